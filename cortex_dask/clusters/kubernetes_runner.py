"""The runner of a job on Kubernetes: a ``Job`` whose pod is the coordinator.

It is made by whoever submits the job, who may then go. It is started again when it dies, with its node or by itself,
and finds its cluster by name. The cluster belongs to it, so removing the ``Job`` removes all that the job has there.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import logging
import os
import signal
import sys
import time
from collections.abc import Mapping
from types import FrameType
from typing import Any

from cortex_dask.clusters import records
from cortex_dask.clusters.kube_api import KubeApi
from cortex_dask.clusters.kubernetes_check import check_cluster, check_paths, check_runner
from cortex_dask.clusters.kubernetes_options import NAMESPACE_VARIABLE, KubernetesOptions
from cortex_dask.clusters.manifests import POD_VARIABLE, dask_cluster, runner_job
from cortex_dask.clusters.pod_trouble import is_going, log_of, trouble_of_object, trouble_of_pod
from cortex_dask.errors import ClusterError, CortexDaskError, JobRunningError, StorageError
from cortex_dask.io.settings import JobSettings
from cortex_dask.progress import parse_time

__all__ = ["has_ended", "is_here", "main", "owner", "start"]

_log = logging.getLogger(__name__)

_START_SECONDS = 30.0  # for a runner to start, before whoever has submitted the job goes
_GONE_SECONDS = 30.0  # for an earlier runner to be removed
_POLL_SECONDS = 0.5
_OTHER_SECONDS = 2.0  # between two looks whether another coordinator has gone
_EVICTED = 143  # the exit code of a process that was asked to end


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


def main() -> None:
    """Run the job of the command line; the pod's main process.

    The exit code tells Kubernetes whether to start it again: 0 when the job's status says how it has ended, whatever
    that is, and something else when this process could not even say that.
    """
    parser = argparse.ArgumentParser(prog="python -m cortex_dask.clusters.kubernetes_runner")
    parser.add_argument("job_url")
    parser.add_argument("--retry", action="store_true", help="handle the failed batches again")
    given = parser.parse_args()
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    signal.signal(signal.SIGTERM, _leave)
    sys.exit(run(given.job_url, retry=given.retry))


def run(job_url: str, *, retry: bool = False) -> int:
    """Run a job to its end and return the exit code."""
    from cortex_dask.runtime import coordinator

    begin = coordinator.retry_failed if retry else coordinator.run_job
    while True:
        try:
            if _was_stopped(job_url):
                _log.info("the job was stopped while this runner was waited for")
                return 0
            document = begin(job_url, cluster="kubernetes")
        except JobRunningError as error:
            # A runner that was lost a moment ago still seems to run, until its last sign of life is old enough.
            _log.info("%s; waiting", error)
            time.sleep(_OTHER_SECONDS)
        except StorageError as error:
            _log.error("%s", error)
            return 1  # nobody could be told, so it is tried again later
        except CortexDaskError as error:
            _log.error("%s", error)
            _note(job_url, error)
            return 0
        else:
            _log.info("the job has ended: %s %s", document["status"], document.get("status_reason") or "")
            return 0


def _was_stopped(job_url: str) -> bool:
    """Whether somebody has stopped the job since this runner was made: it may have waited for a node for hours."""
    from cortex_dask.io.job_directory import JobDirectory
    from cortex_dask.runtime.status import FINAL_STATUSES, StatusBoard

    directory = JobDirectory(job_url)
    document = directory.read_json("status.json") or {}
    request = directory.stop_request()
    if request is not None and document.get("status") not in FINAL_STATUSES:
        # Nobody was there to take it; a coordinator, once it begins, would take it for an old one.
        board = StatusBoard(directory.settings())
        board.end(request["status"], request["reason"])
        directory.write_json("status.json", board.document())
        return True
    ended = parse_time(document.get("end_time"))
    if document.get("status") != "stopped" or ended is None:
        return False
    with KubeApi(namespace=os.environ.get(NAMESPACE_VARIABLE)) as api:
        reference = owner(api)
        job = None if reference is None else api.get("Job", reference["name"])
    made = None if job is None else parse_time(job["metadata"]["creationTimestamp"])
    return made is not None and made < ended


def _leave(number: int, frame: FrameType | None) -> None:
    """End at once: the node goes, and another runner goes on where the ledger ends.

    To stop the job, as a coordinator at a terminal does, would be wrong: nobody has asked for that. The cluster stays.
    """
    os._exit(_EVICTED)


def _note(job_url: str, error: CortexDaskError) -> None:
    """Write the status of a job that its coordinator could not even begin to run."""
    from cortex_dask.io.job_directory import JobDirectory
    from cortex_dask.runtime.status import FINAL_STATUSES, StatusBoard

    with contextlib.suppress(CortexDaskError, OSError):
        job = JobDirectory(job_url)
        if (job.read_json("status.json") or {}).get("status") not in FINAL_STATUSES:
            board = StatusBoard(job.settings())
            board.end("worker error", str(error))
            job.write_json("status.json", board.document())


if __name__ == "__main__":
    main()
