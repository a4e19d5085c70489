"""Read the pieces of a split from Parquet files: row group by row group, into batches of exactly ``batch_size`` rows.

A row group is decoded some rows at a time, so memory is bounded whatever the size of row groups.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cortex_dask.io.arrow.cast import SchemaError, conform
from cortex_dask.io.arrow.schema import decode_schema
from cortex_dask.io.batch import Ahead, Batch, Position
from cortex_dask.io.input.files import HIVE_NULL
from cortex_dask.io.input.filters import Filters, bind, columns_of, mask, parse_filters
from cortex_dask.io.input.prefetch import SmallFiles
from cortex_dask.io.job.splits import Piece, PlanHeader, Split
from cortex_dask.io.parquet.footer import group_bytes, leaves_of
from cortex_dask.io.store.source import UnreadableInput, local_path, open_source, translated, verify_local

#: What is decoded at a time. A reader of this many rows at a time is as fast as one of whole row groups (0.20 s for 5
#: million rows of 4 columns, either way), and a piece that stops inside a row group does not pay for the rest of it.
ROWS_AT_A_TIME, _BYTES_AT_A_TIME = 1 << 17, 16 << 20

#: Bytes of a row group, uncompressed, up to which its encoded columns are fetched whole; larger ones so much at a time.
_WHOLE, _BUFFER = 64 << 20, 4 << 20


def read_parquet(split: Split, header: PlanHeader, ahead: Ahead | None = None) -> Iterator[Batch]:
    """Yield the batches of a split; see :func:`cortex_dask.io.reading.read_split`."""
    assert header.schema is not None
    size = header.batch_size
    ranges = [
        (first, list(_overlapping(split.pieces, first * size, None if stop is None else stop * size)))
        for first, stop in _batch_ranges(split.only)
    ]
    found = _row_runs(header, ranges)
    batcher = None
    for first, row_run in found if ahead is None else ahead(found, _size_of):
        if row_run is None:
            if batcher is not None:
                yield from batcher.rest()
            batcher = _Batcher(size, first)
        else:
            assert batcher is not None
            yield from batcher.add(row_run)
    if batcher is not None:
        yield from batcher.rest()


def _row_runs(
    header: PlanHeader, ranges: list[tuple[int, list[tuple[Piece, int, int]]]]
) -> Iterator[tuple[int, RowRun | None]]:
    """Yield the index of each range's first batch, with None at its start and then with its rows."""
    reader = RowReader(header, [piece for _, pieces in ranges for piece, _, _ in pieces])
    try:
        for first, pieces in ranges:
            yield first, None
            for piece, low, high in pieces:
                for row_run in reader.rows(piece, low, high):
                    yield first, row_run
    finally:
        reader.close()


def _size_of(item: tuple[int, RowRun | None]) -> int:
    return 0 if item[1] is None else item[1].rows.nbytes


def _batch_ranges(only: Sequence[int] | None) -> Iterator[tuple[int, int | None]]:
    """Yield ranges of consecutive batch indexes: first and stop (None: to the end)."""
    if only is None:
        yield 0, None
        return
    indexes = sorted(set(only))
    first = 0
    for at in range(1, len(indexes) + 1):
        if at == len(indexes) or indexes[at] != indexes[at - 1] + 1:
            yield indexes[first], indexes[at - 1] + 1
            first = at


def _overlapping(pieces: Sequence[Piece], start: int, stop: int | None) -> Iterator[tuple[Piece, int, int]]:
    """Yield the pieces that hold rows ``start`` to ``stop`` of the stream, with the range of their passing rows."""
    at = 0
    for piece in pieces:
        assert piece.rows is not None
        low, high = max(start - at, 0), piece.rows if stop is None else min(stop - at, piece.rows)
        if low < high:
            yield piece, low, high
        at += piece.rows


class RowRun(NamedTuple):
    """Rows that pass, ready to be handed out, and where they lie in their file."""

    rows: pa.RecordBatch
    path: str
    start: int  # of the first in the file, when they are consecutive
    numbers: np.ndarray[Any, Any] | None  # of each in the file, when filters leave others out


