"""Splits whose attempts were lost without their own fault: their worker vanished, or a store failed."""

from __future__ import annotations

import time
import uuid

from cortex_dask.io.batch import Batch
from cortex_dask.io.job.directory import JobDirectory
from cortex_dask.io.job.records import SplitRecord
from cortex_dask.io.job.splits import PlanHeader, Split
from cortex_dask.io.store.source import UnreadableInput
from cortex_dask.runtime.cluster import WorkerLost
from cortex_dask.runtime.coordinator.limits import Ended
from cortex_dask.runtime.coordinator.split_queue import SplitQueue
from cortex_dask.runtime.failures import FailureFile, Verdict

#: How often a split may lose its worker before its batches are given up. A vanished host is not the batch's fault, so
#: this is larger than ``max_attempts``; it is finite so that a batch that takes whole hosts down cannot do so for ever.
WORKER_LOST_BUDGET = 10
#: After so many, a split is run alone: if it is the one that takes workers down, no other split is on them.
SUSPICIOUS = 3
#: How often a split is sent again because a store failed (each time after the store's own retries).
STORAGE_BUDGET = 5
_STORAGE_DELAY = 1.0  # seconds before the first of those, doubled each time


class LostSplits:
    """Puts lost splits back into the queue, as often as their budgets allow."""

    def __init__(self, job: JobDirectory, queue: SplitQueue) -> None:
        self._job = job
        self._queue = queue
        self._storage_failures: dict[int, int] = {}  # by split
        #: How many workers each split has lost.
        self.workers: dict[int, int] = {}
        #: Splits that have lost so many workers that they are to run alone.
        self.suspects: list[Split] = []

    def worker_vanished(self, split: Split, error: WorkerLost, *, has_other: bool) -> SplitRecord | None:
        """Have a split run again; return the record of its failure when it has lost too many workers.

        If it ``has_other`` attempts in flight, the loss is only counted.
        """
        lost = self.workers[split.number] = self.workers.get(split.number, 0) + error.workers
        if has_other:
            return None
        if lost >= WORKER_LOST_BUDGET:
            header = self._job.plan_header()
            assert header is not None
            return fail_split(self._job, header, split, f"its worker was lost {lost} times: {error}", attempts=lost)
        if lost >= SUSPICIOUS:
            self.suspects.append(split)
        else:
            self._queue.put_back(split)
        return None

    def storage_failed(self, split: Split, message: str) -> None:
        """Have a split run again after a pause; raise :class:`Ended` when stores have failed too often."""
        failures = self._storage_failures[split.number] = self._storage_failures.get(split.number, 0) + 1
        if failures >= STORAGE_BUDGET:
            raise Ended(
                "worker error", f"{message} (split {split.number} was tried {failures} times; the job can be resumed)"
            )
        self._queue.put_back(split, delay=_STORAGE_DELAY * 2 ** (failures - 1))


def fail_split(job: JobDirectory, header: PlanHeader, split: Split, message: str, *, attempts: int) -> SplitRecord:
    """Write a failure for every batch of a split, and return the record that says so.

    The batches are read again for their payloads (here, by the coordinator; the handler is not involved).
    """
    from cortex_dask.io.reading import read_split  # pyarrow's readers, which a coordinator rarely needs

    attempt_id = uuid.uuid4().hex
    failures = FailureFile(job.store, job.settings().job_id, split, attempt_id, header.batch_size)
    verdict = Verdict("worker lost", message, None, attempts)
    following = 0
    try:
        for item in read_split(split, header):
            if isinstance(item, Batch):
                failures.add(item, verdict)
                following = item.index + 1
            else:
                failures.add_line(item)
    except UnreadableInput:
        # What cannot be read any more is still named: by index, as planned, without its payload.
        planned = split.only if split.only is not None else range(split.batches or following + 1)
        failures.add_unread([index for index in planned if index >= following], verdict)
    batches = [failure for failure in failures.failures if failure.batch is not None]
    return SplitRecord(
        split=split.number,
        attempt_id=attempt_id,
        part=None,
        batches=len(batches),
        succeeded=0,
        failures_file=failures.close(),
        failures=tuple(failures.failures),
        failed_attempts=attempts * len(batches),
        rows_in=sum(failure.rows for failure in batches),
        worker="coordinator",
        finished=time.time(),
    )
