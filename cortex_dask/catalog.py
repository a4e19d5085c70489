"""The jobs of an environment: made, found by id, listed, and the latest.

Most questions are answered by the names of jobs alone, without reading what they hold. An id that we made begins with
its time. A job with an id of the user's own, or with one of an earlier time, has a file beside its directory whose
name holds the time: ``jobs/<api>/.20261123-201509.nightly``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any, TypeVar

from cortex_dask.errors import JobNotFoundError, SpecError
from cortex_dask.formatting import parse_time
from cortex_dask.io.job.directory import JobDirectory, jobs_prefix
from cortex_dask.io.job.settings import JobSettings, differences
from cortex_dask.io.store.store import Store
from cortex_dask.job import Job, create_directory
from cortex_dask.runtime.cluster import Cluster
from cortex_dask.spec.resolution import ResolvedJob

_JOB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_CONCURRENT_READS = 16  # hides the latency of object stores

_TIME_FORMAT = "%Y%m%d-%H%M%S"
_TIMED_ID = re.compile(r"(\d{8}-\d{6})-[0-9a-f]{6}")
_TIME_FILE = re.compile(r"\.(\d{8}-\d{6})\.(.+)")
#: A name holds the second in which it was made, and the job is made a moment later.
_SLACK = timedelta(seconds=2)
_UNKNOWN = datetime.max.replace(tzinfo=UTC)


_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


class Catalog:
    """The jobs of an environment."""

    def __init__(self, store: Store, environment: str | None = None) -> None:
        self._store = store
        self._environment = environment  # the name that commands in messages give; None: the default environment
        self._index = JobIndex(store)

    def create(self, job: Job, resolved: ResolvedJob) -> bool:
        """Make a job; return False if the same submission has made it already, and refuse another one."""
        settings = resolved.settings
        directory = JobDirectory(job.url)
        try:
            before = directory.settings()
        except JobNotFoundError:
            self._index.record_time(settings)
            try:
                create_directory(directory, resolved)
            except FileExistsError:  # another process has submitted it at the same moment
                _check_same(directory.settings(), settings)
                return False
            return True
        _check_same(before, settings)
        if before.cluster != settings.cluster and not job.is_live():
            directory.move(replace(before, cluster=settings.cluster, environment=settings.environment))
        return False

    def handle(self, api_name: str, job_id: str, cluster: str | Cluster | None = None) -> Job:
        """Return the handle on a job of this id, whether there is one or not."""
        url = self._store.child(jobs_prefix(api_name, job_id)).url
        return Job(url, cluster=cluster, environment=self._environment)

    def get(self, api_name: str, job_id: str) -> Job:
        """Return a job by its id, by the beginning of it if that is unambiguous, or the ``"latest"``."""
        if job_id == "latest":
            if (latest := self._latest(api_name)) is None:
                raise self._no_jobs(api_name)
            return latest
        if _JOB_ID.fullmatch(job_id) and (job := _if_exists(self.handle(api_name, job_id))) is not None:
            return job
        ids = self._index.ids(api_name)
        matches = [job_id] if job_id in ids else [known for known in ids if known.startswith(job_id)]
        if len(matches) == 1:
            job = self.handle(api_name, matches[0])
            _ = job.settings  # raises now if the folder has no job.json
            return job
        if matches:
            raise JobNotFoundError(
                f"{len(matches)} jobs of {api_name} begin with {job_id!r}: {_listed(matches)}. Give more of the id",
                api_name=api_name,
                job_id=job_id,
            )
        if not ids:
            raise self._no_jobs(api_name)
        raise JobNotFoundError(
            f"there is no job {job_id!r} of {api_name} in {self._store.url}; its jobs are {_listed(ids)}",
            api_name=api_name,
            job_id=job_id,
        )

    def newest_first(self, api_name: str | None = None) -> list[Job]:
        """Return the jobs of one API, or of all, the newest first; raise JobNotFoundError if the API has none."""
        found = [job for job in _map_concurrently(_if_exists, self._handles(api_name)) if job is not None]
        return sorted(found, key=_age, reverse=True)

    def described(self, api_name: str | None = None) -> list[tuple[Job, dict[str, Any]]]:
        """Return what :meth:`newest_first` returns, with the status documents."""
        return _describe_all(self._handles(api_name))

    def of_api(self, api_name: str) -> list[tuple[Job, dict[str, Any]]]:
        """Return the jobs of an API with their status documents, the newest first; it may have none."""
        return _describe_all([self.handle(api_name, job_id) for job_id in self._index.ids(api_name)])

    def _latest(self, api_name: str) -> Job | None:
        """Return the job that was made last, reading as few jobs as possible."""
        latest: Job | None = None
        for limit, ids in self._index.newest_first(api_name):
            if latest is not None and _created(latest) > limit:
                break
            found = _map_concurrently(_if_exists, [self.handle(api_name, job_id) for job_id in ids])
            latest = max((job for job in [latest, *found] if job is not None), key=_age, default=None)
        return latest

    def _handles(self, api_name: str | None) -> list[Job]:
        """Return handles on the job folders of one API, or of all; a cut-off submission leaves one without a job."""
        names = self._index.apis() if api_name is None else [api_name]
        ids = _map_concurrently(self._index.ids, names)
        jobs = [self.handle(name, job_id) for name, found in zip(names, ids, strict=True) for job_id in found]
        if api_name is not None and not jobs:
            raise self._no_jobs(api_name)
        return jobs

    def _no_jobs(self, api_name: str) -> JobNotFoundError:
        known = ", ".join(self._index.apis()) or "none"
        return JobNotFoundError(
            f"there are no jobs of an API {api_name!r} in {self._store.url}; APIs with jobs there: {known}",
            api_name=api_name,
        )


class JobIndex:
    """The names of the jobs of an environment."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def apis(self) -> list[str]:
        """Return the names of the APIs that have jobs, deployed or not."""
        return [name for name in self._store.children("jobs") if not name.startswith(".")]

    def ids(self, api_name: str) -> list[str]:
        """Return the ids of an API's jobs, and of folders that a submission has left without a job, sorted."""
        return [name for name in self._store.children(f"jobs/{api_name}") if not name.startswith(".")]

    def record_time(self, settings: JobSettings) -> None:
        """Record when a job was made, if its id does not hold the time; call this before the job is made."""
        created = parse_time(settings.created_time)
        assert created is not None
        id_time = _time_of_id(settings.job_id)
        if id_time is None or created > id_time + _SLACK:
            name = f".{created.astimezone(UTC):{_TIME_FORMAT}}.{settings.job_id}"
            self._store.write(f"jobs/{settings.api_name}/{name}", b"")

    def newest_first(self, api_name: str) -> Iterator[tuple[datetime, list[str]]]:
        """Yield ids, a few at a time, with a time after which neither they nor those that follow were made."""
        names = self._store.children(f"jobs/{api_name}")
        limits: dict[str, datetime] = {}
        for name in names:
            if (match := _TIME_FILE.fullmatch(name)) and (recorded := _parse_second(match[1])) is not None:
                limits[match[2]] = max(recorded + _SLACK, limits.get(match[2], recorded))
        for name in names:
            if not name.startswith("."):
                id_time = _time_of_id(name)
                if id_time is not None:
                    limits[name] = max(id_time + _SLACK, limits.get(name, id_time))
                limits.setdefault(name, _UNKNOWN)
        ids = sorted((name for name in names if name in limits), key=lambda name: (limits[name], name), reverse=True)
        at, count = 0, 1  # the first one is the newest nearly always
        while at < len(ids):
            yield limits[ids[at]], ids[at : at + count]
            at, count = at + count, 16


