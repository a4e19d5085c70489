"""Coordinators killed, stopped, doubled: the job directory and the output survive, and the rows are there once."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from cortex_dask.io.job.ledger import Ledger
from cortex_dask.io.job.settings import LimitSettings
from cortex_dask.io.store.store import Store
from tests.faults.checks import exactly_once, output_ids, visible
from tests.faults.conftest import on_stores
from tests.faults.jobs import ROOT, FaultJob, make_job
from tests.faults.processes import Coordinator, Moment
from tests.support.waiting import until

BAD = (120, 1777)

#: Chains of moments: a coordinator is killed at the first, the one that resumes it at the second …
CHAINS = {
    "reserving": [
        Moment("write", r"status\.json$", when="after"),
        Moment("write", r"_job\.json$"),
        Moment("write", r"_job\.json$", when="after"),
        Moment("write", r"replaces\.json$"),
    ],
    "planning": [
        Moment("write", r"plan/splits-", when="before"),
        Moment("write", r"plan/splits-", when="after"),
        Moment("write", r"plan/plan\.json$", when="after"),
    ],
    "settling the schema": [
        Moment("create", r"schema\.json$"),
        Moment("create", r"schema\.json$", when="after"),
    ],
    "first commit": [
        Moment("create", "ledger/"),
        Moment("create", "ledger/", when="after"),
        Moment("create", "ledger/", count=2),
    ],
    "later commits": [
        Moment("create", "ledger/", count=3, when="after"),
        Moment("create", "ledger/", when="after"),
        Moment("create", "ledger/", when="after"),
    ],
    "publishing": [
        Moment("publish", "part-"),
        Moment("publish", "part-", count=2, when="after"),
        Moment("publish", "part-", count=3),
    ],
    "sealing": [
        Moment("write", r"_manifest\.json$"),
        Moment("write", r"_manifest\.json$", when="after"),
        Moment("write", r"completed\.json$", when="after"),
        Moment("delete_tree", "_temporary"),
        Moment("delete_tree", "_temporary", when="after"),
    ],
}


@on_stores(*((name, "local") for name in CHAINS), ("first commit", "s3"), ("publishing", "s3"), ("sealing", "s3"))
def test_killed_and_resumed_and_killed_again(case: str, new_job: Callable[..., FaultJob]) -> None:
    job = new_job(files=6, fault="raise", bad=BAD, seconds=0.03)

    for moment in CHAINS[case]:
        with Coordinator(job, moment) as coordinator:
            assert coordinator.join() == -signal.SIGKILL, f"{moment} did not come: {coordinator.said()}"
        until(job.handlers_gone, "the handlers of the killed coordinator to end", 5)
        assert job.status()["status"] in ("enqueuing", "running")
    job.run()

    result = exactly_once(job, status="completed with failures")
    assert result.dead_ids == result.sharing_a_batch(BAD)
    assert job.completions() == 1


@pytest.mark.parametrize("when", ["before", "after"])
def test_killed_over_the_mark_of_success(when: str, local_job: Callable[..., FaultJob]) -> None:
    job = local_job()

    with Coordinator(job, Moment("write", "_SUCCESS$", when=when)) as coordinator:
        assert coordinator.join() == -signal.SIGKILL
    job.run()

    exactly_once(job, status="succeeded")


@pytest.mark.parametrize("count", [3, 7, 11, 15, 19, 23])
def test_killed_after_any_change(count: int, local_job: Callable[..., FaultJob]) -> None:
    job = local_job(fault="kill", times=1, bad=BAD)

    with Coordinator(job, Moment("any", count=count, when="after")) as coordinator:
        assert coordinator.join() == -signal.SIGKILL, coordinator.said()
    job.run()

    exactly_once(job, status="succeeded")


def test_finished_splits_are_not_handled_again(local_job: Callable[..., FaultJob]) -> None:
    job = local_job(seconds=0.03)
    with Coordinator(job, Moment("create", "ledger/", count=2, when="after")) as coordinator:
        assert coordinator.join() == -signal.SIGKILL
    committed = {number for ids in _committed(job) for number in ids}
    before = len(job.calls())
    assert committed

    job.run()

    exactly_once(job)
    again = {number for call in job.calls()[before:] for number in call.ids}
    assert not committed & again


def _committed(job: FaultJob) -> list[list[int]]:
    """Return the ids in the parts that a killed job's ledger holds, wherever these lie."""
    parts = [record.part for record in Ledger(job.directory.store).records() if record.part is not None]
    names = set(job.output.names())
    return [
        pq.read_table(io.BytesIO(job.output.read(part.name if part.name in names else part.staged)))["id"].to_pylist()
        for part in parts
    ]


def test_resumed_by_the_command_line(tmp_path: Path) -> None:
    job = make_job(str(tmp_path / "store"), tmp_path / "marks", job_id="night", fault="raise", bad=BAD, seconds=0.03)
    with Coordinator(job, Moment("create", "ledger/", count=2)) as coordinator:
        assert coordinator.join() == -signal.SIGKILL

    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "from cortex_dask.cli import main; main()",
            "resume",
            "faulty",
            "night",
            "-e",
            "local",
        ],
        env={**os.environ, "PYTHONPATH": ROOT, "DASK_CORTEX_DASK__STORE": str(tmp_path / "store")},
        capture_output=True,
        text=True,
        timeout=60,
    )

    assert done.returncode == 3, done.stderr
    exactly_once(job, status="completed with failures")


