"""The values that readers yield: ``Batch``, ``Position`` and ``BadLine``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

if TYPE_CHECKING:
    import pyarrow as pa

#: Takes what is read from files and how many bytes each item has, and yields the same items, read in another thread.
Ahead = Callable[[Iterator[Any], Callable[[Any], int]], Iterator[Any]]


class Position(NamedTuple):
    """Where rows lie in the input: ``start`` (included) to ``stop`` (excluded), both counted from 0.

    ``rows``: rows of a Parquet file before filtering, or elements of a JSON array. ``bytes``: of a plain file of JSON
    lines. ``lines``: of a compressed one. Between the first and the last row of a batch there may be rows that the
    filters leave out, blank lines and malformed ones.
    """

    path: str
    unit: Literal["rows", "bytes", "lines"]
    start: int
    stop: int


@dataclass(slots=True)  # not frozen, which makes it four times as slow to make
class Batch:
    """``rows`` consecutive rows of a split's stream; all batches but the last of a split have ``batch_size`` rows."""

    index: int  # in the split, from 0
    data: pa.Table | list[Any]  # Parquet: a table whose columns have one chunk each; JSON: a list of dicts
    rows: int
    #: Where the rows lie, or what finds that out: few batches are asked.
    place: tuple[Position, ...] | Callable[[], tuple[Position, ...]] = field(repr=False, compare=False)
    #: Reads ``data`` once more, for whoever gave it away; None: it has to be copied before.
    again: Callable[[], list[Any]] | None = field(default=None, repr=False, compare=False)

    @property
    def position(self) -> tuple[Position, ...]:
        """Where the rows lie in the input, one after the other."""
        return self.place() if callable(self.place) else self.place


@dataclass(frozen=True, slots=True)
class BadLine:
    """A line (or an element of an array) that is not what it should be; ``path`` and ``offset`` identify it."""

    path: str
    line: int  # from 1
    offset: int  # of its first byte; in a compressed file: after decompression
    text: str  # as it stands, bytes that are not UTF-8 as \xNN; at most 64 KiB of it
    error: str  # one line
