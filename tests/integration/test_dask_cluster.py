"""What the coordinator asks of a Dask cluster: other jobs and other coordinators are on it as well."""

from __future__ import annotations

import queue
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from distributed import Client, LocalCluster

from cortex_dask.clusters import dask
from cortex_dask.clusters.address import Address
from cortex_dask.io.job.records import Outcome, SplitTask
from tests.faults.processes import dask_host
from tests.support.jobs import TestJob, make_job

SAME = """
class Handler:
    def __init__(self, config):
        pass
    def handle_batch(self, payload, batch_id):
        time.sleep(0.05)
        return payload
"""
LEAVES_SLOWLY = """
import atexit

class Handler:
    def __init__(self, config):
        atexit.register(time.sleep, 30)
    def handle_batch(self, payload, batch_id):
        return payload
"""


@pytest.fixture(scope="module")
def scheduler(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    with (
        pytest.MonkeyPatch.context() as patch,
        LocalCluster(
            n_workers=1,
            threads_per_worker=2,
            processes=False,
            host="127.0.0.1",
            protocol="tcp://",
            dashboard_address="127.0.0.1:0",
            worker_dashboard_address="127.0.0.1:0",
        ) as cluster,
    ):
        patch.setenv("DASK_CORTEX_DASK__CACHE", str(tmp_path_factory.mktemp("cache")))
        yield cluster


@pytest.fixture
def connect(scheduler: LocalCluster) -> Iterator[Callable[[TestJob], Address]]:
    """Connects to the scheduler as a coordinator does."""
    clusters: list[Address] = []

    def connect_one(job: TestJob) -> Address:
        cluster = Address(scheduler.scheduler_address)
        clusters.append(cluster)
        cluster.start(job.url, job.settings, job.report, lambda: None)
        return cluster

    yield connect_one
    for cluster in clusters:
        cluster.close()


def send(cluster: Address, job: TestJob) -> queue.SimpleQueue[Outcome | Exception]:
    ended: queue.SimpleQueue[Outcome | Exception] = queue.SimpleQueue()
    cluster.submit([(SplitTask(job.url, job.splits[0], 1, None), ended.put)])
    return ended


def test_two_coordinators_never_share_an_attempt(connect: Callable[[TestJob], Address], tmp_path: Path) -> None:
    # or the second would take the first one's staged part and dead letters for those of an attempt that came too late
    job = make_job(tmp_path, SAME)
    attempts = [send(connect(job), job), send(connect(job), job)]

    outcomes: list[Any] = [ended.get(timeout=30) for ended in attempts]

    assert [outcome.kind for outcome in outcomes] == ["done", "done"], outcomes
    first, second = (outcome.record for outcome in outcomes)
    assert first.attempt_id != second.attempt_id
    assert first.part.staged != second.part.staged


def test_closing_a_job_does_not_hold_up_others_on_its_workers(
    connect: Callable[[TestJob], Address], scheduler: LocalCluster, tmp_path: Path
) -> None:
    job = make_job(tmp_path, LEAVES_SLOWLY)
    cluster = connect(job)
    assert isinstance(send(cluster, job).get(timeout=30), Outcome)
    with Client(scheduler.scheduler_address, set_as_default=False) as bystander:
        closing = threading.Thread(target=cluster.close)
        began = time.monotonic()
        closing.start()
        longest = 0.0
        while closing.is_alive():
            sent = time.monotonic()
            assert bystander.submit(int, "7", pure=False).result(timeout=30) == 7
            longest = max(longest, time.monotonic() - sent)
        closing.join()

    assert time.monotonic() - began > 1.5, "the handler was not waited for"
    assert longest < 1.0


def test_a_worker_that_hangs_does_not_hold_up_the_end_of_a_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dask, "_CLOSE_SECONDS", 1.0)
    job = make_job(tmp_path, SAME)
    with dask_host(tmp_path / "dask", workers=1) as host:
        cluster = Address(host.address)
        cluster.start(job.url, job.settings, job.report, lambda: None)
        host.workers[0].kill(signal.SIGSTOP)
        try:
            began = time.monotonic()
            cluster.close()
        finally:
            host.workers[0].kill(signal.SIGCONT)

    assert time.monotonic() - began < 15.0
