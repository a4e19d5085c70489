"""Read a split: the batches of its row stream, one after the other, with bounded memory.

::

    for item in read_split(split, header):
        match item:
            case Batch():    handle(item.data)           # an Arrow table, or a list of dicts for JSON
            case BadLine():  dead_letter(item)           # a malformed line; its neighbours go on
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from cortex_dask.io.batch import Ahead, BadLine, Batch
from cortex_dask.io.job.splits import PlanHeader, Split

if TYPE_CHECKING:
    pass


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
        from cortex_dask.io.parquet.reader import read_parquet

        return read_parquet(split, header, ahead)
    from cortex_dask.io.json.reader import read_json

    return read_json(split, header, ahead)
