"""Dead letters on their way out: to an SQS queue or to a folder of the user's, beside the job directory.

A batch is delivered when its failure is final, that is when the ledger holds it. What was delivered is noted in the
job directory (``delivered/…``), so that a coordinator that takes over goes on behind that; only what was sent in the
very moment before a coordinator was killed is sent twice. Whatever cannot be delivered stays in the job's failures.
"""

from __future__ import annotations

import uuid
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

import orjson

from cortex_dask.errors import CortexDaskError, SpecError, StorageError
from cortex_dask.io.store.store import Store

if TYPE_CHECKING:
    from cortex_dask.io.job.directory import JobDirectory
    from cortex_dask.io.job.settings import JobSettings

_CHUNK = 4 * 1024 * 1024  # bytes of a failures file that are read at a time

Letter = dict[str, Any]


class DeadLetterTarget(ABC):
    """Where dead letters go.

    Attributes
    ----------
    where : str
        For messages.
    problem : str
        Why a letter was refused, if one was.
    """

    def __init__(self, where: str) -> None:
        self.where = where
        self.problem = ""

    def refused(self, reason: str) -> None:
        """Note that the target does not take a letter; the first reason is kept."""
        self.problem = self.problem or reason

    @abstractmethod
    def key(self, file: str, batch_id: str) -> str:
        """Return what a receipt says of a letter."""

    @abstractmethod
    def check(self) -> None:
        """Make sure that letters can be delivered; called before the first batch runs.

        Raises
        ------
        SpecError
            If they cannot.
        """

    @abstractmethod
    def deliver(self, files: Mapping[str, Collection[str]]) -> Iterator[list[str]]:
        """Deliver letters, by file; yields the keys of what has arrived, from time to time.

        Raises
        ------
        StorageError
            If the target cannot be reached.
        """

    def close(self) -> None:  # noqa: B027 - not every target has something to close
        """Let go of what was opened."""


class Folder(DeadLetterTarget):
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

    def key(self, file: str, batch_id: str) -> str:
        """Return the file's name: a file is delivered as a whole."""
        return file

    def check(self) -> None:
        """Write to the folder, and delete what was written."""
        probe = f".{uuid.uuid4().hex}"
        try:
            self._store.write(probe, b"")
            self._store.delete(probe)
        except (CortexDaskError, OSError) as error:
            raise SpecError(f"dead_letter.path: {one_line(error)}") from error

    def deliver(self, files: Mapping[str, Collection[str]]) -> Iterator[list[str]]:
        """Copy the files."""
        for file in files:
            with self._store.stage(PurePosixPath(file).name) as staged:
                for chunk in _chunks(self._source, file):
                    staged.write(chunk)
                staged.commit()
            yield [file]


def read_letters(store: Store, file: str, wanted: Collection[str]) -> Iterator[Letter]:
    """Yield the letters of a failures file that are wanted, with no more than some of them in memory."""
    identities = set(wanted)
    rest = b""
    for chunk in _chunks(store, file):
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            letter = orjson.loads(line) if line else {}
            if letter.get("batch_id") in identities:
                yield letter


def _chunks(store: Store, file: str) -> Iterator[bytes]:
    size = store.size(file)
    if size is None:
        raise StorageError(f"the dead letters {store.url}/{file} have gone")
    for start in range(0, size, _CHUNK):
        yield store.read_range(file, start, min(start + _CHUNK, size))


def one_line(error: BaseException) -> str:
    """Return the message of an error on one line."""
    return " ".join(str(error).split()) or type(error).__name__
