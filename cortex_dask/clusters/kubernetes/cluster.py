"""Kubernetes: a cluster of the Dask operator for each job, and a runner for a job that outlives its submitter."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import time
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any

from cortex_dask.clusters import records
from cortex_dask.clusters.dask import DaskCluster
from cortex_dask.clusters.kubernetes import runner
from cortex_dask.clusters.kubernetes.api import KubeApi, RefusedError
from cortex_dask.clusters.kubernetes.manifests import MANAGED, make_dask_cluster, scheduler_address, slots_per_worker
from cortex_dask.clusters.kubernetes.operator import OperatorCluster, wait_until_removed
from cortex_dask.clusters.kubernetes.options import KubernetesOptions, check_options
from cortex_dask.clusters.kubernetes.preflight import check_cluster, check_paths
from cortex_dask.clusters.records import RunningCluster
from cortex_dask.clusters.scaling import first_workers
from cortex_dask.errors import ClusterError

if TYPE_CHECKING:
    from distributed import Client

_log = logging.getLogger(__name__)

_CONNECT_SECONDS = 30.0
_CREATION_SECONDS = 20.0  # for requested workers to be made, before others are removed
_POLL_SECONDS = 0.5
_SCHEDULER_PORT = 8786


class Kubernetes(DaskCluster):
    """One ``DaskCluster`` of the operator, made for the job and removed with it.

    From outside the scheduler is reached by forwarding a port through the API server, from a pod by its name.
    """

    name = "kubernetes"
    is_fixed = False

    def __init__(self) -> None:
        super().__init__()
        self._api: KubeApi | None = None
        self._cluster: OperatorCluster | None = None
        self._record: records.ClusterRecord | None = None
        self._requested = 0  # workers, requested again when the whole cluster is lost

    # coming up ------------------------------------------------------------------------------------------------------

    def connect(self) -> Client:
        """Create the cluster, or take over that of an earlier coordinator, and connect to its scheduler."""
        options = KubernetesOptions.from_settings(self.settings)
        deadline = time.monotonic() + options.start_timeout
        self.threads_per_worker = slots_per_worker(self.settings.compute)
        api = self._api = KubeApi(namespace=options.namespace, kubeconfig=options.kubeconfig, context=options.context)
        options = dataclasses.replace(options, namespace=api.namespace)
        manifest = make_dask_cluster(self._job_url, self.settings, options, owner=runner.owner_reference(api))
        check_paths(self._job_url, self.settings, manifest)
        check_cluster(api, manifest)
        name = manifest["metadata"]["name"]
        is_detached = runner.is_runner()
        self._record = records.write(self._job_url, self.name, name, api.namespace, is_detached=is_detached)
        self._cluster = OperatorCluster(api, manifest, self._token, self.closing, self._notice.say)
        self._cluster.claim(deadline)
        pod = self._cluster.wait_for_scheduler(deadline)
        client = self._connect_to(pod, deadline)
        # Not before: workers that wait for a scheduler that never runs would cost money, and are not removed as idle.
        self._requested = first_workers(self.settings, self.threads_per_worker)
        self._notice.say("")
        self._cluster.scale_up(self._requested)
        return client

    def _connect_to(self, pod: Mapping[str, Any], deadline: float) -> Client:
        from distributed import Client

        assert self._api is not None
        assert self._cluster is not None
        if self._api.is_in_cluster:
            address = scheduler_address(self._cluster.name, self._api.namespace)
        else:
            self._api.stop_forwarding()
            address = f"tcp://127.0.0.1:{self._api.forward_port(pod['metadata']['name'], _SCHEDULER_PORT)}"
        while True:
            seconds = min(_CONNECT_SECONDS, max(deadline - time.monotonic(), 1))
            try:
                client = Client(address, set_as_default=False, timeout=seconds)
                break
            except (OSError, TimeoutError) as error:
                if time.monotonic() > deadline or self.closing.is_set():
                    raise ClusterError(
                        f"the scheduler of {self._cluster.where} runs and cannot be reached at {address} ({error}): "
                        "does a network policy forbid it, or is the right to pods/portforward missing?"
                    ) from error
        self._submit_lease(client)
        return client

    def reconnect(self) -> Client | None:
        """Return a client of the scheduler that replaced a lost one, or None if there is none yet."""
        if self._cluster is None:
            return None
        try:
            if not self._cluster.exists():
                self._cluster.claim(time.monotonic() + _CONNECT_SECONDS)  # the whole cluster was removed
            pod = self._cluster.scheduler()
            if pod is None:
                return None
            client = self._connect_to(pod, time.monotonic())
            self._cluster.scale_up(self._requested)
        except RefusedError:
            raise
        except ClusterError as error:
            raise ConnectionError(str(error)) from error  # of the API server: it may come back, as the scheduler may
        return client

    # sizes ----------------------------------------------------------------------------------------------------------

    def resize(self, workers: int) -> None:
        """Request workers, or remove those that have not connected, and then those that are idle."""
        assert self._cluster is not None
        self._requested = workers
        deadline = time.monotonic() + _CREATION_SECONDS
        while not self._cluster.has_all_workers() and time.monotonic() < deadline:
            if self.closing.wait(_POLL_SECONDS):
                break
        names = self._cluster.workers()
        if len(names) <= workers:
            self._cluster.scale_up(workers)
            return
        known = {str(worker["name"]): address for address, worker in self.workers().items()}
        busy = {address for address, tasks in self.client.processing().items() if tasks}
        chosen = choose_workers_to_remove(names, known, busy, len(names) - workers)
        idle = [known[name] for name in chosen if name in known]
        if idle:
            # They get no new split from here on; their pods, and not their processes, are removed below.
            self.client.retire_workers(workers=idle, close_workers=False, remove=False)
        self._cluster.remove_workers(chosen)

    def _lacks_workers(self) -> bool:
        return len(self._threads) < self._requested

    def explain_missing_workers(self) -> str | None:
        """Return why there are no workers: what Kubernetes says about their pods."""
        if self._cluster is None:
            return None
        try:
            return self._cluster.diagnose_workers()
        except ClusterError as error:
            return str(error)

    # ending ---------------------------------------------------------------------------------------------------------

    def shutdown(self) -> None:
        """Remove the cluster, unless another coordinator of the job has taken it over."""
        api, cluster = self._api, self._cluster
        if api is None:
            return
        try:
            left = None if cluster is None else cluster.remove()
        except ClusterError as error:
            seconds = KubernetesOptions.from_settings(self.settings).idle_timeout
            _log.warning(
                "%s; the cluster %s is removed by the Dask operator when it has been idle for %.0f s, or by "
                "cortex-dask clusters gc",
                error,
                "" if cluster is None else cluster.name,
                seconds,
            )
        else:
            if left is not None:
                _log.warning("%s", left)
            # The record of a runner stays as long as the runner's Job, which still exists when the job has ended.
            if self._record is not None and not runner.is_runner():
                records.delete(self._record)
        api.close()
        self._api = None


def choose_workers_to_remove(workers: Sequence[str], known: Mapping[str, str], busy: set[str], count: int) -> list[str]:
    """Return which workers to remove: at most ``count``, those that have not connected, then idle ones, youngest first.

    ``workers`` are the names of all, the oldest first; ``known`` has the addresses of those that are connected, and
    ``busy`` the addresses of those that run something.

    >>> choose_workers_to_remove(["a", "b", "c"], {"a": "tcp://1", "b": "tcp://2"}, {"tcp://1"}, 3)
    ['c', 'b']
    """
    absent = [name for name in reversed(workers) if name not in known]
    idle = [name for name in reversed(workers) if name in known and known[name] not in busy]
    return [*absent, *idle][:count]


# running clusters -----------------------------------------------------------------------------------------------------


def running_clusters(options: Mapping[str, Any], recorded: Sequence[records.ClusterRecord]) -> list[RunningCluster]:
    """Return the clusters that run for jobs, in the namespace of the environment's options and in those of its records.

    A runner without a cluster counts as one: its pod costs little, but the cluster that it will create costs more.
    """
    found: dict[tuple[str, str], RunningCluster] = {}
    configured = str(options["namespace"]) if options.get("namespace") else None
    for namespace in {configured, *(record.where for record in recorded)}:
        with _connected(options, namespace) as api:
            for kind in ("DaskCluster", "Job"):
                for item in api.list(kind, labels=MANAGED):
                    cluster = _running_cluster(item, api.namespace)
                    found.setdefault((cluster.where, cluster.name), cluster)
    return list(found.values())


def close_cluster(cluster: RunningCluster, options: Mapping[str, Any]) -> None:
    """Remove a cluster and its runner, or raise ClusterError."""
    with _connected(options, cluster.where) as api:
        api.delete("Job", cluster.name)  # first, or its pod would create the cluster again
        found = api.get("DaskCluster", cluster.name)
        if found is not None:
            api.delete("DaskCluster", cluster.name)
            left = wait_until_removed(api, cluster.name, found["metadata"]["uid"])
            if left is not None:
                _log.warning("%s", left)


@contextlib.contextmanager
def _connected(options: Mapping[str, Any], namespace: str | None) -> Any:
    checked = check_options(options)
    with KubeApi(namespace=namespace, kubeconfig=checked.get("kubeconfig"), context=checked.get("context")) as api:
        yield api


def _running_cluster(item: Mapping[str, Any], namespace: str) -> RunningCluster:
    metadata = item["metadata"]
    annotations = metadata.get("annotations", {})
    created = datetime.fromisoformat(metadata["creationTimestamp"].replace("Z", "+00:00"))
    has_finished = item["kind"] == "Job" and runner.has_finished(item)
    return RunningCluster(
        backend="kubernetes",
        name=metadata["name"],
        where=namespace,
        job_id=annotations.get("cortex-dask/job-id"),
        api_name=annotations.get("cortex-dask/api-name"),
        created_time=created.timestamp(),
        job_url=annotations.get("cortex-dask/job-url"),
        status="its runner has ended" if has_finished else None,
        is_needed=not has_finished,
    )
