"""Attempts at one batch: what ``handle_batch`` raises is tried again, what takes too much memory is tried in halves."""

from __future__ import annotations

import logging
import traceback
import uuid
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, Union

from cortex_dask.io.batch import Batch
from cortex_dask.io.job.records import SplitTask
from cortex_dask.io.job.splits import BATCH_NAMESPACE, BatchFormat, batch_id
from cortex_dask.io.json.encoder import EncodedRows
from cortex_dask.io.rows.payload import rows_slice, to_payload
from cortex_dask.io.rows.result import to_table
from cortex_dask.runtime.failures import Verdict, one_line, shorten
from cortex_dask.runtime.frames import AttemptFailed, BatchEvent, Recovered, RowsLimit
from cortex_dask.runtime.handler_process import log
from cortex_dask.runtime.handler_process.handler import LoadedJob
from cortex_dask.runtime.handler_process.memory import is_device_lost, is_out_of_memory, release_memory
from cortex_dask.runtime.history import BatchHistory, SplitHistory

if TYPE_CHECKING:
    import pyarrow as pa

Rows = Union["pa.Table", "EncodedRows"]
Fit = Callable[[list[Rows]], list[Rows]]
Shortcut = Callable[[Any], "EncodedRows | None"]
Name = Callable[[], str]  # makes a batch's id, when it is wanted
Notify = Callable[[BatchEvent], None]

_NOT_MADE = object()
_NEW = BatchHistory()  # of a batch that nothing has happened to
_PACKAGE = __name__.partition(".")[0]


class OutOfMemoryError(Exception):
    """One row alone takes too much memory; the cause is what the handler raised."""


class ProcessSpent(Exception):  # noqa: N818 - no fault: a signal to the supervisor
    """The process cannot be used any more: the split has to be run again in a new one."""


class Work:
    """A batch on its way to the handler, with its payload made ahead by the reader thread.

    A handler may change its payload, so every attempt gets a fresh one; the batch itself stays as it was read.
    """

    __slots__ = ("_format", "_given", "_payload", "batch")

    def __init__(self, batch: Batch, batch_format: BatchFormat) -> None:
        self.batch = batch
        self._format = batch_format
        self._given = False  # whether the handler has got the batch's own rows
        if batch_format == "records" and batch.again is not None:
            self._payload = batch.data  # a copy of records costs twice as much as to read them once more
            return
        try:
            self._payload = to_payload(batch.data, batch_format)
        except Exception:  # noqa: BLE001 - it happens again in the attempt, and is reported there
            self._payload = _NOT_MADE

    def payload(self) -> Any:
        """Return the whole batch as the handler wants it, not seen by any handler before."""
        payload, self._payload = self._payload, _NOT_MADE
        if payload is _NOT_MADE:
            return to_payload(self.as_read().data, self._format)
        self._given = self._given or payload is self.batch.data
        return payload

    def piece(self, start: int, stop: int) -> tuple[Any, Any]:
        """Return some of the rows: as they were read, and as the handler wants them."""
        self._payload = _NOT_MADE
        data = rows_slice(self.as_read().data, start, stop)
        return data, to_payload(data, self._format)

    def as_read(self) -> Batch:
        """Return the batch with its rows as they were read, whatever a handler has done to its payload."""
        again = self.batch.again
        if self._given and again is not None:
            self.batch, self._given = replace(self.batch, data=again()), False
        return self.batch


@dataclass(frozen=True, slots=True)
class SplitRun:
    """What is to be run."""

    task: SplitTask
    attempt_id: str  # makes the names of what is written unique
    history: SplitHistory
    overlap: bool = True  # whether the stages run in threads of their own
    #: What counts as raised by the handler: everything, in a process of its own.
    guard: type[BaseException] | tuple[type[BaseException], ...] = BaseException


