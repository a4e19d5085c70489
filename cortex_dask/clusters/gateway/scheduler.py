"""What runs on the scheduler of a gateway's cluster: it lets idle workers go, and ends a cluster that nobody uses.

A gateway knows how many workers a cluster shall have, and asks Dask which ones to close; Dask closes busy ones as well
when there are not enough idle ones. And not every site ends clusters whose users have vanished. An :class:`Attendant`,
which the client puts beside the scheduler, does both as a job needs it, whatever becomes of the client.
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from distributed import Scheduler

_log = logging.getLogger(__name__)

_KEY = "cortex-dask"  # of the scheduler's extensions
_WATCHDOG = "cortex-dask-watchdog"  # the names of the plugins that watch coordinators on the scheduler begin so
_PERIOD = 1.0
_SILENT_SECONDS = 60.0  # a client that is connected sends a heartbeat every five; one whose network is gone does not
_REFUSALS = 5  # of the gateway to end the cluster, before the scheduler ends itself
_REFUSED_SECONDS = 10.0


class Attendant:
    """Looks after one cluster, on its scheduler's event loop.

    Parameters
    ----------
    scheduler : Scheduler
        The scheduler.
    """

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._coordinators: set[str] = set()
        self._idle_timeout: float | None = None
        self._target: int | None = None
        self._awaited: str | None = None  # the scheduler's plugin whose end is that of the cluster
        self.facts: dict[str, Any] = {}
        self._last_used = time.monotonic()
        self._task = asyncio.ensure_future(self._run())

    def follow(self, client_id: str, idle_timeout: float) -> None:
        """Keep the cluster as long as this client lives, and some seconds more."""
        self._coordinators.add(client_id)
        self._idle_timeout = idle_timeout
        self._awaited = None
        self._last_used = time.monotonic()
        # Dask's own limit, from the variables that the cluster was made with, was for the time until now. It does not
        # know of coordinators: it would end the cluster of one that plans, or publishes, for longer.
        self._scheduler.idle_timeout = None

    def release(self, plugin: str) -> None:
        """End the cluster as soon as this plugin of the scheduler is gone: the watchdog of a coordinator there.

        It goes when its coordinator has written the job's status, which must not be ended before that.
        """
        self._awaited = plugin

    async def resize(self, workers: int) -> None:
        """Have so many workers: more as soon as the gateway can, fewer when they are idle."""
        self._target = workers
        await self._approach()

    # on its own -----------------------------------------------------------------------------------------------------

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(_PERIOD)
            try:
                await self._approach()
                if self._is_released() or self._is_abandoned():
                    await self.end()
                    return
            except Exception:  # noqa: BLE001 - the next time may be better, and nobody else looks
                _log.exception("the cluster could not be looked after")

    async def _approach(self) -> None:
        """Ask for the number of workers that comes closest to the wanted one without closing a busy one."""
        if self._target is None:
            return
        service = self._scheduler.services["gateway"]
        busy = sum(1 for worker in self._scheduler.workers.values() if worker.processing or worker.long_running)
        count = max(self._target, busy)
        if count != service.count:
            await service.scale(count)
        if count == self._target:
            self._target = None  # from now on others may ask for another size, an administrator for instance

    def _is_released(self) -> bool:
        return self._awaited is not None and self._awaited not in self._scheduler.plugins

    def _is_abandoned(self) -> bool:
        if self._idle_timeout is None:
            return False
        from distributed.metrics import time as now

        clients = self._scheduler.clients
        kept = any(name.startswith(_WATCHDOG) for name in self._scheduler.plugins)  # a coordinator comes, or comes back
        if kept or any(
            now() - clients[each].last_seen < _SILENT_SECONDS for each in self._coordinators if each in clients
        ):
            self._last_used = time.monotonic()
        if time.monotonic() - self._last_used < self._idle_timeout:
            return False
        _log.warning("no coordinator for %.0f s: the cluster ends", self._idle_timeout)
        return True

    async def end(self) -> None:
        """End the cluster: by the gateway, or, where that cannot be reached, by ending the scheduler."""
        service: Any = self._scheduler.services.get("gateway")
        for _ in range(_REFUSALS if service is not None else 0):
            try:
                await service.gateway.shutdown()
                return
            except Exception as error:  # noqa: BLE001 - whatever it is, it is tried again and then done without
                _log.warning("the gateway does not end the cluster: %s", error)
                await asyncio.sleep(_REFUSED_SECONDS)
        await self._scheduler.close()


def attendant(scheduler: Scheduler) -> Attendant:
    """Return the attendant of this scheduler, the same for all coordinators."""
    extensions: dict[str, Any] = scheduler.extensions
    found: Attendant | None = extensions.get(_KEY)
    if found is None:
        found = extensions[_KEY] = Attendant(scheduler)
    return found


async def attend(
    client_id: str, idle_timeout: float, facts: dict[str, Any] | None, dask_scheduler: Scheduler
) -> dict[str, Any]:
    """Let the cluster end when this client is gone for so many seconds (for ``Client.run_on_scheduler``).

    Returns what the first coordinator of the cluster has told about it.
    """
    found = attendant(dask_scheduler)
    found.follow(client_id, idle_timeout)
    if facts is not None:
        found.facts = facts
    return found.facts


async def resize(workers: int, dask_scheduler: Scheduler) -> None:
    """Let the cluster have so many workers (for ``Client.run_on_scheduler``)."""
    await attendant(dask_scheduler).resize(workers)


async def release(plugin: str, dask_scheduler: Scheduler) -> None:
    """Let the cluster end when a coordinator on the scheduler has (for ``Client.run_on_scheduler``)."""
    attendant(dask_scheduler).release(plugin)
