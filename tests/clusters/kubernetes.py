"""Kubernetes with the Dask operator, in the conformance suite: the cluster that ``KUBECONFIG`` names, with real pods.

Jobs are submitted with the rights of the service account that users are told to make (``deploy/kubernetes/rbac.yaml``);
what the test does to them is done with the rights of ``KUBECONFIG``.
"""

from __future__ import annotations

import base64
import contextlib
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from cortex_dask.clusters.kubernetes.manifests import cluster_name
from cortex_dask.errors import JobNotFoundError
from tests.clusters.backend import Backend
from tests.clusters.jobs import Call, ClusterJob
from tests.kubernetes.endpoint import Endpoint, endpoint
from tests.kubernetes.namespace import Item, Namespace, the_image

__all__ = ["KubernetesBackend"]

#: The account that submits, and the one that the runner has.
ACCOUNT = "cortex-dask"
SECRET = "store-credentials"
_OURS = "cortex-dask/job"


class KubernetesBackend(Backend):
    """``--cluster kubernetes``."""

    name = "kubernetes"
    seconds: ClassVar[float] = 240.0
    leftover_seconds: ClassVar[float] = 90.0
    replaces_schedulers: ClassVar[bool] = True

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.namespace = Namespace(folder)
        self._endpoint: Endpoint | None = None
        self._ending = contextlib.ExitStack()

    def up(self) -> None:
        the_image()
        self._ending.callback(self.namespace.delete)
        self.namespace.create()
        self._endpoint = self._ending.enter_context(endpoint())
        values = {name: base64.b64encode(text.encode()).decode() for name, text in self._endpoint.variables.items()}
        self.namespace.apply_all(
            {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": SECRET}, "type": "Opaque", "data": values}
        )

    def down(self) -> None:
        self._ending.close()

    # how jobs are submitted -----------------------------------------------------------------------------------------

    @property
    def cluster(self) -> str:
        return "kubernetes"

    @property
    def options(self) -> Mapping[str, Any]:
        return {"image": the_image(), "idle_timeout": 20, "start_timeout": 180}

    @property
    def api(self) -> Mapping[str, Any]:
        return {"kubernetes": {"env_from": [{"secret": SECRET}]}}

    @property
    def environment(self) -> Mapping[str, str]:
        assert self._endpoint is not None
        return {**self._endpoint.variables, "KUBECONFIG": str(self.namespace.kubeconfig(ACCOUNT))}

    def store_url(self, folder: Path) -> str:
        assert self._endpoint is not None
        return f"{self._endpoint.url}/{folder.parent.name}-{folder.name}"

    # what happens to it ---------------------------------------------------------------------------------------------

    def pods_of(self, job: ClusterJob, component: str) -> list[Item]:
        """Return a job's pods of one kind: scheduler, worker or runner."""
        if component == "runner":
            return self.namespace.pods(f"{_OURS}={job.job_id},cortex-dask/component=runner")
        try:
            name = cluster_name(job.url, job.settings)  # pods may still be there when their cluster is gone
        except JobNotFoundError:
            return []  # not submitted yet
        return self.namespace.pods(f"dask.org/cluster-name={name},dask.org/component={component}")

    def lose_worker(self, job: ClusterJob, call: Call) -> None:
        self._kill(job, "worker", call.host)

    def lose_coordinator(self, job: ClusterJob) -> None:
        host = job.status()["coordinator"]["host"]
        if host == socket.gethostname():
            super().lose_coordinator(job)
        else:
            self._kill(job, "runner", host)

    def lose_scheduler(self, job: ClusterJob) -> None:
        self._kill(job, "scheduler")

    def _kill(self, job: ClusterJob, component: str, host: str = "") -> None:
        names = [pod["metadata"]["name"] for pod in self.pods_of(job, component)]
        # a host's name has at most 63 characters, a pod's may have more
        chosen = [name for name in names if not host or name[:63].rstrip("-") == host]
        assert len(chosen) == 1, f"{component} {host} is not one of {names}: {self.namespace.look()}"
        self.namespace.kill_pod(chosen[0])

    def remove(self, job: ClusterJob) -> None:
        """Remove what a failed test has left."""
        self.namespace.kubectl("delete", "jobs,daskclusters", f"--selector={_OURS}={job.job_id}", "--wait=false")

    def scale(self, job: ClusterJob, workers: int) -> None:
        group = f"{cluster_name(job.url, job.settings)}-default"
        self.namespace.kubectl("scale", f"daskworkergroup/{group}", f"--replicas={workers}")

    def workers(self, job: ClusterJob) -> int:
        return len([pod for pod in self.pods_of(job, "worker") if pod["status"].get("phase") == "Running"])

    def keeps_record(self, job: ClusterJob) -> bool:
        # by it `clusters gc` finds the runner that has ended, whose pod stays for its log
        return bool(self.namespace.items("jobs", f"{_OURS}={job.job_id}"))

    def leftovers(self, job: ClusterJob) -> list[str]:
        found = self.namespace.items("daskclusters,daskautoscalers,daskjobs,jobs", f"{_OURS}={job.job_id}")
        kinds = [item for item in found if not _has_ended(item)]
        pods = [pod for kind in ("scheduler", "worker", "runner") for pod in self.pods_of(job, kind)]
        return [f"{item['kind']} {item['metadata']['name']}" for item in kinds] + [
            f"Pod {pod['metadata']['name']}"
            for pod in pods
            if pod["status"].get("phase") not in ("Succeeded", "Failed")
        ]


def _has_ended(item: Item) -> bool:
    """Whether it is a ``Job`` that has come to its end: it stays for those who look for its logs, and costs nothing."""
    conditions = item.get("status", {}).get("conditions", [])
    return item["kind"] == "Job" and any(
        condition["type"] in ("Complete", "Failed") and condition["status"] == "True" for condition in conditions
    )
