"""The failed batches of one attempt at a split, gathered while it runs and stored when it is done."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import orjson

from cortex_dask.errors import StorageError
from cortex_dask.io.job.records import BatchFailure, Cause
from cortex_dask.io.job.splits import BATCH_NAMESPACE, Split, batch_id

if TYPE_CHECKING:
    from tempfile import SpooledTemporaryFile

    from cortex_dask.io.batch import BadLine, Batch
    from cortex_dask.io.store.store import Store


_IN_MEMORY = 4 * 1024 * 1024  # bytes of failures in memory; more go to a temporary file
_COPY = 1024 * 1024
_TRACEBACK = 100_000  # characters of a traceback that are kept: one of a deep recursion repeats itself
_LINE = 2_000  # characters of the one line that goes into the ledger


@dataclass(frozen=True, slots=True)
class Verdict:
    """Why a batch failed for good."""

    cause: Cause
    error: str  # one line: type and message
    traceback: str | None
    attempts: int


class FailureFile:
    """``failures/<split>-<attempt id>.jsonl`` in the job directory: a line per failed batch or malformed line."""

    def __init__(self, store: Store, job_id: str, split: Split, attempt_id: str, batch_size: int) -> None:
        self._store = store
        self._job_id = job_id
        self._split = split
        self._batch_size = batch_size
        self._name = f"failures/{split.number:06d}-{attempt_id}.jsonl"
        self._file: SpooledTemporaryFile[bytes] | None = None
        self.failures: list[BatchFailure] = []

    def add(self, batch: Batch, verdict: Verdict) -> None:
        """Add a batch with its rows."""
        from cortex_dask.io.rows.payload import to_records

        try:
            payload: Any = to_records(batch.data)
        except Exception as error:  # noqa: BLE001 - the dead failure is written whatever is in the rows
            payload = None
            problem = f" (its rows could not be written here: {one_line(error)})"
            verdict = Verdict(verdict.cause, verdict.error + problem, verdict.traceback, verdict.attempts)
        self._add(batch.index, batch.rows, verdict, [list(place) for place in batch.position], payload)

    def add_unread(self, indexes: Iterable[int], verdict: Verdict) -> None:
        """Add batches that could not be read, so have no payload."""
        for index in indexes:
            self._add(index, self._planned_rows(index), verdict, None, None)

    def add_line(self, line: BadLine) -> None:
        """Add a malformed line; it was never part of a batch."""
        identity = str(uuid.uuid5(BATCH_NAMESPACE, f"{self._job_id}/{line.path}/{line.offset}"))
        error = f"{line.path}, line {line.line}: {line.error}"
        place = [line.path, "line", line.line, line.offset]
        verdict = Verdict("malformed input", error, None, 1)
        self._write(None, identity, 1, verdict, [place], [line.text])

    def close(self) -> str | None:
        """Store the file; return its name in the job directory, None if there is nothing to store."""
        if self._file is None:
            return None
        self._file.seek(0)
        with self._file, self._store.stage(self._name) as staged:
            while data := self._file.read(_COPY):
                staged.write(data)
            staged.commit()
        return self._name

    def discard(self) -> None:
        """Forget what was added."""
        if self._file is not None:
            self._file.close()

    def _planned_rows(self, index: int) -> int:
        if self._split.rows is None:
            return 0
        return max(min(self._batch_size, self._split.rows - index * self._batch_size), 0)

    def _add(self, index: int, rows: int, verdict: Verdict, position: Any, payload: Any) -> None:
        self._write(index, batch_id(self._job_id, self._split.origin, index), rows, verdict, position, payload)

    def _write(
        self,
        index: int | None,
        identity: str,
        rows: int,
        verdict: Verdict,
        position: Any,
        payload: Sequence[Any] | None,
    ) -> None:
        failure = {
            "batch_id": identity,
            "split": self._split.origin,
            "batch": index,
            "position": position,
            "rows": rows,
            "attempts": verdict.attempts,
            "cause": verdict.cause,
            "error": verdict.error,
            "traceback": shorten(verdict.traceback),
            "payload": payload,
        }
        if self._file is None:
            from tempfile import SpooledTemporaryFile  # not cheap to import, and most splits have no failures

            self._file = SpooledTemporaryFile(max_size=_IN_MEMORY)  # noqa: SIM115 - closed by close() or discard()
        try:
            self._file.write(_dump(failure) + b"\n")
        except OSError as error:
            raise StorageError(f"dead letters cannot be kept in the temporary folder: {error.strerror}") from error
        self.failures.append(
            BatchFailure(index, identity, rows, verdict.attempts, verdict.cause, _cut(verdict.error, _LINE))
        )


def one_line(error: BaseException) -> str:
    """Return an exception's type and message on one line."""
    try:
        message = " ".join(str(error).split())
    except Exception:  # noqa: BLE001 - a __str__ that raises hides nothing but itself
        message = "(its message cannot be shown)"
    name = type(error).__name__
    return _cut(f"{name}: {message}" if message else name, _LINE)


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[:length]}…"


def shorten(text: str | None) -> str | None:
    """Return a traceback with its middle left out if it is very long."""
    if text is None or len(text) <= _TRACEBACK:
        return text
    half = _TRACEBACK // 2
    return f"{text[:half]}\n… {len(text) - _TRACEBACK:,} characters left out …\n{text[-half:]}"


def _dump(failure: dict[str, Any]) -> bytes:
    try:
        return orjson.dumps(failure, default=str, option=orjson.OPT_NON_STR_KEYS)
    except TypeError:  # integers of more than 64 bits, lone surrogates
        return json.dumps(failure, default=str, ensure_ascii=False).encode(errors="replace")
