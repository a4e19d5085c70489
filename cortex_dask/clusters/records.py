"""What is known of the clusters that were started for jobs.

A record is written before its cluster is started, as the process that starts it may be killed a moment later. It says
what to look for: in the job directory, where the job's next coordinator finds it, and in the environment's
``clusters/``, where ``cortex-dask clusters`` finds all of them without reading each job.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from typing import Any

import orjson

from cortex_dask.io.job.directory import JobDirectory
from cortex_dask.io.store.store import Store

_NAME = "cluster.json"


@dataclass(frozen=True, slots=True)
class ClusterRecord:
    """A cluster that was started for a job, by its record."""

    backend: str  # gateway, kubernetes
    name: str
    where: str  # the gateway's address, the namespace
    job_url: str
    created_time: float  # seconds since 1970
    is_detached: bool = False  # its coordinator was started with it, and is expected to come up


@dataclass(frozen=True, slots=True)
class RunningCluster:
    """A cluster that was started for a job and runs, by its backend."""

    backend: str
    name: str
    where: str  # as above
    job_id: str | None = None
    api_name: str | None = None
    created_time: float | None = None  # seconds since 1970
    job_url: str | None = None
    status: str | None = None  # of the job; None: there is no such job in the environment
    is_needed: bool = True

    def to_json(self) -> dict[str, Any]:
        """Return it as plain JSON values."""
        return asdict(self)


def write(job_url: str, backend: str, name: str, where: str, *, is_detached: bool = False) -> ClusterRecord:
    """Write the record of a cluster that is about to be started."""
    record = ClusterRecord(backend, name, where, JobDirectory(job_url).url, time.time(), is_detached)
    data = orjson.dumps(asdict(record), option=orjson.OPT_INDENT_2)
    root = _environment_store(record.job_url)
    if root is not None:
        root.write(f"clusters/{_file_name(record)}", data)
    JobDirectory(job_url).store.write(_NAME, data)
    return record


def find(job_url: str) -> ClusterRecord | None:
    """Return the record of a job's cluster; None when it has none that was not ended."""
    try:
        return _parse(JobDirectory(job_url).store.read(_NAME))
    except FileNotFoundError:
        return None


def delete(record: ClusterRecord) -> None:
    """Delete the record of a cluster that has ended."""
    root = _environment_store(record.job_url)
    if root is not None:
        root.delete(f"clusters/{_file_name(record)}")
    if find(record.job_url) == record:  # the job may have another one by now
        JobDirectory(record.job_url).store.delete(_NAME)


def all_records(environment: Store) -> Iterator[ClusterRecord]:
    """Yield the records of an environment's clusters."""
    for name in environment.children("clusters"):
        try:
            yield _parse(environment.read(f"clusters/{name}"))
        except FileNotFoundError:
            continue  # it was deleted meanwhile


def _environment_store(job_url: str) -> Store | None:
    """Return the environment's store; None for a job directory outside of any."""
    parts = job_url.rstrip("/").rsplit("/", 3)
    return Store(parts[0]) if len(parts) == 4 and parts[1] == "jobs" else None


def _file_name(record: ClusterRecord) -> str:
    return f"{record.backend}-{record.name}.json"


def _parse(data: bytes) -> ClusterRecord:
    names = {item.name for item in fields(ClusterRecord)}
    return ClusterRecord(**{key: item for key, item in orjson.loads(data).items() if key in names})
