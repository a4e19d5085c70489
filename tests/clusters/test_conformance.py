"""What every backend does: one suite for all of them, with the command line as users type it."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from collections.abc import Callable

import pytest

from cortex_dask.job import Job
from tests.clusters.backend import Backend, kill
from tests.clusters.jobs import ClusterJob
from tests.faults.checks import committed_only
from tests.faults.jobs import ROOT
from tests.support.waiting import lives, until

NewJob = Callable[..., ClusterJob]


def needs(backend: Backend, *scenarios: str) -> None:
    """Skip what makes no sense on this backend."""
    for scenario in scenarios:
        if scenario in backend.cannot:
            pytest.skip(f"{backend.name} cannot {scenario}: {backend.cannot[scenario]}")


def test_run_a_job(backend: Backend, new_job: NewJob) -> None:
    job = new_job()

    assert job.submit("--wait").wait(backend.seconds) == 0, job.said()

    job.check()
    # The same submission under the same id: it is complete, so nothing runs a second time.
    calls = len(job.calls())
    assert job.submit("--wait").wait(backend.seconds) == 0, job.said()
    assert len(job.calls()) == calls


def test_lose_a_worker(backend: Backend, new_job: NewJob) -> None:
    needs(backend, "lose a worker")
    job = new_job(gate="open")
    command = job.submit()
    call = job.until_calls()[0]

    backend.lose_worker(job, call)
    job.mark("open")

    assert command.wait(backend.seconds) == 0, job.said()
    result = job.check()
    assert result.status["batch_metrics"]["failed"] == 0, "a lost worker is not the batch's fault"
    assert sum(record.failed_attempts for record in result.records.values()) == 0


def test_lose_the_coordinator(backend: Backend, new_job: NewJob) -> None:
    needs(backend, "lose the coordinator")
    job = new_job(seconds=0.1)
    command = job.submit()
    until(lambda: job.segments() >= 1, "a commit", backend.seconds)

    command.kill()
    assert job.status()["status"] == "running"
    assert job.submit().wait(backend.seconds) == 0, job.said()

    job.check()


def test_lose_a_detached_coordinator(backend: Backend, new_job: NewJob) -> None:
    needs(backend, "detach", "lose the coordinator")
    job = new_job(seconds=0.1)
    assert job.submit("--detach").wait(backend.seconds) == 0, job.said()
    until(lambda: job.segments() >= 1, "a commit", backend.seconds)
    first = job.status()["coordinator"]

    backend.lose_coordinator(job)

    job.until_final()
    result = job.check()
    assert result.status["coordinator"]["id"] != first["id"], "another one has gone on"


@pytest.mark.parametrize("how", ["--wait", "--detach"])
def test_lose_the_scheduler(how: str, backend: Backend, new_job: NewJob) -> None:
    needs(backend, "lose the scheduler", *(["detach"] if how == "--detach" else []))
    job = new_job(seconds=0.1)
    command = job.submit(how)
    until(lambda: job.segments() >= 1, "a commit", backend.seconds)

    backend.lose_scheduler(job)

    if backend.replaces_schedulers:
        assert command.wait(backend.seconds) == 0, job.said()
        job.until_final()
        result = job.check()
        assert result.status["batch_metrics"]["failed"] == 0
        assert sum(record.failed_attempts for record in result.records.values()) == 0
        return
    if how == "--wait":
        assert command.wait(backend.seconds) == 1, job.said()
    handle = Job(job.url)
    until(lambda: not handle.is_live(), "nobody to run it", backend.seconds)
    document = handle.describe()
    assert document["status"] in ("running", "worker error"), document
    assert document["status_reason"], "it says what has happened, or how to go on"

    backend.fresh()
    assert job.resume().wait(backend.seconds) == 0, job.said()
    job.check()


@pytest.mark.parametrize("how", ["--wait", "--detach"])
def test_stop(how: str, backend: Backend, new_job: NewJob) -> None:
    needs(backend, *(["detach"] if how == "--detach" else []))
    job = new_job(gate="open")
    command = job.submit(how)
    job.until_calls()

    assert job.stop().wait(backend.seconds) == 0, job.said()

    assert job.status()["status"] == "stopped"
    assert command.wait(backend.seconds) == (130 if how == "--wait" else 0), job.said()
    job.mark("open")
    assert job.resume().wait(backend.seconds) == 0, job.said()
    job.check()


def test_time_out(backend: Backend, new_job: NewJob) -> None:
    job = new_job(gate="open")

    command = job.submit("--timeout", "2")

    assert command.wait(backend.seconds) == 124, job.said()
    assert job.status()["status"] == "timed out"
    committed_only(job)


def test_detach_and_come_back(backend: Backend, new_job: NewJob) -> None:
    needs(backend, "detach")
    job = new_job(gate="open")

    command = job.submit("--detach")
    # Neither the process nor its session nor anything that it has started is there any more when the job runs.
    assert command.wait(backend.seconds) == 0, job.said()
    assert not lives(command.pid)
    job.until_calls()
    code = """\
        import sys
        from cortex_dask.job import Job
        Job(sys.argv[1]).wait()
        """
    waiting = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), job.url],
        env=job.environment,
        cwd=ROOT,
    )
    try:
        job.mark("open")
        assert waiting.wait(backend.seconds) == 0
    finally:
        kill(waiting.pid)
        waiting.wait()

    job.check()


def test_killed_right_after_it_has_detached(backend: Backend, new_job: NewJob) -> None:
    needs(backend, "detach")
    job = new_job()

    command = job.submit("--detach", killed=True)
    command.wait(backend.seconds)
    job.until_final()

    job.check()


def test_scale(backend: Backend, new_job: NewJob) -> None:
    needs(backend, "scale")
    # Most of the work waits until all have come: how long that takes is the machine's affair.
    job = new_job(gate="open", gate_from=500, seconds=0.2, files=8)
    command = job.submit(workers="3")
    job.until_calls()

    backend.scale(job, 1)
    until(lambda: backend.workers(job) == 1, "one worker to be left", backend.seconds)
    before = len(job.calls())
    backend.scale(job, 3)
    until(lambda: backend.workers(job) == 3, "workers to come", backend.seconds)
    job.mark("open")

    assert command.wait(backend.seconds) == 0, job.said()
    result = job.check()
    assert result.status["batch_metrics"]["failed"] == 0
    late = {(call.host, call.worker) for call in job.calls()[before:]}
    assert len(late) > 1, "who has come takes part"


def test_as_many_workers_as_there_is_work_for(backend: Backend, new_job: NewJob) -> None:
    job = new_job(seconds=0.1)

    assert job.submit(workers="0-3").wait(backend.seconds) == 0, job.said()

    job.check()
    assert len({(call.host, call.pid) for call in job.calls()}) <= 3


def test_two_jobs_at_once(backend: Backend, new_job: NewJob) -> None:
    jobs = [new_job(gate="open"), new_job(gate="open")]
    commands = [job.submit(workers="1") for job in jobs]
    for job in jobs:
        job.until_calls()

    for job in jobs:
        job.mark("open")

    for job, command in zip(jobs, commands, strict=True):
        assert command.wait(backend.seconds) == 0, job.said()
        job.check()
