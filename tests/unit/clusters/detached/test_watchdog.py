"""A coordinator that dies is started again, as long as that helps: real processes, and real SIGKILLs."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cortex_dask.clusters.detached.watchdog import RESTARTS, CoordinatorOrder, Watchdog
from tests.faults.checks import exactly_once
from tests.faults.jobs import ROOT, FaultJob, make_job
from tests.support.waiting import until

#: Ends coordinators as soon as their interpreter has started, as often as it is told to.
_DEADLY = """
import os, pathlib, signal, sys
if "import coordinate" in " ".join(sys.orig_argv):
    deaths = pathlib.Path(os.environ["DEATHS"])
    if len(list(deaths.iterdir())) < int(os.environ["DIES"]):
        (deaths / str(os.getpid())).touch()
        os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture
def deaths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], Path]:
    """Make so many coordinators die at once; returns the folder that counts them."""
    folder = tmp_path / "deaths"
    (tmp_path / "path").mkdir()
    (tmp_path / "path" / "sitecustomize.py").write_text(_DEADLY)
    folder.mkdir()

    def arm(times: int) -> Path:
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path / "path"), ROOT]))
        monkeypatch.setenv("DEATHS", str(folder))
        monkeypatch.setenv("DIES", str(times))
        return folder

    return arm


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[FaultJob], tuple[Watchdog, threading.Thread]]]:
    """Start a watchdog for a job, in a thread as on a scheduler."""
    monkeypatch.setenv("PYTHONPATH", ROOT)
    started: list[tuple[Watchdog, threading.Thread]] = []

    def start(job: FaultJob, **options: Any) -> tuple[Watchdog, threading.Thread]:
        made = Watchdog(CoordinatorOrder(job.url, "local"), pause=0.01, **options)
        made.start_coordinator()
        watching = threading.Thread(target=made.watch)
        watching.start()
        started.append((made, watching))
        return started[-1]

    yield start
    for made, watching in started:
        made.close()
        watching.join(30)


def local_job(folder: Path, **options: object) -> FaultJob:
    return make_job(str(folder / "store"), folder / "marks", **options)  # type: ignore[arg-type]


def test_a_coordinator_that_dies_is_restarted(tmp_path: Path, deaths: Callable, watch: Callable) -> None:
    job = local_job(tmp_path)
    counted = deaths(2)

    made, watching = watch(job)
    watching.join(60)

    assert made.is_finished
    assert len(list(counted.iterdir())) == 2
    exactly_once(job, status="succeeded")


def test_restarts_without_progress_end(tmp_path: Path, deaths: Callable, watch: Callable) -> None:
    job = local_job(tmp_path)
    counted = deaths(1_000)

    _, watching = watch(job)
    watching.join(60)

    assert len(list(counted.iterdir())) == RESTARTS + 1
    document = job.status()
    assert document["status"] == "worker error"
    assert document["status_reason"].startswith("the coordinator has died 6 times in a row without progress")
    assert "killed by SIGKILL" in document["status_reason"]
    assert "can be resumed" in document["status_reason"]
    job.run()
    exactly_once(job, status="succeeded")


def test_progress_allows_further_restarts(tmp_path: Path, watch: Callable) -> None:
    bad = [number * 500 + 499 for number in range(2, 6)]  # the last row of a file, when earlier ones are committed
    # On one machine, the worker is the coordinator's own process.
    store = str(tmp_path / "store")
    job = local_job(tmp_path, files=7, fault="kill worker", bad=bad, times=1, workers=1, after_commits=store)

    _, watching = watch(job, restarts=1)
    watching.join(120)

    exactly_once(job, status="succeeded")
    assert len(list(job.marks.glob("struck-*"))) == len(bad)


def test_a_job_that_is_stopped_stays_stopped(tmp_path: Path, watch: Callable) -> None:
    job = local_job(tmp_path, gate="open")
    _, watching = watch(job)
    until(job.calls, "a batch in hand")

    job.handle.stop()
    watching.join(30)

    assert not watching.is_alive()
    assert job.status()["status"] == "stopped"


def test_a_job_that_another_coordinator_runs_is_left_to_it(tmp_path: Path, watch: Callable) -> None:
    job = local_job(tmp_path, gate="open")
    running = threading.Thread(target=job.run)
    running.start()
    until(job.calls, "a batch in hand")

    made, watching = watch(job)
    watching.join(60)

    assert made.is_finished
    assert job.status()["status"] == "running"
    job.mark("open")
    running.join()
    exactly_once(job, status="succeeded")


def test_an_interrupt_stops_the_coordinator_cleanly(tmp_path: Path, watch: Callable) -> None:
    job = local_job(tmp_path, gate="open")
    made, watching = watch(job)
    until(job.calls, "a batch in hand")

    made.interrupt()
    watching.join(30)

    assert (job.status()["status"], job.status()["status_reason"]) == ("stopped", "interrupted")
    assert job.handlers_gone()


def test_an_order_keeps_its_secrets_out_of_sight() -> None:
    order = CoordinatorOrder("s3://b/j", "tls://s:1", tls={"ca": "CA", "cert": "CERT", "key": "SECRET"})
    assert "SECRET" not in repr(order)
    assert CoordinatorOrder.from_json(order.to_json()) == order
