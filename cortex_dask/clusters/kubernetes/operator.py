"""A cluster of the Dask operator: one ``DaskCluster`` object, what the operator makes of it, and why it does not."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from cortex_dask.clusters.kubernetes.api import KubeApi, Refused
from cortex_dask.clusters.kubernetes.diagnosis import (
    Trouble,
    is_going,
    is_ready,
    log_of,
    trouble_of_deployment,
    trouble_of_events,
    trouble_of_pod,
)
from cortex_dask.errors import ClusterError

#: Who looks after a cluster; a coordinator that finds another one's token leaves the cluster alone.
_OWNER = "cortex-dask/coordinator"
_FINGERPRINT = "cortex-dask/fingerprint"
_JOB_URL = "cortex-dask/job-url"
_POLL_SECONDS = 0.5
_OPERATOR_SECONDS = 60.0  # an operator that runs has acted long before
_PATIENCE = 10.0  # seconds in which a scheduler comes up, as a rule, and nothing has to be said
_GONE_SECONDS = 15.0  # for a cluster to go; with its operator this takes about a second


class OperatedCluster:
    """One cluster of the operator.

    Parameters
    ----------
    api : KubeApi
        The API server.
    manifest : mapping
        The ``DaskCluster``, see :func:`cortex_dask.clusters.kubernetes.manifests.dask_cluster`.
    owner : str
        A token of the coordinator that looks after it.
    closing : threading.Event
        Set when nobody waits for the cluster any longer.
    tell : callable
        Takes what is waited for, once that takes its time.
    """

    def __init__(
        self,
        api: KubeApi,
        manifest: Mapping[str, Any],
        owner: str,
        closing: threading.Event,
        tell: Callable[[str], None] = lambda text: None,
    ) -> None:
        metadata = manifest["metadata"]
        annotations = {**metadata["annotations"], _OWNER: owner}
        self._manifest = {**manifest, "metadata": {**metadata, "annotations": annotations}}
        self._api = api
        self._owner = owner
        self._closing = closing
        self._tell = tell
        self.name: str = metadata["name"]

    @property
    def where(self) -> str:
        """The cluster, for messages."""
        return f"the DaskCluster {self.name} in the namespace {self._api.namespace}"

    # coming up ------------------------------------------------------------------------------------------------------

    def claim(self, deadline: float) -> None:
        """Make the cluster, or take over the one that an earlier coordinator of the job has left.

        Raises
        ------
        ClusterError
            If another one of this name is there.
        """
        while True:
            there = self._api.get("DaskCluster", self.name)
            if there is None:
                try:
                    self._api.create(self._manifest)
                    return
                except Refused as error:
                    if error.code != 409:  # somebody has made it at the same moment
                        raise
            elif not is_going(there) and self._fits(there):
                self._take(there)
                return
            self._pause(
                deadline,
                f"an earlier one is still being removed, which the Dask operator does: does it run? (kubectl describe "
                f"daskcluster {self.name})",
            )

    def _fits(self, there: Mapping[str, Any]) -> bool:
        """Whether a cluster is what would be made now; one that was made differently is removed."""
        annotations, wanted = there["metadata"].get("annotations", {}), self._manifest["metadata"]["annotations"]
        if annotations.get(_JOB_URL) != wanted[_JOB_URL]:
            raise ClusterError(f"{self.where} is there already and was not made for this job: remove it, or rename it")
        if annotations.get(_FINGERPRINT) == wanted[_FINGERPRINT]:
            return True
        self._api.delete("DaskCluster", self.name, uid=there["metadata"]["uid"])
        return False

    def _take(self, there: Mapping[str, Any]) -> None:
        metadata: dict[str, Any] = {"annotations": {_OWNER: self._owner}}
        if owners := self._manifest["metadata"].get("ownerReferences"):
            others = [item for item in there["metadata"].get("ownerReferences", []) if item["uid"] != owners[0]["uid"]]
            metadata["ownerReferences"] = [*others, *owners]
        self._api.patch("DaskCluster", self.name, {"metadata": metadata})

    def await_scheduler(self, deadline: float) -> dict[str, Any]:
        """Wait until the scheduler answers, and return its pod.

        Raises
        ------
        ClusterError
            If it does not by then, or when it is certain that it never will; with the reason.
        """
        begun = time.monotonic()
        while True:
            pod = self.scheduler()
            if pod is not None:
                return pod
            there = self._api.get("DaskCluster", self.name)
            if there is None or is_going(there):
                raise ClusterError(f"{self.where} was removed while it came up")
            found = self._trouble_of_scheduler(there)
            is_ignored = not there.get("status", {}).get("phase")
            if is_ignored and time.monotonic() - begun > _OPERATOR_SECONDS:
                found = Trouble(f"{found.reason if found else self._ignored()} ({_OPERATOR_SECONDS:.0f} s)", True)
            if found is not None and found.is_hopeless:
                raise ClusterError(f"{self.where} does not come up: {found.reason}")
            reason = found.reason if found else "its scheduler's pod starts, and does not answer yet"
            if time.monotonic() - begun > _PATIENCE:
                self._tell(f"waiting for the cluster: {reason}")
            self._pause(deadline, reason)

    def scheduler(self) -> dict[str, Any] | None:
        """Return the scheduler's pod when it answers."""
        return next((pod for pod in self._pods("scheduler") if is_ready(pod)), None)

    def _pause(self, deadline: float, reason: str) -> None:
        if self._closing.wait(_POLL_SECONDS):
            raise ClusterError(f"{self.where} is not waited for any longer")
        if time.monotonic() > deadline:
            raise ClusterError(
                f"{self.where} has not come up in time: {reason} (--cluster-option start_timeout=SECONDS allows more)"
            )

    # trouble --------------------------------------------------------------------------------------------------------

    def _ignored(self) -> str:
        return (
            "the Dask operator has done nothing about it: does it run, and does it watch the namespace "
            f"{self._api.namespace}?"
        )

    def _trouble_of_scheduler(self, there: Mapping[str, Any]) -> Trouble | None:
        events = self._api.warnings()
        for pod in self._pods("scheduler"):
            if not is_going(pod) and (found := trouble_of_pod(pod, events)) is not None:
                said = f"its scheduler's pod {pod['metadata']['name']}: {found.reason}"
                return Trouble(said + self._log(pod, found), found.is_hopeless)
        for deployment in self._deployments("scheduler"):
            if (found := trouble_of_deployment(deployment)) is not None:
                return Trouble(f"its scheduler: {found.reason}", found.is_hopeless)
        if there.get("status", {}).get("phase") == "Error":
            found = trouble_of_events([self.name], events)
            return Trouble(found.reason if found else "the Dask operator refuses it", True)
        if not there.get("status", {}).get("phase"):
            return Trouble(self._ignored())
        return trouble_of_events([self.name], events)

    def trouble(self) -> str | None:
        """Return why there are fewer workers than were asked for; None where nothing is known to be wrong."""
        group = self._group()
        wanted = 0 if group is None else int(group["spec"]["worker"]["replicas"])
        events = self._api.warnings()
        pods = [pod for pod in self._pods("worker") if not is_going(pod)]
        deployments = self._deployments("worker")
        found: list[Trouble] = [
            Trouble(trouble.reason + self._log(pod, trouble))
            for pod in pods
            if (trouble := trouble_of_pod(pod, events)) is not None
        ]
        found += [trouble for item in deployments if (trouble := trouble_of_deployment(item)) is not None]
        if found:
            reasons = [trouble.reason for trouble in found]
            most = max(reasons, key=reasons.count)
            return f"{_pods(len(found), wanted)} cannot run: {most}"
        if len(deployments) < wanted:
            told = trouble_of_events([self.name, f"{self.name}-default"], events)
            reason = told.reason if told else self._ignored()
            return f"only {len(deployments)} of the {wanted} workers that were asked for were made: {reason}"
        starting = sum(1 for pod in pods if not is_ready(pod))
        return f"{_pods(starting, wanted)} {'is' if wanted == 1 else 'are'} starting" if starting else None

    def _log(self, pod: Mapping[str, Any], found: Trouble) -> str:
        return log_of(self._api, pod["metadata"]["name"], found.container) if found.container else ""

    # sizes ----------------------------------------------------------------------------------------------------------

    def grow(self, workers: int) -> None:
        """Ask for so many workers, if there are fewer."""
        if self._replicas() < workers:
            self._set(workers)

    def workers(self) -> list[str]:
        """Return the names of the workers that were made, the oldest first; they are the Dask workers' names too."""
        made = self._deployments("worker")
        return [
            item["metadata"]["name"] for item in sorted(made, key=lambda item: item["metadata"]["creationTimestamp"])
        ]

    def is_settled(self) -> bool:
        """Whether there are as many workers as were asked for."""
        return len(self.workers()) == self._replicas()

    def let_go(self, names: Iterable[str]) -> None:
        """Remove these workers, and no others.

        The operator, asked for fewer workers, asks the scheduler which of those that are connected it can do without.
        It would keep the pods that wait for a node in vain and end workers instead, busy ones if need be. It counts
        Deployments, so when those are gone before the number is lowered, it finds nothing to do.
        """
        gone = sum(self._api.delete("Deployment", name) for name in names)
        if gone:
            self._set(max(self._replicas() - gone, 0))

    def _replicas(self) -> int:
        group = self._group()
        if group is None:
            raise ClusterError(f"{self.where} has no worker group yet")
        return int(group["spec"]["worker"]["replicas"])

    def _set(self, workers: int) -> None:
        self._api.patch("DaskWorkerGroup", f"{self.name}-default", {"spec": {"worker": {"replicas": workers}}})

    # ending ---------------------------------------------------------------------------------------------------------

    def exists(self) -> bool:
        """Whether the cluster is there, and stays."""
        there = self._api.get("DaskCluster", self.name)
        return there is not None and not is_going(there)

    def end(self) -> str | None:
        """Remove the cluster unless another coordinator looks after it; returns what is left, as a sentence.

        It does not wait for an operator that is down: the pods are removed without it, the object goes when it is back.
        """
        there = self._api.get("DaskCluster", self.name)
        if there is None:
            return None
        uid = there["metadata"]["uid"]
        if there["metadata"].get("annotations", {}).get(_OWNER) not in (None, self._owner):
            return None
        self._api.delete("DaskCluster", self.name, uid=uid)
        return remove_the_rest(self._api, self.name, uid)

    # what there is --------------------------------------------------------------------------------------------------

    def _group(self) -> dict[str, Any] | None:
        return self._api.get("DaskWorkerGroup", f"{self.name}-default")

    def _labels(self, component: str) -> dict[str, str]:
        return {"dask.org/cluster-name": self.name, "dask.org/component": component}

    def _pods(self, component: str) -> list[dict[str, Any]]:
        return self._api.list("Pod", labels=self._labels(component))

    def _deployments(self, component: str) -> list[dict[str, Any]]:
        return [item for item in self._api.list("Deployment", labels=self._labels(component)) if not is_going(item)]


def remove_the_rest(api: KubeApi, name: str, uid: str) -> str | None:
    """Wait until a cluster that was deleted is gone; remove its pods where the operator does not.

    Returns
    -------
    str or None
        What is left, as a sentence.
    """
    deadline = time.monotonic() + _GONE_SECONDS
    while True:
        there = api.get("DaskCluster", name)
        if there is None or there["metadata"]["uid"] != uid:
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


def _pods(part: int, whole: int) -> str:
    if whole == 1:
        return "its worker's pod"
    return f"all {whole} of its workers' pods" if part >= whole else f"{part} of its {whole} workers' pods"
