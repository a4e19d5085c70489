"""Failures delivered to a dead-letter target while a job runs, and at its end.

A failure is delivered when it is final, that is when the ledger holds it. Each delivery leaves a receipt in the job
directory (``delivered/…``), so that the next coordinator of the job continues after it; only what was sent in the very
moment before a coordinator was killed is sent twice. What cannot be delivered stays in the job's failures.
"""

from __future__ import annotations

import queue
import threading
import time
import uuid
from collections.abc import Collection, Mapping

from cortex_dask.io.job.directory import JobDirectory
from cortex_dask.io.job.failures import unresolved_failures
from cortex_dask.io.job.records import SplitRecord
from cortex_dask.io.job.settings import JobSettings
from cortex_dask.runtime.dead_letters.target import DeadLetterTarget, FolderTarget, message_of

_RECORDS_AT_A_TIME = 100
_CLOSE_SECONDS = 5.0  # for a delivery that is in progress when a job ends early

#: Failures file -> ids of failed batches in it, in order.
FailuresByFile = dict[str, list[str]]


class Receipts:
    """What has been delivered: ``delivered/<coordinator>-<n>.json`` in the job directory, each a list of keys."""

    def __init__(self, job: JobDirectory) -> None:
        self._job = job
        self._token = uuid.uuid4().hex[:12]
        self._count = 0
        self._files_read: set[str] = set()
        self._keys: set[str] = set()

    def __contains__(self, key: str) -> bool:
        return key in self._keys

    def refresh(self) -> None:
        """Read the receipts that other coordinators have added."""
        for name in self._job.store.names("delivered/"):
            if name not in self._files_read:
                self._files_read.add(name)
                self._keys.update((self._job.read_json(name) or {}).get("delivered", ()))

    def add(self, keys: Collection[str]) -> None:
        """Store a receipt."""
        if keys:
            name = f"delivered/{self._token}-{self._count:06d}.json"
            self._count += 1
            self._files_read.add(name)
            self._keys.update(keys)
            self._job.write_json(name, {"time": time.time(), "delivered": list(keys)})


class Delivery:
    """Delivers a job's failures: those of new records from a thread while the job runs, the rest at its end."""

    def __init__(self, job: JobDirectory, target: DeadLetterTarget) -> None:
        self._job = job
        self._target = target
        self._receipts = Receipts(job)
        self._queue: queue.SimpleQueue[SplitRecord | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._problem = ""
        self.undelivered = 0  # batches that failed for good and have not been delivered

    def check(self) -> None:
        """Raise SpecError if nothing can be delivered; read the receipts."""
        self._target.check()
        self._receipts.refresh()

    def add(self, record: SplitRecord) -> None:
        """Queue the failures of a record that is in the ledger; returns at once."""
        if record.failures_file is None:
            return
        if self._thread is None:
            self._thread = threading.Thread(target=self._deliver_queue, name="cortex-dask-delivery", daemon=True)
            self._thread.start()
        self._queue.put(record)

    def finish(self) -> str:
        """Deliver all failures that have not been; return "" or, if some could not be, a sentence that says why."""
        self._stop_thread(None)
        self._problem = ""
        self._target.clear_refusal()
        self._receipts.refresh()
        files = self._without_receipt(unresolved_failures(self._job))
        self._deliver(files)
        self.undelivered = sum(map(len, self._without_receipt(files).values()))
        if not self.undelivered:
            return ""
        reason = self._problem or self._target.refusal
        return (
            f"{self.undelivered} of them could not be delivered to {self._target.description} ({reason}): "
            "they stay in the job's failures; resume the job to deliver them"
        )

    def close(self) -> None:
        """Stop the thread, which may be in the middle of a delivery, and close the target."""
        self._stop_thread(_CLOSE_SECONDS)
        self._target.close()

    def _stop_thread(self, timeout: float | None) -> None:
        if self._thread is not None:
            self._queue.put(None)
            self._thread.join(timeout)
            self._thread = None

    def _deliver_queue(self) -> None:
        while True:
            records, is_last = self._pop_records()
            files: FailuresByFile = {}
            for record in records:
                if record.failures_file is not None:
                    files[record.failures_file] = [failure.batch_id for failure in record.failures]
            if not self._problem:  # a target that does not work is tried again at the end, not at every failure
                self._deliver(self._without_receipt(files))
            if is_last:
                return

    def _pop_records(self) -> tuple[list[SplitRecord], bool]:
        """Wait for records; return those that are queued, and whether they are the last."""
        records: list[SplitRecord] = []
        while (record := self._queue.get()) is not None:
            records.append(record)
            if len(records) == _RECORDS_AT_A_TIME or self._queue.empty():
                return records, False
        return records, True

    def _deliver(self, files: FailuresByFile) -> None:
        if not files:
            return
        try:
            for keys in self._target.deliver(files):
                self._receipts.add(keys)
        except Exception as error:  # noqa: BLE001 - the failures stay in the job, which says why
            self._problem = message_of(error)

    def _without_receipt(self, files: Mapping[str, Collection[str]]) -> FailuresByFile:
        left = {
            file: [batch_id for batch_id in ids if self._target.receipt_key(file, batch_id) not in self._receipts]
            for file, ids in files.items()
        }
        return {file: ids for file, ids in left.items() if ids}


def make_delivery(job: JobDirectory, settings: JobSettings) -> Delivery | None:
    """Return the delivery that a submission asks for, or None."""
    target = settings.dead_letters
    if target is not None and target.queue_arn is not None:
        from cortex_dask.runtime.dead_letters.sqs import SqsTarget  # imports asyncio, which most jobs do without

        return Delivery(job, SqsTarget(target.queue_arn, job, settings))
    if target is not None and target.folder is not None:
        return Delivery(job, FolderTarget(target.folder, job, settings))
    return None
