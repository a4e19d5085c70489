"""Read the pieces of a split from JSON files: lines (plain or compressed) and arrays, values exactly as written.

A piece of a plain file owns the lines that *start* in its bytes, so the pieces of any cuts together are the file. Every
line is parsed on its own: a malformed one becomes a :class:`~cortex_dask.io.reading.BadLine` and its neighbours go on.
Integers of any size are exact, text stays text, ``NaN`` and ``Infinity`` are taken as Python writes them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any, NamedTuple

import orjson

from cortex_dask.io.filters import matcher, parse_filters
from cortex_dask.io.json_files import Block, JsonFile
from cortex_dask.io.listing import HIVE_NULL
from cortex_dask.io.reading import BadLine, Batch, Position, UnreadableInput
from cortex_dask.io.sources import translated
from cortex_dask.io.splits import Piece, PlanHeader, Split

__all__ = ["parse_line", "read_json"]

_SHOWN = 64 << 10  # bytes of a malformed line that are kept

#: Makes every digit "0" and all else but the minus sign a space: then a search finds long runs of digits quickly.
_DIGITS = bytes(48 if 48 <= byte <= 57 else 45 if byte == 45 else 32 for byte in range(256))
_DIGITS_19, _MINUS_19, _DIGITS_20 = b"0" * 19, b"-" + b"0" * 19, b"0" * 20


def read_json(split: Split, header: PlanHeader) -> Iterator[Batch | BadLine]:
    """Yield the batches of a split, and malformed lines; see :func:`cortex_dask.io.reading.read_split`."""
    any_value = header.extra.get("json") == "any"
    project = _projection(header)
    batcher = _Batcher(header.batch_size)
    wanted = None if split.only is None else set(split.only)
    last = max(wanted, default=-1) if wanted is not None else None
    for piece in split.pieces:
        for item in _items(piece, header, project, any_value=any_value):
            if isinstance(item, BadLine):
                if wanted is None:
                    yield item
                if not any_value:
                    continue
                full = batcher.leave_out()
            else:
                full = batcher.add(item)
            for batch in full:
                if wanted is None or batch.index in wanted:
                    yield batch
                if batch.index == last:
                    return
    for batch in batcher.rest():
        if wanted is None or batch.index in wanted:
            yield batch


def _items(
    piece: Piece, header: PlanHeader, project: Callable[[Stretch, Piece], Stretch] | None, *, any_value: bool
) -> Iterator[Stretch | BadLine]:
    """Yield stretches of good values and malformed lines, in order."""
    with translated(piece.path), JsonFile(piece.path, piece.size, piece.tag) as file:
        lines = any_value or not file.is_array
        found = _lines(file, piece, any_value=any_value) if lines else file.elements(piece.path)
        for item in found if piece.rows is None else _counted(found, piece, piece.rows):
            stretch = item if isinstance(item, BadLine) else Stretch(*item)
            if project is not None and isinstance(stretch, Stretch):
                stretch = project(stretch, piece)
            yield stretch


def _counted(
    found: Iterator[tuple[Any, ...] | BadLine], piece: Piece, rows: int
) -> Iterator[tuple[Any, ...] | BadLine]:
    """Leave out the lines that belong to the pieces before and behind."""
    skip, left = piece.skip, rows
    for item in found:
        count = 1 if isinstance(item, BadLine) else len(item[0])
        start, stop = min(skip, count), min(count, skip + left)
        skip -= start
        left -= stop - start
        if stop > start:
            whole = isinstance(item, BadLine) or stop - start == count
            yield item if whole else _part(item, start, stop)
        if not left:
            return
    raise UnreadableInput(piece.path, f"has {left} lines less than when they were counted: submit the job again")


def _part(item: Any, start: int, stop: int) -> tuple[Any, ...]:
    values, path, unit, starts, stops = item
    return values[start:stop], path, unit, starts[start:stop], stops[start:stop]


class Stretch(NamedTuple):
    """Good values one after the other, and where each lies: from ``starts[i]`` to ``stops[i]`` in ``unit``."""

    values: list[Any]
    path: str
    unit: Any
    starts: Sequence[int]
    stops: Sequence[int]


class _Batcher:
    """Cuts a stream of stretches into batches.

    Samples are counted by their lines before anybody parses them. So a malformed line keeps its place in its batch,
    which is shorter then, or even empty; the other batches stay as they were planned.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._index = 0
        self._left_out = 0  # malformed lines among those of the batch
        self._values: list[Any] = []
        self._positions: list[Position] = []

    def add(self, stretch: Stretch) -> Iterator[Batch]:
        """Take the stretch in, and yield the batches that are full."""
        values, path, unit, starts, stops = stretch
        at, size = 0, self._size
        if self._values or self._left_out:
            at = min(size - len(self._values) - self._left_out, len(values))
            self._hold(stretch, 0, at)
            if len(self._values) + self._left_out == size:
                yield self._cut()
        while len(values) - at >= size:
            stop = at + size
            position = (Position(path, unit, starts[at], stops[stop - 1]),)
            yield Batch(self._index, values[at:stop], size, position)
            self._index += 1
            at = stop
        self._hold(stretch, at, len(values))

    def leave_out(self) -> Iterator[Batch]:
        """Count a malformed line, and yield the batch if it is full with it."""
        self._left_out += 1
        if len(self._values) + self._left_out == self._size:
            yield self._cut()

    def rest(self) -> Iterator[Batch]:
        """Yield the last batch, which may be short."""
        if self._values or self._left_out:
            yield self._cut()

    def _hold(self, stretch: Stretch, at: int, stop: int) -> None:
        if at == stop:
            return
        self._values += stretch.values[at:stop]
        start, end = stretch.starts[at], stretch.stops[stop - 1]
        if self._positions and self._positions[-1].path == stretch.path:
            start = self._positions.pop().start
        self._positions.append(Position(stretch.path, stretch.unit, start, end))

    def _cut(self) -> Batch:
        batch = Batch(self._index, self._values, len(self._values), tuple(self._positions))
        self._index, self._values, self._positions, self._left_out = self._index + 1, [], [], 0
        return batch


