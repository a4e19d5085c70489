"""A gateway's cluster as a detached coordinator on its scheduler's host sees it.

The coordinator has the credentials of the cluster and not those of the user, so it cannot send requests to the
gateway's server. The scheduler does so in its place.
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
    """A gateway's cluster, for a coordinator on the host of its scheduler."""

    _record: records.ClusterRecord | None = None

    def connect(self) -> Client:
        """Connect to the scheduler, and record the cluster as this coordinator's."""
        client = self._connect(self.seconds("connect_timeout", _CONNECT_SECONDS))
        try:
            self._register(client)
            record = records.find(self._job_url)
            if record is not None and record.backend == self.name:
                self._record = records.write(self._job_url, self.name, record.name, record.where, is_detached=True)
            self._is_taken_over = True
            # An earlier coordinator may have removed workers, or died before it requested any.
            client.run_on_scheduler(scheduler.resize, self._first_workers)
        except BaseException:
            client.close(timeout=5)
            raise
        return client

    def _disconnect(self) -> None:
        if self._client is not None and self._lost is None:
            with contextlib.suppress(Exception):  # else the idle timeout closes the cluster
                self._client.run_on_scheduler(scheduler.close_after, watchdog_name(self._job_url))
        super()._disconnect()

    def shutdown(self) -> None:
        """Drop the record of the cluster, which is closed when this process has ended."""
        if self._record is not None:
            records.delete(self._record)