# older data in the output ---------------------------------------------------------------------------------------------

MOMENTS = [
    Moment("create", "ledger/", when="after"),
    Moment("publish", "part-"),
    Moment("publish", "part-", count=3, when="after"),
    Moment("write", r"_manifest\.json$"),
]


def _moments(store_url: str) -> list[Moment]:
    """Return all of them, on S3 the later ones."""
    return MOMENTS[2:] if "://" in store_url else MOMENTS


def _older(folder: str, marks: Path) -> FaultJob:
    older = make_job(folder, marks, job_id="older", source=Store(f"{folder}/older"), files=2)
    older.run()
    return older


def test_append_killed_in_the_middle(store_url: str, tmp_path: Path) -> None:
    older = _older(store_url, tmp_path / "older")
    before = {name: older.output.read(name) for name in visible(older.output)}
    job = make_job(
        store_url, tmp_path / "marks", source=Store(f"{store_url}/more"), start=5000, mode="append", earlier=older.ids
    )

    for moment in [*_moments(store_url), Moment("write", r"_manifest\.json$", when="after")]:
        with Coordinator(job, moment) as coordinator:
            assert coordinator.join() == -signal.SIGKILL, f"{moment} did not come: {coordinator.said()}"
        assert {name: job.output.read(name) for name in before} == before, "what was there stays as it is"
    job.run()

    exactly_once(job, status="succeeded")
    assert output_ids(job.output) == sorted(older.ids | job.ids)


def test_overwrite_killed_in_the_middle(store_url: str, tmp_path: Path) -> None:
    older = _older(store_url, tmp_path / "older")
    before = {name: older.output.read(name) for name in visible(older.output)}
    job = make_job(store_url, tmp_path / "marks", source=Store(f"{store_url}/more"), start=5000, mode="overwrite")

    for moment in _moments(store_url):
        with Coordinator(job, moment) as coordinator:
            assert coordinator.join() == -signal.SIGKILL, f"{moment} did not come: {coordinator.said()}"
        assert {name: job.output.read(name) for name in before} == before, "nothing goes before the new is committed"
    for moment in [Moment("write", r"_manifest\.json$", when="after"), Moment("delete", "part-", when="after")]:
        with Coordinator(job, moment) as coordinator:
            assert coordinator.join() == -signal.SIGKILL, f"{moment} did not come: {coordinator.said()}"
        assert set(output_ids(job.output)) >= job.ids
    job.run()

    exactly_once(job, status="succeeded")
    assert output_ids(job.output) == sorted(job.ids)


# two coordinators -----------------------------------------------------------------------------------------------------


@on_stores(("error", "local"), ("append", "local"), ("overwrite", "local"), ("error", "s3"))
def test_two_coordinators_at_once(case: str, new_job: Callable[..., FaultJob]) -> None:
    job = new_job(fault="raise", bad=BAD, seconds=0.01, mode=case)

    with Coordinator(job, force=True) as one, Coordinator(job, force=True) as other:
        codes = one.join(), other.join()

    assert codes == (0, 0), one.said() + other.said()
    result = exactly_once(job, status="completed with failures")
    assert result.dead_ids == result.sharing_a_batch(BAD)


NAPS = {
    "committing": Moment("create", "ledger/", signal=signal.SIGSTOP),
    "publishing": Moment("publish", "part-", count=2, signal=signal.SIGSTOP),
    "sealing": Moment("write", r"_manifest\.json$", signal=signal.SIGSTOP),
    "cleaning": Moment("delete_tree", "_temporary", signal=signal.SIGSTOP),
}


@on_stores(*((name, "local") for name in NAPS), ("committing", "s3"), ("cleaning", "s3"))
def test_a_coordinator_that_wakes_up_after_another_has_finished(case: str, new_job: Callable[..., FaultJob]) -> None:
    job = new_job(fault="raise", bad=BAD, seconds=0.01)

    with Coordinator(job, NAPS[case]) as sleeper:
        until(sleeper.is_stopped, "the coordinator to fall asleep")
        job.run(force=True)
        exactly_once(job, status="completed with failures")
        before = {name: job.output.read(name) for name in job.output.names()}
        sleeper.kill(signal.SIGCONT)
        assert sleeper.join() == 0, sleeper.said()

    exactly_once(job, status="completed with failures")
    assert {name: job.output.read(name) for name in job.output.names()} == before


def test_a_coordinator_that_wakes_up_past_its_timeout(tmp_path: Path) -> None:
    job = make_job(
        str(tmp_path / "store"), tmp_path / "marks", seconds=0.03, limits=LimitSettings(timeout=3.0), cluster="local"
    )

    with Coordinator(job, Moment("create", "ledger/", when="after", signal=signal.SIGSTOP)) as sleeper:
        until(sleeper.is_stopped, "the coordinator to fall asleep")
        began = time.monotonic()
        job.run(force=True)
        exactly_once(job, status="succeeded")
        until(lambda: time.monotonic() - began > 3.0, "the sleeper's timeout to pass")
        sleeper.kill(signal.SIGCONT)
        assert sleeper.join() == 0, sleeper.said()
        assert sleeper.said().startswith("succeeded"), "it tells what has become of the job"

    exactly_once(job, status="succeeded")
    assert job.directory.stop_request() is None
