"""Clusters that run for jobs, and those that no job needs any more.

A cluster ends with its job. What is left over is that of a submitter, or a coordinator, that was killed: it ends by
itself after its idle timeout, and :func:`end_clusters` ends it now.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from cortex_dask.clusters import records
from cortex_dask.clusters.gateway import cluster as gateway
from cortex_dask.clusters.kubernetes import cluster as kubernetes
from cortex_dask.clusters.records import ClusterRecord, RunningCluster
from cortex_dask.environments import Environment
from cortex_dask.errors import ClusterError, JobNotFoundError, SpecError
from cortex_dask.io.job.directory import JobDirectory
from cortex_dask.io.job.status import FINAL_STATUSES
from cortex_dask.io.store.store import Store
from cortex_dask.runtime.coordinator.heartbeat import running_elsewhere

#: A cluster that is younger is left alone, whatever its job says: its coordinator may not have started yet.
_YOUNG = 600.0


@dataclass(frozen=True, slots=True)
class Backend:
    """How to list and end the clusters of a backend; both raise :class:`ClusterError` when it does not answer."""

    running: Callable[[Mapping[str, Any], Sequence[ClusterRecord]], list[RunningCluster]]
    close: Callable[[RunningCluster, Mapping[str, Any]], None]


#: The backends that start clusters for jobs.
BACKENDS = {
    "gateway": Backend(gateway.running_clusters, gateway.close_cluster),
    "kubernetes": Backend(kubernetes.running_clusters, kubernetes.close_cluster),
}


def find_clusters(environment: Environment) -> tuple[list[RunningCluster], list[str]]:
    """Return the clusters of an environment's jobs, and a sentence for each backend that cannot be asked.

    The environment's backend is asked, and each that a record of one of its jobs names.
    """
    recorded = list(records.all_records(Store(environment.store)))
    names = {record.backend for record in recorded} | {environment.cluster}
    found: list[RunningCluster] = []
    problems = []
    for name in sorted(names & BACKENDS.keys()):
        own = [record for record in recorded if record.backend == name]
        try:
            running = BACKENDS[name].running(_options(environment, name), own)
        except (ClusterError, SpecError) as error:
            problems.append(str(error))
            continue
        found += [_with_job(cluster, own, Store(environment.store).url) for cluster in running]
        _delete_old_records(running, own)
    return found, problems


def end_clusters(environment: Environment, clusters: Iterable[RunningCluster]) -> list[RunningCluster]:
    """End clusters, and return them; raises :class:`ClusterError` at the first one that cannot be ended."""
    ended = []
    for cluster in clusters:
        BACKENDS[cluster.backend].close(cluster, _options(environment, cluster.backend))
        record = None if cluster.job_url is None else records.find(cluster.job_url)
        if record is not None and record.name == cluster.name:
            records.delete(record)
        ended.append(cluster)
    return ended


def _options(environment: Environment, backend: str) -> Mapping[str, Any]:
    return environment.cluster_options if environment.cluster == backend else {}


def _with_job(cluster: RunningCluster, recorded: Sequence[ClusterRecord], store: str) -> RunningCluster:
    """Add what the job's directory says."""
    record = next((item for item in recorded if item.name == cluster.name and item.where == cluster.where), None)
    url = cluster.job_url if record is None else record.job_url
    if url is None or not url.startswith(f"{store}/jobs/"):
        return cluster  # of another environment, or unknown: not for us to end
    created = cluster.created_time or (None if record is None else record.created_time)
    job = JobDirectory(url)
    try:
        settings = job.settings()
    except JobNotFoundError:
        return replace(cluster, job_url=url, created_time=created, is_needed=False)
    document = job.read_json("status.json") or {}
    status = document.get("status", "enqueuing")
    is_live = running_elsewhere(document, "") is not None if document else False
    if status in FINAL_STATUSES:
        is_needed = False
    else:
        is_coming = record is None or record.is_detached
        is_needed = is_live or (is_coming and time.time() - (created or 0.0) < _YOUNG)
        status = status if is_needed else f"{status}, without a coordinator"
    return replace(
        cluster,
        job_id=settings.job_id,
        api_name=settings.api_name,
        job_url=job.url,
        status=status,
        created_time=created,
        is_needed=is_needed,
    )


def _delete_old_records(running: Iterable[RunningCluster], recorded: Iterable[ClusterRecord]) -> None:
    """Delete the records of clusters that are gone: by their idle timeout, or because a user has ended them."""
    names = {cluster.name for cluster in running}
    for record in recorded:
        if record.name not in names and time.time() - record.created_time > _YOUNG:
            records.delete(record)
