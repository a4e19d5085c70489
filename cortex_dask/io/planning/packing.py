"""Cut a stream of pieces into splits of about equal weight: a pure function of the pieces and the target.

Three wishes pull in different directions, and this module weighs them:

- splits of about the target's weight, so that every worker stays busy to the end;
- splits that end with a full batch, as a short one wastes the handler's (often a GPU's) throughput;
- row groups read once: a row group that two splits share is decoded by both up to where they stop.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from cortex_dask.errors import DatasetError
from cortex_dask.io.input.filters import (
    unknown_column,
)
from cortex_dask.io.job.splits import Piece, Plan, PlanHeader, Split

if TYPE_CHECKING:
    pass

#: Decoding a row group again costs about this share of handling its rows, with a handler that is cheap itself.
_REREAD = 0.25

#: Pieces of a split, unless one batch needs more: so many tiny files take seconds to open, and a split with a hundred
#: thousand names would be a task of 30 MB.
_MOST_PIECES = 1000


@dataclass(frozen=True, slots=True)
class Load:
    """A piece and what it costs."""

    piece: Piece
    rows: int  # that pass, or an estimate where ``piece.rows`` is None
    bytes: int  # estimated, of the columns read
    weight: int  # bytes, or more where the rows are many and narrow
    #: What cutting it inside costs, in weight that is read again; None: it cannot be cut.
    cut_cost: int | None


def pack(
    loads: Iterable[Load], *, target: float, batch_size: int, align: bool = True, finer_from: float = math.inf
) -> Iterator[list[Load]]:
    """Yield the loads of each split, in order.

    Parameters
    ----------
    loads : iterable of Load
        The pieces in input order.
    target : float
        The weight of a split, which is exceeded where one batch needs more.
    batch_size : int
        Rows; splits end at multiples of it where that is cheaper than a short batch.
    align : bool
        False: the rows are estimates, there is nothing to align.
    finer_from : float
        The weight from which on splits have half of the target: they are what is left for the end, when a worker that
        has nothing to do waits for those that have.
    """
    unit = batch_size if align else 0
    split: list[Load] = []
    weight = rows = packed = 0
    previous: list[Load] | None = None
    for load in loads:
        if packed >= finer_from:
            target, finer_from = target / 2, math.inf
        packed += load.weight
        # with the piece it would be further from the target than it is without
        if split and rows >= batch_size and weight + load.weight / 2 > target and weight >= target / 2:
            if previous:
                yield previous
            previous, split = _aligned(split, rows, weight, unit)
            weight, rows = _sums(split)
        _append(split, load)
        weight, rows = weight + load.weight, rows + load.rows
        if (weight >= target or len(split) >= _MOST_PIECES) and rows >= batch_size:
            if previous:
                yield previous
            previous, split = _aligned(split, rows, weight, unit)
            weight, rows = _sums(split)
    if split and previous and rows < batch_size and weight < target / 2:
        for load in split:  # less than a batch is not worth a split
            _append(previous, load)
        split = []
    if previous:
        yield previous
    if split:
        yield split


def _sums(loads: list[Load]) -> tuple[int, int]:
    return sum(load.weight for load in loads), sum(load.rows for load in loads)


def _append(split: list[Load], load: Load) -> None:
    """Add a load; one that goes on where the last one stops becomes one with it."""
    if split:
        last, piece = split[-1], load.piece
        whole = last.piece
        same = piece.path == whole.path and piece.group == whole.group and piece.start == whole.stop
        if same and (piece.rows is None) == (whole.rows is None):
            rows = None if piece.rows is None or whole.rows is None else piece.rows + whole.rows
            cost = None if last.cut_cost is None or load.cut_cost is None else max(last.cut_cost, load.cut_cost)
            split[-1] = Load(
                replace(whole, stop=piece.stop, rows=rows),
                last.rows + load.rows,
                last.bytes + load.bytes,
                last.weight + load.weight,
                cost,
            )
            return
    split.append(load)


def _aligned(split: list[Load], rows: int, weight: int, batch_size: int) -> tuple[list[Load], list[Load]]:
    """Return the split and what is left over for the next one: the split ends with a full batch if that pays."""
    over = rows % batch_size if batch_size else 0
    if not over or rows < batch_size:
        return split, []
    at, spare = len(split) - 1, over
    while split[at].rows <= spare:  # whole pieces at the end go over
        spare -= split[at].rows
        at -= 1
    if not spare:
        return split[: at + 1], split[at + 1 :]
    cut = split[at]
    if cut.cut_cost is None or cut.cut_cost * _REREAD > weight / (rows // batch_size):
        return split, []
    kept, moved = _cut(cut, cut.rows - spare)
    return [*split[:at], kept], [moved, *split[at + 1 :]]


def _cut(load: Load, rows: int) -> tuple[Load, Load]:
    """Cut a load after some of its rows, all of which pass."""
    piece = load.piece
    assert piece.rows is not None
    middle = piece.start + rows
    left_bytes, left_weight = load.bytes * rows // load.rows, load.weight * rows // load.rows
    left = Load(replace(piece, stop=middle, rows=rows), rows, left_bytes, left_weight, load.cut_cost)
    rest = load.rows - rows
    right = Load(
        replace(piece, start=middle, rows=rest), rest, load.bytes - left_bytes, load.weight - left_weight, load.cut_cost
    )
    return left, right


Sink = Callable[[Split], None]

#: No split is planned larger than this (uncompressed bytes of the columns read), whatever the size of the input.
_LARGEST = 64 << 20

#: Splits per worker that the target aims at, so that no worker idles long at the end.
_SPLITS_PER_WORKER = 8


def check_keep(keep: Sequence[str], known: Iterable[str], columns: Sequence[str] | None) -> None:
    """Check that the columns which stand beside the output are read."""
    known = list(known)
    for name in keep:
        if name not in known:
            raise unknown_column(name, known, "keep")
        if columns is not None and name not in columns:
            raise DatasetError(f"keep names the column {name!r}, which columns leaves out: add it there")


def target_weight(total: int, workers: int) -> float:
    """Return the weight of a split."""
    return min(float(_LARGEST), total / (workers * _SPLITS_PER_WORKER))


def finer_weight(total: int, target: float, workers: int) -> float:
    """Return the weight from which on splits are smaller: for the last two of each worker, at most a quarter of all."""
    return total - min(total / 4, 2 * workers * target)


def assemble(header: PlanHeader, packed: Iterator[list[Load]], sink: Sink | None = None) -> Plan:
    """Make the plan: number the splits and add up the totals."""
    splits: list[Split] = []
    take = splits.append if sink is None else sink
    number = 0
    total_rows = total_bytes = total_batches = 0
    for loads in packed:
        rows, size = sum(load.rows for load in loads), sum(load.bytes for load in loads)
        batches = -(-rows // header.batch_size)
        exact = header.batches_exact
        pieces = tuple(load.piece for load in loads)
        take(Split(number, pieces, rows if exact else None, batches if exact else None, size))
        number += 1
        total_rows, total_bytes, total_batches = total_rows + rows, total_bytes + size, total_batches + batches
    header = replace(header, splits=number, batches=total_batches, rows=total_rows, bytes=total_bytes)
    return Plan(header, tuple(splits))
