"""Read a split: the batches of its row stream, one after the other, with bounded memory.

::

    for item in read_split(split, header):
        match item:
            case Batch():    handle(item.data)           # an Arrow table, or a list of dicts for JSON
            case BadLine():  dead_letter(item)           # a malformed line; its neighbours go on
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from cortex_dask.io.splits import PlanHeader, Split

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["Ahead", "BadLine", "Batch", "Position", "UnreadableInput", "read_split"]


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


class UnreadableInput(Exception):  # noqa: N818 - named like the cause that it is reported as
    """A file cannot be read, or is not the file that was planned.

    Attributes
    ----------
    path : str
        The file.
    """

    def __init__(self, path: str, problem: str) -> None:
        super().__init__(path, problem)  # both, so that it can be pickled
        self.path = path
        self.problem = problem

    def __str__(self) -> str:
        return f"{self.path} {self.problem}"


def read_split(split: Split, header: PlanHeader, ahead: Ahead | None = None) -> Iterator[Batch | BadLine]:
    """Yield the batches of a split in order, and malformed lines where they occur.

    For a split with ``only``, just the batches with those indexes (and no malformed lines).

    Parameters
    ----------
    split, header
        What to read.
    ahead : callable, optional
        Has the files read and decompressed in another thread, stretch by stretch. What needs Python's lock, parsing
        lines and cutting batches, stays in the thread of the caller.

    Raises
    ------
    UnreadableInput
        If a file is damaged, gone, or has changed since the job was planned.
    StorageError
        If the store fails after all retries.
    """
    if header.format == "parquet":
        from cortex_dask.io.parquet import read_parquet

        return read_parquet(split, header, ahead)
    from cortex_dask.io.jsonlines import read_json

    return read_json(split, header, ahead)
