"""Which jobs an environment has, and which may be the newest: told by names alone, without reading what they hold.

The ids that are made here begin with the time at which they were made. A job whose id tells nothing, or an earlier time
because somebody gave it, has a file beside its directory whose name does: ``jobs/<api>/.20261123-201509.nightly``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from cortex_dask.errors import JobNotFoundError
from cortex_dask.formatting import parse_time
from cortex_dask.io.job.directory import jobs_prefix
from cortex_dask.io.job.settings import JobSettings
from cortex_dask.io.store.store import Store
from cortex_dask.job import Job

if TYPE_CHECKING:
    from cortex_dask.runtime.cluster import Cluster

_FORMAT = "%Y%m%d-%H%M%S"
_ID = re.compile(r"(\d{8}-\d{6})-[0-9a-f]{6}")
_NOTE = re.compile(r"\.(\d{8}-\d{6})\.(.+)")
#: A name tells the second in which it was made, and the job is made a moment later.
_SLACK = timedelta(seconds=2)
_UNKNOWN = datetime.max.replace(tzinfo=UTC)


class JobIndex:
    """The names of the jobs of an environment.

    Parameters
    ----------
    store : Store
        The environment's.
    """

    def __init__(self, store: Store) -> None:
        self._store = store

    def apis(self) -> list[str]:
        """Return the names of the APIs that have jobs, deployed or not."""
        return [name for name in self._store.children("jobs") if not name.startswith(".")]

    def ids(self, api_name: str) -> list[str]:
        """Return the ids of an API's jobs, and of folders that a submission has left without a job, sorted."""
        return [name for name in self._store.children(f"jobs/{api_name}") if not name.startswith(".")]

    def note(self, settings: JobSettings) -> None:
        """Note when a job was made, if its id does not tell; this comes before the job."""
        created = parse_time(settings.created_time)
        assert created is not None
        told = _told(settings.job_id)
        if told is None or created > told + _SLACK:
            name = f".{created.astimezone(UTC):{_FORMAT}}.{settings.job_id}"
            self._store.write(f"jobs/{settings.api_name}/{name}", b"")

    def newest_first(self, api_name: str) -> Iterator[tuple[datetime, list[str]]]:
        """Yield ids, a few at a time, with a time after which neither they nor those that follow were made."""
        names = self._store.children(f"jobs/{api_name}")
        limits: dict[str, datetime] = {}
        for name in names:
            if (match := _NOTE.fullmatch(name)) and (noted := _parsed(match[1])) is not None:
                limits[match[2]] = max(noted + _SLACK, limits.get(match[2], noted))
        for name in names:
            if not name.startswith("."):
                told = _told(name)
                if told is not None:
                    limits[name] = max(told + _SLACK, limits.get(name, told))
                limits.setdefault(name, _UNKNOWN)
        ids = sorted((name for name in names if name in limits), key=lambda name: (limits[name], name), reverse=True)
        at, count = 0, 1  # the first one is the newest nearly always
        while at < len(ids):
            yield limits[ids[at]], ids[at : at + count]
            at, count = at + count, 16


def _told(job_id: str) -> datetime | None:
    """Return the time with which an id begins, None if it is not one that was made here."""
    match = _ID.fullmatch(job_id)
    return None if match is None else _parsed(match[1])


def _parsed(text: str) -> datetime | None:
    try:
        return datetime.strptime(text, _FORMAT).replace(tzinfo=UTC)
    except ValueError:  # the 32nd of a 13th month
        return None


_WHOLE_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_READERS = 16  # concurrent reads of status documents: hides the latency of object stores


