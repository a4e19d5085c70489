"""The agent on the scheduler of a gateway's cluster: closes idle workers only, and an unused cluster.

A gateway is given the number of workers, and has Dask choose which ones to close; Dask closes busy ones as well if
there are not enough idle ones. And not every site closes clusters whose users have vanished. A :class:`SchedulerAgent`
does both as a job needs it, even after its client is gone.
"""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from distributed import Scheduler

_log = logging.getLogger(__name__)

_KEY = "cortex-dask"  # of the scheduler's extensions
_WATCHDOG = "cortex-dask-watchdog"  # the names of the plugins that watch coordinators on the scheduler begin so
_PERIOD = 1.0
_SILENT_SECONDS = 60.0  # a connected client sends a heartbeat every five; one without a network does not
_SHUTDOWN_ATTEMPTS = 5  # through the gateway, before the scheduler closes itself
_SHUTDOWN_PAUSE = 10.0


@dataclass(frozen=True, slots=True)
class WorkerSlots:
    """What later coordinators of a cluster have to know of its workers."""

    slots: int | None = None  # of each worker; None: as many as its threads
    has_gpus: bool = False  # even if the workers do not report them


class SchedulerAgent:
    """Resizes and closes one cluster, on its scheduler's event loop."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._coordinators: set[str] = set()
        self._idle_timeout: float | None = None
        self._target: int | None = None
        self._watchdog: str | None = None  # the cluster is closed as soon as this plugin of the scheduler is gone
        self._workers = WorkerSlots()
        self._last_used = time.monotonic()
        self._task = asyncio.ensure_future(self._maintain())

    def add_coordinator(self, client_id: str, idle_timeout: float, workers: WorkerSlots | None) -> WorkerSlots:
        """Keep the cluster until this client has been gone for so many seconds; return what is known of its workers."""
        self._coordinators.add(client_id)
        self._idle_timeout = idle_timeout
        self._watchdog = None
        self._last_used = time.monotonic()
        # Dask's own limit, from the variables that the cluster was created with, was for the time until now. It does
        # not count coordinators, so it would close the cluster of one that plans, or publishes, for longer.
        self._scheduler.idle_timeout = None
        self._workers = workers or self._workers
        return self._workers

    def close_after(self, watchdog: str) -> None:
        """Close the cluster as soon as this plugin of the scheduler is gone, the watchdog of a coordinator there.

        It goes when its coordinator has written the job's status, and the cluster must not be closed before that.
        """
        self._watchdog = watchdog

    async def resize(self, workers: int) -> None:
        """Scale to so many workers: up as soon as the gateway can, down when workers are idle."""
        self._target = workers
        await self._approach_target()

    # by itself ------------------------------------------------------------------------------------------------------

    async def _maintain(self) -> None:
        while True:
            await asyncio.sleep(_PERIOD)
            try:
                await self._approach_target()
                if self._is_finished() or self._is_unused():
                    await self._close()
                    return
            except Exception:  # noqa: BLE001 - the next time may succeed
                _log.exception("the cluster could not be looked after")

    async def _approach_target(self) -> None:
        """Scale as far as possible without closing a busy worker."""
        if self._target is None:
            return
        service = self._scheduler.services["gateway"]
        busy = sum(1 for worker in self._scheduler.workers.values() if worker.processing or worker.long_running)
        count = max(self._target, busy)
        if count != service.count:
            await service.scale(count)
        if count == self._target:
            self._target = None  # from now on others may set another size, an administrator for instance

    def _is_finished(self) -> bool:
        return self._watchdog is not None and self._watchdog not in self._scheduler.plugins

    def _is_unused(self) -> bool:
        if self._idle_timeout is None:
            return False
        from distributed.metrics import time as now

        clients = self._scheduler.clients
        # A watchdog starts a coordinator, or restarts it.
        has_watchdog = any(name.startswith(_WATCHDOG) for name in self._scheduler.plugins)
        if has_watchdog or any(
            now() - clients[client_id].last_seen < _SILENT_SECONDS
            for client_id in self._coordinators
            if client_id in clients
        ):
            self._last_used = time.monotonic()
        if time.monotonic() - self._last_used < self._idle_timeout:
            return False
        _log.warning("no coordinator for %.0f s: the cluster ends", self._idle_timeout)
        return True

    async def _close(self) -> None:
        """Close the cluster through the gateway or, if that cannot be reached, by closing the scheduler."""
        service: Any = self._scheduler.services.get("gateway")
        for _ in range(_SHUTDOWN_ATTEMPTS if service is not None else 0):
            try:
                await service.gateway.shutdown()
                return
            except Exception as error:  # noqa: BLE001 - it is repeated, and then done without the gateway
                _log.warning("the gateway does not end the cluster: %s", error)
                await asyncio.sleep(_SHUTDOWN_PAUSE)
        await self._scheduler.close()


# for Client.run_on_scheduler ------------------------------------------------------------------------------------------


async def add_coordinator(
    client_id: str, idle_timeout: float, workers: WorkerSlots | None, dask_scheduler: Scheduler
) -> WorkerSlots:
    """Close the cluster when this client has been gone for so many seconds; return what is known of its workers."""
    return _agent(dask_scheduler).add_coordinator(client_id, idle_timeout, workers)


async def resize(workers: int, dask_scheduler: Scheduler) -> None:
    """Scale the cluster to so many workers, without closing a busy one."""
    await _agent(dask_scheduler).resize(workers)


async def close_after(watchdog: str, dask_scheduler: Scheduler) -> None:
    """Close the cluster when this watchdog's coordinator has ended."""
    _agent(dask_scheduler).close_after(watchdog)


def _agent(scheduler: Scheduler) -> SchedulerAgent:
    """Return the agent on this scheduler, one for all coordinators."""
    extensions: dict[str, Any] = scheduler.extensions
    found: SchedulerAgent | None = extensions.get(_KEY)
    if found is None:
        found = extensions[_KEY] = SchedulerAgent(scheduler)
    return found
