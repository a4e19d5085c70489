"""What has to hold in every simulated job, whatever the numbers."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

from simulate import READY, Result, Setting, simulate

QUIET = Setting(workers=10, splits=400, seconds=5.0, spread=0.5, noise=0.0, copy=0.0, append=0.0, **READY)
SICK = replace(QUIET, slow_share=0.05, loss_per_hour=30.0, first_worker=3.0, per_second=1.0, append=0.05, copy=0.1)


def check(result: Result) -> Result:
    """Check that every split counts, once, and that times add up."""
    setting = result.setting
    assert set(result.committed) == set(range(setting.splits))
    assert set(result.committed.values()) == {1}
    assert result.attempts >= setting.splits
    assert 0 < result.efficiency <= 1
    assert result.work <= result.alive + 1e-6
    assert all(0 <= share <= 1 + 1e-9 for share in result.busy.values())
    return result


def test_the_same_seed_gives_the_same_job_and_another_seed_another_one():
    first, again, other = (simulate(replace(SICK, seed=seed)) for seed in (1, 1, 2))
    assert (first.makespan, first.attempts, first.alive) == (again.makespan, again.attempts, again.alive)
    assert first.makespan != other.makespan


@pytest.mark.parametrize("setting", [QUIET, SICK], ids=["quiet", "sick"])
@pytest.mark.parametrize("seed", range(3))
def test_every_split_counts_once(setting: Setting, seed: int):
    check(simulate(replace(setting, seed=seed)))


def test_longest_first_leaves_no_more_than_a_short_split_at_the_end():
    result = check(simulate(QUIET))
    assert result.efficiency > 0.98
    assert result.attempts == 400


def test_ten_times_the_workers_are_nearly_ten_times_as_fast():
    few, many = check(simulate(replace(QUIET, workers=4))), check(simulate(replace(QUIET, workers=40)))
    assert 8 < few.makespan / many.makespan <= 10.01


def test_the_scheduler_bounds_the_rate():
    result = check(simulate(replace(QUIET, workers=400, splits=4000, seconds=0.1, tasks_per_second=500.0)))
    assert 450 < result.rate <= 500
    assert result.limit == "scheduler"


def test_the_ledger_bounds_the_rate():
    slow = replace(QUIET, workers=4000, splits=10_000, seconds=0.1, tasks_per_second=1e6, append=2.0)
    result = check(simulate(slow))
    assert result.rate <= 500  # a thousand records each 2 s
    assert result.limit == "ledger"


def test_copies_bound_the_rate():
    result = check(simulate(replace(QUIET, workers=400, splits=15_000, seconds=0.1, copy=0.5, publishers=50)))
    assert result.rate <= 100
    assert result.limit == "copies"


def test_a_hang_ends_only_with_a_second_attempt():
    hangs = replace(QUIET, slow_share=0.01, slow_factor=math.inf)
    result = check(simulate(hangs))
    assert result.backups >= 1
    assert simulate(replace(hangs, backups=False)).makespan == math.inf


def test_second_attempts_pay_and_are_few():
    slow = replace(QUIET, workers=100, slow_share=0.02, slow_factor=20.0)
    runs = [
        (simulate(replace(slow, seed=seed)), simulate(replace(slow, seed=seed, backups=False))) for seed in range(5)
    ]
    assert sum(run.makespan for run, _ in runs) < 0.9 * sum(run.makespan for _, run in runs)
    assert all(run.backups <= 0.05 * slow.splits for run, _ in runs)
    assert simulate(QUIET).backups == 0


def test_lost_workers_cost_time_and_come_back():
    result = check(simulate(replace(QUIET, loss_per_hour=60.0)))
    assert result.losses > 0
    assert result.attempts == 400 + result.losses
    assert result.makespan > simulate(QUIET).makespan


def test_splits_of_a_real_job_are_drawn_as_they_were():
    result = check(simulate(replace(QUIET, measured=(1.0, 2.0))))
    assert 400 < result.work < 800
