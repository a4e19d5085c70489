"""Clusters that were started for jobs: which there are, which nobody needs any more, and away with those.

A cluster ends with its job. What is left over is that of a submitter, or a coordinator, that was killed: it ends by
itself after its idle timeout, and :func:`collect` ends it now.

Each backend's module has two functions for this: ``running(options, records)`` returns the clusters that run for jobs,
as :class:`RunningCluster`, and ``close(cluster, options)`` ends one. Both raise :class:`ClusterError` when nobody
answers.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from typing import TYPE_CHECKING, Any

from cortex_dask.clusters import records
from cortex_dask.errors import ClusterError, JobNotFoundError, SpecError
from cortex_dask.io.job.directory import JobDirectory
from cortex_dask.io.store.store import Store

if TYPE_CHECKING:
    from types import ModuleType

    from cortex_dask.environments import Environment

__all__ = ["BACKENDS", "RunningCluster", "collect", "survey"]

#: The backends that start something for a job, and their modules, which import the clients of servers.
_MODULES = {
    "gateway": "cortex_dask.clusters.gateway.cluster",
    "kubernetes": "cortex_dask.clusters.kubernetes.cluster",
}
BACKENDS = tuple(_MODULES)
#: A cluster that is younger is left alone, whatever its job says: its coordinator may not have begun yet.
_YOUNG = 600.0


@dataclass(frozen=True, slots=True)
class RunningCluster:
    """A cluster that was started for a job and runs, as its backend tells it."""

    backend: str
    name: str
    where: str  # the gateway's address, the namespace
    job_id: str | None = None
    api_name: str | None = None
    created_time: float | None = None  # seconds since 1970
    job_url: str | None = None
    status: str | None = None  # of the job; None: there is no such job in the environment
    is_needed: bool = True

    def to_json(self) -> dict[str, Any]:
        """Return it as plain JSON values."""
        return {name: getattr(self, name) for name in self.__slots__}


def survey(environment: Environment) -> tuple[list[RunningCluster], list[str]]:
    """Return the clusters of an environment's jobs, and a sentence for each backend that cannot be asked.

    Parameters
    ----------
    environment : Environment
        Its backend is asked, and each that a record of one of its jobs names.
    """
    noted = list(records.all_records(Store(environment.store)))
    backends = {record.backend for record in noted} | ({environment.cluster} & set(BACKENDS))
    found: list[RunningCluster] = []
    problems = []
    for backend in sorted(backends & set(BACKENDS)):
        options = environment.cluster_options if environment.cluster == backend else {}
        mine = [record for record in noted if record.backend == backend]
        try:
            running = list(_module(backend).running(options, mine))
        except (ClusterError, SpecError) as error:
            problems.append(str(error))
            continue
        found += [_with_job(cluster, mine, Store(environment.store).url) for cluster in running]
        _forget_ended(running, mine)
    return found, problems


def collect(environment: Environment, clusters: Iterable[RunningCluster]) -> list[RunningCluster]:
    """End clusters, and return those that were ended.

    Raises
    ------
    ClusterError
        If one cannot be ended; those before it were.
    """
    ended = []
    for cluster in clusters:
        options = environment.cluster_options if environment.cluster == cluster.backend else {}
        _module(cluster.backend).close(cluster, options)
        record = None if cluster.job_url is None else records.find(cluster.job_url)
        if record is not None and record.name == cluster.name:
            records.drop(record)
        ended.append(cluster)
    return ended


def _module(backend: str) -> ModuleType:
    return import_module(_MODULES[backend])


def _with_job(cluster: RunningCluster, noted: Sequence[records.ClusterRecord], store: str) -> RunningCluster:
    """Add what the job's directory says."""
    record = next((item for item in noted if item.name == cluster.name and item.where == cluster.where), None)
    url = cluster.job_url if record is None else record.job_url
    if url is None or not url.startswith(f"{store}/jobs/"):
        return cluster  # of another environment, or of nobody that is known: not for us to end
    created = cluster.created_time or (None if record is None else record.created_time)
    job = JobDirectory(url)
    try:
        settings = job.settings()
    except JobNotFoundError:
        return replace(cluster, job_url=url, created_time=created, is_needed=False)
    from cortex_dask.io.job.status import FINAL_STATUSES
    from cortex_dask.runtime.coordinator.heartbeat import running_elsewhere

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


def _forget_ended(running: Iterable[RunningCluster], noted: Iterable[records.ClusterRecord]) -> None:
    """Drop the records of clusters that are gone: by their idle timeout, or by somebody else's hand."""
    names = {cluster.name for cluster in running}
    for record in noted:
        if record.name not in names and time.time() - record.created_time > _YOUNG:
            records.drop(record)
