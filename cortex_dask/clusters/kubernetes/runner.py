"""The runner of a job on Kubernetes, a ``Job`` whose pod is the coordinator: created, found and recognised.

The submitter creates it, and may then leave. The ``Job`` starts it again when it dies, with its node or by itself, and
it finds its cluster by name. It owns the cluster, so removing the ``Job`` removes all that the job has there.
:mod:`cortex_dask.clusters.kubernetes.runner_main` is what its pod runs.
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
from cortex_dask.clusters.kubernetes.diagnosis import diagnose_by_warnings, diagnose_pod, is_being_deleted, log_tail
from cortex_dask.clusters.kubernetes.manifests import POD_VARIABLE, make_dask_cluster, make_runner_job
from cortex_dask.clusters.kubernetes.options import KubernetesOptions
from cortex_dask.clusters.kubernetes.preflight import check_cluster, check_paths, check_runner
from cortex_dask.errors import ClusterError
from cortex_dask.io.job.settings import JobSettings

_START_SECONDS = 30.0  # for a runner to start, while its submitter waits
_REMOVAL_SECONDS = 30.0  # for an earlier runner to be removed
_POLL_SECONDS = 0.5

_log = logging.getLogger(__name__)


# recognised -----------------------------------------------------------------------------------------------------------


def is_runner() -> bool:
    """Return whether this process is in the pod of a runner."""
    return POD_VARIABLE in os.environ


def owner_reference(api: KubeApi) -> dict[str, Any] | None:
    """Return the ``ownerReferences`` entry for the ``Job`` of this process, or None if it is no runner."""
    if not is_runner():
        return None
    pod = api.get("Pod", os.environ[POD_VARIABLE])
    for reference in [] if pod is None else pod["metadata"].get("ownerReferences", []):
        if reference["kind"] == "Job":
            return {key: reference[key] for key in ("apiVersion", "kind", "name", "uid")}
    return None


def has_finished(job: Mapping[str, Any]) -> bool:
    """Return whether a ``Job`` is complete or failed."""
    conditions = job.get("status", {}).get("conditions") or ()
    return any(item["type"] in ("Complete", "Failed") and item["status"] == "True" for item in conditions)


# created --------------------------------------------------------------------------------------------------------------


def start_runner(job_url: str, settings: JobSettings, *, retry: bool = False) -> None:
    """Check all that can be checked, start a runner, and return when it runs.

    Raises SpecError if the job cannot run in pods, ClusterError if Kubernetes refuses it.
    """
    options = KubernetesOptions.from_settings(settings)
    with KubeApi(namespace=options.namespace, kubeconfig=options.kubeconfig, context=options.context) as api:
        options = dataclasses.replace(options, namespace=api.namespace)
        cluster = make_dask_cluster(job_url, settings, options)
        job = make_runner_job(job_url, settings, options, retry=retry)
        check_paths(job_url, settings, cluster)
        check_cluster(api, cluster)
        check_runner(api, job)
        name = job["metadata"]["name"]
        record = records.write(job_url, "kubernetes", name, api.namespace, is_detached=True)
        if _is_active(api, name):
            return
        created = api.create(job)
        try:
            _wait_until_running(api, created, min(_START_SECONDS, options.start_timeout))
        except ClusterError:
            api.delete("Job", name, uid=created["metadata"]["uid"])
            records.delete(record)
            raise


def _is_active(api: KubeApi, name: str) -> bool:
    """Return whether there is a runner that runs or will; remove one that has finished."""
    deadline = time.monotonic() + _REMOVAL_SECONDS
    while (found := api.get("Job", name)) is not None:
        if not is_being_deleted(found):
            if not has_finished(found):
                return True
            api.delete("Job", name, uid=found["metadata"]["uid"])
        if time.monotonic() > deadline:
            raise ClusterError(f"the Job {name} in the namespace {api.namespace}, an earlier runner, does not go")
        time.sleep(_POLL_SECONDS)
    return False


def _wait_until_running(api: KubeApi, job: Mapping[str, Any], seconds: float) -> None:
    """Wait until the runner's pod runs, for its submitter would not see later what keeps it from running.

    Raises ClusterError if it cannot start. A runner that only waits for a node or its image is left to itself.
    """
    name = job["metadata"]["name"]
    deadline = time.monotonic() + seconds
    was_running = False
    while True:
        events = api.warnings()
        pods = api.list("Pod", labels={"job-name": name})
        problem = next((problem for pod in pods if (problem := diagnose_pod(pod, events)) is not None), None)
        if not pods:
            problem = diagnose_by_warnings(job, events)
        is_running = any(_has_started(pod) for pod in pods)
        if problem is None and is_running and was_running:
            return
        was_running = is_running
        is_late = time.monotonic() > deadline
        if problem is not None and (problem.is_permanent or (is_late and not problem.is_lack_of_room)):
            log = log_tail(api, pods[0]["metadata"]["name"], problem.container) if problem.container else ""
            raise ClusterError(
                f"the runner {name} in the namespace {api.namespace} does not start, so the job was not started: "
                f"{problem.reason}{log}"
            )
        if is_late:
            _log.warning("the runner %s has not started yet%s", name, f": {problem.reason}" if problem else "")
            return
        time.sleep(_POLL_SECONDS)


def _has_started(pod: Mapping[str, Any]) -> bool:
    status = pod.get("status", {})
    if status.get("phase") == "Succeeded":
        return True
    return any("running" in item.get("state", {}) for item in status.get("containerStatuses") or ())
