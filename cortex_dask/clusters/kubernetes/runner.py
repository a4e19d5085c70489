"""The runner of a job on Kubernetes: a ``Job`` whose pod is the coordinator.

It is made by whoever submits the job, who may then go. It is started again when it dies, with its node or by itself,
and finds its cluster by name. The cluster belongs to it, so removing the ``Job`` removes all that the job has there.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import time
from collections.abc import Mapping
from typing import Any

from cortex_dask.clusters import records
from cortex_dask.clusters.kubernetes.api import KubeApi
from cortex_dask.clusters.kubernetes.diagnosis import is_going, log_of, trouble_of_object, trouble_of_pod
from cortex_dask.clusters.kubernetes.manifests import POD_VARIABLE, dask_cluster, runner_job
from cortex_dask.clusters.kubernetes.options import KubernetesOptions
from cortex_dask.clusters.kubernetes.preflight import check_cluster, check_paths, check_runner
from cortex_dask.errors import ClusterError
from cortex_dask.io.job.settings import JobSettings

_START_SECONDS = 30.0  # for a runner to start, before whoever has submitted the job goes
_log = logging.getLogger(__name__)

_GONE_SECONDS = 30.0  # for an earlier runner to be removed
_POLL_SECONDS = 0.5


def is_here() -> bool:
    """Whether this process is in a runner's pod."""
    return POD_VARIABLE in os.environ


def has_ended(job: Mapping[str, Any]) -> bool:
    """Whether a ``Job`` has come to its end, good or bad."""
    conditions = job.get("status", {}).get("conditions") or ()
    return any(item["type"] in ("Complete", "Failed") and item["status"] == "True" for item in conditions)


def start(job_url: str, settings: JobSettings, *, retry: bool = False) -> None:
    """Start a runner, and return when it runs; everything that can be checked is checked before.

    Parameters
    ----------
    job_url : str
        The job directory.
    settings : JobSettings
        The job's.
    retry : bool, default False
        Whether the failed batches are handled again.

    Raises
    ------
    SpecError
        If the job cannot run in pods.
    ClusterError
        If Kubernetes refuses it.
    """
    options = KubernetesOptions.of(settings)
    with KubeApi(namespace=options.namespace, kubeconfig=options.kubeconfig, context=options.context) as api:
        options = dataclasses.replace(options, namespace=api.namespace)
        cluster = dask_cluster(job_url, settings, options)
        job = runner_job(job_url, settings, options, retry=retry)
        check_paths(job_url, settings, cluster)
        check_cluster(api, cluster)
        check_runner(api, job)
        name = job["metadata"]["name"]
        record = records.keep(job_url, "kubernetes", name, api.namespace, is_detached=True)
        deadline = time.monotonic() + _GONE_SECONDS
        while (there := api.get("Job", name)) is not None:
            if not has_ended(there) and not is_going(there):
                return  # it is about to run, or to be started again
            if not is_going(there):
                api.delete("Job", name, uid=there["metadata"]["uid"])
            if time.monotonic() > deadline:
                raise ClusterError(f"the Job {name} in the namespace {api.namespace}, an earlier runner, does not go")
            time.sleep(_POLL_SECONDS)
        made = api.create(job)
        try:
            _await_start(api, made, min(_START_SECONDS, options.start_timeout))
        except ClusterError:
            api.delete("Job", name, uid=made["metadata"]["uid"])
            records.drop(record)
            raise


def _await_start(api: KubeApi, job: Mapping[str, Any], seconds: float) -> None:
    """Wait a moment until the runner runs: of what keeps it from that, nobody would hear later.

    Raises
    ------
    ClusterError
        If it cannot start. Where it only waits for a node, or its image takes its time, it is left to itself.
    """
    name = job["metadata"]["name"]
    deadline = time.monotonic() + seconds
    has_run = False
    while True:
        events = api.warnings()
        pods = api.list("Pod", labels={"job-name": name})
        found = next((found for pod in pods if (found := trouble_of_pod(pod, events)) is not None), None)
        if not pods:
            found = trouble_of_object(job, events)
        runs = any(_runs(pod) for pod in pods)
        if found is None and runs and has_run:
            return
        has_run = runs
        is_late = time.monotonic() > deadline
        if found is not None and (found.is_hopeless or (is_late and not found.may_pass)):
            text = "" if not found.container else log_of(api, pods[0]["metadata"]["name"], found.container)
            raise ClusterError(
                f"the runner {name} in the namespace {api.namespace} does not start, so the job was not started: "
                f"{found.reason}{text}"
            )
        if is_late:
            _log.warning("the runner %s has not started yet%s", name, f": {found.reason}" if found else "")
            return
        time.sleep(_POLL_SECONDS)


def _runs(pod: Mapping[str, Any]) -> bool:
    status = pod.get("status", {})
    if status.get("phase") == "Succeeded":
        return True
    return any("running" in item.get("state", {}) for item in status.get("containerStatuses") or ())


def owner(api: KubeApi) -> dict[str, Any] | None:
    """Return the ``ownerReferences`` entry of the ``Job`` that this process runs for; None where it is no runner."""
    if not is_here():
        return None
    pod = api.get("Pod", os.environ[POD_VARIABLE])
    for reference in [] if pod is None else pod["metadata"].get("ownerReferences", []):
        if reference["kind"] == "Job":
            return {key: reference[key] for key in ("apiVersion", "kind", "name", "uid")}
    return None
