"""Clusters of a real Dask Gateway on this machine, in the conformance suite."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import psutil
import pytest

from tests.clusters.backend import Backend, kill
from tests.clusters.jobs import Call, ClusterJob
from tests.support.gateway_server import GatewayServer, missing
from tests.support.waiting import until

__all__ = ["GatewayBackend"]


class GatewayBackend(Backend):
    """``--cluster gateway``."""

    name = "gateway"
    _server: GatewayServer | None = None

    def up(self) -> None:
        reason = missing()
        if reason is not None:
            pytest.skip(f"no Dask Gateway can be run here: {reason}")
        self._server = GatewayServer(self.folder / "server")
        self._server.start()

    def down(self) -> None:
        if self._server is not None:
            self._server.close()

    @property
    def server(self) -> GatewayServer:
        assert self._server is not None
        return self._server

    @property
    def cluster(self) -> str:
        return "gateway"

    @property
    def options(self) -> Mapping[str, Any]:
        return {"idle_timeout": 10, "start_timeout": 60}

    @property
    def environment(self) -> Mapping[str, str]:
        return self.server.variables()

    def lose_worker(self, job: ClusterJob, call: Call) -> None:
        assert call.worker in {process.pid for process in self.server.workers()}
        kill(call.worker)

    def lose_scheduler(self, job: ClusterJob) -> None:
        schedulers = self.server.schedulers(self._name(job))
        assert len(schedulers) == 1
        schedulers[0].kill()
        psutil.wait_procs(schedulers, timeout=10)

    def scale(self, job: ClusterJob, workers: int) -> None:
        self.server.scale(self._name(job), workers)

    def workers(self, job: ClusterJob) -> int:
        return len(self.server.workers(self._name(job)))

    def leftovers(self, job: ClusterJob) -> list[str]:
        # one test at a time: whatever the server has is this job's
        left = [f"the cluster {name}" for name in self.server.clusters()]
        return left + [f"process {each.pid}" for each in self.server.processes()]

    def _name(self, job: ClusterJob) -> str:
        found: list[str] = []

        def has_name() -> bool:
            name = (job.directory.read_json("cluster.json") or {}).get("name")
            found[:] = [name] if name else []
            return bool(found)

        until(has_name, "the cluster's name", self.seconds)
        return found[0]
