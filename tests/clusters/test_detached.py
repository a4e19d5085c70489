"""Coordinators beside a scheduler: with its credentials, as long as it lives, and none too many."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from distributed import Client, Security

from cortex_dask.clusters import detach
from cortex_dask.errors import ClusterError, SpecError
from tests.clusters.jobs import ClusterJob
from tests.clusters.local import LocalBackend
from tests.clusters.workers import WITHOUT
from tests.faults.checks import exactly_once
from tests.faults.jobs import ROOT, FaultJob, make_job
from tests.faults.processes import DaskHost, dask_host
from tests.support.waiting import lives, until

_SECONDS = 60.0


@pytest.fixture
def host(tmp_path: Path) -> Iterator[DaskHost]:
    with dask_host(tmp_path / "dask", workers=1) as host:
        yield host


def make(host: DaskHost, folder: Path, **options: Any) -> FaultJob:
    return make_job(str(folder / "store"), folder / "marks", cluster=host.address, **options)


def until_ended(job: FaultJob, status: str, seconds: float = _SECONDS) -> dict[str, Any]:
    until(
        lambda: (job.directory.read_json("status.json") or {}).get("status") == status,
        f"the job to be {status}",
        seconds,
    )
    return job.status()


def test_two_submitters_send_off_one_coordinator(host: DaskHost, tmp_path: Path) -> None:
    job = make(host, tmp_path, gate="open")
    for _ in range(2):
        detach(host.address, job.url, job.settings)
    until(job.calls, "a batch in hand")
    coordinator = psutil.Process(job.status()["coordinator"]["pid"])

    siblings = [child for child in coordinator.parent().children() if "coordinate" in " ".join(child.cmdline())]
    assert siblings == [coordinator]
    assert coordinator.parent().pid == host.scheduler.pid
    job.mark("open")
    until_ended(job, "succeeded")
    exactly_once(job)
    until(lambda: not coordinator.is_running(), "the coordinator to end", 20)


def test_a_scheduler_that_is_killed_takes_the_coordinator_with_it(host: DaskHost, tmp_path: Path) -> None:
    job = make(host, tmp_path, gate="open")
    detach(host.address, job.url, job.settings)
    until(job.calls, "a batch in hand")
    pid = job.status()["coordinator"]["pid"]

    host.scheduler.kill()

    document = until_ended(job, "worker error", 30)
    assert document["status_reason"].startswith(f"the Dask scheduler on {socket.gethostname()} has ended")
    assert "can be resumed" in document["status_reason"]
    until(lambda: not lives(pid), "the coordinator to end", 20)
    job.mark("open")
    until(job.handlers_gone, "the handlers to end", 30)
    job.run(cluster="local")
    exactly_once(job, status="succeeded")


def test_a_scheduler_that_is_closed_lets_the_coordinator_write_its_status(host: DaskHost, tmp_path: Path) -> None:
    job = make(host, tmp_path, gate="open")
    detach(host.address, job.url, job.settings)
    until(job.calls, "a batch in hand")
    pid = job.status()["coordinator"]["pid"]

    with Client(host.address, set_as_default=False) as client:
        client.shutdown()
    host.scheduler.join()

    assert not lives(pid)
    assert job.status()["status"] == "worker error"
    assert "has ended" in job.status()["status_reason"]


def test_the_failed_batches_are_handled_again(host: DaskHost, tmp_path: Path) -> None:
    job = make(host, tmp_path, fault="raise", bad=[120], until="mended")
    job.run()
    job.mark("mended")

    detach(host.address, job.url, job.settings, retry=True)

    until_ended(job, "succeeded")
    exactly_once(job)


def test_a_job_directory_that_the_scheduler_cannot_read(host: DaskHost, tmp_path: Path) -> None:
    job = make(host, tmp_path)
    with pytest.raises(ClusterError) as raised:
        detach(host.address, "/on/the/laptop/only", job.settings)
    assert "cannot read the job directory /on/the/laptop/only" in str(raised.value)
    assert not job.calls()


def test_a_scheduler_within_a_process_is_no_place(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="ends with it"):
        detach("inproc://192.0.2.1/1/1", str(tmp_path), None)  # type: ignore[arg-type]


# schedulers of other kinds --------------------------------------------------------------------------------------------

_SCHEDULER = """
import asyncio, sys
from pathlib import Path
from distributed import Scheduler, Worker
async def serve():
    common = dict(host="127.0.0.1", dashboard_address="127.0.0.1:0", security=globals().get("security"))
    async with Scheduler(port=0, **common, {options}) as scheduler:
        async with Worker(scheduler.address, nthreads=2, memory_limit=0, local_directory=sys.argv[1], **common):
            Path(sys.argv[1], "new").write_text(scheduler.address)
            Path(sys.argv[1], "new").rename(Path(sys.argv[1], "address"))
            await scheduler.finished()
