"""The batches of a job that failed for good, with their payloads: the dead letters that the ledger points to."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import orjson

from cortex_dask.io.job.ledger import Ledger
from cortex_dask.io.job.splits import Split

if TYPE_CHECKING:
    import pandas as pd

    from cortex_dask.io.job.directory import JobDirectory

#: The columns that a table of failures always has, in this order.
COLUMNS = ("batch_id", "split", "batch", "rows", "attempts", "cause", "error", "traceback", "position", "payload")


def dead_letters(job: JobDirectory) -> Iterator[dict[str, Any]]:
    """Yield the dead letters that stand: those of attempts in the ledger, less the batches that a retry has handled.

    Files of attempts that lost against another one are never looked at.
    """
    for file, identities in standing(job).items():
        wanted = set(identities)
        for line in job.store.read(file).splitlines():
            letter = orjson.loads(line)
            if letter.get("batch_id") in wanted:
                yield letter


def standing(job: JobDirectory) -> dict[str, list[str]]:
    """Return the ids of the batches (and malformed lines) whose dead letters stand, by the failures file with them."""
    found: dict[str, dict[str, None]] = {}  # failures file -> the batch ids in it that stand, in order
    places: dict[tuple[int, int], tuple[str, str]] = {}  # (split of origin, batch) -> (failures file, batch id)
    retries = _retries(job)
    for record in Ledger(job.store).records():
        retry = retries.get(record.split)
        origin = record.split if retry is None else retry.origin
        for index in (retry.only or ()) if retry is not None else ():
            file, identity = places.pop((origin, index), ("", ""))
            found.get(file, {}).pop(identity, None)
        if record.failures_file is None:
            continue
        for failure in record.failures:
            if retry is not None and failure.batch is None:
                continue  # the malformed line is reported by the split of origin already
            found.setdefault(record.failures_file, {})[failure.batch_id] = None
            if failure.batch is not None:
                places[origin, failure.batch] = (record.failures_file, failure.batch_id)
    return {file: list(identities) for file, identities in found.items() if identities}


def to_frame(job: JobDirectory) -> pd.DataFrame:
    """Return the dead letters as a table, one row for each failed batch or malformed line."""
    import pandas as pd

    letters = list(dead_letters(job))
    frame = pd.DataFrame(letters, columns=None if letters else list(COLUMNS))
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
