"""The output directory: reserved before a job writes, filled with published parts, sealed at the end.

Everything that is not a committed part has a name that begins with ``_``, which readers of Parquet and JSON datasets
skip:

=========================  ===============================================================================
``part-000042-1f2e3d4c.…`` a committed part of split 42; the digits stand for the job id
``_temporary/<digits>/``   staged parts of attempts of that job, and the reservation ``_job.json``
``_manifest.json``         the parts that make up the result, with rows and bytes, and the schema
``_SUCCESS``               the result is complete: every batch was committed
=========================  ===============================================================================
"""

from __future__ import annotations

import contextlib
import itertools
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from cortex_dask.errors import OutputError
from cortex_dask.io.job.records import Part
from cortex_dask.io.job.settings import OutputSettings
from cortex_dask.io.job.splits import part_token
from cortex_dask.io.store.errors import explain, is_transient
from cortex_dask.io.store.store import Store

MANIFEST = "_manifest.json"
SUCCESS = "_SUCCESS"
_STAGING = "_temporary"
_LISTED = 10_000  # parts that are listed at a time
_PUBLISHERS = 32  # server-side copies at a time on an object store
_PUBLISHED = 1_000  # parts that are handed to them together


def staging_prefix(job_id: str) -> str:
    """Return the folder in the output directory that holds a job's staged parts."""
    return f"{_STAGING}/{part_token(job_id)}"


@dataclass(frozen=True, slots=True)
class AttemptName:
    """Names one attempt at a split, and the part that it stages."""

    job_id: str
    split: int
    attempt_id: str

    @property
    def staged(self) -> str:
        """Where the attempt writes its part, relative to the output directory."""
        return f"{staging_prefix(self.job_id)}/{self.split:06d}-{self.attempt_id}"