class Catalog:
    """The jobs of an environment.

    Parameters
    ----------
    store : Store
        The environment's.
    environment : str, optional
        Its name, for the commands that messages show; None: the default one.
    """

    def __init__(self, store: Store, environment: str | None = None) -> None:
        self._store = store
        self._environment = environment
        #: Their names.
        self.index = JobIndex(store)

    def handle(self, api_name: str, job_id: str, cluster: str | Cluster | None = None) -> Job:
        """Return the handle on a job of this id, whether there is one or not."""
        url = self._store.child(jobs_prefix(api_name, job_id)).url
        return Job(url, cluster=cluster, environment=self._environment)

    def get(self, api_name: str, job_id: str) -> Job:
        """Return a job by its id, by the beginning of it if that is unambiguous, or the ``"latest"``.

        Raises
        ------
        JobNotFoundError
            If there is none, or if several ids begin like this.
        """
        if job_id == "latest":
            if (latest := self._latest(api_name)) is None:
                raise self._no_jobs(api_name)
            return latest
        if _WHOLE_ID.fullmatch(job_id) and (job := _or_none(self.handle(api_name, job_id))) is not None:
            return job
        ids = self.index.ids(api_name)
        matches = [job_id] if job_id in ids else [known for known in ids if known.startswith(job_id)]
        if len(matches) == 1:
            job = self.handle(api_name, matches[0])
            _ = job.settings  # a folder without job.json is no job: that is said now
            return job
        if matches:
            raise JobNotFoundError(
                f"{len(matches)} jobs of {api_name} begin with {job_id!r}: {_some(matches)}. Give more of the id"
            )
        if not ids:
            raise self._no_jobs(api_name)
        raise JobNotFoundError(
            f"there is no job {job_id!r} of {api_name} in {self._store.url}; its jobs are {_some(ids)}"
        )

    def newest_first(self, api_name: str | None = None) -> list[Job]:
        """Return the jobs of one API, or of all, the newest first.

        Raises
        ------
        JobNotFoundError
            If the API has no jobs here.
        """
        found = [job for job in _together(_or_none, self._handles(api_name)) if job is not None]
        return sorted(found, key=_age, reverse=True)

    def described(self, api_name: str | None = None) -> list[tuple[Job, dict[str, Any]]]:
        """Return the jobs of one API, or of all, with their status documents, the newest first.

        Raises
        ------
        JobNotFoundError
            If the API has no jobs here.
        """
        return _described(self._handles(api_name))

    def of_api(self, api_name: str) -> list[tuple[Job, dict[str, Any]]]:
        """Return the jobs of an API with their status documents, the newest first; it may have none."""
        return _described([self.handle(api_name, job_id) for job_id in self.index.ids(api_name)])

    def _latest(self, api_name: str) -> Job | None:
        """Return the job that was made last, reading as few as need be."""
        latest: Job | None = None
        for limit, ids in self.index.newest_first(api_name):
            if latest is not None and _created(latest) > limit:
                break
            found = _together(_or_none, [self.handle(api_name, job_id) for job_id in ids])
            latest = max((job for job in [latest, *found] if job is not None), key=_age, default=None)
        return latest

    def _handles(self, api_name: str | None) -> list[Job]:
        """Return all jobs of one API, or of all, and folders that are none."""
        names = self.index.apis() if api_name is None else [api_name]
        ids = _together(self.index.ids, names)
        jobs = [self.handle(name, job_id) for name, found in zip(names, ids, strict=True) for job_id in found]
        if api_name is not None and not jobs:
            raise self._no_jobs(api_name)
        return jobs

    def _no_jobs(self, api_name: str) -> JobNotFoundError:
        known = ", ".join(self.index.apis()) or "none"
        return JobNotFoundError(
            f"there are no jobs of an API {api_name!r} in {self._store.url}; APIs with jobs there: {known}"
        )


_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


def _together(function: Callable[[_Item], _Result], items: Sequence[_Item]) -> list[_Result]:
    if not items:
        return []
    with ThreadPoolExecutor(min(_READERS, len(items))) as pool:
        return list(pool.map(function, items))


def _or_none(job: Job) -> Job | None:
    try:
        _ = job.settings
    except JobNotFoundError:
        return None  # a folder whose submission was cut off before job.json
    return job


def _described(jobs: Sequence[Job]) -> list[tuple[Job, dict[str, Any]]]:
    """Return jobs with their status documents, the newest first: one request for each that has ended."""
    found = zip(jobs, _together(_describe_or_none, jobs), strict=True)
    pairs = [(job, document) for job, document in found if document is not None]
    return sorted(pairs, key=lambda pair: (pair[1]["created_time"], pair[1]["job_id"]), reverse=True)


def _describe_or_none(job: Job) -> dict[str, Any] | None:
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


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[-5:])
    return shown if len(names) <= 5 else f"{shown} and {len(names) - 5} more"
