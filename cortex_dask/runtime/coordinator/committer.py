"""The committer: a thread that appends finished splits to the ledger and publishes their parts.

It gathers records for a moment, so that a job of many short splits makes few segments, and longer the longer the job
runs, so that an overnight job has thousands of segments and not a hundred thousand.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from cortex_dask.io.job.directory import JobDirectory
from cortex_dask.io.job.ledger import Ledger
from cortex_dask.io.job.records import SplitRecord
from cortex_dask.io.output.directory import OutputDirectory
from cortex_dask.runtime.dead_letters.delivery import Delivery

#: A segment has no more records than this; so many are appended at once.
SEGMENT_RECORDS = 1000
#: Server-side copies at a time on an object store. One takes some 50 ms: eight would hold a job to 160 parts a second.
PUBLISHERS = 32
_DELETED = 1000  # staged files with one request
_MOST_WAITING = 10_000  # parts that wait to be copied; a store that is slower than the job makes the job wait


def gather_seconds(elapsed: float) -> float:
    """Return how long to gather records: a tenth of a second at first, up to five in a job of an hour or so.

    Parameters
    ----------
    elapsed : float
        Seconds since the job began.
    """
    return min(0.1 + elapsed / 600, 5.0)


class Committer:
    """Appends records to the ledger, in the background.

    Parameters
    ----------
    job : JobDirectory
        The job.
    ledger : Ledger
        Up to date, i.e. refreshed.
    output : OutputDirectory or None
        Where parts are published.
    on_commit : callable
        Called from the committer's thread with each record that has got into the ledger, ours or another coordinator's.
    on_error : callable
        Called once with the exception that ended the committer.
    delivery : Delivery, optional
        Is offered the records of ours that have got into the ledger, for their dead letters.
    """

    def __init__(
        self,
        job: JobDirectory,
        ledger: Ledger,
        output: OutputDirectory | None,
        on_commit: Callable[[SplitRecord], None],
        on_error: Callable[[Exception], None],
        delivery: Delivery | None = None,
    ) -> None:
        self._job = job
        self._ledger = ledger
        self._output = output
        self._on_commit = on_commit
        self._on_error = on_error
        self._delivery = delivery
        self._queue: queue.SimpleQueue[SplitRecord | None] = queue.SimpleQueue()
        self._pending = 0
        self._hurry = threading.Event()
        self._began = time.monotonic()
        self._pool: ThreadPoolExecutor | None = None
        self._room = threading.Semaphore(_MOST_WAITING)
        self._published: deque[str] = deque()  # staged names that have been copied, and can be deleted
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="cortex-dask-committer", daemon=True)
        self._thread.start()

    def commit(self, record: SplitRecord) -> None:
        """Take a record in; returns at once."""
        self._queue.put(record)

    def hurry(self) -> None:
        """Say that nothing more is in flight: append now what is there."""
        self._hurry.set()
        self._queue.put(None)

    def close(self) -> None:
        """Append what is there, and end."""
        self._hurry.set()
        self._closed = True
        self._queue.put(None)
        self._thread.join()

    def _run(self) -> None:
        try:
            while True:
                batch = self._gather()
                if batch:
                    self._append(batch)
                if self._closed and self._queue.empty():
                    break
            if self._pool is not None:
                self._pool.shutdown()
                self._delete_published()
        except Exception as error:  # noqa: BLE001 - handed to the coordinator, which ends the job with it
            self._on_error(error)

    def _gather(self) -> list[SplitRecord]:
        first = self._queue.get()
        if first is None:
            return []
        batch = [first]
        now = time.monotonic()
        deadline = now + gather_seconds(now - self._began)
        while len(batch) < SEGMENT_RECORDS:
            remaining = 0.0 if self._hurry.is_set() else deadline - time.monotonic()
            try:
                item = self._queue.get(timeout=remaining) if remaining > 0 else self._queue.get_nowait()
            except queue.Empty:
                break
            if item is not None:
                batch.append(item)
        self._hurry.clear()
        return batch

    def _append(self, batch: list[SplitRecord]) -> None:
        result = self._ledger.append(batch)
        for record in result.dropped:
            self._discard(record)
        for record in (*result.foreign, *result.accepted):
            self._on_commit(record)
        if self._delivery is not None:
            for record in result.accepted:
                self._delivery.add(record)
        if self._output is not None and self._output.eager:
            for record in result.accepted:
                self._publish(record)
            self._delete_published()

    def _publish(self, record: SplitRecord) -> None:
        output, part = self._output, record.part
        if output is None or part is None:
            return
        if output.store.is_local:
            output.publish(part)
            return
        if self._pool is None:
            self._pool = ThreadPoolExecutor(PUBLISHERS, thread_name_prefix="cortex-dask-publish")
        self._room.acquire()  # what waits here is in memory

        def publish() -> None:
            try:
                output.publish(part, keep=True)
                self._published.append(part.staged)
            finally:
                self._room.release()

        self._pool.submit(publish)  # whatever fails here is published when the job is sealed

    def _delete_published(self) -> None:
        """Delete the staged files of published parts, many with one request; the end of the job deletes the rest."""
        while self._output is not None and len(self._published) >= _DELETED:
            names = [self._published.popleft() for _ in range(_DELETED)]
            with contextlib.suppress(OSError):
                self._output.store.delete(*names)

    def _discard(self, record: SplitRecord) -> None:
        """Remove what an attempt left that did not count; it is invisible anyway, so a failure to do so is no harm."""
        try:
            if self._output is not None and record.part is not None:
                self._output.discard(record.part)
            if record.failures_file is not None:
                self._job.store.delete(record.failures_file)
        except OSError:
            return
