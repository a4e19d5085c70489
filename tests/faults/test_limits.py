"""Stopping, time limits, giving up early, and handling the dead letters again; and that all of it is repeatable."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cortex_dask.io.job.settings import LimitSettings
from cortex_dask.io.job.splits import batch_id
from cortex_dask.io.store.store import Store
from tests.faults.checks import Result, exactly_once
from tests.faults.conftest import on_stores
from tests.faults.jobs import FaultJob, make_input, make_job
from tests.faults.processes import Coordinator, Moment
from tests.support.waiting import until

BAD = (120, 1777)


@on_stores(("hang", "local"), ("hang in native code", "local"), ("hang", "s3"))
def test_stopped_by_another_process_and_resumed(case: str, new_job: Callable[..., FaultJob]) -> None:
    job = new_job(fault=case, bad=BAD, until="let go")

    with Coordinator(job) as coordinator:
        until(lambda: _both_hang(job), "both handlers to hang")
        asked = time.monotonic()
        job.handle.stop()
        until(job.handlers_gone, "the handlers to end", 5 - (time.monotonic() - asked))
        assert coordinator.join() == 0, coordinator.said()
    document = job.status()
    assert (document["status"], document["status_reason"]) == ("stopped", "stopped by a user")
    assert document["worker_counts"]["running"] == 0

    job.mark("let go")
    job.run()

    exactly_once(job, status="succeeded")


@on_stores(("hang", "local"), ("hang in native code", "s3"))
def test_timed_out_and_resumed(case: str, new_job: Callable[..., FaultJob]) -> None:
    job = new_job(fault=case, bad=BAD, until="let go", limits=LimitSettings(timeout=4))

    with Coordinator(job) as coordinator:
        until(lambda: job.status() and job.status()["status"] == "running", "the job to run")
        began = time.monotonic()
        assert coordinator.join() == 0, coordinator.said()
        assert time.monotonic() - began < 4 + 5
    assert job.handlers_gone()
    document = job.status()
    assert document["status"] == "timed out"
    assert "timeout of 4 s" in document["status_reason"]

    job.mark("let go")
    for _ in range(10):  # on a slow machine what is left may take more than 4 s as well: it goes on where it was
        if job.run()["status"] != "timed out":
            break

    exactly_once(job, status="succeeded")


def _both_hang(job: FaultJob) -> bool:
    return all(any(number in call.ids for call in job.calls()) for number in BAD)


@pytest.mark.parametrize(("allowed", "most"), [(2, 2), (0.1, 4)])
def test_too_many_failures_end_the_job_early(allowed: float, most: int, local_job: Callable[..., FaultJob]) -> None:
    job = local_job(
        fault="raise",
        bad=list(range(0, 2000, 50)),
        until="fixed",
        limits=LimitSettings(max_attempts=1, max_failed_batches=allowed),
        seconds=0.02,
    )

    document = job.run()

    assert document["status"] == "worker error"
    assert "max_failed_batches" in document["status_reason"]
    assert most < document["failed_batches"] < 40
    assert not job.output.exists("_SUCCESS")
    assert job.completions() == 0

    # With the cause out of the world, resuming handles the rest, and a retry what has failed.
    job.mark("fixed")
    document = job.run()
    assert document["status"] == "completed with failures"
    exactly_once(job)
    job.retry()
    exactly_once(job, status="succeeded")


@on_stores(("raise", "local"), ("kill", "local"), ("raise", "s3"))
def test_retry_handles_exactly_the_failed_batches_again(case: str, new_job: Callable[..., FaultJob]) -> None:
    job = new_job(fault=case, bad=BAD, until="fixed")
    job.run()
    failed = exactly_once(job, status="completed with failures")
    before = {name: job.output.read(name) for name in failed.parts}
    calls = len(job.calls())

    job.mark("fixed")
    job.retry()

    result = exactly_once(job, status="succeeded")
    again = job.calls()[calls:]
    assert sorted(call.batch_id for call in again) == sorted(letter["batch_id"] for letter in failed.letters)
    assert sorted(number for call in again for number in call.ids) == failed.dead_ids
    assert job.completions() == 1, "the end of the job is told once"
    assert {name: job.output.read(name) for name in before} == before, "parts stay as they are"
    assert len(result.parts) == len(failed.parts) + 2


def test_retry_that_fails_again_and_is_killed(local_job: Callable[..., FaultJob]) -> None:
    job = local_job(fault="raise", bad=BAD, until="fixed")
    job.run()
    first = exactly_once(job, status="completed with failures")

    job.retry()
    second = exactly_once(job, status="completed with failures")
    assert second.dead_ids == first.dead_ids

    job.mark("fixed")
    for moment in (
        Moment("create", "plan/retry-", when="after"),
        Moment("create", "ledger/", when="before"),
        Moment("create", "ledger/", when="after"),
        Moment("write", r"_manifest\.json$"),
        Moment("write", "_SUCCESS$"),
    ):
        with Coordinator(job, moment, retry=True) as coordinator:
            assert coordinator.join() == -signal.SIGKILL, f"{moment} did not come: {coordinator.said()}"
    job.run()
    exactly_once(job, status="succeeded")
    assert job.completions() == 1


def test_a_complete_job_is_left_as_it_is(local_job: Callable[..., FaultJob]) -> None:
    job = local_job()
    job.run()
    exactly_once(job, status="succeeded")
    before = {name: job.output.read(name) for name in job.output.names()}
    calls = len(job.calls())

    assert job.run()["status"] == "succeeded"
    assert job.retry()["status"] == "succeeded"

    assert {name: job.output.read(name) for name in job.output.names()} == before
    assert len(job.calls()) == calls


@pytest.mark.parametrize(
    ("workers", "fault"), [(1, {}), (2, {"fault": "kill", "times": 1}), (2, {"fault": "raise", "times": 2})], ids=str
)
def test_the_same_again(workers: int, fault: dict[str, Any], tmp_path: Path) -> None:
    source = Store(str(tmp_path / "in"))
    firsts = make_input(source)
    results: list[Result] = []
    ids: list[set[str]] = []
    for name, options in (("one", {}), ("other", {**fault, "bad": BAD})):
        job = make_job(
            str(tmp_path / name),
            tmp_path / name / "marks",
            source=source,
            firsts=firsts,
            job_id="job",
            workers=workers,
            **options,
        )
        job.run()
        results.append(exactly_once(job, status="succeeded"))
        ids.append({call.batch_id for call in job.calls()})

    one, other = results
    assert one.splits == other.splits
    assert one.parts == other.parts, "the same parts with the same rows in the same order"
    assert (
        ids[0]
        == ids[1]
        == {
            batch_id("job", number, index)
            for number, split in one.splits.items()
            for index in range(split.batches or 0)
        }
    )
