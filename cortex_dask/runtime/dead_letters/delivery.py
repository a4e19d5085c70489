"""Dead letters on their way out: to an SQS queue or to a folder of the user's, beside the job directory.

A batch is delivered when its failure is final, that is when the ledger holds it. What was delivered is noted in the
job directory (``delivered/…``), so that a coordinator that takes over goes on behind that; only what was sent in the
very moment before a coordinator was killed is sent twice. Whatever cannot be delivered stays in the job's failures.
"""

from __future__ import annotations

import queue
import threading
import time
import uuid
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING

from cortex_dask.io.job.failures import standing
from cortex_dask.io.job.records import SplitRecord
from cortex_dask.runtime.dead_letters.target import DeadLetterTarget, Folder, one_line

if TYPE_CHECKING:
    from cortex_dask.io.job.directory import JobDirectory
    from cortex_dask.io.job.settings import JobSettings

_GATHER = 100  # records that are looked at together
_END_SECONDS = 5.0  # for what is being delivered when a job ends early
Files = dict[str, list[str]]  # failures file -> ids of the batches in it, in order


class Receipts:
    """What has been delivered: ``delivered/<coordinator>-<n>.json`` in the job directory, each a list of keys."""

    def __init__(self, job: JobDirectory) -> None:
        self._job = job
        self._token = uuid.uuid4().hex[:12]
        self._count = 0
        self._read: set[str] = set()
        self._keys: set[str] = set()

    def __contains__(self, key: str) -> bool:
        return key in self._keys

    def refresh(self) -> None:
        """Take in what other coordinators have delivered."""
        for name in self._job.store.names("delivered/"):
            if name not in self._read:
                self._read.add(name)
                self._keys.update((self._job.read_json(name) or {}).get("delivered", ()))

    def add(self, keys: Collection[str]) -> None:
        """Note what has just been delivered."""
        if keys:
            name = f"delivered/{self._token}-{self._count:06d}.json"
            self._count += 1
            self._read.add(name)
            self._keys.update(keys)
            self._job.write_json(name, {"time": time.time(), "delivered": list(keys)})


class Delivery:
    """Delivers a job's dead letters: those of new records from a thread while the job runs, the rest at its end.

    Parameters
    ----------
    job : JobDirectory
        The job.
    target : Target
        Where they go.

    Attributes
    ----------
    undelivered : int
        Batches that are dead letters and have not been delivered.
    """

    def __init__(self, job: JobDirectory, target: DeadLetterTarget) -> None:
        self._job = job
        self._target = target
        self._receipts = Receipts(job)
        self._queue: queue.SimpleQueue[SplitRecord | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._problem = ""
        self.undelivered = 0

    def check(self) -> None:
        """Make sure that letters can be delivered, and read what has been.

        Raises
        ------
        SpecError
            If they cannot be.
        """
        self._target.check()
        self._receipts.refresh()

    def offer(self, record: SplitRecord) -> None:
        """Take in a record that is in the ledger; returns at once."""
        if record.failures_file is None:
            return
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="cortex-dask-delivery", daemon=True)
            self._thread.start()
        self._queue.put(record)

    def settle(self) -> str:
        """Deliver what stands and has not been delivered; returns "" or, if not all could be, why, for people."""
        self._end_thread(None)
        self._problem = self._target.problem = ""
        self._receipts.refresh()
        files = self._missing(standing(self._job))
        self._deliver(files)
        self.undelivered = sum(map(len, self._missing(files).values()))
        if not self.undelivered:
            return ""
        why = self._problem or self._target.problem
        return (
            f"{self.undelivered} of them could not be delivered to {self._target.where} ({why}): "
            "they stay in the job's failures; resume the job to deliver them"
        )

    def close(self) -> None:
        """End, wherever it is."""
        self._end_thread(_END_SECONDS)
        self._target.close()

    def _end_thread(self, seconds: float | None) -> None:
        if self._thread is not None:
            self._queue.put(None)
            self._thread.join(seconds)
            self._thread = None

    def _run(self) -> None:
        while True:
            records, over = self._gather()
            files: Files = {}
            for record in records:
                if record.failures_file is not None:
                    files[record.failures_file] = [failure.batch_id for failure in record.failures]
            if not self._problem:  # what is out of order is tried again at the end, not at every failure
                self._deliver(self._missing(files))
            if over:
                return

    def _gather(self) -> tuple[list[SplitRecord], bool]:
        records: list[SplitRecord] = []
        item = self._queue.get()
        while item is not None and len(records) < _GATHER:
            records.append(item)
            try:
                item = self._queue.get_nowait()
            except queue.Empty:
                return records, False
        return records, item is None

    def _deliver(self, files: Files) -> None:
        if not files:
            return
        try:
            for keys in self._target.deliver(files):
                self._receipts.add(keys)
        except Exception as error:  # noqa: BLE001 - whatever it is, the letters stay where they are, and the job says why
            self._problem = one_line(error)

    def _missing(self, files: Mapping[str, Collection[str]]) -> Files:
        """Return the letters without a receipt."""
        found = {
            file: [identity for identity in ids if self._target.key(file, identity) not in self._receipts]
            for file, ids in files.items()
        }
        return {file: ids for file, ids in found.items() if ids}


def make_delivery(job: JobDirectory, settings: JobSettings) -> Delivery | None:
    """Return the delivery that a submission asks for, or None."""
    queue_settings = settings.handler.extra.get("sqs_dead_letter_queue")
    if queue_settings is not None:
        from cortex_dask.runtime.dead_letters.sqs import SqsQueue

        return Delivery(job, SqsQueue(queue_settings["arn"], job, settings))
    folder = settings.handler.extra.get("dead_letter")
    return None if folder is None else Delivery(job, Folder(folder["path"], job, settings))
