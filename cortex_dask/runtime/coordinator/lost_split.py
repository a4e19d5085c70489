"""Giving a split up whose workers vanish again and again: each of its batches becomes a dead letter that says so."""

from __future__ import annotations

import time
import uuid

from cortex_dask.io.batch import Batch
from cortex_dask.io.job.directory import JobDirectory
from cortex_dask.io.job.records import SplitRecord
from cortex_dask.io.job.settings import JobSettings
from cortex_dask.io.job.splits import PlanHeader, Split
from cortex_dask.io.reading import read_split
from cortex_dask.io.store.source import UnreadableInput
from cortex_dask.runtime.failures import FailureFile, Verdict


def abandon_split(
    job: JobDirectory, settings: JobSettings, header: PlanHeader, split: Split, message: str, *, attempts: int
) -> SplitRecord:
    """Write a dead letter for every batch of a split, and return the record that says so.

    The batches are read again for their payloads (here, by the coordinator; the handler is not involved).

    Parameters
    ----------
    job : JobDirectory
        Where the dead letters are written.
    settings : JobSettings
        The job's.
    header : PlanHeader
        The plan's.
    split : Split
        The split.
    message : str
        What happened, for people.
    attempts : int
        How often the split was sent.
    """
    attempt_id = uuid.uuid4().hex
    letters = FailureFile(job.store, settings.job_id, split, attempt_id, header.batch_size)
    verdict = Verdict("worker lost", message, None, attempts)
    following = 0
    try:
        for item in read_split(split, header):
            if isinstance(item, Batch):
                letters.add(item, verdict)
                following = item.index + 1
            else:
                letters.add_line(item)
    except UnreadableInput:
        # What cannot be read any more is still named: by index, as planned, without its payload.
        planned = split.only if split.only is not None else range(split.batches or following + 1)
        letters.add_unread([index for index in planned if index >= following], verdict)
    batches = [failure for failure in letters.failures if failure.batch is not None]
    return SplitRecord(
        split=split.number,
        attempt_id=attempt_id,
        part=None,
        batches=len(batches),
        succeeded=0,
        failures_file=letters.close(),
        failures=tuple(letters.failures),
        failed_attempts=attempts * len(batches),
        rows_in=sum(failure.rows for failure in batches),
        worker="coordinator",
        finished=time.time(),
    )