class _Batcher:
    """Cuts a stream of rows into batches."""

    def __init__(self, size: int, index: int) -> None:
        self._size, self._index = size, index
        self._parts: list[pa.RecordBatch] = []
        self._positions: list[Position] = []
        self._held = 0

    def add(self, row_run: RowRun) -> Iterator[Batch]:
        """Add rows, and yield the batches that are full."""
        rows, at = row_run.rows, 0
        while at < rows.num_rows:
            count = min(self._size - self._held, rows.num_rows - at)
            self._parts.append(rows.slice(at, count))
            self._record_position(row_run, at, at + count)
            self._held += count
            at += count
            if self._held == self._size:
                yield self._cut()

    def rest(self) -> Iterator[Batch]:
        """Yield the last batch, which may be short."""
        if self._held:
            yield self._cut()

    def _record_position(self, row_run: RowRun, at: int, stop: int) -> None:
        if row_run.numbers is None:
            start, end = row_run.start + at, row_run.start + stop
        else:
            start, end = int(row_run.numbers[at]), int(row_run.numbers[stop - 1]) + 1
        if self._positions and self._positions[-1].path == row_run.path:
            start = self._positions.pop().start
        self._positions.append(Position(row_run.path, "rows", start, end))

    def _cut(self) -> Batch:
        table = pa.Table.from_batches(self._parts)
        if len(self._parts) > 1:
            table = table.combine_chunks()
        batch = Batch(self._index, table, self._held, tuple(self._positions))
        self._index, self._held, self._parts, self._positions = self._index + 1, 0, [], []
        return batch


class RowReader:
    """Reads rows of pieces as the plan's schema has them, one file open at a time."""

    def __init__(self, header: PlanHeader, pieces: Sequence[Piece] = ()) -> None:
        assert header.schema is not None
        self._schema = decode_schema(header.schema)
        self._keys = header.keys
        self._filters: Filters | None = None
        self._filter_schema = pa.schema([])
        if header.filters:
            assert header.filter_schema is not None  # planning wrote it beside the filters
            self._filter_schema = decode_schema(header.filter_schema)
            self._filters = bind(parse_filters(header.filters) or (), self._filter_schema)
        self._filter_columns = columns_of(self._filters)
        self._file: _OpenFile | None = None
        self._small = SmallFiles(pieces)

    def close(self) -> None:
        """Close the file that is open, and fetch no more."""
        self._small.close()
        if self._file is not None:
            self._file.close()
            self._file = None

    def rows(self, piece: Piece, low: int, high: int) -> Iterator[RowRun]:
        """Yield the rows ``low`` to ``high`` of those of the piece that pass."""
        filtered = self._filters is not None and piece.rows != piece.stop - piece.start
        names = [*self._schema.names, *(self._filter_columns if filtered else ())]
        start, stop = (piece.start, piece.stop) if filtered else (piece.start + low, piece.start + high)
        with translated(piece.path):
            file = self._open(piece)
            assert piece.group is not None
            offset = file.offsets[piece.group]
            seen = 0  # passing rows so far
            for at, table in file.read(piece.group, start, stop, self._in_file(names)):
                if not filtered:
                    yield from self._row_runs(table, piece, offset + at, None)
                    continue
                numbers = self._passing(table, piece)
                wanted = numbers[max(0, low - seen) : max(0, high - seen)]
                seen += len(numbers)
                if len(wanted):
                    yield from self._row_runs(table.take(pa.array(wanted)), piece, 0, wanted + (offset + at))
                if seen >= high:
                    return
            if filtered and seen < high:
                raise UnreadableInput(
                    piece.path, "holds other rows than when the job was planned: submit the job again"
                )

    def passing_rows(self, piece: Piece) -> np.ndarray[Any, Any]:
        """Return which rows of the piece pass the filters, counted from its start; reads only what filters look at."""
        found = []
        with translated(piece.path):
            file = self._open(piece)
            assert piece.group is not None
            for at, table in file.read(piece.group, piece.start, piece.stop, self._in_file(self._filter_columns)):
                found.append(self._passing(table, piece) + (at - piece.start))
        return np.concatenate(found) if found else np.empty(0, np.int64)

    def _open(self, piece: Piece) -> _OpenFile:
        if self._file is None or self._file.path != piece.path:
            if self._file is not None:
                self._file.close()
                self._file = None
            self._file = _OpenFile(piece, self._small.take(piece))
        return self._file

    def _in_file(self, names: Sequence[str]) -> list[str]:
        return [name for name in dict.fromkeys(names) if name not in self._keys]

    def _passing(self, table: pa.Table, piece: Piece) -> np.ndarray[Any, Any]:
        import pyarrow.compute as pc

        assert self._filters is not None
        columns = self._assembled(table, piece, self._filter_schema)
        numbers = pc.indices_nonzero(mask(self._filters, columns))
        return np.asarray(numbers).astype(np.int64)

    def _row_runs(
        self, table: pa.Table, piece: Piece, start: int, numbers: np.ndarray[Any, Any] | None
    ) -> Iterator[RowRun]:
        at = 0
        for rows in self._assembled(table, piece, self._schema).combine_chunks().to_batches():
            yield RowRun(rows, piece.path, start + at, None if numbers is None else numbers[at : at + rows.num_rows])
            at += rows.num_rows

    def _assembled(self, table: pa.Table, piece: Piece, schema: pa.Schema) -> pa.Table:
        """Return the table as the schema has it: columns promoted, null where missing, keys from the path."""
        if table.schema.equals(schema):
            return table
        keys = dict(piece.keys)
        columns = []
        for field in schema:
            index = -1 if field.name in self._keys else table.schema.get_field_index(field.name)
            if field.name in self._keys:
                text = keys.get(field.name, HIVE_NULL)
                value = None if text == HIVE_NULL else int(text) if self._keys[field.name] == "int64" else text
                columns.append(pa.repeat(pa.scalar(value, field.type), table.num_rows))
            elif index < 0:
                columns.append(pa.nulls(table.num_rows, field.type))
            elif table.schema.field(index).type.equals(field.type):
                columns.append(table.column(index))
            else:
                columns.append(_promoted(table.column(index), field, piece.path))
        return pa.Table.from_arrays(columns, schema=schema)


