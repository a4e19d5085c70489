"""The output of one attempt at a split: its schema found, its rows written to a staged part."""

from __future__ import annotations

import threading
from collections.abc import Callable
from itertools import groupby
from typing import TYPE_CHECKING, Any, Protocol

import pyarrow as pa

from cortex_dask.io.arrow.cast import conform
from cortex_dask.io.arrow.schema import decide_schema, decode_schema, encode_schema, is_decided
from cortex_dask.io.job.records import Part
from cortex_dask.io.job.settings import OutputSettings
from cortex_dask.io.job.splits import part_name
from cortex_dask.io.json.encoder import EncodedRows
from cortex_dask.io.output.directory import AttemptName
from cortex_dask.io.store.staged_file import StagedFile
from cortex_dask.io.store.store import Store
from cortex_dask.runtime.frames import Writing
from cortex_dask.runtime.handler_process.channel import Channel, ChannelAborted
from cortex_dask.runtime.progress_cell import Phase, ProgressCell

if TYPE_CHECKING:
    from cortex_dask.io.output.part import PartWriter
    from cortex_dask.runtime.handler_process.attempts import Fit, Rows, Work

MOST_BATCHES = 64  # that a schema is made of: a column that is null in all of them stays a column of nulls
_MOST_ROWS = 100_000

_AT_ONCE = 4 * 1024 * 1024
_TABLES_AT_ONCE = 256
_SLICED = 64 * 1024


class NeedsSchema(Exception):  # noqa: N818 - an outcome, not a fault
    """There is output, but its schema is not decided; ``schema`` is what the first rows make of it."""

    def __init__(self, schema: str) -> None:
        super().__init__(schema)
        self.schema = schema


class SchemaSource(Protocol):
    """What knows which schema the job's output has."""

    def propose(self, schema: str) -> None:
        """Propose what this split's first rows make of it (base64 of Arrow IPC)."""

    def answer(self, *, wait: bool) -> str | None:
        """Return the schema that was decided; None while there is none (after some time, when waiting)."""


class Gathering:
    """The first batches of a split while the job has no output schema.

    What is proposed depends on the rows only: on the first batches that decide the type of every column, 64 of them
    at most. While the answer is on its way, handling continues.
    """

    def __init__(self, source: SchemaSource, cell: ProgressCell) -> None:
        self._source = source
        self._cell = cell
        self._candidate: pa.Schema | None = None
        self._proposed: str | None = None
        self._seen = 0
        self._rows = 0
        self._held: list[tuple[Work, list[Rows]]] = []

    def fit(self, rows: list[Rows]) -> list[Rows]:
        """Check that rows have types in common with those before; the batch fails if not."""
        known = [] if self._candidate is None else [pa.Table.from_batches([], self._candidate)]
        tables: list[Any] = [table for table in rows if not isinstance(table, EncodedRows) and table.num_columns]
        if tables:
            self._candidate = decide_schema([*known, *tables])
        return tables

    def add(self, work: Work, tables: list[Rows]) -> pa.Schema | None:
        """Keep a batch's rows; return the schema when it is decided."""
        self._seen += 1
        if rows := sum(table.num_rows for table in tables):
            self._held.append((work, tables))
            self._rows += rows
        full = self._seen >= MOST_BATCHES or self._rows >= _MOST_ROWS
        if self._proposed is None and self._rows and self._candidate is not None:
            if not full and not is_decided(self._candidate):
                return None
            self._propose()
        return self._answer(wait=full) if self._proposed is not None else None

    def pop_held(self) -> list[tuple[Work, list[Rows]]]:
        """Return what is held back, and forget it."""
        held, self._held = self._held, []
        return held

    def finish(self) -> pa.Schema | None:
        """Return the schema that is decided for what is held, waiting for it; None if there are no rows."""
        if not self._rows or self._candidate is None:
            return None
        if self._proposed is None:
            self._propose()
        return self._answer(wait=True)

    def _propose(self) -> None:
        schema = self._candidate
        if not is_decided(schema):  # not even after many batches: now a column without values gets the type it has
            schema = decide_schema([table for _, tables in self._held for table in tables], final=True)
        self._proposed = encode_schema(schema)
        self._source.propose(self._proposed)

    def _answer(self, *, wait: bool) -> pa.Schema | None:
        answer = self._source.answer(wait=False)
        if answer is None and wait:
            self._cell.set_phase(Phase.WAITING)
            answer = self._source.answer(wait=True)
            self._cell.set_phase(Phase.RUNNING)
            if answer is None:
                raise NeedsSchema(self._proposed or "")
        return None if answer is None else decode_schema(answer)


