"""`on_job_complete` runs once, and a job that has to end meanwhile ends."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from cortex_dask.io.job.records import Outcome, SplitTask
from cortex_dask.io.job.settings import JobSettings
from cortex_dask.runtime.cluster import Cluster, Done, Report
from cortex_dask.runtime.coordinator import completion
from cortex_dask.runtime.coordinator.completion import complete
from cortex_dask.runtime.coordinator.heartbeat import Heartbeat
from cortex_dask.runtime.coordinator.limits import Ended, Limits
from cortex_dask.runtime.coordinator.status_board import StatusBoard
from cortex_dask.runtime.coordinator.totals import JobTotals
from tests.support.jobs import TestJob, make_job

HANDLER = """
class Handler:
    def __init__(self, config):
        pass
    def handle_batch(self, payload, batch_id):
        return payload
"""


class Completes(Cluster):
    """A cluster whose `complete` does what it is told."""

    name = "test"

    def __init__(self, outcome: Callable[[], Outcome]) -> None:
        self.outcome = outcome
        self.calls = 0

    def start(self, job_url: str, settings: JobSettings, report: Report, check: Callable[[], None]) -> None: ...
    def slots(self) -> int:
        return 1

    def submit(self, tasks: Sequence[tuple[SplitTask, Done]], *, elsewhere: bool = False) -> None: ...
    def stop(self, reason: str) -> None: ...
    def close(self) -> None: ...

    def complete(self) -> Outcome:
        self.calls += 1
        return self.outcome()


@pytest.fixture
def job(tmp_path: Path) -> TestJob:
    return make_job(tmp_path, HANDLER)


def limits_of(job: TestJob) -> Limits:
    heartbeat = Heartbeat(job.directory, StatusBoard(job.settings))
    return Limits(job.directory, job.settings.limits, heartbeat, JobTotals())


def never(error: Exception) -> None:
    raise AssertionError(error)


def test_it_runs_once(job: TestJob) -> None:
    cluster = Completes(lambda: Outcome("done", -1))
    assert complete(job.directory, cluster, limits_of(job), never)
    assert not complete(job.directory, cluster, limits_of(job), never)
    assert cluster.calls == 1


@pytest.mark.parametrize(
    ("outcome", "status", "reason"),
    [
        (Outcome("worker error", -1, message="it raised"), "worker error", "it raised"),
        (Outcome("storage", -1, message="no space"), "worker error", r"no space \(the job can be resumed\)"),
    ],
)
def test_its_failure_ends_the_job(job: TestJob, outcome: Outcome, status: str, reason: str) -> None:
    with pytest.raises(Ended, match=reason) as raised:
        complete(job.directory, Completes(lambda: outcome), limits_of(job), never)
    assert raised.value.status == status
    assert complete(job.directory, Completes(lambda: Outcome("done", -1)), limits_of(job), never), (
        "it has not succeeded"
    )


def test_what_the_cluster_raises_is_raised(job: TestJob) -> None:
    def fail() -> Outcome:
        raise ConnectionError("no scheduler")

    with pytest.raises(ConnectionError, match="no scheduler"):
        complete(job.directory, Completes(fail), limits_of(job), never)


@pytest.mark.parametrize("succeeds", [True, False])
def test_a_request_to_stop_ends_it_unless_it_succeeds_in_the_last_moment(
    job: TestJob, monkeypatch: pytest.MonkeyPatch, succeeds: bool
) -> None:
    monkeypatch.setattr(completion, "STOP_GRACE", 60.0 if succeeds else 0.05)
    release = threading.Event()
    reasons: list[str] = []

    def wait() -> Outcome:
        release.wait(60)
        return Outcome("done", -1)

    def stop(error: Exception) -> None:
        reasons.append(str(error))
        if succeeds:
            release.set()

    job.directory.request_stop("stopped", "by a user")
    try:
        if succeeds:
            assert complete(job.directory, Completes(wait), limits_of(job), stop)
        else:
            with pytest.raises(Ended, match="by a user"):
                complete(job.directory, Completes(wait), limits_of(job), stop)
    finally:
        release.set()
    assert reasons == ["by a user"]
