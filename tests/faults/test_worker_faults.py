"""Dask workers and the scheduler killed with SIGKILL under a job."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.checks import exactly_once
from tests.faults.jobs import make_job
from tests.faults.processes import Coordinator, DaskHost, dask_host
from tests.support.waiting import lives, until

BAD = (120, 1777)


@pytest.fixture
def host(tmp_path: Path) -> Iterator[DaskHost]:
    with dask_host(tmp_path / "dask", workers=2) as host:
        yield host


def test_killed_in_the_middle_of_a_split(host: DaskHost, tmp_path: Path) -> None:
    job = make_job(str(tmp_path / "store"), tmp_path / "marks", gate="open", cluster=host.address)
    ended = threading.Thread(target=job.run)
    ended.start()
    call = until(job.calls, "a batch in hand")[0]

    host.kill(call.worker)
    until(lambda: not lives(call.pid), "the handler process of the killed worker to end", 20)
    job.mark("open")
    ended.join()

    result = exactly_once(job, status="succeeded")
    assert result.status["batch_metrics"]["failed"] == 0, "a lost worker is not the batch's fault"
    assert {record.worker for record in result.records.values()}


def test_killed_again_and_again(host: DaskHost, tmp_path: Path) -> None:
    job = make_job(str(tmp_path / "store"), tmp_path / "marks", cluster=host.address, seconds=0.02, files=8)
    ended = threading.Thread(target=job.run)
    ended.start()
    for count in (3, 20, 40):
        until(lambda count=count: len(job.calls()) >= count, "progress")
        host.kill(job.calls()[-1].worker)
    ended.join()

    exactly_once(job, status="succeeded")


def test_a_batch_that_kills_its_worker_every_time(tmp_path: Path) -> None:
    # With one worker of two threads, another split is always on the worker that goes down.
    with dask_host(tmp_path / "dask", workers=1, threads=2) as host:
        job = make_job(
            str(tmp_path / "store"),
            tmp_path / "marks",
            cluster=host.address,
            workers=2,
            fault="kill worker",
            bad=BAD[:1],
            seconds=0.1,
        )

        job.run()

        result = exactly_once(job, status="completed with failures")
        assert len({letter["split"] for letter in result.letters}) == 1, "bystanders in other splits are safe"
        assert set(result.sharing_a_batch(BAD[:1])) <= set(result.dead_ids)
        assert {letter["cause"] for letter in result.letters} == {"worker lost"}
        assert host.started >= 4


def test_all_workers_killed_at_once(host: DaskHost, tmp_path: Path) -> None:
    job = make_job(str(tmp_path / "store"), tmp_path / "marks", cluster=host.address, seconds=0.02)
    ended = threading.Thread(target=job.run)
    ended.start()
    until(lambda: len(job.calls()) >= 5, "some progress")
    for worker in {call.worker for call in job.calls()}:
        host.kill(worker)
    ended.join()

    exactly_once(job, status="succeeded")


def test_the_coordinator_killed_while_workers_continue(host: DaskHost, tmp_path: Path) -> None:
    job = make_job(str(tmp_path / "store"), tmp_path / "marks", cluster=host.address, seconds=0.02, files=8)
    with Coordinator(job) as coordinator:
        until(lambda: job.segments() >= 2, "two commits")
        coordinator.kill()
        coordinator.join()
        job.run()

    exactly_once(job, status="succeeded")


def test_the_scheduler_killed(host: DaskHost, tmp_path: Path) -> None:
    job = make_job(str(tmp_path / "store"), tmp_path / "marks", cluster=host.address, seconds=0.02, files=8)
    with Coordinator(job, patience=3) as coordinator:
        until(lambda: job.segments() >= 1, "a commit")
        host.scheduler.kill()
        assert coordinator.join() == 1
    document = job.status()
    assert document["status"] == "worker error"
    assert "scheduler" in document["status_reason"]
    until(job.handlers_gone, "the handlers to end", 30)

    job.run(cluster="local")

    exactly_once(job, status="succeeded")
