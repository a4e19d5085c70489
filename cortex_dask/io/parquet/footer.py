"""Parquet footers: what planning needs of a file without reading its rows, and no more.

A footer is read in one request where it is smaller than 64 KiB, else in two, and 64 of them at a time; of each row
group only the number of rows, the size of the columns that will be read, and the statistics of the columns that filters
look at are kept.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq
import pyarrow.types as pt

from cortex_dask.errors import CortexDaskError, DatasetError
from cortex_dask.io.input.files import InputFile
from cortex_dask.io.input.filters import Bounds
from cortex_dask.io.input.prefetch import read_ranges
from cortex_dask.io.store.errors import explain, is_transient
from cortex_dask.io.store.source import REMOTE_THREADS, in_parallel, local_path, read_range

_TAIL = 64 << 10
_MAGIC = b"PAR1"
_FILES_PER_TASK = 32  # a future for each of 100,000 files would cost more than its file
#: Two groups at a time, one that is parsed while the other is on its way; their tails are in memory, of 64 KiB each.
_GROUPS, _FILES_PER_GROUP = 2, 256


@dataclass(frozen=True, slots=True)
class RowGroup:
    """What planning keeps of a row group."""

    rows: int
    bytes: int  # of the columns read, uncompressed but still encoded
    bounds: dict[str, Bounds] | None  # of the columns that filters look at


@dataclass(frozen=True, slots=True)
class Footer:
    """What planning keeps of a file; files with equal schemas share one."""

    schema: pa.Schema
    groups: tuple[RowGroup, ...]


def read_footers(
    files: Sequence[InputFile],
    columns: Collection[str] | None,  # that will be read; None for all
    filter_columns: Sequence[str],  # whose statistics are kept
    check: Callable[[], None] = lambda: None,  # called now and then; reading ends with what it raises
) -> list[Footer]:
    """Read the footers of all files at once; raise ``DatasetError`` for the first file that cannot be read."""
    summary = _Summary(columns, tuple(filter_columns))
    if local_path(files[0].path) is None:
        groups = [files[at : at + _FILES_PER_GROUP] for at in range(0, len(files), _FILES_PER_GROUP)]
        results = in_parallel(summary.of_remote, groups, local=False, threads=_GROUPS)
    else:
        size = _FILES_PER_TASK if len(files) > REMOTE_THREADS else 1
        groups = [files[at : at + size] for at in range(0, len(files), size)]
        results = in_parallel(lambda group: [summary.of(file) for file in group], groups, local=True)
    footers: list[Footer] = []
    for found in results:
        check()
        footers += found
    return footers


class _Summary:
    """Makes footers; shares what they have in common."""

    def __init__(self, columns: Collection[str] | None, filter_columns: tuple[str, ...]) -> None:
        self._columns = None if columns is None else frozenset(columns)
        self._filter_columns = filter_columns
        self._known: dict[bytes, tuple[pa.Schema, dict[str, range], list[int] | None]] = {}
        self._lock = threading.Lock()

    def of_remote(self, files: Sequence[InputFile]) -> list[Footer]:
        """Read the footers of files that are not local."""
        wanted = [(file.path, max(0, file.size - _TAIL), file.size) for file in files]
        tails = read_ranges(wanted, at_once=REMOTE_THREADS)
        return [self.of(file, tail) for file, tail in zip(files, tails, strict=True)]

    def of(self, file: InputFile, tail: bytes | None = None) -> Footer:
        """Make one file's footer, of its last bytes if they have been read."""
        metadata = _read_metadata(file, tail)
        try:
            schema, leaves, read = self._shared(metadata.schema.to_arrow_schema().remove_metadata())
            groups = []
            for number in range(metadata.num_row_groups):
                group = metadata.row_group(number)
                bounds = {name: _bounds(group, leaves, schema, name) for name in self._filter_columns} or None
                groups.append(RowGroup(group.num_rows, group_bytes(group, read), bounds))
        except (pa.ArrowException, ValueError, OSError) as error:
            raise DatasetError(f"{file.path} cannot be read as Parquet: {error}") from error
        return Footer(schema, tuple(groups))

    def _shared(self, schema: pa.Schema) -> tuple[pa.Schema, dict[str, range], list[int] | None]:
        key = schema.serialize().to_pybytes()
        known = self._known.get(key)
        if known is None:
            leaves = leaves_of(schema)
            read = None
            if self._columns is not None and not self._columns.issuperset(schema.names):
                read = [leaf for name, span in leaves.items() if name in self._columns for leaf in span]
            with self._lock:
                known = self._known.setdefault(key, (schema, leaves, read))
        return known


