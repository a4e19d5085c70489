"""Hosts that do not fit, found before anything is sent, or when they come: real workers with other packages."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from distributed import Client

from cortex_dask.clusters import versions
from cortex_dask.errors import ClusterError
from tests.clusters.workers import WITHOUT, another_cortex_dask, another_version, worker
from tests.faults.checks import exactly_once
from tests.faults.jobs import FaultJob, make_job
from tests.faults.processes import DaskHost, dask_host
from tests.support.waiting import until


@pytest.fixture
def host(tmp_path: Path) -> Iterator[DaskHost]:
    with dask_host(tmp_path / "dask", workers=0) as host:
        yield host


@pytest.fixture
def job(host: DaskHost, tmp_path: Path) -> FaultJob:
    return make_job(str(tmp_path / "store"), tmp_path / "marks", cluster=host.address)


def refusal(job: FaultJob) -> str:
    """Run the job, which must fail before any batch; returns the reason."""
    with pytest.raises(ClusterError) as raised:
        job.run()
    assert not job.calls()
    assert job.status()["status"] == "worker error"
    return str(raised.value)


def test_a_worker_without_the_package(host: DaskHost, job: FaultJob, tmp_path: Path) -> None:
    with worker(host.address, tmp_path / "fit"), worker(host.address, tmp_path / "w", before=WITHOUT):
        message = refusal(job)

        first, *rows = message.splitlines()
        assert "cortex_dask is 0.1.0 here and missing on workers" in first.replace(versions.__version__, "0.1.0")
        assert [row.split()[0] for row in rows[1:]] == ["client", "scheduler", "worker", "worker"]
        assert "Traceback" not in message

    with worker(host.address, tmp_path / "right"):
        job.run()
        exactly_once(job, status="succeeded")


def test_a_worker_with_another_version_of_the_package(host: DaskHost, job: FaultJob, tmp_path: Path) -> None:
    path = another_cortex_dask(tmp_path / "older", "0.0.1")
    with worker(host.address, tmp_path / "w", path=path):
        assert "0.0.1 on workers" in refusal(job)


def test_a_worker_with_another_release_of_distributed(host: DaskHost, job: FaultJob, tmp_path: Path) -> None:
    path = another_version(tmp_path / "older", "distributed", "2025.1.0")
    with worker(host.address, tmp_path / "w", path=path):
        message = refusal(job)
    assert "distributed is" in message
    assert "2025.1.0 on workers" in message


def test_a_class_of_another_python(host: DaskHost, job: FaultJob, tmp_path: Path) -> None:
    handler = dataclasses.replace(job.settings.handler, python="3.99")
    settings = dataclasses.replace(job.settings, handler=handler)
    with (
        worker(host.address, tmp_path / "w"),
        Client(host.address, set_as_default=False) as client,
        pytest.raises(ClusterError, match=r"pickled by Python 3\.99, and it is 3\.\d+\.\d+ on workers"),
    ):
        versions.check(client, settings, job.url)


def test_another_patch_is_a_warning(host: DaskHost, job: FaultJob, tmp_path: Path, caplog: Any) -> None:
    path = another_version(tmp_path / "older", "cloudpickle", "3.0.0")
    with worker(host.address, tmp_path / "w", path=path):
        job.run()
    exactly_once(job, status="succeeded")
    (said,) = [record.getMessage() for record in caplog.records if record.name == versions.__name__]
    assert "cloudpickle is" in said
    assert "3.0.0 on workers" in said


def test_a_worker_that_cannot_read_the_job_directory(host: DaskHost, job: FaultJob, tmp_path: Path) -> None:
    with worker(host.address, tmp_path / "w"), Client(host.address, set_as_default=False) as client:
        with pytest.raises(ClusterError) as raised:
            versions.check(client, job.settings, "/on/the/laptop/only")

        assert "cannot read the job directory /on/the/laptop/only" in str(raised.value)
        assert "a store that all hosts reach" in str(raised.value)
        assert "\n" not in str(raised.value)


@pytest.mark.s3
def test_a_worker_without_access_to_the_store(host: DaskHost, s3: str, tmp_path: Path) -> None:
    job = make_job(f"{s3}/store", tmp_path / "marks", cluster=host.address)
    nowhere = {"AWS_ENDPOINT_URL": "http://127.0.0.1:9", "AWS_MAX_ATTEMPTS": "1"}
    with worker(host.address, tmp_path / "w", environment=nowhere):
        message = refusal(job)
    assert "cannot read the job directory s3://" in message
    assert "127.0.0.1" in message


def _with_a_latecomer(job: FaultJob, host: DaskHost, folder: Path, **how: Any) -> dict[str, Any]:
    """Run a job on one worker; another one comes in the middle. Returns the status."""
    with worker(host.address, folder / "first"):
        running = threading.Thread(target=job.try_to_run)
        running.start()
        until(job.calls, "a batch in hand")
        with worker(host.address, folder / "late", **how):
            job.mark("open")
            running.join()
    return job.status()


def test_workers_that_come_in_the_middle_and_do_not_fit(host: DaskHost, tmp_path: Path) -> None:
    older = another_cortex_dask(tmp_path / "older", "0.0.1")
    for number, how in enumerate([{"before": WITHOUT}, {"path": older}]):
        folder = tmp_path / str(number)
        job = make_job(str(folder / "store"), folder / "marks", cluster=host.address, gate="open", seconds=0.1, files=8)

        document = _with_a_latecomer(job, host, folder, **how)

        assert document["status"] == "worker error"
        assert "start workers with the same environment" in document["status_reason"], document
        assert "can be resumed" in document["status_reason"]
        assert document["batch_metrics"]["failed"] == 0
        until(job.handlers_gone, "the handlers to end")
