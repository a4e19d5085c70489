"""The machine at hand: one in-process Dask worker whose threads drive the handler processes."""

from __future__ import annotations

import logging
import warnings
from typing import TYPE_CHECKING

from cortex_dask.clusters.client import DaskCluster
from cortex_dask.io.settings import JobSettings
from cortex_dask.runtime import devices, slots

if TYPE_CHECKING:
    from distributed import Client, LocalCluster

__all__ = ["LocalThreads"]

#: The latest messages, transitions and events, which Dask keeps for its developers: a thousand of each by default, and
#: with some hundred short splits in a message that is some hundred megabytes.
_CONFIGURATION = {"distributed.admin.low-level-log-length": 20}


class LocalThreads(DaskCluster):
    """The default: no server to reach, no nannies to start, N threads for N handler processes."""

    name = "local"
    has_resources = False

    def __init__(self) -> None:
        super().__init__()
        self._cluster: LocalCluster | None = None

    def prepare(self, job_url: str, settings: JobSettings) -> None:
        """Start the handler processes: they load the handler while this process imports distributed and plans."""
        self._job_url, self._settings = job_url, settings
        slots.prestart(job_url, self._slots_wanted())

    def _slots_wanted(self) -> int:
        """Return how many slots to have: no more than this machine's devices suffice for.

        Raises
        ------
        SpecError
            If somebody has said how many, and those are more.
        """
        settings = self.settings
        if not settings.workers_said and (most := devices.capacity(settings.compute)):
            return min(settings.workers, most)
        devices.check_slots(settings.compute, settings.workers)
        return settings.workers

    def connect(self) -> Client:
        """Start the in-process cluster and connect to it."""
        import dask
        from distributed import Client, LocalCluster

        with warnings.catch_warnings(), dask.config.set(_CONFIGURATION):
            # Of ports that are taken, of dashboards that are not installed: no concern here.
            warnings.simplefilter("ignore")
            self._cluster = LocalCluster(
                n_workers=1,
                threads_per_worker=self._slots_wanted(),
                processes=False,
                protocol="inproc://",
                # Distributed serves its pages in any case; None would mean port 8787 of all interfaces.
                dashboard_address="127.0.0.1:0",
                worker_dashboard_address="127.0.0.1:0",
                memory_limit=0,  # the rows are in the handler processes, and those are watched by their supervisors
                silence_logs=logging.ERROR,
            )
            return Client(self._cluster, set_as_default=False)

    def ahead(self) -> int:
        """Return as many as there are slots: they all take from one queue, so the order stays what it was."""
        return self.slots()

    def check(self, client: Client) -> None:
        """Do nothing: it is all one process."""

    def detach(self, job_url: str, settings: JobSettings, *, retry: bool = False) -> None:
        """Start the coordinator in a background process.

        From a handler process it is started as the handler's worker would start it, with nothing of the handler's.
        """
        from cortex_dask import detached
        from cortex_dask.runtime import surroundings

        here = surroundings.current()
        detached.start(
            job_url,
            cluster=self.name,
            retry=retry,
            python=None if here is None else here.python,
            variables=None if here is None else here.variables,
        )

    def stop(self, reason: str) -> None:
        """End the running splits; they are in this process, so nobody else has to be asked."""
        slots.stop_job(self._job_url, reason)

    def close(self) -> None:
        """End the job's handler processes, then the in-process cluster."""
        super().close()
        if self._job_url:
            slots.close_job(self._job_url)  # also those that were started for a job that was never connected

    def shutdown(self) -> None:
        """End the in-process cluster."""
        if self._cluster is not None:
            self._cluster.close()
            self._cluster = None
