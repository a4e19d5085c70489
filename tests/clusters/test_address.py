"""A scheduler that somebody else runs: what it lacks is a sentence, and when it comes back the job goes on."""

from __future__ import annotations

import contextlib
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cortex_dask.clusters.address import Address
from cortex_dask.errors import ClusterError, SpecError
from cortex_dask.io.job.records import SplitTask
from cortex_dask.io.job.splits import Split
from cortex_dask.runtime.cluster import WorkerLost
from tests.clusters.workers import worker
from tests.faults.checks import exactly_once
from tests.faults.jobs import ROOT, FaultJob, make_job
from tests.faults.processes import DaskHost, dask_host
from tests.support.waiting import until


@pytest.fixture
def host(tmp_path: Path) -> Iterator[DaskHost]:
    with dask_host(tmp_path / "dask", workers=0) as host:
        yield host


def make(host: DaskHost, folder: Path, **how: Any) -> FaultJob:
    return make_job(str(folder / "store"), folder / "marks", cluster=host.address, **how)


def refusal(job: FaultJob) -> str:
    with pytest.raises((ClusterError, SpecError)) as raised:
        job.run()
    message = str(raised.value)
    assert job.status()["status"] in ("worker error", "failed while enqueuing")
    assert "\n" not in message
    return message


def test_no_workers(host: DaskHost, tmp_path: Path) -> None:
    said = refusal(make(host, tmp_path, options={"start_timeout": 1}))
    assert "has had no worker for 1 s" in said
    assert f"start some with dask worker {host.address} " in said


def test_no_gpus(host: DaskHost, tmp_path: Path) -> None:
    job = make(host, tmp_path, gpu=2.0, options={"start_timeout": 1})
    with worker(host.address, tmp_path / "plain"), worker(host.address, tmp_path / "one", resources='{"GPU": 1}'):
        said = refusal(job)
    assert "asks for 2 GPU for each split, and none of the 2 workers" in said
    assert f"dask worker {host.address} --resources GPU=1" in said
    assert not job.calls()


def test_splits_land_where_a_gpu_is(host: DaskHost, tmp_path: Path) -> None:
    job = make(host, tmp_path, gpu=1.0, files=2)
    with worker(host.address, tmp_path / "plain"), worker(host.address, tmp_path / "w", resources='{"GPU": 1}') as here:
        job.run()
    assert {call.worker for call in job.calls()} == {here.pid}
    exactly_once(job, status="succeeded")


def test_workers_that_come_later_are_waited_for(host: DaskHost, tmp_path: Path) -> None:
    job = make(host, tmp_path)
    running = threading.Thread(target=job.run)
    running.start()
    until(lambda: (job.directory.read_json("status.json") or {}).get("status") == "running", "the job to be planned")
    with worker(host.address, tmp_path / "w"):
        running.join(60)
    exactly_once(job, status="succeeded")


def test_an_option_that_it_has_not(host: DaskHost, tmp_path: Path) -> None:
    said = refusal(make(host, tmp_path, options={"image": "x"}))
    assert "cluster option 'image' is unknown" in said
    assert "allowed are connect_timeout, start_timeout, reconnect_timeout" in said


def test_nobody_there(tmp_path: Path) -> None:
    job = make_job(
        str(tmp_path / "store"), tmp_path / "marks", cluster="tcp://127.0.0.1:9", options={"connect_timeout": 0.5}
    )
    assert "no Dask scheduler answers at tcp://127.0.0.1:9 within 0.5 s" in refusal(job)


_SCHEDULER = """
import asyncio, sys
from distributed import Scheduler, Worker
async def serve():
    common = dict(host="127.0.0.1", dashboard_address="127.0.0.1:0")
    async with Scheduler(port=int(sys.argv[2]), **common) as scheduler:
        async with Worker(scheduler.address, nthreads=2, memory_limit=0, local_directory=sys.argv[1], **common):
            print(scheduler.address, flush=True)
            await scheduler.finished()
asyncio.run(serve())
"""


@contextlib.contextmanager
def scheduler(folder: Path, port: int = 0) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    folder.mkdir(exist_ok=True)
    with (folder / "log").open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-c", _SCHEDULER, str(folder), str(port)],
            env={**os.environ, "PYTHONPATH": ROOT},
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
    try:
        assert process.stdout is not None
        address = process.stdout.readline().strip()
        assert address, (folder / "log").read_text()
        yield address, process
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("away", [0.0, 4.0], ids=["a moment", "longer than its client waits"])
def test_a_scheduler_that_is_started_again_at_the_same_address(
    away: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cortex_dask.clusters.address._CLIENT_SECONDS", 1.0 if away else 30.0)
    with scheduler(tmp_path / "dask") as (address, first):
        job = make_job(str(tmp_path / "store"), tmp_path / "marks", cluster=address, seconds=0.05, files=8)
        running = threading.Thread(target=job.run)
        running.start()
        until(lambda: job.segments() >= 1, "a commit")
        first.kill()
        first.wait()
        threading.Event().wait(away)
        with scheduler(tmp_path / "dask", int(address.rpartition(":")[2])) as (again, _):
            assert again == address
            running.join(90)
    result = exactly_once(job, status="succeeded")
    assert result.status["batch_metrics"]["failed"] == 0


def test_what_is_sent_while_the_client_connects_again_or_closes_ends_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cortex_dask.clusters.address._CLIENT_SECONDS", 3.0)
    ended: queue.SimpleQueue[object] = queue.SimpleQueue()
    with scheduler(tmp_path / "dask") as (address, first):
        cluster = Address(address)
        job = make_job(str(tmp_path / "store"), tmp_path / "marks", cluster=address)
        cluster.start(job.url, job.settings, lambda event: None, lambda: None)
        try:
            until(lambda: cluster.slots() == 2, "the worker")
            first.kill()
            first.wait()
            until(lambda: cluster.client.status != "running", "the client to notice")
            cluster.submit([(SplitTask(job.url, Split(0, (), None, 1, 1), 1, None), ended.put)])
            until(lambda: not ended.empty() or cluster.slots() < 0, "the first attempt to end")  # the client closes
            cluster.submit([(SplitTask(job.url, Split(0, (), None, 1, 1), 2, None), ended.put)])
            until(lambda: ended.qsize() == 2 or cluster.slots() < 0, "the second one to end")
            lost = [ended.get(), ended.get()]
        finally:
            cluster.close()
    assert all(isinstance(each, WorkerLost) and each.workers == 0 for each in lost), "no worker was lost"


def test_its_name_is_that_of_its_kind() -> None:
    assert Address("tcp://127.0.0.1:1").name == "address"
