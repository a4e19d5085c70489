"""Which jobs an environment has, and which may be the newest: told by names alone, without reading what they hold.

The ids that are made here begin with the time at which they were made. A job whose id tells nothing, or an earlier time
because somebody gave it, has a file beside its directory whose name does: ``jobs/<api>/.20261123-201509.nightly``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

from cortex_dask.io.settings import JobSettings
from cortex_dask.io.store import Store
from cortex_dask.progress import parse_time

__all__ = ["JobIndex"]

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
