"""Attempts at one batch: what ``handle_batch`` raises is tried again, what takes too much memory is tried in halves."""

from __future__ import annotations

import logging
import traceback
import uuid
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, Union

from cortex_dask.io.batch import Batch
from cortex_dask.io.job.settings import JobSettings
from cortex_dask.io.job.splits import BATCH_NAMESPACE, BatchFormat, batch_id
from cortex_dask.io.rows.payload import rows_slice, to_payload
from cortex_dask.io.rows.result import to_table
from cortex_dask.runtime.failures import Verdict, one_line, shorten
from cortex_dask.runtime.frames import AttemptFailed, BatchEvent, Recovered, RowsLimit
from cortex_dask.runtime.handler_process import log
from cortex_dask.runtime.handler_process.handler import LoadedHandler
from cortex_dask.runtime.handler_process.memory import is_device_lost, is_out_of_memory, release_memory
from cortex_dask.runtime.history import BatchHistory, SplitHistory
from cortex_dask.runtime.progress_cell import ProgressCell

if TYPE_CHECKING:
    import pyarrow as pa

    from cortex_dask.io.json.encoder import EncodedRows

Rows = Union["pa.Table", "EncodedRows"]
Fit = Callable[[list[Rows]], list[Rows]]
Shortcut = Callable[[Any], "EncodedRows | None"]
Name = Callable[[], str]  # makes a batch's id, for those who want it
Notify = Callable[[BatchEvent], None]

_NOT_MADE = object()
_NEW = BatchHistory()  # of a batch that nothing has happened to
_PACKAGE = __name__.partition(".")[0]


class OutOfMemoryError(Exception):
    """One row alone takes too much memory; the cause is what the handler raised."""


class ProcessSpent(Exception):  # noqa: N818 - no fault of anybody's: a signal to the supervisor
    """The process is of no more use: the split has to be run again in a new one."""


class Work:
    """A batch on its way to the handler, with its payload made ahead by the reader thread.

    A handler may change its payload, so every attempt gets a fresh one; the batch itself stays as it was read.

    Parameters
    ----------
    batch : Batch
        As it was read.
    batch_format : str
        What the handler wants.
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


class Attempts:
    """Handles batches, and decides what becomes of those that fail.

    Parameters
    ----------
    handler : LoadedHandler
        The handler.
    settings : JobSettings
        The job's.
    origin : int
        The number of the split that names the batches.
    history : SplitHistory
        What earlier processes met.
    cell : ProgressCell
        Where each call is noted.
    notify : callable
        Told of every failed attempt, so that it is not forgotten when the process dies over a later batch.
    guard : type
        What counts as raised by the handler: everything, in a process of its own.
    """

    def __init__(
        self,
        handler: LoadedHandler,
        settings: JobSettings,
        origin: int,
        history: SplitHistory,
        cell: ProgressCell,
        notify: Notify,
        guard: type[BaseException] | tuple[type[BaseException], ...] = BaseException,
    ) -> None:
        self._handler = handler
        self._settings = settings
        self._origin = origin
        self._history = history.batches
        self._cell = cell
        self._notify = notify
        self._guard = guard
        output = settings.output
        self._has_output = output is not None
        self._keep: bool | tuple[str, ...] = output.keep if output is not None else False
        self.shortcut: Shortcut | None = None  # makes rows of a result without a table, where it can

    def run(self, work: Work, fit: Fit, *, used: int = 0) -> list[Rows] | Verdict:
        """Handle a batch until it succeeds or fails for good.

        Parameters
        ----------
        work : Work
            The batch.
        fit : callable
            Takes the rows that came back and returns them as they are written; what it raises is a failed attempt too.
        used : int
            Attempts that have failed in this process already.

        Returns
        -------
        list of pyarrow.Table or EncodedRows, or Verdict
            The rows that came back, or why there are none.
        """
        index = work.batch.index
        known = self._history.get(index) if self._history else None
        before = known or _NEW
        if before.verdict is not None:
            return before.verdict
        name = partial(batch_id, self._settings.job_id, self._origin, index)
        self._cell.begin_batch(index)
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
                        raise ProcessSpent(f"the device is of no more use to this process: {one_line(error)}") from None
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
        """Note a failed attempt; returns the verdict when it was the last."""
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
                self._handler.exhausted += not exhausted
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
            self._handler.rows_limit = largest
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
            self._cell.begin_call(attempt, rows)
            try:
                result = self._handler.handle(payload, name)
            finally:
                self._cell.end_call()
            if result is None or not self._has_output:
                return None, None
            if self.shortcut is not None and (encoded := self.shortcut(result)) is not None:
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
