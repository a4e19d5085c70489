"""Values read from JSON files, cut into batches with their positions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple, overload

from cortex_dask.io.batch import Batch, Position


class RecordRun(NamedTuple):
    """Good values one after the other, and where each lies: from ``starts[i]`` to ``stops[i]`` in ``unit``."""

    values: list[Any]
    path: str
    unit: Any
    starts: Sequence[int]
    stops: Sequence[int]
    lines: list[bytes] | None = None  # what the values, and no others, are parsed from

    def part(self, start: int, stop: int) -> RecordRun:
        """Return some of the values."""
        return RecordRun(self.values[start:stop], self.path, self.unit, self.starts[start:stop], self.stops[start:stop])

    def position(self, start: int, stop: int) -> Position:
        """Return where some of the values lie."""
        return Position(self.path, self.unit, self.starts[start], self.stops[stop - 1])


class LineEdges:
    """Where the lines of a block begin and end.

    Only few edges are needed, mostly in rising order: each is counted from the one before when it is asked for. The
    reading thread and the handling one may both ask. The last line may lack its line end.
    """

    __slots__ = ("_first", "_last", "_lines", "_mark")

    def __init__(self, lines: list[bytes], first: int, last: int) -> None:
        self._lines, self._first, self._last = lines, first, last
        self._mark = (0, first)  # the line that was asked for last, and where it starts

    def starts(self, at: int, stop: int) -> Sequence[int]:
        """Return where each of some lines starts."""
        return _Edges(self, range(at, stop))

    def stops(self, at: int, stop: int) -> Sequence[int]:
        """Return where each of some lines stops, after its line end."""
        return _Edges(self, range(at + 1, stop + 1))

    def edge(self, number: int) -> int:
        """Return where line ``number`` starts, which is where the one before stops."""
        if number == len(self._lines):
            return self._last
        at, offset = self._mark
        if number < at:
            at, offset = 0, self._first
        offset += sum(map(len, self._lines[at:number])) + number - at
        self._mark = (number, offset)
        return offset


class _Edges(Sequence[int]):
    __slots__ = ("_lines", "_numbers")

    def __init__(self, lines: LineEdges, numbers: range) -> None:
        self._lines, self._numbers = lines, numbers

    def __len__(self) -> int:
        return len(self._numbers)

    @overload
    def __getitem__(self, index: int) -> int: ...

    @overload
    def __getitem__(self, index: slice) -> list[int]: ...

    def __getitem__(self, index: int | slice) -> int | list[int]:
        numbers = self._numbers[index]
        return self._lines.edge(numbers) if isinstance(numbers, int) else [self._lines.edge(at) for at in numbers]


def _place(run: RecordRun, at: int, stop: int) -> tuple[Position, ...]:
    return (run.position(at, stop),)


class Batcher:
    """Cuts a stream of runs of records into batches of ``size``; ``parse`` makes the values of lines once more.

    Samples are counted by their lines before they are parsed. So a malformed line keeps its place in its batch,
    which is shorter then, or even empty; the other batches stay as they were planned.
    """

    def __init__(self, size: int, parse: Callable[[list[bytes]], list[Any]]) -> None:
        self.size = size
        self._parse = parse
        self._index = 0
        self._left_out = 0  # malformed lines among those of the batch
        self._values: list[Any] = []
        self._positions: list[Position] = []

    @property
    def room(self) -> int:
        """How many values the batch lacks that is being made."""
        return self.size - len(self._values) - self._left_out

    def add(self, run: RecordRun) -> Iterator[Batch]:
        """Add a run of records, and yield the batches that are full."""
        values, lines = run.values, run.lines
        at, size = 0, self.size
        if self._values or self._left_out:
            at = min(self.room, len(values))
            self._append(run, 0, at)
            if not self.room:
                yield self._cut()
        while len(values) - at >= size:
            stop = at + size
            place = partial(_place, run, at, stop)
            again = None if lines is None else partial(self._parse, lines[at:stop])
            yield Batch(self._index, values[at:stop], size, place, again)
            self._index += 1
            at = stop
        self._append(run, at, len(values))

    def leave_out(self) -> Iterator[Batch]:
        """Count a malformed line, and yield the batch if it is full with it."""
        self._left_out += 1
        if not self.room:
            yield self._cut()

    def rest(self) -> Iterator[Batch]:
        """Yield the last batch, which may be short."""
        if self._values or self._left_out:
            yield self._cut()

    def _append(self, run: RecordRun, at: int, stop: int) -> None:
        if at == stop:
            return
        self._values += run.values[at:stop]
        position = run.position(at, stop)
        if self._positions and self._positions[-1].path == run.path:
            position = position._replace(start=self._positions.pop().start)
        self._positions.append(position)

    def _cut(self) -> Batch:
        batch = Batch(self._index, self._values, len(self._values), tuple(self._positions))
        self._index, self._values, self._positions, self._left_out = self._index + 1, [], [], 0
        return batch
