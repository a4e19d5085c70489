"""What is written down about a cluster that was started for a job, before it is started.

Whoever starts a cluster may be killed a moment later. The record says what to look for: in the job directory, where the
job's next coordinator finds it, and in the environment's ``clusters/``, where ``cortex-dask clusters`` finds all of
them without reading each job.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields

import orjson

from cortex_dask.io.job.directory import JobDirectory
from cortex_dask.io.store.store import Store

__all__ = ["ClusterRecord", "all_records", "drop", "find", "keep"]

_NAME = "cluster.json"


@dataclass(frozen=True, slots=True)
class ClusterRecord:
    """A cluster that was started for a job."""

    backend: str  # gateway, kubernetes
    name: str
    where: str  # the gateway's address, the namespace
    job_url: str
    created_time: float  # seconds since 1970
    is_detached: bool = False  # its coordinator was started with it, and is expected to come up


def keep(job_url: str, backend: str, name: str, where: str, *, is_detached: bool = False) -> ClusterRecord:
    """Write the record of a cluster that is about to be started.

    Parameters
    ----------
    job_url : str
        The job directory.
    backend, name, where : str
        What it takes to find the cluster again.
    is_detached : bool, default False
        Whether the job's coordinator is started with the cluster.
    """
    record = ClusterRecord(backend, name, where, JobDirectory(job_url).url, time.time(), is_detached)
    data = orjson.dumps(asdict(record), option=orjson.OPT_INDENT_2)
    root = _root(record.job_url)
    if root is not None:
        root.write(f"clusters/{_file(record)}", data)
    JobDirectory(job_url).store.write(_NAME, data)
    return record


def find(job_url: str) -> ClusterRecord | None:
    """Return the record of a job's cluster; None when it has none that was not ended."""
    try:
        return _read(JobDirectory(job_url).store.read(_NAME))
    except FileNotFoundError:
        return None


def drop(record: ClusterRecord) -> None:
    """Forget a cluster that has ended."""
    root = _root(record.job_url)
    if root is not None:
        root.delete(f"clusters/{_file(record)}")
    if find(record.job_url) == record:  # the job may have another one by now
        JobDirectory(record.job_url).store.delete(_NAME)


def all_records(environment: Store) -> Iterator[ClusterRecord]:
    """Yield the records of an environment's clusters."""
    for name in environment.children("clusters"):
        try:
            record = _read(environment.read(f"clusters/{name}"))
        except FileNotFoundError:
            continue  # it was ended meanwhile
        if record is not None:
            yield record


def _root(job_url: str) -> Store | None:
    """Return the environment's store; None for a job directory outside of any."""
    parts = job_url.rstrip("/").rsplit("/", 3)
    return Store(parts[0]) if len(parts) == 4 and parts[1] == "jobs" else None


def _file(record: ClusterRecord) -> str:
    return f"{record.backend}-{record.name}.json"


def _read(data: bytes) -> ClusterRecord | None:
    value = orjson.loads(data)
    names = {item.name for item in fields(ClusterRecord)}
    return ClusterRecord(**{key: item for key, item in value.items() if key in names})
