"""Read the pieces of a split from JSON files: lines (plain or compressed) and arrays, values exactly as written.

A piece of a plain file owns the lines that *start* in its bytes, so the pieces of any cuts together are the file. Every
line is parsed on its own: a malformed one becomes a :class:`~cortex_dask.io.batch.BadLine`, and its neighbours
are read.
Integers of any size are exact, text stays text, ``NaN`` and ``Infinity`` are read as Python writes them.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from itertools import groupby
from operator import itemgetter
from typing import Any

import orjson

from cortex_dask.io.batch import Ahead, BadLine, Batch
from cortex_dask.io.input.files import HIVE_NULL
from cortex_dask.io.input.filters import matcher, parse_filters
from cortex_dask.io.input.prefetch import SmallFiles
from cortex_dask.io.job.splits import Piece, PlanHeader, Split
from cortex_dask.io.json.batcher import Batcher, LineEdges, RecordRun
from cortex_dask.io.json.file import Block, JsonFile
from cortex_dask.io.store.source import UnreadableInput, translated

_KEPT_BYTES = 64 << 10  # of a malformed line
_ONLY_DICTS = {dict}
_ARRAY_BYTES = 1 << 20  # assumed for records of an array, which are Python objects already
_LINES_AT_ONCE = 128  # where batches are smaller

#: Separates lines that are parsed with one call. It is random, so that no file can hold it on purpose.
_SEPARATING_NUMBER = (1 << 29) + secrets.randbelow(1 << 29)
SEPARATOR = b",%d," % _SEPARATING_NUMBER

#: Makes every digit "0" and all else but the minus sign a space, so that one search finds long rows of digits.
_DIGITS = bytes(48 if 48 <= byte <= 57 else 45 if byte == 45 else 32 for byte in range(256))
_DIGITS_19, _MINUS_19, _DIGITS_20 = b"0" * 19, b"-" + b"0" * 19, b"0" * 20
_LARGE = 16 * 1024  # bytes; NumPy is faster on larger blocks, in spite of the cost of its calls
_FOUR_DIGITS = 0x01010101


def read_json(split: Split, header: PlanHeader, ahead: Ahead | None = None) -> Iterator[Batch | BadLine]:
    """Yield the batches of a split, and malformed lines; see :func:`cortex_dask.io.reading.read_split`."""
    any_value = header.any_json
    project = _projection(header)
    batcher = Batcher(header.batch_size, parse_lines)
    wanted = None if split.only is None else set(split.only)
    last = max(wanted, default=-1) if wanted is not None else None
    source = _Source(split.pieces, any_value=any_value)
    found = groupby(source if ahead is None else ahead(iter(source), _size_of), key=itemgetter(0))
    for (number, group), piece in zip(found, split.pieces, strict=False):
        runs = _LineParser(piece, batcher, any_value=any_value).parse(item for _, item in group)
        with translated(piece.path):
            for item in runs if piece.rows is None else _counted(runs, piece, piece.rows):
                if isinstance(item, BadLine):
                    if wanted is None:
                        yield item
                    if not any_value:
                        continue
                    full = batcher.leave_out()
                else:
                    full = batcher.add(item if project is None else project(item, piece))
                for batch in full:
                    if wanted is None or batch.index in wanted:
                        yield batch
                    if batch.index == last:
                        return
        source.finish(number)
    for batch in batcher.rest():
        if wanted is None or batch.index in wanted:
            yield batch


class _Source:
    """The pieces of a split as they lie in the files: blocks of lines, and the elements of arrays.

    Each item comes with the number of its piece. Each piece begins with None, so that an empty one is seen too.
    """

    def __init__(self, pieces: Sequence[Piece], *, any_value: bool) -> None:
        self._pieces, self._any_value = pieces, any_value
        self._finished = -1

    def finish(self, number: int) -> None:
        """Skip what is left of a piece."""
        self._finished = number

    def __iter__(self) -> Iterator[tuple[int, Any]]:
        with closing(SmallFiles(self._pieces)) as small:
            for number, piece in enumerate(self._pieces):
                yield number, None
                for item in self._items(piece, small.take(piece)):
                    if self._finished >= number:
                        break
                    yield number, item

    def _items(self, piece: Piece, data: bytes | None) -> Iterator[Any]:
        with translated(piece.path), JsonFile(piece.path, piece.size, piece.tag, data) as file:
            if file.is_array and not self._any_value:
                yield from file.elements(piece.path)
            else:
                compressed = file.is_compressed
                yield from ((block, compressed) for block in file.blocks(piece.start, piece.stop))


def _size_of(numbered: tuple[int, Any]) -> int:
    """Return about how many bytes an item of :class:`_Source` holds."""
    item = numbered[1]
    if isinstance(item, tuple) and isinstance(item[0], Block):
        return len(item[0].data)
    return _ARRAY_BYTES if isinstance(item, tuple) else 0


def _counted(found: Iterator[RecordRun | BadLine], piece: Piece, rows: int) -> Iterator[RecordRun | BadLine]:
    """Yield only the rows of the piece, not those of the pieces before and behind it."""
    skip, left = piece.skip, rows
    for item in found:
        count = 1 if isinstance(item, BadLine) else len(item.values)
        start, stop = min(skip, count), min(count, skip + left)
        skip -= start
        left -= stop - start
        if stop > start:
            whole = isinstance(item, BadLine) or stop - start == count
            yield item if whole or isinstance(item, BadLine) else item.part(start, stop)
        if not left:
            return
    raise UnreadableInput(piece.path, f"has {left} lines less than when they were counted: submit the job again")


# lines ----------------------------------------------------------------------------------------------------------------


class _LineParser:
    """Parses the blocks of one piece.

    It parses as many lines at a time as the next batch lacks, or several small batches lack: then their values are
    handled, written and freed while they are in the processor's cache, before the garbage collector scans them often.
    """

    def __init__(self, piece: Piece, batcher: Batcher, *, any_value: bool) -> None:
        self._piece, self._batcher, self._any_value = piece, batcher, any_value
        self._compressed = False
        self._before: int | None = None  # lines before the piece: counted only when a line is malformed
        self._began = 0  # where the first line of the piece starts
        self._number = 0  # of lines of this piece before those that are parsed

    def parse(self, found: Iterator[Any]) -> Iterator[RecordRun | BadLine]:
        """Yield runs of good records, and malformed lines, in order."""
        for item in found:
            if item is None:
                continue
            if isinstance(item, BadLine):
                yield item
            elif isinstance(item[0], Block):
                block, self._compressed = item
                yield from self._block(block)
            else:
                yield RecordRun(*item)

    def _block(self, block: Block) -> Iterator[RecordRun | BadLine]:
        lines = block.data.split(b"\n")
        whole = not lines[-1]
        if whole:
            lines.pop()
        if not self._number:
            self._began = block.offset
        long_integers = may_hold_long_integers(block.data)
        edges = LineEdges(lines, block.offset, block.offset + len(block.data))
        at, count, batcher = 0, len(lines), self._batcher
        together = max(_LINES_AT_ONCE // batcher.size - 1, 0) * batcher.size
        while at < count:
            some = lines[at : at + batcher.room + together]
            values = None if long_integers else self._values(some)
            if values is None:
                yield from self._one_by_one(some, edges, at, long_integers=long_integers)
            else:
                yield self._record_run(values, edges, at, some)
            at += len(some)
            self._number += len(some)

    def _values(self, lines: list[bytes]) -> list[Any] | None:
        """Return the values of the lines; None if one of them is blank, malformed or not an object."""
        try:
            values = parse_lines(lines)
        except orjson.JSONDecodeError:
            return None
        return values if self._any_value or set(map(type, values)) == _ONLY_DICTS else None

    def _one_by_one(
        self, lines: list[bytes], edges: LineEdges, at: int, *, long_integers: bool
    ) -> Iterator[RecordRun | BadLine]:
        good: list[Any] = []
        indexes: list[int] = []
        for index, line in enumerate(lines):
            try:
                if long_integers and may_hold_long_integers(line):
                    value = _parse_with_json(line)
                else:
                    try:
                        value = orjson.loads(line)
                    except orjson.JSONDecodeError:
                        if not line.strip():
                            continue
                        value = _parse_with_json(line)
                if not self._any_value and type(value) is not dict:
                    raise ValueError(f"not a JSON object but {_kind(value)}")
            except (ValueError, RecursionError) as error:
                if good:
                    yield self._record_run(good, edges, at, lines, indexes)
                    good, indexes = [], []
                number = self._lines_before() + self._number + index + 1
                yield BadLine(self._piece.path, number, edges.edge(at + index), _decoded(line), _reason(error))
            else:
                good.append(value)
                indexes.append(index)
        if good:
            yield self._record_run(good, edges, at, lines, indexes)

    def _record_run(
        self, values: list[Any], edges: LineEdges, at: int, lines: list[bytes], indexes: list[int] | None = None
    ) -> RecordRun:
        """Return the values of the lines with these indexes (None: of all); the first line is ``at`` in its block."""
        path, count = self._piece.path, len(lines)
        unit, starts, stops = "bytes", edges.starts(at, at + count), edges.stops(at, at + count)
        if self._compressed:
            unit, first = "lines", self._number
            starts, stops = range(first, first + count), range(first + 1, first + count + 1)
        if indexes is None:
            return RecordRun(values, path, unit, starts, stops, lines)
        if len(indexes) < count:
            starts, stops = [starts[index] for index in indexes], [stops[index] for index in indexes]
        return RecordRun(values, path, unit, starts, stops)

    def _lines_before(self) -> int:
        if self._before is None:
            self._before = 0
            if not self._compressed:
                piece = self._piece
                with JsonFile(piece.path, piece.size, piece.tag) as file:
                    self._before = file.lines_before(self._began)
        return self._before


def parse_lines(lines: list[bytes]) -> list[Any]:
    """Parse lines with one call, or raise ``orjson.JSONDecodeError`` if one of them is blank or malformed.

    That takes a fifth less time than a call for each line. Two malformed lines may together be one value, and one line
    may hold two: therefore the number between the lines must be found between all the values.
    """
    found = orjson.loads(b"[%b]" % SEPARATOR.join(lines))
    joints = found[1::2]
    if len(found) != 2 * len(lines) - 1 or joints.count(_SEPARATING_NUMBER) != len(joints):
        return list(map(orjson.loads, lines))
    values: list[Any] = found[::2]
    return values


def parse_line(line: bytes) -> Any:
    """Parse one line as :func:`read_json` does; raise ``ValueError`` if it is not JSON."""
    if not may_hold_long_integers(line):
        try:
            return orjson.loads(line)
        except orjson.JSONDecodeError:
            pass
    return _parse_with_json(line)


def _parse_with_json(line: bytes) -> Any:
    """Parse what orjson refuses or does not keep exactly: long integers, NaN, Infinity."""
    text = line.decode("utf-8")
    value = json.loads(text)
    if "\\ud" in text.lower():  # half of a surrogate pair cannot be encoded: writing it later would fail
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ValueError("text with half of a surrogate pair") from None
    return value


def _kind(value: Any) -> str:
    names = {list: "an array", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")


def _decoded(line: bytes) -> str:
    return line[:_KEPT_BYTES].rstrip(b"\r").decode("utf-8", errors="backslashreplace")


def _reason(error: Exception) -> str:
    if isinstance(error, UnicodeDecodeError):
        return f"not UTF-8: {error.reason} at byte {error.start} of the line"
    if isinstance(error, RecursionError):
        return "nested too deeply"
    if isinstance(error, json.JSONDecodeError):
        return f"not JSON: {error.msg} at character {error.pos + 1}"
    return " ".join(str(error).split())


# integers beyond 64 bits ----------------------------------------------------------------------------------------------


def may_hold_long_integers(data: bytes) -> bool:
    """Return whether there may be integers beyond 64 bits: 20 digits in a row, or a minus sign and 19.

    Examples
    --------
    >>> may_hold_long_integers(b'{"a": 18446744073709551616}'), may_hold_long_integers(b'{"a": 1844674407370955161}')
    (True, False)
    """
    if len(data) >= _LARGE and not _may_hold_19_digits(data):
        return False
    digits = data.translate(_DIGITS)
    return _DIGITS_19 in digits and (_DIGITS_20 in digits or _MINUS_19 in digits)


def _may_hold_19_digits(data: bytes) -> bool:
    """Return whether there may be 19 digits in a row, in less time than a search takes.

    Any 19 bytes in a row contain four whole groups of four bytes, counted from the start of the data.
    """
    import numpy as np  # slow to import, and only large blocks need it

    text = np.frombuffer(data, np.uint8, len(data) // 4 * 4)
    groups = ((text ^ 48) < 10).view(np.uint32) == _FOUR_DIGITS  # "0" to "9" are 48 to 57
    return bool((groups[:-3] & groups[1:-2] & groups[2:-1] & groups[3:]).any())


# columns, filters, keys -----------------------------------------------------------------------------------------------


def _projection(header: PlanHeader) -> Callable[[RecordRun, Piece], RecordRun] | None:
    """Return a function that adds partition keys, filters, and selects columns; None if nothing is to be done."""
    kinds = header.keys
    filters = parse_filters(header.filters)
    matches = None if filters is None else matcher(filters)
    columns = header.columns
    if not kinds and matches is None and columns is None:
        return None

    def project(run: RecordRun, piece: Piece) -> RecordRun:
        values = run.values
        if kinds:
            written = dict(piece.keys)
            keys = {name: _key_value(written.get(name, HIVE_NULL), kind) for name, kind in kinds.items()}
            for value in values:
                value.update(keys)
        if matches is not None:
            kept = [index for index, value in enumerate(values) if matches(value)]
            if len(kept) < len(values):
                values, starts, stops = ([items[index] for index in kept] for items in (values, run.starts, run.stops))
                run = run._replace(starts=starts, stops=stops)
        if columns is not None:
            values = [{name: value[name] for name in columns if name in value} for value in values]
        return run._replace(values=values, lines=None)

    return project


def _key_value(text: str, kind: str) -> Any:
    if text == HIVE_NULL:
        return None
    return int(text) if kind == "int64" else text