asyncio.run(serve())
"""


@contextlib.contextmanager
def scheduler(
    folder: Path, *, options: str = "", before: str = "", environment: dict[str, str] | None = None
) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """Run a scheduler with a worker in one process; yields its address."""
    folder.mkdir()
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-c", before + _SCHEDULER.replace("{options}", options), str(folder)],
            env={**os.environ, "PYTHONPATH": ROOT, **(environment or {})},
            stdout=log,
            stderr=log,
            cwd=folder,
        )
    try:
        address = folder / "address"
        until(lambda: address.exists() or process.poll() is not None, "the scheduler's address")
        assert process.poll() is None, (folder / "log").read_text()
        yield address.read_text(), process
    finally:
        process.kill()
        process.wait()


@pytest.fixture
def tls(tmp_path: Path) -> dict[str, str]:
    """The variables of Dask that name fresh credentials."""
    security = Security.temporary()
    files = {"CA_FILE": security.tls_ca_file}
    for role in ("SCHEDULER", "WORKER", "CLIENT"):
        files[f"{role}__CERT"] = getattr(security, f"tls_{role.lower()}_cert")
        files[f"{role}__KEY"] = getattr(security, f"tls_{role.lower()}_key")
    folder = tmp_path / "credentials"
    folder.mkdir()
    for name, text in files.items():
        (folder / f"{name}.pem").write_text(text)
    variables = {f"DASK_DISTRIBUTED__COMM__TLS__{name}": str(folder / f"{name}.pem") for name in files}
    return {**variables, "DASK_DISTRIBUTED__COMM__REQUIRE_ENCRYPTION": "true"}


class _Secured(LocalBackend):
    """A scheduler with TLS; whoever submits has the credentials in variables."""

    variables: dict[str, str]
    address: str

    @property
    def cluster(self) -> str:
        return self.address

    @property
    def environment(self) -> dict[str, str]:
        return self.variables


_SECURITY = """
import os
from distributed import Security
_own = {name: os.environ.pop(name) for name in list(os.environ) if "__COMM__" in name}
_tls = {name.partition("__TLS__")[2].lower(): path for name, path in _own.items() if "__TLS__" in name}
security = Security(require_encryption=True, **{f"tls_{name.replace('__', '_')}": path for name, path in _tls.items()})
import dask
dask.config.refresh()
"""


def test_with_the_clusters_credentials(tls: dict[str, str], tmp_path: Path) -> None:
    # The scheduler's are in its process, and not in the variables of what it starts.
    with scheduler(tmp_path / "dask", options='protocol="tls://"', before=_SECURITY, environment=tls) as (address, _):
        assert address.startswith("tls://")
        backend = _Secured(tmp_path)
        backend.variables, backend.address = tls, address
        job = ClusterJob(backend, tmp_path / "job", gate="open")
        try:
            assert job.submit("--detach").wait(_SECONDS) == 0, job.said()
            job.until_calls()
            words = psutil.Process(job.status()["coordinator"]["pid"]).cmdline()
            job.mark("open")
            job.until_final()
            job.check()
        finally:
            job.close()
    assert "coordinate" in " ".join(words)
    assert not [word for word in words if "pem" in word or "CERTIFICATE" in word]


def test_a_client_without_the_credentials(tls: dict[str, str], tmp_path: Path) -> None:
    with scheduler(tmp_path / "dask", options='protocol="tls://"', environment=tls) as (address, _):
        backend = _Secured(tmp_path)
        backend.variables, backend.address = {}, address
        job = ClusterJob(backend, tmp_path / "job")
        command = job.submit("--detach")
        assert command.wait(_SECONDS) == 2
        assert "needs credentials, and there are none" in command.said()
        assert "Traceback" not in command.said()


def test_a_scheduler_that_is_idle_waits_for_its_coordinator(tmp_path: Path) -> None:
    with scheduler(tmp_path / "dask", options='idle_timeout="4s"') as (address, process):
        job = make_job(str(tmp_path / "store"), tmp_path / "marks", cluster=address)
        detach(address, job.url, job.settings)
        until(lambda: job.directory.read_json("status.json"), "the coordinator to begin")
        pid = job.status()["coordinator"]["pid"]
        os.kill(pid, signal.SIGSTOP)  # it plans, for a long time

        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(8)
        os.kill(pid, signal.SIGCONT)

        until_ended(job, "succeeded")
        exactly_once(job)
        assert process.wait(30) == 0, "then it ends by itself"


def test_a_scheduler_without_the_package(tmp_path: Path) -> None:
    with scheduler(tmp_path / "dask", before=WITHOUT) as (address, _):
        job = make_job(str(tmp_path / "store"), tmp_path / "marks", cluster=address)
        with pytest.raises(ClusterError) as raised:
            detach(address, job.url, job.settings)
    assert "cortex_dask is" in str(raised.value)
    assert "missing on the scheduler, missing on workers" in str(raised.value)


# on one machine -------------------------------------------------------------------------------------------------------


def test_a_job_on_one_machine_does_not_need_its_watchdog(tmp_path: Path) -> None:
    job = ClusterJob(LocalBackend(tmp_path), tmp_path / "job", gate="open")
    try:
        assert job.submit("--detach").wait(_SECONDS) == 0, job.said()
        job.until_calls()
        coordinator = psutil.Process(job.status()["coordinator"]["pid"])
        coordinator.parent().kill()
        job.mark("open")
        job.until_final()
        job.check()
    finally:
        job.close()


def test_go_on_with_a_stopped_job_and_leave(tmp_path: Path) -> None:
    job = ClusterJob(LocalBackend(tmp_path), tmp_path / "job", gate="open")
    try:
        assert job.submit("--detach").wait(_SECONDS) == 0, job.said()
        job.until_calls()
        refused = job.command("resume", "conformance", job.job_id, "--detach")
        assert refused.wait(_SECONDS) == 1
        assert "is running: wait for it or stop it first" in refused.said()
        assert job.stop().wait(_SECONDS) == 0, job.said()
        job.mark("open")

        command = job.command("resume", "conformance", job.job_id, "--detach")

        assert command.wait(_SECONDS) == 0, job.said()
        assert f"cortex-dask get conformance {job.job_id}" in command.said()
        until(lambda: job.status()["status"] == "succeeded", "the job to end", _SECONDS)
        job.check()
    finally:
        job.close()
