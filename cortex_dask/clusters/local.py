"""The machine at hand: one in-process Dask worker whose threads drive the handler processes."""

from __future__ import annotations

import logging
import warnings
from typing import TYPE_CHECKING

from cortex_dask.clusters.base import Report
from cortex_dask.clusters.client import DaskCluster
from cortex_dask.io.settings import JobSettings
from cortex_dask.runtime import slots

if TYPE_CHECKING:
    from distributed import Client, LocalCluster

__all__ = ["LocalThreads"]


class LocalThreads(DaskCluster):
    """The default: no server to reach, no nannies to start, N threads for N handler processes."""

    name = "local"

    def __init__(self) -> None:
        super().__init__()
        self._cluster: LocalCluster | None = None

    def prepare(self, job_url: str, settings: JobSettings) -> None:
        """Start the handler processes: they load the handler while this process imports distributed and plans."""
        self._job_url = job_url
        slots.prestart(job_url, settings.workers)

    def start(self, job_url: str, settings: JobSettings, report: Report) -> None:
        """Start scheduler and worker in this process."""
        self._workers = settings.workers
        super().start(job_url, settings, report)

    def connect(self) -> Client:
        """Start the in-process cluster and connect to it."""
        from distributed import Client, LocalCluster

        with warnings.catch_warnings():
            # Of ports that are taken, of dashboards that are not installed: no concern here.
            warnings.simplefilter("ignore")
            self._cluster = LocalCluster(
                n_workers=1,
                threads_per_worker=self._workers,
                processes=False,
                protocol="inproc://",
                # Distributed serves its pages in any case; None would mean port 8787 of all interfaces.
                dashboard_address="127.0.0.1:0",
                worker_dashboard_address="127.0.0.1:0",
                memory_limit=0,  # the rows are in the handler processes, and those are watched by their supervisors
                silence_logs=logging.ERROR,
            )
            return Client(self._cluster, set_as_default=False)

    def stop(self, reason: str) -> None:
        """End the running splits; they are in this process, so nobody else has to be asked."""
        slots.stop_job(self._job_url, reason)

    def close(self) -> None:
        """End the job's handler processes, then the in-process cluster."""
        super().close()
        if self._job_url:
            slots.close_job(self._job_url)  # also those that were started for a job that was never connected
        if self._cluster is not None:
            self._cluster.close()
            self._cluster = None
