"""A worker's slots: for each job the handler processes that this Dask worker (or this process) drives, one per slot.

A slot's process lives as long as the job: the handler is loaded once. A split leases the free slot with the
lowest number, so that a job with one worker stays on one handler, and a slot's GPU stays the same.
"""

from __future__ import annotations

import atexit
import contextlib
import threading
import time
from collections.abc import Iterator

from cortex_dask.runtime.worker.handler_process import HandlerProcess
from cortex_dask.runtime.worker.job_facts import JobFacts
from cortex_dask.runtime.worker.slot import CLOSE_GRACE, Slot

_STOP_POLL = 1.0  # seconds between two polls of control/stop.json
_STOP_GRACE = 1.5  # seconds between SIGTERM and SIGKILL: everything has to end within five
_INSTALL_GRACE = 3.0  # seconds that programs which install dependencies are given to end
_UNUSED = 300.0  # seconds after which unused processes of a job are ended

_pools: dict[str, SlotPool] = {}
_lock = threading.Lock()


def lease(job_url: str) -> contextlib.AbstractContextManager[Slot]:
    """Lease a slot of a job for the time of a ``with`` block; raises CortexDaskError if the job cannot be read."""
    return _pool(job_url).lease()


def prestart(job_url: str, count: int) -> None:
    """Start the first slots' processes in the background, before there is a split for them; return at once.

    They import what they need and load the handler while the job is planned. What goes wrong is reported by the first
    split.
    """
    pool = _pool(job_url)
    threading.Thread(target=pool.prestart, args=(count,), name="cortex-dask-prestart", daemon=True).start()


def stop_job(job_url: str, reason: str) -> None:
    """End the job's running handlers now; their splits end with the outcome ``stopped``. Returns at once."""
    with _lock:
        pool = _pools.get(_key(job_url))
    if pool is not None:
        pool.stop(reason)


def cancel_split(job_url: str, split: int) -> None:
    """End every attempt at a split here, as the ledger has a record of it; they end as ``stopped``. Returns at once."""
    with _lock:
        pool = _pools.get(_key(job_url))
    if pool is not None:
        pool.job.end.cancel_split(split)  # which its supervisors check


def close_job(job_url: str) -> None:
    """End the job's processes, and store the rest of its log."""
    with _lock:
        pool = _pools.pop(_key(job_url), None)
    if pool is not None:
        pool.close()


def _pool(job_url: str) -> SlotPool:
    key = _key(job_url)
    with _lock:
        pool = _pools.get(key)
        if pool is None or pool.is_over:
            pool = _pools[key] = SlotPool(job_url)
        return pool


def _key(job_url: str) -> str:
    return job_url.rstrip("/")


@atexit.register
def _close_all() -> None:
    with _lock:
        pools = list(_pools.values())
        _pools.clear()
    for pool in pools:
        pool.close(grace=0.5)


