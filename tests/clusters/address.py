"""A scheduler and workers that somebody else runs, in the conformance suite: processes on this machine."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from typing import Any

from distributed import Client

from tests.clusters.backend import Backend
from tests.clusters.jobs import Call, ClusterJob
from tests.faults.processes import DaskHost

__all__ = ["AddressBackend"]


class AddressBackend(Backend):
    """``--cluster tcp://127.0.0.1:…``."""

    name = "address"
    _host: DaskHost | None = None
    _hosts = 0

    def fresh(self) -> None:
        if self._host is not None and not self._host.scheduler.alive:
            self.down()
        if self._host is None:
            self._hosts += 1
            self._host = DaskHost(self.folder / f"dask-{self._hosts}", workers=2, threads=1)
        self._host.resize(2)

    def down(self) -> None:
        if self._host is not None:
            self._host.close()
            self._host = None

    @property
    def host(self) -> DaskHost:
        assert self._host is not None
        return self._host

    @property
    def cluster(self) -> str:
        return self.host.address

    @property
    def options(self) -> Mapping[str, Any]:
        return {"reconnect_timeout": 3}

    def lose_worker(self, job: ClusterJob, call: Call) -> None:
        assert call.host == socket.gethostname()
        self.host.kill(call.worker)

    def lose_scheduler(self, job: ClusterJob) -> None:
        self.host.scheduler.kill()
        self.host.scheduler.join()

    def scale(self, job: ClusterJob, workers: int) -> None:
        self.host.resize(workers)

    def workers(self, job: ClusterJob) -> int:
        with Client(self.host.address, set_as_default=False) as client:
            return len(client.nthreads())