class OutputDirectory:
    """The output directory of one job."""

    def __init__(self, settings: OutputSettings, job_id: str) -> None:
        self.store = Store(settings.url)
        self._settings = settings
        self._job_id = job_id
        self._token = part_token(job_id)
        self._reservation = f"{staging_prefix(job_id)}/_job.json"

    @property
    def eager(self) -> bool:
        """Whether parts are published as they come; else only when all are there, beside or in place of older data."""
        return self._settings.mode == "error"

    def reserve(self) -> list[str]:
        """Mark the directory as the job's, before its first batch, or raise ``OutputError`` if it may not write here.

        Return the names of parts of earlier jobs, for the modes ``append`` and ``overwrite``. A transient
        error of the store is raised as it is.
        """
        try:
            return self._reserve()
        except OSError as error:
            if is_transient(error.__cause__ or error):
                raise  # the store does not answer just now
            raise OutputError(
                f"the output directory cannot be used: {explain(error, self.store.url)}", url=self.store.url
            ) from error

    def _reserve(self) -> list[str]:
        names = self.store.names()
        others = self._others(names)
        held = [name for name in names if not name.startswith(f"{_STAGING}/")]
        if self._settings.mode == "error" and held:
            raise OutputError(
                f"the output directory {self.store.url} holds {_files(len(held))} already (for example {held[0]}): "
                "choose an empty one, or say mode 'append' or 'overwrite'",
                url=self.store.url,
            )
        self._refuse(others)
        self.store.write(
            self._reservation,
            orjson.dumps({"job_id": self._job_id, "mode": self._settings.mode}),
        )
        # Two jobs that looked at the same moment saw no reservation; after both have written, one sees the other.
        if newcomers := self._others(self.store.names(f"{_STAGING}/")) - others:
            try:
                self._refuse(newcomers)
            except OutputError:
                self.release()
                raise
        return [name for name in held if not name.startswith("_") and "/_" not in name]

    def _others(self, names: Iterable[str]) -> set[str]:
        """Return the tokens of other jobs that write here, or were left unfinished."""
        return {_owner(name) for name in names if name.startswith(f"{_STAGING}/")} - {self._token}

    def _refuse(self, others: set[str]) -> None:
        if others and self._settings.mode != "overwrite":
            owner = self._reserved_by(min(others))
            raise OutputError(
                f"the job {owner} is writing to {self.store.url}, or was left unfinished there: wait for it, "
                "resume it, or choose another output directory",
                url=self.store.url,
            )

    def is_reserved(self) -> bool:
        """Return whether the directory is marked as the job's."""
        return self.store.exists(self._reservation)

    def release(self) -> None:
        """Remove the mark of :meth:`reserve`, so that another job may write here.

        It stays if this job has staged something: it may be resumed, or another coordinator of it may be alive.
        """
        if self.store.names(staging_prefix(self._job_id)) != [self._reservation]:
            return
        self.store.delete(self._reservation)
        if self.store.is_local:
            root = Path(self.store.path())
            with contextlib.suppress(OSError):  # not empty
                for folder in (root / staging_prefix(self._job_id), root / _STAGING):
                    folder.rmdir()

    def _reserved_by(self, token: str) -> str:
        try:
            return str(orjson.loads(self.store.read(f"{_STAGING}/{token}/_job.json"))["job_id"])
        except (FileNotFoundError, ValueError, KeyError):
            return token

    def published(self) -> dict[str, int]:
        """Return the names and sizes in bytes of this job's parts that are in place."""
        return {name: size for name, size in self.store.sizes("part-").items() if f"-{self._token}." in name}

    def missing(self, parts: Iterable[Part], splits: int) -> Iterator[Part]:
        """Yield the parts that are not in place in their full size; the numbers of splits are below ``splits``."""
        if self.store.is_local:
            yield from (part for part in parts if self.store.size(part.name) != part.bytes)
            return
        # A number for each split, whatever the length of the names, from some listings.
        sizes = array("q", bytes(8 * splits))
        for first in range(0, splits, _LISTED):
            for name, size in self.store.sizes(f"part-{first:06d}"[: -len(str(_LISTED)) + 1]).items():
                if f"-{self._token}." in name and _number(name) < splits:
                    sizes[_number(name)] = size
        for part in parts:
            number = _number(part.name)
            if number >= splits or sizes[number] != part.bytes:
                yield part

    def publish(self, part: Part, *, keep: bool = False) -> None:
        """Put a staged part in its final place; doing so again changes nothing.

        With ``keep``, its staged file may be left where the store copies it instead of moving it.
        """
        self.store.publish(part.staged, part.name, part.bytes, keep=keep)

    def publish_missing(self, parts: Iterable[Part], splits: int) -> None:
        """Roll forward: put every part in place that is not there in its full size."""
        if not self.eager:
            self.unseal()
        missing = self.missing(parts, splits)
        if self.store.is_local:
            for part in missing:
                self.publish(part)
            return
        from concurrent.futures import ThreadPoolExecutor  # a handler process imports this module and has no need of it

        with ThreadPoolExecutor(_PUBLISHERS) as pool:
            while wave := list(itertools.islice(missing, _PUBLISHED)):  # what waits is in memory
                list(pool.map(lambda part: self.publish(part, keep=True), wave))  # clean() deletes them all

    def discard(self, part: Part) -> None:
        """Remove a staged part of an attempt that did not count."""
        self.store.delete(part.staged)

    def manifest(self) -> dict[str, Any] | None:
        """Read the manifest; None where there is none."""
        try:
            value: dict[str, Any] = orjson.loads(self.store.read(MANIFEST))
        except FileNotFoundError:
            return None
        return value

    def unseal(self) -> None:
        """Remove ``_SUCCESS`` while the directory's content changes."""
        self.store.delete(SUCCESS)

    def write_manifest(self, parts: Iterable[Part], schema: str | None, status: str, replaced: Iterable[str]) -> None:
        """List the committed parts.

        In mode ``append`` those of earlier jobs stay listed; in mode ``overwrite`` the files that :meth:`reserve` found
        (``replaced``) are removed after the manifest has been written. The schema is base64 of Arrow IPC.
        """
        earlier = self._earlier() if self._settings.mode == "append" else iter(())
        own = ({"name": part.name, "rows": part.rows, "bytes": part.bytes} for part in parts)
        stale = set(replaced)
        rows = size = 0
        document = {
            "version": 1,
            "job_id": self._job_id,
            "status": status,
            "format": self._settings.format,
            "schema": schema,
        }
        # A line for each part, encoded as it comes: a job of a million splits has a million of them.
        text = bytearray(orjson.dumps(document, option=orjson.OPT_INDENT_2).removesuffix(b"\n}") + b',\n  "parts": [')
        for count, item in enumerate(itertools.chain(earlier, own)):
            rows, size = rows + item["rows"], size + item["bytes"]
            stale.discard(item["name"])
            text += (b",\n    " if count else b"\n    ") + orjson.dumps(item)
        text += b"\n  ]," + orjson.dumps({"rows": rows, "bytes": size}, option=orjson.OPT_INDENT_2).removeprefix(b"{")
        self.store.write(MANIFEST, text)
        if self._settings.mode == "overwrite":
            self.store.delete(*sorted(stale))

    def _earlier(self) -> Iterator[dict[str, Any]]:
        manifest = self.manifest() or {"parts": []}
        return (item for item in manifest["parts"] if f"-{self._token}." not in item["name"])

    def seal(self) -> None:
        """Mark the result as complete."""
        self.store.write(SUCCESS, b"")

    def clean(self) -> None:
        """Remove the job's staging folder."""
        self.store.delete_tree(staging_prefix(self._job_id))
        if self.store.is_local:
            with contextlib.suppress(OSError):  # not empty: another job has staged something there
                Path(self.store.path(_STAGING)).rmdir()


def _files(count: int) -> str:
    return "1 file" if count == 1 else f"{count} files"


def _number(part: str) -> int:
    """Return which split a part is of."""
    return int(part.split("-", 2)[1])


def _owner(name: str) -> str:
    parts = name.split("/")
    return parts[1] if len(parts) > 1 else ""