def _check_same(existing: JobSettings, new: JobSettings) -> None:
    """Raise SpecError if a submission is not that of the job that has its id."""
    if found := differences(existing, new):
        raise SpecError(
            f"job_id: the job {new.job_id!r} of {new.api_name} exists with other settings ({'; '.join(found)}): "
            "choose another job id, or submit the same as before to attach to it or resume it"
        )


def _time_of_id(job_id: str) -> datetime | None:
    """Return the time with which an id of ours begins; None for another id."""
    match = _TIMED_ID.fullmatch(job_id)
    return None if match is None else _parse_second(match[1])


def _parse_second(text: str) -> datetime | None:
    try:
        return datetime.strptime(text, _TIME_FORMAT).replace(tzinfo=UTC)
    except ValueError:  # the 32nd of a 13th month
        return None


def _map_concurrently(function: Callable[[_Item], _Result], items: Sequence[_Item]) -> list[_Result]:
    if not items:
        return []
    with ThreadPoolExecutor(min(_CONCURRENT_READS, len(items))) as pool:
        return list(pool.map(function, items))


def _if_exists(job: Job) -> Job | None:
    try:
        _ = job.settings
    except JobNotFoundError:
        return None  # a folder whose submission was cut off before job.json
    return job


def _describe_all(jobs: Sequence[Job]) -> list[tuple[Job, dict[str, Any]]]:
    """Return jobs with their status documents, the newest first: one request for each that has ended."""
    found = zip(jobs, _map_concurrently(_describe_if_exists, jobs), strict=True)
    pairs = [(job, document) for job, document in found if document is not None]
    return sorted(pairs, key=lambda pair: (pair[1]["created_time"], pair[1]["job_id"]), reverse=True)


def _describe_if_exists(job: Job) -> dict[str, Any] | None:
    try:
        return job.describe()
    except JobNotFoundError:
        return None  # likewise


def _age(job: Job) -> tuple[str, str]:
    return job.settings.created_time, job.job_id


def _created(job: Job) -> datetime:
    created = parse_time(job.settings.created_time)
    assert created is not None
    return created


def _listed(names: Sequence[str]) -> str:
    newest = ", ".join(names[-5:])
    return newest if len(names) <= 5 else f"{newest} and {len(names) - 5} more"
