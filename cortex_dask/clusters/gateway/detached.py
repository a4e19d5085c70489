"""The coordinator of a detached job, on the host of its cluster's scheduler: it ends the cluster when the job is over.

It has the cluster's own credentials, and none of the user's, so it cannot ask the gateway's server anything. What it
wants, the scheduler tells the gateway.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from cortex_dask.clusters import records
from cortex_dask.clusters.detached.scheduler import ParentScheduler, watchdog_name
from cortex_dask.clusters.gateway import scheduler
from cortex_dask.clusters.gateway.cluster import GatewayCluster

if TYPE_CHECKING:
    from distributed import Client

_CONNECT_SECONDS = 30.0


class GatewayParentScheduler(GatewayCluster, ParentScheduler):
    """A gateway's cluster, for the coordinator beside its scheduler.

    Takes what :class:`~cortex_dask.clusters.detached.scheduler.ParentScheduler` takes.
    """

    _record: records.ClusterRecord | None = None

    def connect(self) -> Client:
        """Connect to the scheduler, and answer for the cluster from now on."""
        client = self._connect(self.seconds("connect_timeout", _CONNECT_SECONDS))
        try:
            self._attend(client)
            left = records.find(self._job_url)
            if left is not None and left.backend == self.name:
                self._record = records.keep(self._job_url, self.name, left.name, left.where, is_detached=True)
            self._is_taken_over = True
            # It may take the place of one that had let workers go, or had died before it asked for any.
            client.run_on_scheduler(scheduler.resize, self._first_workers)
        except BaseException:
            client.close(timeout=5)
            raise
        return client

    def _disconnect(self) -> None:
        if self._client is not None and self._lost is None:
            with contextlib.suppress(Exception):  # what cannot be told now, the idle timeout does
                self._client.run_on_scheduler(scheduler.release, watchdog_name(self._job_url))
        super()._disconnect()

    def shutdown(self) -> None:
        """Forget the cluster; it ends when this process has."""
        if self._record is not None:
            records.drop(self._record)
