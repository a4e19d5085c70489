"""The batches and input lines of a job that failed for good, with their payloads, read back."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import orjson

from cortex_dask.io.job.directory import JobDirectory
from cortex_dask.io.job.ledger import Ledger
from cortex_dask.io.job.splits import Split

if TYPE_CHECKING:
    import pandas as pd

#: The columns that a table of failures always has, in this order.
COLUMNS = ("batch_id", "split", "batch", "rows", "attempts", "cause", "error", "traceback", "position", "payload")


def read_failures(job: JobDirectory) -> Iterator[dict[str, Any]]:
    """Yield the failures of attempts in the ledger, without those that a retry has handled since."""
    for file, batch_ids in unresolved_failures(job).items():
        wanted = set(batch_ids)
        for line in job.store.read(file).splitlines():
            failure = orjson.loads(line)
            if failure.get("batch_id") in wanted:
                yield failure


def unresolved_failures(job: JobDirectory) -> dict[str, list[str]]:
    """Return the ids of failed batches and malformed lines that no retry has handled, by failures file."""
    found: dict[str, dict[str, None]] = {}  # failures file -> batch ids, in order
    places: dict[tuple[int, int], tuple[str, str]] = {}  # (split of origin, batch) -> (failures file, batch id)
    retries = _retries(job)
    for record in Ledger(job.store).records():
        retry = retries.get(record.split)
        origin = record.split if retry is None else retry.origin
        for index in (retry.only or ()) if retry is not None else ():
            file, batch_id = places.pop((origin, index), ("", ""))
            found.get(file, {}).pop(batch_id, None)
        if record.failures_file is None:
            continue
        for failure in record.failures:
            if retry is not None and failure.batch is None:
                continue  # the split of origin reports the malformed line
            found.setdefault(record.failures_file, {})[failure.batch_id] = None
            if failure.batch is not None:
                places[origin, failure.batch] = (record.failures_file, failure.batch_id)
    return {file: list(batch_ids) for file, batch_ids in found.items() if batch_ids}


def to_frame(job: JobDirectory) -> pd.DataFrame:
    """Return the failures as a table, one row for each failed batch or malformed line."""
    import pandas as pd

    failures = list(read_failures(job))
    frame = pd.DataFrame(failures, columns=None if failures else list(COLUMNS))
    for column in COLUMNS:
        if column not in frame:
            frame[column] = None
    return frame[[*COLUMNS, *(column for column in frame.columns if column not in COLUMNS)]]


def _retries(job: JobDirectory) -> dict[int, Split]:
    """Return the splits that repeat failed batches, by number."""
    splits: dict[int, Split] = {}
    for name in job.store.names("plan/"):
        if name.startswith("plan/retry-"):
            for line in job.store.read(name).splitlines():
                split = Split.from_json(orjson.loads(line))
                splits[split.number] = split
    return splits
