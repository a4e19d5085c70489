"""One attempt at a split: read its batches, handle them, write what comes back.

In a handler process the three stages overlap: a reader thread fetches and decodes the next batches, the calling
thread runs the handler, a writer thread encodes and uploads. The same code runs them in turns, in one thread, for
``cluster="inline"`` and after a crash, when it has to be certain which stage of which batch it hits.
"""

from __future__ import annotations

import itertools
import threading
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import pyarrow as pa

from cortex_dask.errors import StorageError
from cortex_dask.io.arrow.schema import decode_schema
from cortex_dask.io.batch import Ahead, BadLine, Batch
from cortex_dask.io.job.records import Cause, NoOutput, SplitRecord
from cortex_dask.io.job.splits import BatchFormat, Split
from cortex_dask.io.json.encoder import row_encoder
from cortex_dask.io.output.directory import AttemptName
from cortex_dask.io.reading import read_split
from cortex_dask.io.store.source import UnreadableInput
from cortex_dask.runtime.failures import FailureFile, Verdict, one_line
from cortex_dask.runtime.frames import SchemaMismatch
from cortex_dask.runtime.handler_process import log
from cortex_dask.runtime.handler_process.attempts import Attempts, Fit, Notify, SplitRun, Work
from cortex_dask.runtime.handler_process.channel import Channel, ChannelAborted
from cortex_dask.runtime.handler_process.handler import LoadedJob
from cortex_dask.runtime.handler_process.part import Gathering, SchemaSource, StagedPart, fitting
from cortex_dask.runtime.progress_cell import Phase

READ_AHEAD = 32 * 1024 * 1024  # bytes of small batches that wait for the handler, and again for the writer
_ROW = 200  # bytes of a row, where the plan does not know
#: Bytes of a batch up to which it is cut, or parsed, by the thread that handles it. That keeps Python's lock, so a
#: thread of its own helps only while the handler does without, and makes the handler wait for the lock afterwards.
SMALL_BATCH = 64 * 1024
_QUICK: tuple[BatchFormat, ...] = ("records", "numpy", "pyarrow")  # a payload of few rows takes microseconds to make
_JOIN_SECONDS = 5.0
_NAMED_LINES = 10  # malformed lines of a split that its log names


@dataclass(frozen=True, slots=True)
class Unread:
    """The batches from ``first`` on cannot be read."""

    first: int
    verdict: Verdict


Item = Work | BadLine | Unread
T = TypeVar("T")


def run_attempt(job: LoadedJob, split_run: SplitRun, source: SchemaSource, notify: Notify) -> SplitRecord:
    """Run a split; the record lacks what only the supervisor knows.

    Raises StorageError if a store fails after all retries, and NeedsSchema if there is output and its schema is not
    decided. Nothing is left behind, as with every exception.
    """
    pipeline = Pipeline(job, split_run, source, notify)
    carried = job.metrics.collect()  # pushed between two splits, as from __init__
    try:
        record = pipeline.run_split()
    except BaseException:
        pipeline.discard()
        job.metrics.collect()
        job.metrics.restore(carried)
        raise
    job.metrics.restore(carried)
    metrics = job.metrics.collect()
    return replace(record, metrics=metrics)


