"""Threads of this process, which take the places of Dask workers and supervise the handler processes.

With one queue, and slots that are all the same, a scheduler has nothing to decide. So none is started, and Dask's is
not even imported, which takes longer than many a job (see ``docs/performance.md``).
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence

from cortex_dask.io.job.records import Outcome, SplitTask
from cortex_dask.io.job.settings import JobSettings
from cortex_dask.runtime.cluster import Cluster, Done, Report
from cortex_dask.runtime.worker import devices, slots

_CLOSE_SECONDS = 5.0  # the threads end when their handler processes have ended
_JOIN_SECONDS = 0.2


class LocalThreads(Cluster):
    """The default: a thread for each slot."""

    name = "local"

    def __init__(self) -> None:
        self._job_url = ""
        self._report: Report = lambda event: None
        self._count = 0  # of threads
        self._tasks: queue.SimpleQueue[tuple[SplitTask, Done] | None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._stop_reason: str | None = None  # once no split is started any more

    def prepare(self, job_url: str, settings: JobSettings) -> None:
        """Start the handler processes: they load the handler while this process plans."""
        self._job_url, self._count = job_url, _count_slots(settings)
        slots.prestart(job_url, self._count)

    def start(self, job_url: str, settings: JobSettings, report: Report, check: Callable[[], None]) -> None:
        """Start the threads."""
        self._job_url, self._count, self._report = job_url, _count_slots(settings), report
        for number in range(self._count):
            # A daemon, so that it does not delay the end of the caller: what it waits for is a process of its own.
            thread = threading.Thread(target=self._run_splits, name=f"cortex-dask-slot-{number}", daemon=True)
            self._threads.append(thread)
            thread.start()

    def slots(self) -> int:
        """Return the number of threads."""
        return self._count

    def queue_depth(self) -> int:
        """Return the number of slots: all take from one queue, so the order of the splits is kept."""
        return self._count

    def submit(self, tasks: Sequence[tuple[SplitTask, Done]], *, elsewhere: bool = False) -> None:
        """Put splits into the queue."""
        for item in tasks:
            self._tasks.put(item)

    def _run_splits(self) -> None:
        from cortex_dask.runtime.worker.supervisor import run_split  # while the handler processes start

        while (item := self._tasks.get()) is not None:
            task, done = item
            result: Outcome | Exception
            if self._stop_reason is not None:
                result = Outcome("stopped", task.split.number, message=self._stop_reason)
            else:
                try:
                    result = run_split(task, self._report)
                except Exception as error:  # noqa: BLE001 - the coordinator decides what becomes of the split
                    result = error
            done(result)

    def cancel(self, split: int) -> None:
        """End the attempts at a split that still run."""
        slots.cancel_split(self._job_url, split)

    def complete(self) -> Outcome:
        """Run ``on_job_complete`` on one handler."""
        from cortex_dask.runtime.worker.supervisor import run_completion  # as above

        return run_completion(self._job_url, self._report)

    def stop(self, reason: str) -> None:
        """End the running splits, and the queued ones."""
        self._stop_reason = reason
        slots.stop_job(self._job_url, reason)

    def close(self) -> None:
        """End the job's handler processes, then the threads."""
        self._stop_reason = self._stop_reason or "the job was closed"
        for _ in self._threads:
            self._tasks.put(None)
        deadline = time.monotonic() + _CLOSE_SECONDS
        while True:
            if self._job_url:
                # Also the processes of a job that has never started; and repeatedly, as a thread may have started a
                # split meanwhile.
                slots.close_job(self._job_url)
            self._threads = [thread for thread in self._threads if thread.is_alive()]
            if not self._threads or time.monotonic() > deadline:
                return
            self._threads[0].join(_JOIN_SECONDS)


def _count_slots(settings: JobSettings) -> int:
    """Return how many slots to have: no more than this machine's devices suffice for.

    Raises :class:`SpecError` if the submission says how many, and those are more.
    """
    if not settings.workers_said and (most := devices.capacity(settings.compute)):
        return min(settings.workers, most)
    devices.check_slots(settings.compute, settings.workers)
    return settings.workers
