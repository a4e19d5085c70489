"""`DeadLetterTarget`: where a job's failures are delivered to; and a folder as target."""

from __future__ import annotations

import uuid
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping
from pathlib import PurePosixPath
from typing import Any

import orjson

from cortex_dask.errors import CortexDaskError, SpecError, StorageError
from cortex_dask.io.job.directory import JobDirectory
from cortex_dask.io.job.settings import JobSettings
from cortex_dask.io.store.store import Store

_CHUNK = 4 * 1024 * 1024  # bytes of a failures file that are read at a time

#: One line of a failures file, parsed.
Failure = dict[str, Any]


class DeadLetterTarget(ABC):
    """A place that failures are delivered to."""

    def __init__(self, description: str) -> None:
        self.description = description  # for messages
        self._refusal = ""

    @property
    def refusal(self) -> str:
        """The reason of the first dead letter that the target refused, or ""."""
        return self._refusal

    def record_refusal(self, reason: str) -> None:
        """Keep the reason of a refused dead letter, if it is the first."""
        self._refusal = self._refusal or reason

    def clear_refusal(self) -> None:
        """Forget earlier refusals, before another try."""
        self._refusal = ""

    @abstractmethod
    def receipt_key(self, file: str, batch_id: str) -> str:
        """Return the key by which receipts record the delivery of a failure."""

    @abstractmethod
    def check(self) -> None:
        """Raise SpecError if nothing can be delivered; called before the first batch runs."""

    @abstractmethod
    def deliver(self, files: Mapping[str, Collection[str]]) -> Iterator[list[str]]:
        """Deliver the failures with these batch ids, by file; yield the receipt keys of what arrived, in portions.

        Raises StorageError if the target cannot be reached.
        """

    def close(self) -> None:  # noqa: B027 - not every target has something to close
        """Close connections."""


class FolderTarget(DeadLetterTarget):
    """A folder of the user's: ``<path>/<job id>/<split>-<attempt id>.jsonl``, the same lines as in the job directory.

    Names come from the ledger, and files appear whole, so that writing one again changes nothing.
    """

    def __init__(self, path: str, job: JobDirectory, settings: JobSettings) -> None:
        super().__init__(f"the folder {path}")
        self._source = job.store
        self._path = path
        self._job_id = settings.job_id

    @property
    def _store(self) -> Store:
        return Store(self._path).child(self._job_id)

    def receipt_key(self, file: str, batch_id: str) -> str:
        """Return the file's name: a file is delivered as a whole."""
        return file

    def check(self) -> None:
        """Write a file to the folder, and delete it."""
        probe = f".{uuid.uuid4().hex}"
        try:
            self._store.write(probe, b"")
            self._store.delete(probe)
        except (CortexDaskError, OSError) as error:
            raise SpecError(f"dead_letter.path: {message_of(error)}") from error

    def deliver(self, files: Mapping[str, Collection[str]]) -> Iterator[list[str]]:
        """Copy the files."""
        for file in files:
            with self._store.stage(PurePosixPath(file).name) as staged:
                for chunk in _chunks(self._source, file, _CHUNK):
                    staged.write(chunk)
                staged.commit()
            yield [file]


def read_failures(
    store: Store, file: str, batch_ids: Collection[str], *, chunk_size: int = _CHUNK
) -> Iterator[Failure]:
    """Yield the failures of a file that have one of these batch ids, with one chunk of the file in memory."""
    wanted = set(batch_ids)
    rest = b""
    for chunk in _chunks(store, file, chunk_size):
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            failure = orjson.loads(line) if line else {}
            if failure.get("batch_id") in wanted:
                yield failure


def _chunks(store: Store, file: str, chunk_size: int) -> Iterator[bytes]:
    size = store.size(file)
    if size is None:
        raise StorageError(f"the dead letters {store.url}/{file} have gone")
    for start in range(0, size, chunk_size):
        yield store.read_range(file, start, min(start + chunk_size, size))


def message_of(error: BaseException) -> str:
    """Return the message of an error on one line."""
    return " ".join(str(error).split()) or type(error).__name__
