"""Plan a job: input files -> splits, the same ones whenever the same input is planned for as many workers.

::

    made = plan(DatasetInput(("s3://bucket/in/",), batch_size=1024), workers=4)
    made.header.batches, made.header.rows
    for split in made: ...
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from cortex_dask.errors import DatasetError
from cortex_dask.io.input.files import detect_format, list_files
from cortex_dask.io.input.filters import (
    parse_filters,
)
from cortex_dask.io.job.splits import DatasetInput, Plan
from cortex_dask.io.planning.packing import Sink
from cortex_dask.io.planning.parquet import ParquetPlanner

if TYPE_CHECKING:
    pass


def plan(
    dataset: DatasetInput,
    *,
    workers: int,
    keep: Sequence[str] = (),
    any_json: bool = False,
    sink: Sink | None = None,
    check: Callable[[], None] = lambda: None,
) -> Plan:
    """Plan the splits of a dataset.

    Parameters
    ----------
    dataset : DatasetInput
        What to read.
    workers : int
        How many workers there will be; the sizes of the splits depend on it.
    keep : sequence of str
        Columns that must be among those that are read.
    any_json : bool
        For JSON: a line may hold any JSON value, not just an object (and a file that starts with ``[`` is lines too).
    sink : callable, optional
        Takes each split as it is cut, and the plan holds none: a million of them are 600 MB.
    check : callable
        Called now and then while footers are read; planning ends with what it raises.

    Raises
    ------
    DatasetError
        If the input is missing, empty, unreadable, contradicts itself, or lacks what ``columns``, ``filters`` and
        ``keep`` name.
    """
    if dataset.batch_size < 1:
        raise DatasetError(f"batch_size is {dataset.batch_size}: give a number of rows from 1 on")
    filters = parse_filters(dataset.filters)
    columns = None if dataset.columns is None else tuple(dict.fromkeys(dataset.columns))
    if columns is not None and not columns:
        raise DatasetError("columns is empty: name at least one column, or leave it out to read all")
    files = list_files(dataset.paths)
    kind = detect_format(files) if dataset.format == "auto" else dataset.format
    dataset = replace(dataset, columns=columns)
    if kind == "parquet":
        return ParquetPlanner(dataset, files, filters, max(1, workers), keep).plan(sink, check)
    from cortex_dask.io.planning.json import plan_json

    return plan_json(dataset, files, filters, max(1, workers), keep=keep, any_json=any_json, sink=sink)
