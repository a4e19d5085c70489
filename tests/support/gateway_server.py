"""A real Dask Gateway for the tests: its server, its proxy, and clusters of processes on this machine, on loopback.

The server runs its clusters as processes without any separation of users (``UnsafeLocalBackend``), and wants to be
root for it. All that belongs to it is found by its address in the variables of each process, so that it can be ended
by process id, whatever became of its parents.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Awaitable, Callable
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil

__all__ = ["PASSWORD", "USER", "GatewayServer", "missing"]

USER = "alice"
PASSWORD = "s3cret-of-alice"

_CONFIG = """
import os
import sys
from base64 import b64encode
from pathlib import Path

from dask_gateway_server.options import Bool, Float, Integer, Mapping, Options, Select

folder = Path(os.environ["GATEWAY_DIR"])
api, http, tcp = os.environ["GATEWAY_PORTS"].split()
dask = [sys.executable, "-m", "dask"]

c.DaskGateway.backend_class = "dask_gateway_server.backends.local.UnsafeLocalBackend"
c.DaskGateway.authenticator_class = "dask_gateway_server.auth.SimpleAuthenticator"
c.SimpleAuthenticator.password = os.environ["GATEWAY_PASSWORD"]
c.DaskGateway.address = f"127.0.0.1:{api}"
c.Proxy.address = f"127.0.0.1:{http}"
c.Proxy.tcp_address = f"127.0.0.1:{tcp}"
c.Proxy.api_token = "00" * 16  # the same after a restart
c.DBBackendBase.db_url = f"sqlite:///{folder / 'gateway.sqlite'}"
c.DBBackendBase.db_encrypt_keys = [b64encode(bytes(32)).decode()]
c.DBBackendBase.cluster_status_period = 1
c.DBBackendBase.worker_status_period = 1
c.DBBackendBase.cluster_heartbeat_period = 1
c.DBBackendBase.cluster_heartbeat_timeout = 12
c.DBBackendBase.check_timeouts_period = 2
c.UnsafeLocalBackend.clusters_directory = str(folder / "clusters")
c.UnsafeLocalBackend.sigint_timeout = 2
c.UnsafeLocalBackend.sigterm_timeout = 2
c.UnsafeLocalBackend.sigkill_timeout = 2
c.UnsafeLocalBackend.inherited_environment = [
    "PATH", "PYTHONPATH", "VIRTUAL_ENV", "LANG", "LC_ALL", "HOME", "TMPDIR", "DASK_CORTEX_DASK__CACHE",
]
c.ClusterConfig.scheduler_cmd = [*dask, "scheduler"]
c.ClusterConfig.worker_cmd = [*dask, "worker", "--no-nanny"]
c.ClusterConfig.cluster_max_workers = 4


def configure(options, user):
    worker = [*dask, "worker", "--no-nanny"]
    if options.gpus and options.declare_gpus:
        worker += ["--resources", f"GPU={options.gpus}"]
    made = {
        "worker_cores": options.worker_cores,
        "worker_memory": int(options.worker_memory * 2**30),
        "environment": {**options.environment, "SITE_IMAGE": options.image},
        "worker_cmd": worker,
    }
    if options.fault == "scheduler":
        made["scheduler_cmd"] = ["sh", "-c", "exit 3"]
    if options.fault == "slow":
        made["scheduler_cmd"] = ["sh", "-c", "exec sleep 300"]
    if options.fault == "workers":
        made["worker_cmd"] = ["sh", "-c", "exec sleep 300"]
    return made


