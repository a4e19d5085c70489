"""How the status document counts workers."""

from __future__ import annotations

import pytest

from cortex_dask.runtime.coordinator.status_board import STALLED_SECONDS, WorkerStates, count_workers


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def some(counts: dict[str, int]) -> dict[str, int]:
    return {key: count for key, count in counts.items() if count}


def test_workers_are_waited_for_until_they_report() -> None:
    workers = WorkerStates(3, Clock())
    assert some(workers.counts()) == {"pending": 3}
    workers.report("a", "initializing")
    workers.report("b", "running")
    assert some(workers.counts()) == {"pending": 1, "initializing": 1, "running": 1}
    workers.report("a", "running")
    workers.report("b", "idle")
    workers.report("c", "failed")
    assert some(workers.counts()) == {"running": 2, "failed": 1}


@pytest.mark.parametrize(("seconds", "expected"), [(STALLED_SECONDS, "pending"), (STALLED_SECONDS + 1, "stalled")])
def test_one_that_is_pending_for_more_than_ten_minutes_is_stalled(seconds: float, expected: str) -> None:
    clock = Clock()
    workers = WorkerStates(2, clock)
    workers.report("a", "running")
    clock.now = seconds
    assert some(workers.counts()) == {"running": 1, expected: 1}
    workers.report("b", "running")
    assert some(workers.counts()) == {"running": 2}
    assert STALLED_SECONDS == 600


def test_the_one_that_comes_is_the_one_waited_for_the_longest() -> None:
    clock = Clock()
    workers = WorkerStates(1, clock)
    clock.now = 500
    workers.set_wanted(2)
    workers.report("a", "running")
    clock.now = 700
    assert some(workers.counts()) == {"running": 1, "pending": 1}


def test_the_slots_of_a_host_that_vanished_are_not_counted_for_ever() -> None:
    workers = WorkerStates(2, Clock())
    for slot in ("host-1-0", "host-1-1", "host-2-0", "host-2-1"):
        workers.report(slot, "running")
    assert some(workers.counts()) == {"running": 2}


def test_nobody_waits_for_more_workers_than_there_are_splits() -> None:
    workers = WorkerStates(8, Clock())
    workers.report("a", "running")
    workers.set_wanted(1)
    assert some(workers.counts()) == {"running": 1}


@pytest.mark.parametrize(
    ("status", "expected"),
    [("succeeded", {"succeeded": 1, "failed": 1}), ("worker error", {"succeeded": 1, "failed": 1}), ("stopped", {})],
)
def test_when_the_job_has_ended_nobody_runs_or_waits(status: str, expected: dict[str, int]) -> None:
    assert some(count_workers(["idle", "failed"], [0.0], 1000.0, status)) == expected