class Attempts:
    """Handles batches, and decides what becomes of those that fail.

    Every failed attempt is reported at once, so that it is not forgotten when the process dies over a later batch.
    """

    def __init__(self, job: LoadedJob, split_run: SplitRun, notify: Notify) -> None:
        self._handler = job.handler
        self._settings = job.settings
        self._origin = split_run.task.split.origin
        self._history = split_run.history.batches
        self._cell = job.cell
        self._notify = notify
        self._guard = split_run.guard
        output = job.settings.output
        self._has_output = output is not None
        self._keep: bool | tuple[str, ...] = output.keep if output is not None else False
        self._shortcut: Shortcut | None = None

    def set_shortcut(self, shortcut: Shortcut | None) -> None:
        """Set what makes rows of a result without a table, where it can."""
        self._shortcut = shortcut

    def shorten(self, tables: list[Rows]) -> list[Rows]:
        """Return rows that were held back as the shortcut would have made them.

        Arrow's own way to JSON makes pyarrow import pandas, which a process that has only such rows can do without.
        """
        shortcut = self._shortcut
        if shortcut is None:
            return tables
        return [table if isinstance(table, EncodedRows) else shortcut(table.to_pylist()) or table for table in tables]

    def handle_batch(self, work: Work, fit: Fit, *, used: int = 0) -> list[Rows] | Verdict:
        """Handle a batch until it succeeds or fails for good; return the rows that came back, or why there are none.

        ``fit`` returns rows as they are written; what it raises is a failed attempt, too. ``used`` attempts have failed
        in this process already.
        """
        index = work.batch.index
        known = self._history.get(index) if self._history else None
        before = known or _NEW
        if before.verdict is not None:
            return before.verdict
        name = partial(batch_id, self._settings.job_id, self._origin, index)
        self._cell.start_batch(index)
        log.set_batch(name)
        attempts = before.attempts + used
        try:
            while True:
                try:
                    tables = fit(self._attempt(work, name, attempts + 1, before.rows_limit))
                except self._guard as error:
                    self._check_memory(error)
                    verdict, attempts = self._failed(index, error, attempts + 1), attempts + 1
                    if is_device_lost(error):
                        message = f"the device is of no more use to this process: {one_line(error)}"
                        raise ProcessSpent(message) from None
                else:
                    if known is not None or attempts:
                        self._notify(Recovered(index))
                    return tables
                if verdict is not None:
                    return verdict
        finally:
            log.set_batch(None)

    def _check_memory(self, error: BaseException) -> None:
        """Ask for a new process before a batch is given up for its memory in one that has run out of it repeatedly."""
        handler = self._handler
        if isinstance(error, OutOfMemoryError) and handler.patience and handler.exhausted >= handler.patience:
            raise ProcessSpent(
                f"{handler.exhausted} batches have run out of memory in it, the last with a single row"
            ) from None

    def _failed(self, index: int, error: BaseException, attempts: int) -> Verdict | None:
        """Report a failed attempt; return the verdict when it was the last."""
        memory = isinstance(error, OutOfMemoryError)
        shown = error.__cause__ if memory and error.__cause__ is not None else error
        text = shorten(_traceback(shown))
        most = self._settings.limits.max_attempts
        final = memory or attempts >= most
        verdict = Verdict("out of memory" if memory else "exception", one_line(shown), text, attempts)
        what = "failed with a single row" if memory else f"failed (attempt {attempts} of {most})"
        level = logging.ERROR if final else logging.WARNING
        log.logger.log(level, "batch %s: %s", what, verdict.error, extra={"exc_info": text})
        self._notify(AttemptFailed(index, verdict, final))
        return verdict if final else None

    # one attempt ------------------------------------------------------------------------------------------------------

    def _attempt(self, work: Work, name: Name, attempt: int, known_limit: int | None) -> list[Rows]:
        """Handle all rows of a batch: at once, or in pieces where that has taken too much memory before."""
        rows = work.batch.rows
        limit = min(self._handler.rows_limit or rows, known_limit or rows, rows)
        todo = [(0, rows)]
        if limit < rows:
            todo = [(start, min(start + limit, rows)) for start in range(0, rows, max(limit, 1))][::-1]
        exhausted = False
        largest = 0  # of the pieces that worked
        tables: list[Rows] = []
        while todo:
            start, stop = todo.pop()
            table, problem = self._call(work, start, stop, name, attempt)
            if problem is not None:
                if not exhausted:
                    self._handler.count_exhausted()
                exhausted = True
                if stop - start <= 1:
                    raise OutOfMemoryError from problem
                del problem  # with it go the frames that hold what filled the memory
                release_memory()
                middle = (start + stop) // 2
                todo += [(middle, stop), (start, middle)]
                log.logger.warning("out of memory with %d rows: trying again with %d", stop - start, stop - middle)
                continue
            largest = max(largest, stop - start)
            if table is not None:
                tables.append(table)
        # The largest piece, not the smallest: one huge row must not make all batches of the job handled row by row.
        if (exhausted or known_limit is not None) and 0 < largest < (self._handler.rows_limit or rows):
            self._handler.limit_rows(largest)
            self._notify(RowsLimit(largest, everywhere=exhausted))
        return tables

    def _call(
        self, work: Work, start: int, stop: int, name: Name, attempt: int
    ) -> tuple[Rows | None, BaseException | None]:
        """Handle some rows; returns what came back, or the exception that says that they took too much memory."""
        rows = stop - start
        try:
            data: Any = None
            if rows == work.batch.rows:
                payload = work.payload()
            else:
                data, payload = work.piece(start, stop)
                name = partial(_piece_id, name, start, stop)
            self._cell.start_call(attempt, rows)
            try:
                result = self._handler.handle(payload, name)
            finally:
                self._cell.end_call()
            if result is None or not self._has_output:
                return None, None
            if self._shortcut is not None and (encoded := self._shortcut(result)) is not None:
                return encoded, None
            if self._keep and data is None:
                data = work.as_read().data
            return to_table(result, data, rows, self._keep), None
        except self._guard as error:
            if not is_out_of_memory(error):
                raise
            if rows > 1:
                error = error.with_traceback(None)
                error.__context__ = error.__cause__ = None
            return None, error


def _piece_id(name: Name, start: int, stop: int) -> str:
    """Return the id of a piece of a batch: a handler that names its own results by ids must not overwrite one half."""
    return str(uuid.uuid5(BATCH_NAMESPACE, f"{name()}/{start}-{stop}"))


def _traceback(error: BaseException) -> str:
    """Return the traceback from where the handler's own code begins."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None and _is_ours(trace):
        trace = trace.tb_next
    try:
        return "".join(traceback.format_exception(type(error), error, trace))
    except Exception:  # noqa: BLE001 - of an exception whose __str__ raises
        return "".join(traceback.format_tb(trace)) + one_line(error)


def _is_ours(trace: TracebackType) -> bool:
    name = str(trace.tb_frame.f_globals.get("__name__", ""))
    return name == _PACKAGE or name.startswith((f"{_PACKAGE}.runtime.", f"{_PACKAGE}.io."))