c.Backend.cluster_options = Options(
    Integer("worker_cores", 1, min=1, max=4, label="Worker cores"),
    Float("worker_memory", 1, min=0.25, max=8, label="Worker memory (GiB)"),
    Integer("gpus", 0, min=0, max=2, label="GPUs"),
    Bool("declare_gpus", True, label="Workers say how many GPUs they have"),
    Select("image", ["site/plain:1", "site/torch:1"], label="Image"),
    Mapping("environment", {}, label="Environment"),
    Select("fault", ["none", "scheduler", "slow", "workers"], label="What goes wrong"),
    handler=configure,
)
"""
_START_SECONDS = 60.0
_MARK = "DASK_GATEWAY_API_URL"  # each process of each cluster has it, with this server's address


def missing() -> str | None:
    """Return why no gateway can be run here, if that is so."""
    if os.geteuid() != 0:
        return "dask-gateway-server's local backend starts clusters only as root, and these tests do not run as root"
    absent = [name for name in ("dask_gateway", "dask_gateway_server", "sqlalchemy") if find_spec(name) is None]
    return f"the packages {', '.join(absent)} are not installed" if absent else None


class GatewayServer:
    """A gateway on free ports of 127.0.0.1; a context manager that leaves no process behind.

    Parameters
    ----------
    folder : Path
        An empty folder for its database, its logs and its clusters.

    Attributes
    ----------
    address, proxy_address : str
        As in Dask's configuration.
    """

    def __init__(self, folder: Path) -> None:
        # It adds its defaults to Dask's configuration: not while a test changes that for a while.
        self._library = import_module("dask_gateway")
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self._config = folder / "gateway_config.py"
        self._config.write_text(_CONFIG)
        self._process: subprocess.Popen[bytes] | None = None
        self._choose_ports()

    def _choose_ports(self) -> None:
        with contextlib.ExitStack() as stack:
            sockets = [stack.enter_context(socket.socket()) for _ in range(3)]
            for each in sockets:
                each.bind(("127.0.0.1", 0))
            self._ports = [each.getsockname()[1] for each in sockets]
        self.address = f"http://127.0.0.1:{self._ports[1]}"
        self.proxy_address = f"gateway://127.0.0.1:{self._ports[2]}"

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # the server -----------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start the server, also after :meth:`kill`; it finds its clusters again."""
        variables = {
            **{name: value for name, value in os.environ.items() if not name.startswith("DASK_GATEWAY")},
            "GATEWAY_DIR": str(self.folder),
            "GATEWAY_PORTS": " ".join(map(str, self._ports)),
            "GATEWAY_PASSWORD": PASSWORD,
            "PYTHONPATH": os.pathsep.join(filter(None, [_ROOT, os.environ.get("PYTHONPATH")])),
        }
        with (self.folder / "server.log").open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "dask_gateway_server", "-f", str(self._config)],
                env=variables,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._await(_START_SECONDS)

    def _await(self, seconds: float) -> None:
        assert self._process is not None
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            assert self._process.poll() is None, f"the gateway ended:\n{self.log()}"
            try:
                with urllib.request.urlopen(f"{self.address}/api/health", timeout=5):
                    return
            except urllib.error.HTTPError as error:
                error.close()
            except OSError:
                pass
            time.sleep(0.05)
        raise AssertionError(f"the gateway does not answer:\n{self.log()}")

    def kill(self) -> None:
        """Kill the server as a power failure would; its clusters go on."""
        assert self._process is not None
        proxies = psutil.Process(self._process.pid).children()
        self._process.kill()
        self._process.wait()
        psutil.wait_procs([each for each in proxies if "proxy" in _name(each)], timeout=10)

    def close(self) -> None:
        """End the server and all of its clusters."""
        if self._process is not None and self._process.poll() is None:
            self.kill()
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(self.processes(), timeout=10)

    def log(self) -> str:
        """Return what the server has said."""
        return (self.folder / "server.log").read_text(errors="replace")

    # its clusters ---------------------------------------------------------------------------------------------------

    def processes(self, cluster: str | None = None) -> list[psutil.Process]:
        """Return the processes of one cluster, or of all: schedulers, workers, and what those started."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.status() == psutil.STATUS_ZOMBIE:
                    continue
                variables = process.environ()
                if variables.get(_MARK, "").startswith(self.address) and cluster in (
                    None,
                    variables.get("DASK_GATEWAY_CLUSTER_NAME"),
                ):
                    found.append(process)
        return found

    def schedulers(self, cluster: str | None = None) -> list[psutil.Process]:
        """Return the scheduler processes."""
        return [each for each in self.processes(cluster) if "--dg-api-address" in _command(each)]

    def workers(self, cluster: str | None = None) -> list[psutil.Process]:
        """Return the worker processes."""
        return [each for each in self.processes(cluster) if _command(each)[2:4] == ["dask", "worker"]]

    def clusters(self) -> list[str]:
        """Return the names of the clusters that are starting, running or stopping."""
        statuses = ["pending", "running", "stopping"]
        return [report.name for report in self._ask(lambda gateway: gateway.list_clusters(status=statuses))]

    def end_clusters(self) -> None:
        """End what a failed test has left."""
        for name in self.clusters():
            self._ask(partial(_stop, name=name))
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                process.kill()

    def scale(self, cluster: str, workers: int) -> None:
        """Scale a cluster as its user may with the gateway's own tools."""
        self._ask(lambda gateway: gateway.scale_cluster(cluster, workers))

    def _ask(self, question: Callable[[Any], Awaitable[Any]]) -> Any:
        async def ask() -> Any:
            auth = self._library.BasicAuth(USER, PASSWORD)
            connection = self._library.Gateway(self.address, self.proxy_address, auth=auth, asynchronous=True)
            async with connection as gateway:
                return await question(gateway)

        return asyncio.run(ask())

    # who uses it ----------------------------------------------------------------------------------------------------

    def variables(self, password: str = PASSWORD) -> dict[str, str]:
        """Return the environment variables that point Dask to it."""
        return {
            "DASK_GATEWAY__ADDRESS": self.address,
            "DASK_GATEWAY__PROXY_ADDRESS": self.proxy_address,
            "DASK_GATEWAY__AUTH__TYPE": "basic",
            "DASK_GATEWAY__AUTH__KWARGS__USERNAME": USER,
            "DASK_GATEWAY__AUTH__KWARGS__PASSWORD": password,
        }

    def configuration(self, password: str = PASSWORD) -> dict[str, Any]:
        """Return the same as values for ``dask.config.set``."""
        return {
            "gateway.address": self.address,
            "gateway.proxy-address": self.proxy_address,
            "gateway.auth.type": "basic",
            "gateway.auth.kwargs": {"username": USER, "password": password},
        }


_ROOT = str(Path(__file__).parents[2])


async def _stop(gateway: Any, name: str) -> None:
    await gateway.stop_cluster(name)


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def _name(process: psutil.Process) -> str:
    try:
        return process.name()
    except psutil.Error:
        return ""
