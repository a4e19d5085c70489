"""A coordinator on the scheduler's host: how it is started there, and the cluster as it sees it.

:func:`send_coordinator` has the scheduler's process start a :class:`~cortex_dask.clusters.detached.watchdog.Watchdog`
in a thread. The coordinator is a process on the scheduler's host, with the scheduler's own credentials; it connects to
the scheduler as any client does, through :class:`ParentScheduler`. The submitter is not needed any more.
"""

from __future__ import annotations

import asyncio
import importlib
import os
import select
import socket
import threading
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from distributed import SchedulerPlugin, Security

from cortex_dask.clusters import versions
from cortex_dask.clusters.address import Address
from cortex_dask.clusters.detached.watchdog import CoordinatorOrder, Watchdog
from cortex_dask.errors import ClusterError, SpecError

if TYPE_CHECKING:
    from distributed import Client, Scheduler

    from cortex_dask.io.job.settings import JobSettings

_PARENT_SCHEDULER = "cortex_dask.clusters.detached.scheduler:ParentScheduler"
_BUSY_SECONDS = 1.0
_CLOSE_SECONDS = 5.0
_PARENT_SECONDS = 5.0  # between two checks of the parent, should a copy of the pipe's other end live on elsewhere
_EXIT_SECONDS = 60.0  # a coordinator that has lost its scheduler is killed after so long, whatever it is doing


class ParentScheduler(Address):
    """The scheduler whose process has started this one."""

    def give_up(self, reason: str) -> None:
        """End the job's run, from any thread: the scheduler has ended."""
        self._lost = ClusterError(f"{reason} (the job can be resumed)")
        self.closing.set()


def make_parent_scheduler(order: CoordinatorOrder) -> Address:
    """Return the backend that a coordinator was told to use, and end it with its parent, the scheduler."""
    assert order.backend is not None
    module, _, name = order.backend.partition(":")
    security = None
    if order.tls is not None:
        security = Security(
            require_encryption=True,
            tls_ca_file=order.tls["ca"],
            tls_client_cert=order.tls["cert"],
            tls_client_key=order.tls["key"],
        )
    cluster: ParentScheduler = getattr(importlib.import_module(module), name)(order.cluster, security)
    arguments = (cluster, os.getppid())
    threading.Thread(target=_watch_parent, args=arguments, name="cortex-dask-parent", daemon=True).start()
    return cluster


def _watch_parent(cluster: ParentScheduler, parent: int) -> None:
    """Wait for the end of the standard input, whose other end is the scheduler's."""
    poll = select.poll()
    poll.register(0, select.POLLIN | select.POLLHUP)
    while not (poll.poll(_PARENT_SECONDS * 1000) and not os.read(0, 1024)) and os.getppid() == parent:
        pass
    # What it writes last is its status; only a store or a handler that hangs keeps it from that.
    threading.Timer(_EXIT_SECONDS, os._exit, (1,)).start()
    cluster.give_up(f"the Dask scheduler on {socket.gethostname()} has ended, and with it the job's coordinator there")


def start_coordinator(address: str, job_url: str, settings: JobSettings, *, retry: bool = False) -> None:
    """Start a job's coordinator on the host of the scheduler at an address."""
    if address.startswith("inproc://"):
        raise SpecError("cluster: a scheduler within a process ends with it; a detached job needs one that stays")
    cluster = Address(address)
    cluster.prepare(job_url, settings)
    client = cluster.connect()
    try:
        send_coordinator(client, job_url, settings, retry=retry)
    finally:
        client.close(timeout=_CLOSE_SECONDS)


def send_coordinator(
    client: Client, job_url: str, settings: JobSettings, *, retry: bool = False, backend: str = _PARENT_SCHEDULER
) -> dict[str, Any]:
    """Start a job's coordinator on the host of a client's scheduler; return its ``host`` and ``pid``.

    ``backend`` is the class that the coordinator uses, as ``module:class``, derived from :class:`ParentScheduler`.
    Raises :class:`ClusterError` if versions do not fit, the host cannot read the job directory, or no process can be
    started.
    """
    versions.check(client, settings, job_url, scheduler_reads=True)
    address: str = client.scheduler.address  # type: ignore[assignment, union-attr]  # it is connected
    order = CoordinatorOrder(job_url, address, backend, retry)
    try:
        started: dict[str, Any] = client.run_on_scheduler(start_watchdog, order.to_json())
    except Exception as error:
        raise ClusterError(
            f"the coordinator cannot be started beside the scheduler {address}: {type(error).__name__}: {error}"
        ) from error
    return started


# in the scheduler's process -------------------------------------------------------------------------------------------


async def start_watchdog(order: Mapping[str, Any], dask_scheduler: Scheduler) -> dict[str, Any]:
    """Start a coordinator and its watchdog in the scheduler's process (for ``Client.run_on_scheduler``)."""
    name = watchdog_name(order["job_url"])
    plugin = dask_scheduler.plugins.get(name)
    if not isinstance(plugin, WatchdogPlugin) or plugin.watchdog.is_finished:
        # The scheduler knows itself by another address than its clients, who may come through a proxy.
        own = {"cluster": dask_scheduler.address, "tls": credentials(dask_scheduler)}
        plugin = WatchdogPlugin(Watchdog(CoordinatorOrder.from_json({**order, **own})), dask_scheduler)
        dask_scheduler.plugins[name] = plugin
        try:
            await plugin.start_coordinator(name)
        except BaseException:
            del dask_scheduler.plugins[name]
            raise
    return {"host": socket.gethostname(), "pid": plugin.pid}


def watchdog_name(job_url: str) -> str:
    """Return the name of the scheduler's plugin that watches a job's coordinator; the plugin goes with it."""
    return f"cortex-dask-watchdog {job_url}"


class WatchdogPlugin(SchedulerPlugin):
    """Ends the coordinator cleanly before the scheduler ends, and keeps the scheduler from being idle until then."""

    def __init__(self, watchdog: Watchdog, scheduler: Scheduler) -> None:
        self.watchdog = watchdog
        self.pid = 0
        self._scheduler = scheduler
        self._task: asyncio.Future[None] | None = None

    async def start_coordinator(self, name: str) -> None:
        """Start the coordinator, then the thread that watches it."""
        self.pid = await asyncio.to_thread(self.watchdog.start_coordinator)
        threading.Thread(target=self.watchdog.watch, name=name, daemon=True).start()
        self._task = asyncio.ensure_future(self._keep_busy(name))

    async def _keep_busy(self, name: str) -> None:
        """Keep the scheduler from taking itself for idle, while a coordinator plans or publishes."""
        while not self.watchdog.is_finished:
            self._scheduler.idle_since = None
            await asyncio.sleep(_BUSY_SECONDS)
        self._scheduler.plugins.pop(name, None)

    async def before_close(self) -> None:
        """End the coordinator; the scheduler still answers meanwhile."""
        await asyncio.to_thread(self.watchdog.close)
        if self._task is not None:
            self._task.cancel()


def credentials(scheduler: Scheduler) -> dict[str, str | None] | None:
    """Return what opens a connection to this scheduler: its own credentials, as paths or PEM texts."""
    if not scheduler.address.startswith(("tls://", "wss://")):
        return None
    security = scheduler.security
    for role in ("client", "scheduler", "worker"):
        config = security.get_tls_config_for_role(role)
        if config["cert"]:
            return {"ca": config["ca_file"], "cert": config["cert"], "key": config["key"]}
    return None