def _promoted(column: pa.ChunkedArray, field: pa.Field, path: str) -> pa.ChunkedArray:
    try:
        return conform(pa.table({field.name: column}), pa.schema([field.with_nullable(True)])).column(0)
    except SchemaError as error:
        raise UnreadableInput(
            path,
            f"does not fit the schema of the whole input: column {field.name!r} is {column.type} here and {field.type} "
            "with the other files, and a value of it cannot be held exactly; convert it, or run it as a job of its own",
        ) from error


class _OpenFile:
    """An open Parquet file, verified to be the planned one."""

    def __init__(self, piece: Piece, data: bytes | None) -> None:
        self.path = piece.path
        local = local_path(piece.path)
        self._source: Any = local
        if data is not None:
            self._source = pa.BufferReader(data)
        elif local is None:
            self._source = open_source(piece.path, piece.size, piece.tag)
        elif piece.tag:
            verify_local(local, piece.size, piece.tag)
        # Coalesces the requests for the columns of one row group; from a local disk that only costs memory.
        self._file = pq.ParquetFile(self._source, pre_buffer=local is None and data is None)
        metadata = self._file.metadata
        counts = [metadata.row_group(number).num_rows for number in range(metadata.num_row_groups)]
        self.offsets = [0, *accumulate(counts)]
        self._counts = counts
        self._leaves = leaves_of(self._file.schema_arrow)
        self._buffered: pq.ParquetFile | None = None

    def close(self) -> None:
        self._file.close(force=True)
        if self._buffered is not None:
            self._buffered.close(force=True)
        if not isinstance(self._source, str):
            self._source.close()

    def read(self, group: int, start: int, stop: int, columns: Sequence[str]) -> Iterator[tuple[int, pa.Table]]:
        """Yield rows ``start`` to ``stop`` of a row group as tables, with the number of each one's first row."""
        if group >= len(self._counts) or stop > self._counts[group]:
            raise UnreadableInput(self.path, "holds fewer rows than when the job was planned: submit the job again")
        present = [name for name in columns if name in self._leaves]
        if not present:
            yield start, _without_columns(stop - start)
            return
        metadata = self._file.metadata.row_group(group)
        size = group_bytes(metadata, [leaf for name in present for leaf in self._leaves[name]])
        size = max(size, 4 * len(present) * metadata.num_rows)
        count = max(1, min(ROWS_AT_A_TIME, _BYTES_AT_A_TIME * metadata.num_rows // size))
        at = 0
        for rows in self._reader(size).iter_batches(
            batch_size=count, row_groups=[group], columns=present, use_threads=False
        ):
            low, high = max(start - at, 0), min(stop - at, rows.num_rows)
            if low < high:
                yield at + low, pa.Table.from_batches([rows.slice(low, high - low)])
            at += rows.num_rows
            if at >= stop:
                return

    def _reader(self, size: int) -> pq.ParquetFile:
        """Return what reads row groups of a size: the encoded columns at once, or a few MiB at a time of large ones."""
        if size <= _WHOLE:
            return self._file
        if self._buffered is None:
            self._buffered = pq.ParquetFile(
                self._source, metadata=self._file.metadata, pre_buffer=False, buffer_size=_BUFFER
            )
        return self._buffered


def _without_columns(rows: int) -> pa.Table:
    """Return a table that has rows, but only a placeholder column."""
    return pa.table({"": pa.nulls(rows)})