class SlotPool:
    """The slots of one job in this process, and the thread that polls for a request to stop; for many threads."""

    def __init__(self, url: str) -> None:
        self.job = JobFacts(url)
        self._slots: list[Slot] = []
        self._used = time.monotonic()
        self._changed = threading.Condition()
        self._polls = False

    @property
    def is_over(self) -> bool:
        """Whether the job was stopped or closed and nothing uses it any more, so that a new pool may take its place."""
        with self._changed:
            return self.job.end.has_come and not any(slot.is_leased for slot in self._slots)

    @contextlib.contextmanager
    def lease(self) -> Iterator[Slot]:
        """Lease the free slot with the lowest number; there is always one."""
        _ = self.job.log  # reads the settings: an error belongs to this caller
        with self._changed:
            slot = next((slot for slot in self._slots if not slot.is_leased), None) or self._add_slot()
            slot.set_leased(True)
            self._poll()
        try:
            yield slot
        finally:
            with self._changed:
                slot.set_leased(False)
                self._used = time.monotonic()

    def _add_slot(self) -> Slot:
        slot = Slot(self.job, len(self._slots), self._make_room)
        self._slots.append(slot)
        return slot

    def prestart(self, count: int) -> None:
        """Start the first processes."""
        with contextlib.suppress(Exception):  # the first split meets the same error, and can report it
            self._prestart(count)
        self._end_if_over()

    def _prestart(self, count: int) -> None:
        _ = self.job.log
        for number in range(count):
            with self._changed:
                if self.job.end.has_come:
                    return
                slot = self._slots[number] if number < len(self._slots) else self._add_slot()
                self._poll()
            slot.process()

    def stop(self, reason: str) -> None:
        """End all processes now."""
        with self._changed:
            if self.job.end.has_come:
                return
            self.job.end.stop(reason)
            self._changed.notify_all()
        for process in self._processes():
            threading.Thread(target=process.terminate, args=(_STOP_GRACE,), daemon=True).start()
        threading.Thread(target=self._release_devices, name="cortex-dask-devices", daemon=True).start()

    def close(self, grace: float = CLOSE_GRACE) -> None:
        """End all processes in good order, or kill them after some seconds; then store the rest of the log."""
        with self._changed:
            self.job.end.close()
            self._changed.notify_all()
        processes = self._processes()
        for process in processes:
            process.close()
        self.job.interpreter.wait_until_idle(_INSTALL_GRACE)
        deadline = time.monotonic() + grace
        for process in processes:
            if not process.gone.wait(max(deadline - time.monotonic(), 0)):
                process.kill()
        self._release_devices()
        self.job.close_log()

    def _processes(self) -> list[HandlerProcess]:
        with self._changed:
            return [slot.current for slot in self._slots if slot.current is not None and not slot.current.gone.is_set()]

    def _end_if_over(self) -> None:
        """End processes that were started while the job was being closed or stopped."""
        if self.job.end.has_come:
            for process in self._processes():
                process.kill()
            self._release_devices()

    def _make_room(self) -> bool:
        """End an idle process of another job that holds devices; return whether there was one.

        A scheduler that hands out this worker's devices has given them to this job, so the other one cannot use them
        before this one is done.
        """
        with _lock:
            others = [pool for pool in _pools.values() if pool is not self]
        return any(pool.give_up_devices() for pool in others)

    def give_up_devices(self) -> bool:
        """End an idle process that holds devices; return whether there was one."""
        with self._changed:
            slot = next((slot for slot in self._slots if not slot.is_leased and slot.has_devices), None)
            if slot is None:
                return False
            slot.set_leased(True)  # so that no split gets it meanwhile
        try:
            return slot.retire(wait=False)
        finally:
            with self._changed:
                slot.set_leased(False)

    def _release_devices(self) -> None:
        """Give the devices of all slots back, each when its process has ended."""
        with self._changed:
            slots = [slot for slot in self._slots if slot.has_devices]
        for slot in slots:
            process = slot.current
            if process is not None:
                process.gone.wait(2 * _STOP_GRACE)
            slot.retire()

    # polling ----------------------------------------------------------------------------------------------------------

    def _poll(self) -> None:
        """Have a thread that polls for a request to stop, and ends unused processes; with the lock held."""
        if not self._polls:
            self._polls = True
            threading.Thread(target=self._poll_control, name="cortex-dask-control", daemon=True).start()
        else:
            self._changed.notify_all()

    def _poll_control(self) -> None:
        next_poll = time.monotonic()
        while True:
            with self._changed:
                if self.job.end.has_come:
                    return
                busy = any(slot.is_leased for slot in self._slots)
                now = time.monotonic()
                due = next_poll if busy else self._used + _UNUSED
                if now < due:
                    self._changed.wait(due - now)
                    continue
            if not busy:
                self._retire()
                return
            next_poll = now + _STOP_POLL
            with contextlib.suppress(OSError):  # a store that cannot be asked has no answer; it is asked again
                request = self.job.directory.stop_request()
                if request is not None:
                    self.stop(request.get("reason") or "")

    def _retire(self) -> None:
        with _lock:
            if _pools.get(_key(self.job.url)) is self:
                del _pools[_key(self.job.url)]
        self.close()