class Pipeline:
    """The state of one attempt at a split."""

    def __init__(self, job: LoadedJob, split_run: SplitRun, source: SchemaSource, notify: Notify) -> None:
        self._job = job
        self._split: Split = split_run.task.split
        self._name = AttemptName(job.settings.job_id, self._split.number, split_run.attempt_id)
        self._history = split_run.history
        self._overlap = split_run.overlap and not split_run.history.careful
        self._notify = notify
        self._handled_before = job.handler.handle_nanoseconds
        settings = job.settings
        self._format = settings.batch_format
        self._attempts = Attempts(job, split_run, notify)
        self._failures = FailureFile(
            job.store, settings.job_id, self._split, split_run.attempt_id, job.header.batch_size
        )
        self._limit = min(READ_AHEAD, (settings.compute.memory or READ_AHEAD * 32) // 32)
        self._part: StagedPart | None = None
        self._gathering: Gathering | None = None
        self._fit: Fit = lambda tables: tables
        if settings.output is not None:
            limit = self._limit if self._overlap else None
            self._part = StagedPart(settings.output, self._name, job.cell, limit, notify)
            if split_run.task.schema is not None:
                self._set_schema(decode_schema(split_run.task.schema))
            else:
                self._gathering = Gathering(source, job.cell)
                self._fit = self._gathering.fit
        self._channel: Channel[Any] | None = None
        self._reader: threading.Thread | None = None
        self._batches = 0
        self._failed = 0
        self._malformed = 0
        self._rows_in = 0
        self._knows_output = self._part is None  # whether it is known that the first batch has output or has none

    def run_split(self) -> SplitRecord:
        """Handle every batch, then make failures and part durable."""
        self._job.cell.set_phase(Phase.RUNNING)
        for item in self._items():
            match item:
                case Work():
                    self._handle(item)
                case BadLine():
                    self._leave_out(item)
                case Unread():
                    self._give_up(item)
        return self._finish()

    def _finish(self) -> SplitRecord:
        """Write what is left; the part and the failures are durable afterwards."""
        self._job.cell.set_phase(Phase.CLOSING)
        if self._gathering is not None:
            self._write_held(self._gathering.finish())
        part = None if self._part is None else self._part.close()
        return SplitRecord(
            split=self._split.number,
            attempt_id=self._name.attempt_id,
            part=part,
            batches=self._batches,
            succeeded=self._batches - self._failed,
            failures_file=self._failures.close(),
            failures=tuple(self._failures.failures),
            rows_in=self._rows_in,
            rows_out=part.rows if part is not None else 0,
            handle_seconds=(self._job.handler.handle_nanoseconds - self._handled_before) / 1e9,
        )

    def discard(self) -> None:
        """Stop the other stages, and leave nothing behind."""
        if self._channel is not None:
            self._channel.abort()
        if self._part is not None:
            self._part.discard()
        self._failures.discard()
        if self._reader is not None:
            self._reader.join(_JOIN_SECONDS)  # it may be in a request that takes longer; it ends after that

    # handling ---------------------------------------------------------------------------------------------------------

    def _handle(self, work: Work) -> None:
        """Handle a batch and pass on what came back."""
        batch = work.batch
        self._batches += 1
        self._rows_in += batch.rows
        if batch.rows:  # or else each of its lines is malformed
            self._handle_rows(work)
        self._job.cell.end_batch(batch.rows)

    def _handle_rows(self, work: Work, used: int = 0) -> None:
        result = self._attempts.handle_batch(work, self._fit, used=used)
        if isinstance(result, Verdict):
            self._failed += 1
            self._failures.add(work.as_read(), result)
            return
        if not self._knows_output:
            self._knows_output = True
            if not any(table.num_rows for table in result):
                self._notify(NoOutput(self._split.number))
        if self._gathering is not None:
            schema = self._gathering.add(work, result)
            if schema is not None:
                self._write_held(schema)
        elif self._part is not None:
            self._part.write(result)

    # the schema -------------------------------------------------------------------------------------------------------

    def _set_schema(self, schema: pa.Schema) -> None:
        assert self._part is not None
        self._part.set_schema(schema)
        self._fit = fitting(schema)
        self._gathering = None
        output = self._job.settings.output
        if output is not None and output.format == "json" and not output.keep:
            self._attempts.set_shortcut(row_encoder(schema))

    def _write_held(self, schema: pa.Schema | None) -> None:
        """Write what was held back while there was no schema; a batch that does not fit it has failed an attempt."""
        assert self._gathering is not None
        held = self._gathering.pop_held()
        if schema is None:
            return
        self._set_schema(schema)
        assert self._part is not None
        for work, tables in held:
            try:
                fitted = self._fit(self._attempts.shorten(tables))
            except ValueError as error:
                log.logger.warning("a batch does not fit the output's schema, trying it again: %s", error)
                self._notify(SchemaMismatch(work.batch.index))
                self._handle_rows(work, used=1)
            else:
                self._part.write(fitted)

    # reading ----------------------------------------------------------------------------------------------------------

    def _items(self) -> Iterator[Item]:
        """Yield the split's batches, read ahead by another thread: the files, and what can be made of them there."""
        if not self._overlap:
            return self._read()
        size = self._bytes_per_row()
        header = self._job.header
        if header.batch_size * size <= SMALL_BATCH and self._job.settings.batch_format in _QUICK:
            return self._read(self._ahead)
        return self._ahead(self._read(), lambda item: item.batch.rows * size if isinstance(item, Work) else _ROW)

    def _ahead(self, items: Iterator[T], size: Callable[[T], int]) -> Iterator[T]:
        """Yield ``items``, which a reader thread reads."""
        channel: Channel[T] = Channel(self._limit)
        self._channel = channel
        self._reader = threading.Thread(
            target=self._fill, args=(channel, items, size), name="cortex-dask-reader", daemon=True
        )
        self._reader.start()
        while popped := channel.pop_items():
            yield from popped
        self._reader.join()

    def _fill(self, channel: Channel[T], items: Iterator[T], size: Callable[[T], int]) -> None:
        """Read in the reader thread."""
        try:
            for item in items:
                channel.put(item, size(item))
                self._job.cell.count_read()
            channel.finish()
        except ChannelAborted:
            return
        except BaseException as error:  # noqa: BLE001 - raised again in the main thread
            channel.finish(error)

    def _read(self, ahead: Ahead | None = None) -> Iterator[Item]:
        """Yield the split's batches with their payloads, in the end perhaps those that cannot be read."""
        split, cell = self._split, self._job.cell
        wanted = iter(split.only) if split.only is not None else itertools.count()
        expected = next(wanted, None)
        stop = self._history.unreadable
        items = iter(read_split(split, self._job.header, ahead) if ahead else read_split(split, self._job.header))
        while expected is not None:
            if stop is not None and expected >= stop[0]:
                yield Unread(expected, stop[1])
                return
            if not self._overlap:
                cell.start_read(expected)
            try:
                item = next(items, None)
            except StorageError:
                raise
            except Exception as error:  # noqa: BLE001 - however it failed, the rest was not read
                yield Unread(expected, _unreadable(error))
                return
            if item is None:
                if expected < (split.batches or 0):
                    planned = f"the plan says that split {split.number} has {split.batches} batches"
                    found = f"{planned}, but number {expected} is not there"
                    yield Unread(expected, Verdict("unreadable input", found, None, 1))
                return
            if isinstance(item, Batch):
                expected = next(wanted, None)
                work = Work(item, self._format)
                if not self._overlap:
                    cell.end_read()
                yield work
            else:
                yield item

    def _leave_out(self, line: BadLine) -> None:
        """Make a dead letter of a malformed line."""
        self._malformed += 1
        if self._malformed <= _NAMED_LINES:
            log.logger.error("a line is malformed: %s, line %d: %s", line.path, line.line, line.error)
        elif self._malformed == _NAMED_LINES + 1:
            number = self._split.number
            log.logger.error("split %d has more malformed lines: all of them are in the dead letter", number)
        self._failures.add_line(line)

    def _give_up(self, unread: Unread) -> None:
        """Make dead letters of the batches that cannot be read."""
        split = self._split
        if split.only is not None:
            indexes = [index for index in split.only if index >= unread.first]
        elif split.batches is not None:
            indexes = list(range(unread.first, split.batches))
        else:
            indexes = [unread.first]  # it is unknown how many follow: this one is for all of them
        many = "1 batch is" if len(indexes) == 1 else f"{len(indexes)} batches are"
        log.logger.error("split %d: %s not handled: %s", split.number, many, unread.verdict.error)
        self._batches += len(indexes)
        self._failed += len(indexes)
        self._failures.add_unread(indexes, unread.verdict)

    def _bytes_per_row(self) -> int:
        split, header = self._split, self._job.header
        rows, size = (split.rows, split.bytes) if split.rows else (header.rows, header.bytes)
        return max(size // rows, 1) if rows and size else _ROW


def _unreadable(error: Exception) -> Verdict:
    if isinstance(error, UnreadableInput):
        return Verdict("unreadable input", str(error), None, 1)
    cause: Cause = "out of memory" if isinstance(error, MemoryError) else "unreadable input"
    return Verdict(cause, f"the input cannot be read: {one_line(error)}", traceback.format_exc(), 1)