class _ReportingStore(Store):
    """A store that reports which local files it opens, so that they can be removed if this process is killed."""

    __slots__ = ("_notify",)

    def __init__(self, url: str, notify: Callable[[Writing], None]) -> None:
        super().__init__(url)
        self._notify = notify

    def stage(self, name: str) -> StagedFile:
        staged = super().stage(name)
        if staged.local_path is not None:
            self._notify(Writing(staged.local_path))
        return staged


class StagedPart:
    """The part that an attempt writes, started with the first row."""

    def __init__(
        self,
        settings: OutputSettings,
        name: AttemptName,
        cell: ProgressCell,
        limit: int | None,  # bytes that may wait for a thread that encodes and uploads; None: there is no such thread
        notify: Callable[[Writing], None],
    ) -> None:
        self._store = _ReportingStore(settings.url, notify)
        self._settings = settings
        self._name = part_name(name.job_id, name.split, settings.suffix)
        self._staged = name.staged
        self._cell = cell
        self._limit = limit
        self._writer: PartWriter | None = None
        self._channel: Channel[list[Rows]] | None = None
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._waiting: list[Rows] = []  # until they are a few megabytes, which are worth a switch to the thread
        self._waiting_bytes = 0
        self._schema: pa.Schema | None = None

    def set_schema(self, schema: pa.Schema) -> None:
        """Set the schema of the rows that are written."""
        self._schema = schema

    def write(self, tables: list[Rows]) -> None:
        """Append rows that have the schema."""
        for table in tables:
            if table.num_rows:
                self._waiting.append(table)
                size = table.nbytes if isinstance(table, EncodedRows) else table.get_total_buffer_size()
                if size > _SLICED:  # perhaps of a buffer of which the table is a slice; to look closer takes longer
                    size = table.nbytes
                self._waiting_bytes += size
        if self._limit is None or self._waiting_bytes >= _AT_ONCE or len(self._waiting) >= _TABLES_AT_ONCE:
            self._pass_on()

    def close(self) -> Part | None:
        """Write the rest; returns the part, staged and durable, or None where no row came back."""
        self._pass_on()
        if self._channel is not None and self._thread is not None:
            self._channel.finish()
            self._thread.join()
            if self._error is not None:
                raise self._error
        if self._writer is None:
            return None
        rows, size = self._writer.close()
        return Part(self._name, self._staged, rows, size)

    def discard(self) -> None:
        """Leave nothing behind."""
        if self._channel is not None:
            self._channel.abort()
        if self._thread is not None:
            self._thread.join()
        if self._writer is not None:
            self._writer.discard()

    def _pass_on(self) -> None:
        """Encode what is waiting, or have the thread do it."""
        tables, size = self._waiting, self._waiting_bytes
        if not tables:
            return
        self._waiting, self._waiting_bytes = [], 0
        if self._limit is None:
            self._encode(tables)
            return
        if self._channel is None:
            self._channel = Channel(self._limit)
            self._thread = threading.Thread(target=self._encode_items, name="cortex-dask-writer", daemon=True)
            self._thread.start()
        try:
            self._channel.put(tables, size)
        except ChannelAborted:
            raise (self._error or RuntimeError("the writer thread ended")) from None

    def _encode_items(self) -> None:
        assert self._channel is not None
        try:
            while groups := self._channel.pop_items():
                for tables in groups:
                    self._encode(tables)
                    self._cell.count_written(len(tables))
        except ChannelAborted:
            return
        except BaseException as error:  # noqa: BLE001 - raised again in the main thread
            self._error = error
            self._channel.abort()

    def _encode(self, tables: list[Rows]) -> None:
        if self._writer is None:
            from cortex_dask.io.output.part import PartWriter

            assert self._schema is not None
            self._writer = PartWriter(self._store, self._staged, self._settings, self._schema)
        for encoded, group in groupby(tables, key=lambda rows: isinstance(rows, EncodedRows)):
            rows: list[Any] = list(group)
            if encoded:
                self._writer.write_text(b"".join([item.text for item in rows]), sum(item.num_rows for item in rows))
            else:
                self._writer.write(rows[0] if len(rows) == 1 else pa.concat_tables(rows))


def fitting(schema: pa.Schema) -> Fit:
    """Return what brings rows to a schema that is decided."""

    def fit(tables: list[Rows]) -> list[Rows]:
        if len(tables) == 1 and isinstance(tables[0], EncodedRows):
            return tables
        return [
            table if isinstance(table, EncodedRows) else conform(table, schema)
            for table in tables
            if isinstance(table, EncodedRows) or table.num_columns
        ]

    return fit