# lines ----------------------------------------------------------------------------------------------------------------


def _lines(file: JsonFile, piece: Piece, *, any_value: bool) -> Iterator[tuple[Any, ...] | BadLine]:
    number = 0  # of lines of this piece before the block
    before: int | None = (
        0 if file.is_compressed else None
    )  # lines before the piece: counted only when a line is malformed
    start = 0
    for block in file.blocks(piece.start, piece.stop):
        lines = block.data.split(b"\n")
        if not lines[-1]:
            lines.pop()
        start = start if number else block.offset
        for item in _parsed(file, piece.path, block, lines, number, any_value=any_value):
            if isinstance(item, BadLine):
                if before is None:
                    before = file.lines_before(start)
                item = replace(item, line=before + item.line)
            yield item
        number += len(lines)


def _parsed(
    file: JsonFile, path: str, block: Block, lines: list[bytes], number: int, *, any_value: bool
) -> Iterator[tuple[Any, ...] | BadLine]:
    """Yield what the lines of one block hold; malformed ones with their number in the piece."""
    long_integers = _may_hold_long_integers(block.data)
    if not long_integers:
        try:
            values = list(map(orjson.loads, lines))
        except orjson.JSONDecodeError:
            pass  # some line is blank, malformed or for the other parser
        else:
            if any_value or set(map(type, values)) <= {dict}:
                yield values, path, *_places(file, block, lines, number, None)
                return
    good: list[Any] = []
    indexes: list[int] = []
    ends: list[int] | None = None
    for index, line in enumerate(lines):
        try:
            if long_integers and _may_hold_long_integers(line):
                value = _slow_loads(line)
            else:
                try:
                    value = orjson.loads(line)
                except orjson.JSONDecodeError:
                    if not line.strip():
                        continue
                    value = _slow_loads(line)
            if not any_value and type(value) is not dict:
                raise ValueError(f"not a JSON object but {_kind(value)}")
        except (ValueError, RecursionError) as error:
            if good:
                yield good, path, *_places(file, block, lines, number, indexes)
                good, indexes = [], []
            ends = ends or _ends(block, lines)
            offset = ends[index] - len(line) - 1
            yield BadLine(path, number + index + 1, offset, _shown(line), _error(error))
        else:
            good.append(value)
            indexes.append(index)
    if good:
        yield good, path, *_places(file, block, lines, number, indexes)


def _ends(block: Block, lines: list[bytes]) -> list[int]:
    """Return where each line ends, its newline included."""
    lengths = accumulate(map(len, lines), initial=block.offset)
    next(lengths)
    return [length + count for count, length in enumerate(lengths, 1)]


def _places(
    file: JsonFile, block: Block, lines: list[bytes], number: int, indexes: list[int] | None
) -> tuple[Any, ...]:
    """Return unit, starts and stops of the lines with these indexes (None: all)."""
    if file.is_compressed:
        if indexes is None:
            return "lines", range(number, number + len(lines)), range(number + 1, number + 1 + len(lines))
        return "lines", [number + index for index in indexes], [number + index + 1 for index in indexes]
    stops = _ends(block, lines)
    stops[-1] = min(stops[-1], block.offset + len(block.data))  # the last line of a file may lack its newline
    starts = [block.offset, *stops[:-1]]
    if indexes is None:
        return "bytes", starts, stops
    return "bytes", [starts[index] for index in indexes], [stops[index] for index in indexes]


def _may_hold_long_integers(data: bytes) -> bool:
    """Tell whether there may be integers beyond 64 bits, which orjson reads as floats."""
    digits = data.translate(_DIGITS)
    return _DIGITS_19 in digits and (_DIGITS_20 in digits or _MINUS_19 in digits)


def parse_line(line: bytes) -> Any:
    """Parse one line exactly as a reader does.

    Raises
    ------
    ValueError
        If it is not JSON.
    """
    if not _may_hold_long_integers(line):
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


def _projection(header: PlanHeader) -> Callable[[Stretch, Piece], Stretch] | None:
    """Return what adds the partition keys, filters, and selects the columns; None if there is nothing to do."""
    kinds: dict[str, str] = header.extra.get("keys", {})
    filters = parse_filters(header.filters)
    matches = None if filters is None else matcher(filters)
    columns = header.columns
    if not kinds and matches is None and columns is None:
        return None

    def project(stretch: Stretch, piece: Piece) -> Stretch:
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
        return stretch._replace(values=values)

    return project


def _key_value(text: str, kind: str) -> Any:
    if text == HIVE_NULL:
        return None
    return int(text) if kind == "int64" else text
