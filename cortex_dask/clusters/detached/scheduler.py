"""A coordinator beside the scheduler: what starts it there, and the backend that it uses.

:func:`send_off` has the scheduler's process start a :class:`~cortex_dask.clusters.detached.watchdog.Watchdog`, in a
thread. The coordinator is a process on the scheduler's host, with the scheduler's own credentials; it speaks to the
scheduler as any client does, through :class:`Beside`. Whoever has sent it off is not needed any more.
"""

from __future__ import annotations

import asyncio
import os
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

#: The backend of a coordinator beside a scheduler, as ``module:class``.
BESIDE = "cortex_dask.clusters.detached.scheduler:Beside"
_BUSY_SECONDS = 1.0
_CLOSE_SECONDS = 5.0
_PARENT_SECONDS = 5.0  # between two looks at the parent, should a copy of the lifeline's other end live on elsewhere
_END_SECONDS = 60.0  # a coordinator that has lost its scheduler is killed after so long, whatever it is at


class Beside(Address):
    """The scheduler whose process has started this one.

    Parameters
    ----------
    address : str
        The scheduler's address.
    security : Security, optional
        Its credentials; None: it needs none.
    """

    def give_up(self, reason: str) -> None:
        """End the job's run, from any thread: the scheduler has gone."""
        self._lost = ClusterError(f"{reason} (the job can be resumed)")
        self.closing.set()


def make(order: CoordinatorOrder) -> Address:
    """Return the backend that a coordinator was told to use, and let it end with its parent, the scheduler."""
    import importlib

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
    cluster: Beside = getattr(importlib.import_module(module), name)(order.cluster, security)
    threading.Thread(target=_await_end, args=(cluster, os.getppid()), name="cortex-dask-lifeline", daemon=True).start()
    return cluster


def _await_end(cluster: Beside, parent: int) -> None:
    """Wait for the end of the standard input, whose other end is the scheduler's."""
    import select

    poll = select.poll()
    poll.register(0, select.POLLIN | select.POLLHUP)
    while not (poll.poll(_PARENT_SECONDS * 1000) and not os.read(0, 1024)) and os.getppid() == parent:
        pass
    # What it writes last is its status; only a store or a handler that hangs keeps it from that.
    threading.Timer(_END_SECONDS, os._exit, (1,)).start()
    cluster.give_up(f"the Dask scheduler on {socket.gethostname()} has ended, and with it the job's coordinator there")


def start_coordinator(address: str, job_url: str, settings: JobSettings, *, retry: bool = False) -> None:
    """Start a job's coordinator on the host of the scheduler at an address."""
    if address.startswith("inproc://"):
        raise SpecError("cluster: a scheduler within a process ends with it; a detached job needs one that stays")
    cluster = Address(address)
    cluster.prepare(job_url, settings)
    client = cluster.connect()
    try:
        send_off(client, job_url, settings, retry=retry)
    finally:
        client.close(timeout=_CLOSE_SECONDS)


def send_off(
    client: Client, job_url: str, settings: JobSettings, *, retry: bool = False, backend: str = BESIDE
) -> dict[str, Any]:
    """Start a job's coordinator on the scheduler's host, and return; from then on nobody needs the caller.

    Parameters
    ----------
    client : distributed.Client
        Connected to the scheduler, whose host has to have cortex_dask and read the job directory.
    job_url : str
        The job directory.
    settings : JobSettings
        The job's.
    retry : bool, default False
        Whether the failed batches are handled again.
    backend : str
        The class that the coordinator uses, as ``module:class``: :class:`Beside`, or one that is derived from it.

    Returns
    -------
    dict
        ``host`` and ``pid`` of the coordinator.

    Raises
    ------
    ClusterError
        If versions do not fit, the scheduler's host cannot read the job directory, or no process can be started.
    """
    versions.check(client, settings, job_url, scheduler_reads=True)
    address: str = client.scheduler.address  # type: ignore[assignment, union-attr]  # it is connected
    order = CoordinatorOrder(job_url, address, backend, retry)
    try:
        begun: dict[str, Any] = client.run_on_scheduler(keep, order.to_json())
    except Exception as error:
        raise ClusterError(
            f"the coordinator cannot be started beside the scheduler {address}: {type(error).__name__}: {error}"
        ) from error
    return begun


# in the scheduler's process -------------------------------------------------------------------------------------------


async def keep(order: Mapping[str, Any], dask_scheduler: Scheduler) -> dict[str, Any]:
    """Start a coordinator and its keeper in the scheduler's process (for ``Client.run_on_scheduler``)."""
    name = keeper_name(order["job_url"])
    plugin = dask_scheduler.plugins.get(name)
    if not isinstance(plugin, KeeperPlugin) or plugin.keeper.over:
        # The scheduler knows itself by another address than its clients, who may come through a proxy.
        meant = CoordinatorOrder.from_json(
            {**order, "cluster": dask_scheduler.address, "tls": credentials(dask_scheduler)}
        )
        plugin = KeeperPlugin(Watchdog(meant), dask_scheduler)
        dask_scheduler.plugins[name] = plugin
        try:
            plugin.pid = await asyncio.to_thread(plugin.keeper.begin)
        except BaseException:
            del dask_scheduler.plugins[name]
            raise
        threading.Thread(target=plugin.keeper.watch, name=name, daemon=True).start()
        plugin.task = asyncio.ensure_future(plugin.attend(name))
    return {"host": socket.gethostname(), "pid": plugin.pid}


def keeper_name(job_url: str) -> str:
    """Return the name of the scheduler's plugin that keeps a job's coordinator, as long as there is one to keep."""
    return f"cortex-dask-keeper {job_url}"


class KeeperPlugin(SchedulerPlugin):
    """Ends the coordinator in good order before the scheduler ends.

    Parameters
    ----------
    keeper : Keeper
        Looks after the coordinator.
    scheduler : Scheduler
        The scheduler.
    """

    def __init__(self, keeper: Watchdog, scheduler: Scheduler) -> None:
        self.keeper = keeper
        self.pid = 0
        self.task: asyncio.Future[None] | None = None
        self._scheduler = scheduler

    async def attend(self, name: str) -> None:
        """Keep the scheduler from taking itself for idle, while a coordinator plans or publishes."""
        while not self.keeper.over:
            self._scheduler.idle_since = None
            await asyncio.sleep(_BUSY_SECONDS)
        self._scheduler.plugins.pop(name, None)

    async def before_close(self) -> None:
        """End the coordinator; the scheduler still answers meanwhile."""
        await asyncio.to_thread(self.keeper.close)
        if self.task is not None:
            self.task.cancel()


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
