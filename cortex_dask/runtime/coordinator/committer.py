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
_DELETED_AT_ONCE = 1000  # staged files with one request
_LONGEST_QUEUE = 10_000  # parts that wait to be copied; a store that is slower than the job makes the job wait


def gather_seconds(elapsed: float) -> float:
    """Return how long to gather records: a tenth of a second at first, up to five seconds after an hour or so."""
    return min(0.1 + elapsed / 600, 5.0)


class Committer:
    """Appends records to the ledger, publishes their parts and hands on their failures, in the background.

    ``report`` is called from the committer's thread with each record that has got into the ledger, ours or another
    coordinator's, and once with the exception that ends the committer.
    """

    def __init__(
        self,
        job: JobDirectory,
        ledger: Ledger,  # refreshed
        output: OutputDirectory | None,
        delivery: Delivery | None,
        report: Callable[[SplitRecord | Exception], None],
    ) -> None:
        self._job = job
        self._ledger = ledger
        self._output = output
        self._delivery = delivery
        self._report = report
        self._queue: queue.SimpleQueue[SplitRecord | None] = queue.SimpleQueue()
        self._flush = threading.Event()
        self._started = time.monotonic()
        self._pool: ThreadPoolExecutor | None = None
        self._room = threading.Semaphore(_LONGEST_QUEUE)
        self._published: deque[str] = deque()  # staged names that have been copied, and can be deleted
        self._closed = False
        self._thread = threading.Thread(target=self._commit_all, name="cortex-dask-committer", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._started = time.monotonic()
        self._thread.start()

    def commit(self, record: SplitRecord) -> None:
        """Queue a record; returns at once."""
        self._queue.put(record)

    def flush(self) -> None:
        """Append the queued records now, because nothing more is in flight."""
        self._flush.set()
        self._queue.put(None)

    def close(self) -> None:
        """Append the queued records, and end the thread."""
        self._flush.set()
        self._closed = True
        self._queue.put(None)
        self._thread.join()

    def _commit_all(self) -> None:
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
        except Exception as error:  # noqa: BLE001 - the coordinator ends the job with it
            self._report(error)

    def _gather(self) -> list[SplitRecord]:
        first = self._queue.get()
        if first is None:
            return []
        batch = [first]
        now = time.monotonic()
        deadline = now + gather_seconds(now - self._started)
        while len(batch) < SEGMENT_RECORDS:
            remaining = 0.0 if self._flush.is_set() else deadline - time.monotonic()
            try:
                item = self._queue.get(timeout=remaining) if remaining > 0 else self._queue.get_nowait()
            except queue.Empty:
                break
            if item is not None:
                batch.append(item)
        self._flush.clear()
        return batch

    def _append(self, batch: list[SplitRecord]) -> None:
        result = self._ledger.append(batch)
        for record in result.dropped:
            self._discard(record)
        for record in (*result.foreign, *result.accepted):
            self._report(record)
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
        self._room.acquire()  # queued parts are in memory

        def publish() -> None:
            try:
                output.publish(part, keep=True)
                self._published.append(part.staged)
            finally:
                self._room.release()

        self._pool.submit(publish)  # parts that fail here are published when the job is sealed

    def _delete_published(self) -> None:
        """Delete the staged files of published parts, many with one request; the end of the job deletes the rest."""
        while self._output is not None and len(self._published) >= _DELETED_AT_ONCE:
            names = [self._published.popleft() for _ in range(_DELETED_AT_ONCE)]
            with contextlib.suppress(OSError):
                self._output.store.delete(*names)

    def _discard(self, record: SplitRecord) -> None:
        """Remove the files of an attempt that did not count; they are invisible, so a failure to do so is harmless."""
        try:
            if self._output is not None and record.part is not None:
                self._output.discard(record.part)
            if record.failures_file is not None:
                self._job.store.delete(record.failures_file)
        except OSError:
            return