def _read_metadata(file: InputFile, tail: bytes | None) -> pq.FileMetaData:
    try:
        if tail is None:
            tail = read_range(file.path, max(0, file.size - _TAIL), file.size)
        length = int.from_bytes(tail[-8:-4], "little") + 8
        if len(tail) < 12 or tail[-4:] != _MAGIC or length + 4 > file.size:
            raise pa.ArrowInvalid("Parquet magic bytes not found in footer")
        if length > len(tail):
            tail = read_range(file.path, file.size - length, file.size)
        return pq.read_metadata(pa.BufferReader(_MAGIC + tail[-length:]))
    except (pa.ArrowException, CortexDaskError, OSError, ValueError) as error:
        if isinstance(error, FileNotFoundError):
            raise DatasetError(f"{file.path} was deleted while the job was planned: submit the job again") from error
        if isinstance(error, CortexDaskError) or getattr(error, "errno", None) is not None or is_transient(error):
            raise DatasetError(f"the input cannot be read: {explain(error, file.path)}") from error
        kind = "is empty (0 bytes)" if file.size == 0 else "is truncated, or is not a Parquet file"
        raise DatasetError(
            f"{file.path} {kind} ({_first_sentence(error)}): repair it, or leave it out of the input"
        ) from error


def _first_sentence(error: BaseException) -> str:
    return str(error).split(". ")[0].split("\n")[0].strip().rstrip(".")


def leaves_of(schema: pa.Schema) -> dict[str, range]:
    """Return which leaf columns of the Parquet schema belong to which column."""
    leaves: dict[str, range] = {}
    at = 0
    for field in schema:
        count = _leaf_count(field.type)
        leaves[field.name] = range(at, at + count)
        at += count
    return leaves


def _leaf_count(kind: pa.DataType) -> int:
    if isinstance(kind, pa.BaseExtensionType):
        return _leaf_count(kind.storage_type)
    if pt.is_struct(kind):
        return sum(_leaf_count(field.type) for field in kind)
    if pt.is_map(kind):
        return _leaf_count(kind.key_type) + _leaf_count(kind.item_type)
    if hasattr(kind, "value_field"):  # lists of all kinds
        return _leaf_count(kind.value_type)
    return 1


def group_bytes(group: pq.RowGroupMetaData, leaves: Sequence[int] | None) -> int:
    """Return the uncompressed size of some leaf columns of a row group; None for all."""
    if leaves is None and group.total_byte_size > 0:
        return int(group.total_byte_size)
    if leaves is None:
        leaves = range(group.num_columns)
    return sum(group.column(leaf).total_uncompressed_size for leaf in leaves)


def _bounds(group: pq.RowGroupMetaData, leaves: dict[str, range], schema: pa.Schema, name: str) -> Bounds:
    rows = group.num_rows
    span = leaves.get(name)
    if span is None:
        return Bounds(None, None, rows, rows)
    kind = schema.field(name).type
    nothing = Bounds(None, None, None, rows)
    if len(span) != 1 or pt.is_nested(kind):
        return nothing
    statistics = group.column(span.start).statistics
    if statistics is None:
        return nothing
    nulls = statistics.null_count if statistics.has_null_count else None
    try:
        low, high = (statistics.min, statistics.max) if statistics.has_min_max else (None, None)
    except (ValueError, pa.ArrowException, OverflowError):  # a value that Python's types cannot hold
        low = high = None
    return Bounds(low, high, nulls, rows, pt.is_floating(kind))
