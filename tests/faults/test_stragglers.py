"""A split that runs far longer than its siblings is started a second time; the first to commit wins, and wins once."""

from __future__ import annotations

import time
from pathlib import Path

import cloudpickle
import pytest

from tests.faults.checks import exactly_once
from tests.faults.jobs import FaultJob, make_job
from tests.faults.processes import dask_host
from tests.faults.racing import RacingHandler

BAD = 1960  # near the end of the input: most of the job is done when it is met


def attempts(job: FaultJob) -> list[tuple[int, int]]:
    """Return which handlers, of which workers, have had the batch with the bad id."""
    return [(call.pid, call.worker) for call in job.calls() if BAD in call.ids]


def racing(folder: Path, **config: object) -> FaultJob:
    job = make_job(str(folder / "store"), folder / "marks", bad=(BAD,), **config)
    job.directory.store.write("handler.pkl", cloudpickle.dumps(RacingHandler))
    return job


def rows_counted(job: FaultJob) -> int:
    return sum(item["value"] for item in job.handle.metrics if item["metric"] == "rows")


def test_a_hang_ends_with_the_second_attempt_on_another_worker(tmp_path: Path) -> None:
    with dask_host(tmp_path / "dask", workers=2) as host:
        job = make_job(
            str(tmp_path / "store"), tmp_path / "marks", cluster=host.address, fault="hang", bad=(BAD,), times=1
        )

        began = time.monotonic()
        job.run()

        assert time.monotonic() - began < 60, "it hangs for ever otherwise"
        result = exactly_once(job, status="succeeded")
        (_, first), (_, second) = attempts(job)
        assert first != second, "the second attempt was made elsewhere"
        assert result.status["batch_metrics"]["failed"] == 0, "to be late is no failure"
        assert job.completions() == 1
        assert job.handlers_gone()


def test_a_job_with_one_slot_waits(tmp_path: Path) -> None:
    job = racing(tmp_path, workers=1, then="end", wait=4)

    job.run()

    exactly_once(job, status="succeeded")
    assert len(attempts(job)) == 1


@pytest.mark.parametrize("then", ["end", "hang"])
def test_two_attempts_that_run_against_each_other_count_once(then: str, tmp_path: Path) -> None:
    job = racing(tmp_path, then=then)

    job.run()

    exactly_once(job, status="succeeded")
    assert len(attempts(job)) == 2
    assert rows_counted(job) == len(job.ids)
    assert job.handlers_gone()
