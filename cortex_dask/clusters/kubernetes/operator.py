"""A cluster of the Dask operator: one ``DaskCluster`` object, and the pods that the operator makes of it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from cortex_dask.clusters.kubernetes.api import KubeApi, RefusedError
from cortex_dask.clusters.kubernetes.diagnosis import (
    PodProblem,
    diagnose_by_operator_events,
    diagnose_deployment,
    diagnose_pod,
    is_being_deleted,
    is_ready,
    log_tail,
)
from cortex_dask.errors import ClusterError

#: The coordinator that uses a cluster; one that finds the token of another leaves the cluster alone.
_OWNER = "cortex-dask/coordinator"
_FINGERPRINT = "cortex-dask/fingerprint"
_JOB_URL = "cortex-dask/job-url"
_POLL_SECONDS = 0.5
_OPERATOR_SECONDS = 60.0  # an operator that runs acts long before
_SILENT_SECONDS = 10.0  # in which a scheduler usually comes up, so nothing is reported
_REMOVAL_SECONDS = 15.0  # an operator that runs takes about one


class OperatorCluster:
    """One cluster of the operator."""

    def __init__(
        self,
        api: KubeApi,
        manifest: Mapping[str, Any],  # the DaskCluster
        owner: str,  # a token of the coordinator that uses it
        closing: threading.Event,  # ends waiting
        report: Callable[[str], None] = lambda text: None,  # receives what is waited for, once that takes long
    ) -> None:
        metadata = manifest["metadata"]
        annotations = {**metadata["annotations"], _OWNER: owner}
        self._manifest = {**manifest, "metadata": {**metadata, "annotations": annotations}}
        self._api = api
        self._owner = owner
        self._closing = closing
        self._report = report
        self.name: str = metadata["name"]

    @property
    def where(self) -> str:
        """The cluster, for messages."""
        return f"the DaskCluster {self.name} in the namespace {self._api.namespace}"

    # coming up ------------------------------------------------------------------------------------------------------

    def claim(self, deadline: float) -> None:
        """Create the cluster, or take over that of an earlier coordinator of the job.

        Raises ClusterError if there is a cluster of this name that belongs to another job.
        """
        while True:
            found = self._api.get("DaskCluster", self.name)
            if found is None:
                try:
                    self._api.create(self._manifest)
                    return
                except RefusedError as error:
                    if error.code != 409:  # created at the same moment by another coordinator
                        raise
            elif not is_being_deleted(found) and self._matches(found):
                self._take_over(found)
                return
            self._wait(
                deadline,
                f"an earlier one is still being removed, which the Dask operator does: does it run? (kubectl describe "
                f"daskcluster {self.name})",
            )

    def _matches(self, found: Mapping[str, Any]) -> bool:
        """Return whether a cluster is as it would be created now; delete one that is not."""
        annotations, wanted = found["metadata"].get("annotations", {}), self._manifest["metadata"]["annotations"]
        if annotations.get(_JOB_URL) != wanted[_JOB_URL]:
            raise ClusterError(f"{self.where} is there already and was not made for this job: remove it, or rename it")
        if annotations.get(_FINGERPRINT) == wanted[_FINGERPRINT]:
            return True
        self._api.delete("DaskCluster", self.name, uid=found["metadata"]["uid"])
        return False

    def _take_over(self, found: Mapping[str, Any]) -> None:
        metadata: dict[str, Any] = {"annotations": {_OWNER: self._owner}}
        if owners := self._manifest["metadata"].get("ownerReferences"):
            others = [item for item in found["metadata"].get("ownerReferences", []) if item["uid"] != owners[0]["uid"]]
            metadata["ownerReferences"] = [*others, *owners]
        self._api.patch("DaskCluster", self.name, {"metadata": metadata})

    def wait_for_scheduler(self, deadline: float) -> dict[str, Any]:
        """Wait until the scheduler answers, and return its pod.

        Raises ClusterError with the reason at the deadline, or as soon as it is certain that it never will answer.
        """
        started = time.monotonic()
        while True:
            pod = self.scheduler()
            if pod is not None:
                return pod
            cluster = self._api.get("DaskCluster", self.name)
            if cluster is None or is_being_deleted(cluster):
                raise ClusterError(f"{self.where} was removed while it came up")
            problem = self._diagnose_scheduler(cluster)
            is_ignored = not cluster.get("status", {}).get("phase")
            if is_ignored and time.monotonic() - started > _OPERATOR_SECONDS:
                reason = problem.reason if problem else self._ignored()
                problem = PodProblem(f"{reason} ({_OPERATOR_SECONDS:.0f} s)", is_permanent=True)
            if problem is not None and problem.is_permanent:
                raise ClusterError(f"{self.where} does not come up: {problem.reason}")
            reason = problem.reason if problem else "its scheduler's pod starts, and does not answer yet"
            if time.monotonic() - started > _SILENT_SECONDS:
                self._report(f"waiting for the cluster: {reason}")
            self._wait(deadline, reason)

    def scheduler(self) -> dict[str, Any] | None:
        """Return the scheduler's pod, or None if it does not answer."""
        return next((pod for pod in self._pods("scheduler") if is_ready(pod)), None)

    def _wait(self, deadline: float, reason: str) -> None:
        if self._closing.wait(_POLL_SECONDS):
            raise ClusterError(f"{self.where} is not waited for any longer")
        if time.monotonic() > deadline:
            raise ClusterError(
                f"{self.where} has not come up in time: {reason} (--cluster-option start_timeout=SECONDS allows more)"
            )

    # problems -------------------------------------------------------------------------------------------------------

    def _ignored(self) -> str:
        return (
            "the Dask operator has done nothing about it: does it run, and does it watch the namespace "
            f"{self._api.namespace}?"
        )

    def _diagnose_scheduler(self, cluster: Mapping[str, Any]) -> PodProblem | None:
        events = self._api.warnings()
        for pod in self._pods("scheduler"):
            if not is_being_deleted(pod) and (problem := diagnose_pod(pod, events)) is not None:
                reason = f"its scheduler's pod {pod['metadata']['name']}: {problem.reason}"
                return PodProblem(reason + self._log_tail(pod, problem), problem.is_permanent)
        for deployment in self._deployments("scheduler"):
            if (problem := diagnose_deployment(deployment)) is not None:
                return PodProblem(f"its scheduler: {problem.reason}", problem.is_permanent)
        if cluster.get("status", {}).get("phase") == "Error":
            problem = diagnose_by_operator_events([self.name], events)
            return PodProblem(problem.reason if problem else "the Dask operator refuses it", is_permanent=True)
        if not cluster.get("status", {}).get("phase"):
            return PodProblem(self._ignored())
        return diagnose_by_operator_events([self.name], events)

    def diagnose_workers(self) -> str | None:
        """Return why there are fewer workers than requested, or None if no problem is known."""
        group = self._worker_group()
        requested = 0 if group is None else int(group["spec"]["worker"]["replicas"])
        events = self._api.warnings()
        pods = [pod for pod in self._pods("worker") if not is_being_deleted(pod)]
        deployments = self._deployments("worker")
        reasons = [
            problem.reason + self._log_tail(pod, problem)
            for pod in pods
            if (problem := diagnose_pod(pod, events)) is not None
        ]
        reasons += [problem.reason for item in deployments if (problem := diagnose_deployment(item)) is not None]
        if reasons:
            most_frequent = max(reasons, key=reasons.count)
            return f"{_pods_as_text(len(reasons), requested)} cannot run: {most_frequent}"
        if len(deployments) < requested:
            reported = diagnose_by_operator_events([self.name, f"{self.name}-default"], events)
            reason = reported.reason if reported else self._ignored()
            return f"only {len(deployments)} of the {requested} workers that were asked for were made: {reason}"
        starting = sum(1 for pod in pods if not is_ready(pod))
        return (
            f"{_pods_as_text(starting, requested)} {'is' if requested == 1 else 'are'} starting" if starting else None
        )

    def _log_tail(self, pod: Mapping[str, Any], problem: PodProblem) -> str:
        return log_tail(self._api, pod["metadata"]["name"], problem.container) if problem.container else ""

    # sizes ----------------------------------------------------------------------------------------------------------

    def scale_up(self, workers: int) -> None:
        """Request so many workers, if fewer are requested now."""
        if self._replicas() < workers:
            self._set_replicas(workers)

    def workers(self) -> list[str]:
        """Return the names of the workers' Deployments, the oldest first; the Dask workers have the same names."""
        deployments = sorted(self._deployments("worker"), key=lambda item: item["metadata"]["creationTimestamp"])
        return [item["metadata"]["name"] for item in deployments]

    def has_all_workers(self) -> bool:
        """Return whether the operator has made as many workers as were requested."""
        return len(self.workers()) == self._replicas()

    def remove_workers(self, names: Iterable[str]) -> None:
        """Remove these workers, and no others.

        The operator, asked for fewer workers, has the scheduler choose among those that are connected. So it would keep
        pods that wait for a node in vain, and end workers instead, even busy ones. It counts Deployments, so when those
        are deleted before the number is lowered, it finds nothing to do.
        """
        deleted = sum(self._api.delete("Deployment", name) for name in names)
        if deleted:
            self._set_replicas(max(self._replicas() - deleted, 0))

    def _replicas(self) -> int:
        # The operator makes the worker group after the scheduler, whose pod may be ready before that.
        deadline = time.monotonic() + _OPERATOR_SECONDS
        while (group := self._worker_group()) is None:
            if time.monotonic() > deadline or self._closing.wait(_POLL_SECONDS):
                raise ClusterError(f"{self.where} has no worker group yet: {self._ignored()}")
        return int(group["spec"]["worker"]["replicas"])

    def _set_replicas(self, workers: int) -> None:
        self._api.patch("DaskWorkerGroup", f"{self.name}-default", {"spec": {"worker": {"replicas": workers}}})

    # ending ---------------------------------------------------------------------------------------------------------

    def exists(self) -> bool:
        """Return whether the cluster exists and is not being deleted."""
        cluster = self._api.get("DaskCluster", self.name)
        return cluster is not None and not is_being_deleted(cluster)

    def remove(self) -> str | None:
        """Remove the cluster unless another coordinator uses it; return a sentence if something is left.

        It does not wait for an operator that is down: the pods are removed without it, the object goes when it is back.
        """
        cluster = self._api.get("DaskCluster", self.name)
        if cluster is None:
            return None
        uid = cluster["metadata"]["uid"]
        if cluster["metadata"].get("annotations", {}).get(_OWNER) not in (None, self._owner):
            return None
        self._api.delete("DaskCluster", self.name, uid=uid)
        return wait_until_removed(self._api, self.name, uid)

    # objects --------------------------------------------------------------------------------------------------------

    def _worker_group(self) -> dict[str, Any] | None:
        return self._api.get("DaskWorkerGroup", f"{self.name}-default")

    def _labels(self, component: str) -> dict[str, str]:
        return {"dask.org/cluster-name": self.name, "dask.org/component": component}

    def _pods(self, component: str) -> list[dict[str, Any]]:
        return self._api.list("Pod", labels=self._labels(component))

    def _deployments(self, component: str) -> list[dict[str, Any]]:
        return [
            item for item in self._api.list("Deployment", labels=self._labels(component)) if not is_being_deleted(item)
        ]


def wait_until_removed(api: KubeApi, name: str, uid: str) -> str | None:
    """Wait until a deleted cluster is gone, or remove its pods without the operator; return what is left."""
    deadline = time.monotonic() + _REMOVAL_SECONDS
    while True:
        cluster = api.get("DaskCluster", name)
        if cluster is None or cluster["metadata"]["uid"] != uid:
            return None
        if time.monotonic() > deadline:
            break
        time.sleep(_POLL_SECONDS)
    for deployment in api.list("Deployment", labels={"dask.org/cluster-name": name}):
        api.delete("Deployment", deployment["metadata"]["name"])
    return (
        f"the DaskCluster {name} in the namespace {api.namespace} goes when the Dask operator, which does not react, "
        "is back; its pods were removed"
    )


def _pods_as_text(part: int, whole: int) -> str:
    if whole == 1:
        return "its worker's pod"
    return f"all {whole} of its workers' pods" if part >= whole else f"{part} of its {whole} workers' pods"
