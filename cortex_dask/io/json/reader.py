"""Read the pieces of a split from JSON files: lines (plain or compressed) and arrays, values exactly as written.

A piece of a plain file owns the lines that *start* in its bytes, so the pieces of any cuts together are the file. Every
line is parsed on its own: a malformed one becomes a :class:`~cortex_dask.io.batch.BadLine` and its neighbours go on.
Integers of any size are exact, text stays text, ``NaN`` and ``Infinity`` are taken as Python writes them.
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

_SHOWN = 64 << 10  # bytes of a malformed line that are kept
_DICTS = {dict}
_ARRAY_BYTES = 1 << 20  # of the values of a stretch of an array; roughly, they are Python objects already
_TOGETHER = 128  # values of small batches that are parsed at once

#: Stands between lines that are parsed at once. Nobody who writes the lines knows it.
_BETWEEN = (1 << 29) + secrets.randbelow(1 << 29)
_JOINT = b",%d," % _BETWEEN


def read_json(split: Split, header: PlanHeader, ahead: Ahead | None = None) -> Iterator[Batch | BadLine]:
    """Yield the batches of a split, and malformed lines; see :func:`cortex_dask.io.reading.read_split`."""
    any_value = header.extra.get("json") == "any"
    project = _projection(header)
    batcher = Batcher(header.batch_size, _parse_lines)
    wanted = None if split.only is None else set(split.only)
    last = max(wanted, default=-1) if wanted is not None else None
    source = _Source(split.pieces, any_value=any_value)
    found = groupby(source if ahead is None else ahead(iter(source), _size_of), key=itemgetter(0))
    for (number, group), piece in zip(found, split.pieces, strict=False):
        stretches = _LineParser(piece, batcher, any_value=any_value).stretches(what for _, what in group)
        with translated(piece.path):
            for item in stretches if piece.rows is None else _counted(stretches, piece, piece.rows):
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
    """The pieces of a split as they lie in the files: blocks of lines, stretches of arrays; nothing is parsed twice.

    Each item comes with the number of its piece, and each piece begins with None, so that none is passed over.
    """

    def __init__(self, pieces: Sequence[Piece], *, any_value: bool) -> None:
        self._pieces, self._any_value = pieces, any_value
        self._finished = -1

    def finish(self, number: int) -> None:
        """Say that nothing more is wanted of a piece."""
        self._finished = number

    def __iter__(self) -> Iterator[tuple[int, Any]]:
        with closing(SmallFiles(self._pieces)) as small:
            for number, piece in enumerate(self._pieces):
                yield number, None
                for what in self._items(piece, small.take(piece)):
                    if self._finished >= number:
                        break
                    yield number, what

    def _items(self, piece: Piece, data: bytes | None) -> Iterator[Any]:
        with translated(piece.path), JsonFile(piece.path, piece.size, piece.tag, data) as file:
            if file.is_array and not self._any_value:
                yield from file.elements(piece.path)
            else:
                compressed = file.is_compressed
                yield from ((block, compressed) for block in file.blocks(piece.start, piece.stop))


def _size_of(item: tuple[int, Any]) -> int:
    what = item[1]
    if isinstance(what, tuple) and isinstance(what[0], Block):
        return len(what[0].data)
    return _ARRAY_BYTES if isinstance(what, tuple) else 0


def _counted(found: Iterator[RecordRun | BadLine], piece: Piece, rows: int) -> Iterator[RecordRun | BadLine]:
    """Leave out the lines that belong to the pieces before and behind."""
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

    As many lines at a time as the next batch lacks, or the next small ones: their values are handled, written and
    forgotten while they are in the processor's cache, and before the garbage collector has looked at them often.
    """

    def __init__(self, piece: Piece, batcher: Batcher, *, any_value: bool) -> None:
        self._piece, self._batcher, self._any_value = piece, batcher, any_value
        self._compressed = False
        self._before: int | None = None  # lines before the piece: counted only when a line is malformed
        self._began = 0  # where the first line of the piece starts
        self._number = 0  # of lines of this piece before those that are parsed

    def stretches(self, found: Iterator[Any]) -> Iterator[RecordRun | BadLine]:
        """Yield stretches of good values and malformed lines, in order."""
        for what in found:
            if what is None:
                continue
            if isinstance(what, BadLine):
                yield what
            elif isinstance(what[0], Block):
                block, self._compressed = what
                yield from self._block(block)
            else:
                yield RecordRun(*what)

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
        together = max(_TOGETHER // batcher.size - 1, 0) * batcher.size
        while at < count:
            some = lines[at : at + batcher.room + together]
            values = None if long_integers else self._values(some)
            if values is None:
                yield from self._one_by_one(some, edges, at, long_integers=long_integers)
            else:
                yield self._stretch(values, edges, at, some)
            at += len(some)
            self._number += len(some)

    def _values(self, lines: list[bytes]) -> list[Any] | None:
        """Return what the lines hold; None if one of them is blank, malformed or for the other parser."""
        try:
            values = _parse_lines(lines)
        except orjson.JSONDecodeError:
            return None
        return values if self._any_value or set(map(type, values)) == _DICTS else None

    def _one_by_one(
        self, lines: list[bytes], edges: LineEdges, at: int, *, long_integers: bool
    ) -> Iterator[RecordRun | BadLine]:
        good: list[Any] = []
        indexes: list[int] = []
        for index, line in enumerate(lines):
            try:
                if long_integers and may_hold_long_integers(line):
                    value = _slow_loads(line)
                else:
                    try:
                        value = orjson.loads(line)
                    except orjson.JSONDecodeError:
                        if not line.strip():
                            continue
                        value = _slow_loads(line)
                if not self._any_value and type(value) is not dict:
                    raise ValueError(f"not a JSON object but {_kind(value)}")
            except (ValueError, RecursionError) as error:
                if good:
                    yield self._stretch(good, edges, at, lines, indexes)
                    good, indexes = [], []
                number = self._lines_before() + self._number + index + 1
                yield BadLine(self._piece.path, number, edges.edge(at + index), _shown(line), _error(error))
            else:
                good.append(value)
                indexes.append(index)
        if good:
            yield self._stretch(good, edges, at, lines, indexes)

    def _stretch(
        self, values: list[Any], edges: LineEdges, at: int, lines: list[bytes], indexes: list[int] | None = None
    ) -> RecordRun:
        """Return the values of the lines from ``at`` on with these indexes (None: of all)."""
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


def _parse_lines(lines: list[bytes]) -> list[Any]:
    """Parse lines with one call, which takes a fifth less time than a call for each.

    Two lines could be one value only together, and one line be two. So what stands between the lines has to be found
    between the values.

    Raises
    ------
    orjson.JSONDecodeError
        If one of them is blank or malformed.
    """
    found = orjson.loads(b"[%b]" % _JOINT.join(lines))
    joints = found[1::2]
    if len(found) != 2 * len(lines) - 1 or joints.count(_BETWEEN) != len(joints):
        return list(map(orjson.loads, lines))
    values: list[Any] = found[::2]
    return values


def parse_line(line: bytes) -> Any:
    """Parse one line exactly as a reader does.

    Raises
    ------
    ValueError
        If it is not JSON.
    """
    if not may_hold_long_integers(line):
        try:
            return orjson.loads(line)
        except orjson.JSONDecodeError:
            pass
    return _slow_loads(line)


def _slow_loads(line: bytes) -> Any:
    """Parse what orjson does not take or not exactly: long integers, NaN, Infinity."""
    text = line.decode("utf-8")
    value = json.loads(text)
    if "\\ud" in text.lower():  # half of a surrogate pair is no text: whoever writes it later would fail
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ValueError("text with half of a surrogate pair") from None
    return value


def _kind(value: Any) -> str:
    names = {list: "an array", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")


def _shown(line: bytes) -> str:
    return line[:_SHOWN].rstrip(b"\r").decode("utf-8", errors="backslashreplace")


def _error(error: Exception) -> str:
    if isinstance(error, UnicodeDecodeError):
        return f"not UTF-8: {error.reason} at byte {error.start} of the line"
    if isinstance(error, RecursionError):
        return "nested too deeply"
    if isinstance(error, json.JSONDecodeError):
        return f"not JSON: {error.msg} at character {error.pos + 1}"
    return " ".join(str(error).split())


# columns, filters, keys -----------------------------------------------------------------------------------------------


def _projection(header: PlanHeader) -> Callable[[RecordRun, Piece], RecordRun] | None:
    """Return what adds the partition keys, filters, and selects the columns; None if there is nothing to do."""
    kinds: dict[str, str] = header.extra.get("keys", {})
    filters = parse_filters(header.filters)
    matches = None if filters is None else matcher(filters)
    columns = header.columns
    if not kinds and matches is None and columns is None:
        return None

    def project(stretch: RecordRun, piece: Piece) -> RecordRun:
        values = stretch.values
        if kinds:
            written = dict(piece.keys)
            keys = {name: _key_value(written.get(name, HIVE_NULL), kind) for name, kind in kinds.items()}
            for value in values:
                value.update(keys)
        if matches is not None:
            kept = [index for index, value in enumerate(values) if matches(value)]
            if len(kept) < len(values):
                values, starts, stops = (
                    [items[index] for index in kept] for items in (values, stretch.starts, stretch.stops)
                )
                stretch = stretch._replace(starts=starts, stops=stops)
        if columns is not None:
            values = [{name: value[name] for name in columns if name in value} for value in values]
        return stretch._replace(values=values, lines=None)

    return project


def _key_value(text: str, kind: str) -> Any:
    if text == HIVE_NULL:
        return None
    return int(text) if kind == "int64" else text


#: Makes every digit "0" and all else but the minus sign a space: then a search finds long runs of digits quickly.
_DIGITS = bytes(48 if 48 <= byte <= 57 else 45 if byte == 45 else 32 for byte in range(256))
_DIGITS_19, _MINUS_19, _DIGITS_20 = b"0" * 19, b"-" + b"0" * 19, b"0" * 20
_LARGE = 16 * 1024  # bytes from which on NumPy is faster, in spite of what its calls take
_FOUR_DIGITS = 0x01010101


def may_hold_long_integers(data: bytes) -> bool:
    """Tell whether there may be integers beyond 64 bits: 20 digits in a row, or a minus sign and 19.

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
    """Tell whether there may be 19 digits in a row, in less time than a search takes.

    Wherever 19 bytes lie, four whole groups of four bytes lie among them, counted from the start of the data.
    """
    import numpy as np  # only those who read large files need it

    text = np.frombuffer(data, np.uint8, len(data) // 4 * 4)
    groups = ((text ^ 48) < 10).view(np.uint32) == _FOUR_DIGITS  # "0" to "9" are 48 to 57
    return bool((groups[:-3] & groups[1:-2] & groups[2:-1] & groups[3:]).any())
