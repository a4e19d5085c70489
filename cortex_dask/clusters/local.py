"""The machine at hand: threads of this process take the places of Dask workers, and drive the handler processes.

There is nothing here that a scheduler could decide: one queue, and slots that are all the same. So none is started, and
Dask's is not even imported, which takes longer than many a job (see ``docs/performance.md``).
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence

from cortex_dask.io.job.records import Outcome, SplitTask
from cortex_dask.io.job.settings import JobSettings
from cortex_dask.runtime.cluster import Cluster, Done, Report
from cortex_dask.runtime.worker import devices, slots, spares

_CLOSE_SECONDS = 5.0  # the threads end when their handler processes have ended
_LOOK_AGAIN_SECONDS = 0.2


class LocalThreads(Cluster):
    """The default: a thread for each slot."""

    name = "local"

    def __init__(self) -> None:
        self._job_url = ""
        self._report: Report = lambda event: None
        self._count = 0
        self._tasks: queue.SimpleQueue[tuple[SplitTask, Done] | None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._ending: str | None = None  # why no split is begun any more

    def prepare(self, job_url: str, settings: JobSettings) -> None:
        """Start the handler processes: they load the handler while this process plans."""
        self._job_url, self._count = job_url, _slots_wanted(settings)
        slots.prestart(job_url, self._count)

    def start(self, job_url: str, settings: JobSettings, report: Report, check: Callable[[], None]) -> None:
        """Start the threads."""
        self._job_url, self._count, self._report = job_url, _slots_wanted(settings), report
        for number in range(self._count):
            # A daemon, so that a caller who ends is not held up: what the thread waits for has a process of its own.
            thread = threading.Thread(target=self._work, name=f"cortex-dask-slot-{number}", daemon=True)
            self._threads.append(thread)
            thread.start()

    def slots(self) -> int:
        """Return the number of threads."""
        return self._count

    def queue_depth(self) -> int:
        """Return as many as there are slots: they all take from one queue, so the order stays what it was."""
        return self._count

    def submit(self, tasks: Sequence[tuple[SplitTask, Done]], *, elsewhere: bool = False) -> None:
        """Put splits into the queue."""
        for item in tasks:
            self._tasks.put(item)

    def _work(self) -> None:
        from cortex_dask.runtime.worker.supervisor import run_split

        while (item := self._tasks.get()) is not None:
            task, done = item
            ended: Outcome | Exception
            if self._ending is not None:
                ended = Outcome("stopped", task.split.number, message=self._ending)
            else:
                try:
                    ended = run_split(task, self._report)
                except Exception as error:  # noqa: BLE001 - the coordinator decides what becomes of it
                    ended = error
            done(ended)

    def cancel(self, split: int) -> None:
        """End the attempts at a split that run on."""
        slots.abandon_split(self._job_url, split)

    def complete(self) -> Outcome:
        """Run ``on_job_complete`` on one handler."""
        from cortex_dask.runtime.worker.supervisor import run_completion

        return run_completion(self._job_url, self._report)

    def stop(self, reason: str) -> None:
        """End the running splits, and those that wait."""
        self._ending = reason
        slots.stop_job(self._job_url, reason)

    def close(self) -> None:
        """End the job's handler processes, then the threads."""
        self._ending = self._ending or "the job was closed"
        spares.discard()  # those of a job that was refused before it took any
        for _ in self._threads:
            self._tasks.put(None)
        deadline = time.monotonic() + _CLOSE_SECONDS
        while True:
            if self._job_url:
                # Also processes that were started for a job that has never begun; and once more, as a thread may just
                # then have begun with a split.
                slots.close_job(self._job_url)
            self._threads = [thread for thread in self._threads if thread.is_alive()]
            if not self._threads or time.monotonic() > deadline:
                return
            self._threads[0].join(_LOOK_AGAIN_SECONDS)


def _slots_wanted(settings: JobSettings) -> int:
    """Return how many slots to have: no more than this machine's devices suffice for.

    Raises
    ------
    SpecError
        If somebody has said how many, and those are more.
    """
    if not settings.workers_said and (most := devices.capacity(settings.compute)):
        return min(settings.workers, most)
    devices.check_slots(settings.compute, settings.workers)
    return settings.workers
