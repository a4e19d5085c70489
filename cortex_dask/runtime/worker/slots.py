"""A worker's slots: for each job the handler processes that this Dask worker (or this process) drives, one per slot.

A slot's process lives as long as the job: the handler is loaded once. Whoever runs a split leases the free slot with
the lowest number, so that a job with one worker stays on one handler, and a slot's GPU stays the same.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import re
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from cortex_dask.errors import CortexDaskError
from cortex_dask.io.job.directory import JobDirectory
from cortex_dask.io.job.settings import JobSettings
from cortex_dask.runtime.frames import PlanKnown
from cortex_dask.runtime.worker.handler_process import HandlerProcess
from cortex_dask.runtime.worker.log_writer import LogWriter
from cortex_dask.runtime.worker.slot import CLOSE_GRACE, NoProcessError, Slot

if TYPE_CHECKING:
    from cortex_dask.runtime.worker.virtual_environment import Interpreter

_STOP_POLL = 1.0  # seconds between two looks at control/stop.json
_STOP_GRACE = 1.5  # seconds between SIGTERM and SIGKILL: everything has to end within five
_INSTALL_GRACE = 3.0  # seconds that programs which install dependencies are given to end
_UNUSED = 300.0  # seconds after which the processes of a job that nobody uses are ended

_jobs: dict[str, JobSlots] = {}
_lock = threading.Lock()


def lease(job_url: str) -> contextlib.AbstractContextManager[Slot]:
    """Lease a slot of a job for the time of a ``with`` block.

    Raises
    ------
    CortexDaskError
        If the job cannot be read.
    """
    return _job(job_url).lease()


def prestart(job_url: str, count: int) -> None:
    """Start the first slots' processes in the background, before there is a split for them; returns at once.

    They import what they need and load the handler while the job is planned. What goes wrong is reported by the first
    split.
    """
    job = _job(job_url)
    threading.Thread(target=job.prestart, args=(count,), name="cortex-dask-prestart", daemon=True).start()


def stop_job(job_url: str, reason: str) -> None:
    """End the job's running handlers now; their splits end with the outcome ``stopped``. Returns at once."""
    with _lock:
        job = _jobs.get(_key(job_url))
    if job is not None:
        job.stop(reason)


def abandon_split(job_url: str, split: int) -> None:
    """End every attempt at a split here, as the ledger has a record of it; they end as ``stopped``. Returns at once."""
    with _lock:
        job = _jobs.get(_key(job_url))
    if job is not None:
        job.abandoned.add(split)  # whoever supervises an attempt at it looks there


def close_job(job_url: str) -> None:
    """End the job's processes, and store the rest of its log."""
    with _lock:
        job = _jobs.pop(_key(job_url), None)
    if job is not None:
        job.close()


def _job(job_url: str) -> JobSlots:
    key = _key(job_url)
    with _lock:
        job = _jobs.get(key)
        if job is None or job.is_over:
            job = _jobs[key] = JobSlots(job_url)
        return job


def _key(job_url: str) -> str:
    return job_url.rstrip("/")


@atexit.register
def _close_all() -> None:
    with _lock:
        jobs = list(_jobs.values())
        _jobs.clear()
    for job in jobs:
        job.close(grace=0.5)


class JobSlots:
    """The slots of one job in this process; safe to use from many threads.

    Attributes
    ----------
    rows_limit : int or None
        The most rows that this job's handlers take at once here, learnt from those that ran out of memory.
    shared_rows_limit : int or None
        The same for the handlers on all workers: only what a handler has survived.
    schema : str or None
        The output's schema, once it is known here.
    has_completion : bool or None
        Whether the handler has ``on_job_complete``; None until one was loaded.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self.worker = f"{re.sub(r'[^A-Za-z0-9.-]', '-', socket.gethostname())}-{os.getpid()}"
        self.rows_limit: int | None = None
        self.shared_rows_limit: int | None = None
        self.schema: str | None = None
        self.has_completion: bool | None = None
        self.stopped: str | None = None
        self.abandoned: set[int] = set()  # splits that another attempt has brought into the ledger meanwhile
        self.closed = False
        self._directory: JobDirectory | None = None
        self._settings: JobSettings | None = None
        self._chunks: LogWriter | None = None
        self._plan: PlanKnown | None = None
        self._project: str | None = None
        self._slots: list[Slot] = []
        self._used = time.monotonic()
        self._changed = threading.Condition()
        self._reading = threading.RLock()
        self._watching = False
        self._interpreter: Interpreter | None = None
        self._interpreter_error: CortexDaskError | None = None
        self._has_interpreter = False
        self._installing = threading.Lock()

    # what is read once ------------------------------------------------------------------------------------------------

    @property
    def directory(self) -> JobDirectory:
        """The job directory."""
        if self._directory is None:
            self._directory = JobDirectory(self.url)
        return self._directory

    @property
    def settings(self) -> JobSettings:
        """The job's settings."""
        with self._reading:
            if self._settings is None:
                self._settings = self.directory.settings()
            return self._settings

    @property
    def labels(self) -> dict[str, str]:
        """What every log line of the job carries."""
        settings = self.settings
        return {
            **settings.labels,
            "apiName": settings.api_name,
            "apiKind": "BatchAPI",
            "apiID": settings.api_id,
            "jobID": settings.job_id,
        }

    @property
    def chunks(self) -> LogWriter:
        """The job's log, as this worker writes it."""
        with self._reading:
            if self._chunks is None:
                labels = {**self.labels, "workerID": self.worker}
                self._chunks = LogWriter(self.directory.store, self.worker, labels)
            return self._chunks

    def plan(self) -> PlanKnown | None:
        """Return the command that tells a process the plan; None while the job is not planned."""
        with self._reading:
            if self._plan is None and (header := self.directory.plan_header()) is not None:
                status = self.directory.read_json("status.json") or {}
                start_time = status.get("start_time") or self.settings.created_time
                self._plan = PlanKnown(header, start_time)
            return self._plan

    def project_directory(self) -> str | None:
        """Return where this host has unpacked the project; None for a class that travels by value."""
        with self._reading:
            digest = self.settings.handler.project
            if digest is not None and self._project is None:
                from cortex_dask.project.archive import unpack

                store = self.directory.store
                self._project = unpack(lambda: store.read(f"project/{digest}.tar.gz"), digest)
            return self._project

    def interpreter(self, slot: Slot, environment: Mapping[str, str]) -> Interpreter | None:
        """Return the interpreter with the project's dependencies, made by the slot that comes first.

        None where the lists of dependencies are empty. What went wrong once is not tried again in this job.
        """
        from cortex_dask.runtime.worker.dependencies import Dependencies
        from cortex_dask.runtime.worker.installation import InstallationCancelledError
        from cortex_dask.runtime.worker.virtual_environment import ensure_interpreter  # most projects have none

        with self._installing:
            if self._interpreter_error is not None:
                raise self._interpreter_error
            if not self._has_interpreter:
                directory = self.project_directory()
                digest = self.settings.handler.project
                assert directory is not None
                assert digest is not None
                names: dict[str, str] = self.settings.handler.extra["dependencies"]
                try:
                    dependencies = Dependencies(directory, digest, **names)
                    self._interpreter = ensure_interpreter(dependencies, environment, slot.log, lambda: self.is_ending)
                except InstallationCancelledError:
                    raise NoProcessError from None
                except CortexDaskError as error:
                    slot.log("ERROR", str(error))
                    self._interpreter_error = error
                    raise
                self._has_interpreter = True
            return self._interpreter

    def learn_rows_limit(self, rows: int, *, everywhere: bool) -> None:
        """Take in how many rows were not too many.

        Parameters
        ----------
        rows : int
            The rows.
        everywhere : bool
            Whether it holds on all workers. After a death it is only known that the whole batch was too large, and not
            which part of it; one huge row has to slow one worker down, not all.
        """
        self.rows_limit = min(rows, self.rows_limit or rows)
        if everywhere:
            self.shared_rows_limit = min(rows, self.shared_rows_limit or rows)

    # slots ------------------------------------------------------------------------------------------------------------

    @property
    def is_ending(self) -> bool:
        """Whether it was stopped or closed."""
        return self.closed or self.stopped is not None

    @property
    def is_over(self) -> bool:
        """Whether it was stopped or closed and nobody uses it any more, so that a new one may take its place."""
        with self._changed:
            return self.is_ending and not any(slot.leased for slot in self._slots)

    @contextlib.contextmanager
    def lease(self) -> Iterator[Slot]:
        """Lease the free slot with the lowest number; there is always one."""
        _ = self.chunks  # the settings are read now, by whoever can say that they cannot be
        with self._changed:
            slot = next((slot for slot in self._slots if not slot.leased), None)
            if slot is None:
                slot = Slot(self, len(self._slots))
                self._slots.append(slot)
            slot.leased = True
            self._watch()
        try:
            yield slot
        finally:
            with self._changed:
                slot.leased = False
                self._used = time.monotonic()

    def prestart(self, count: int) -> None:
        """Start the first processes."""
        with contextlib.suppress(Exception):  # whatever it is, the first split meets it too, and can report it
            self._prestart(count)
        self._end_if_over()

    def _prestart(self, count: int) -> None:
        _ = self.chunks
        for number in range(count):
            with self._changed:
                if self.is_ending:
                    return
                if number >= len(self._slots):
                    self._slots.append(Slot(self, number))
                slot = self._slots[number]
                self._watch()
            slot.process()

    def stop(self, reason: str) -> None:
        """End all processes now."""
        with self._changed:
            if self.stopped is not None or self.closed:
                return
            self.stopped = reason
            self._changed.notify_all()
        for process in self._processes():
            threading.Thread(target=process.terminate, args=(_STOP_GRACE,), daemon=True).start()
        threading.Thread(target=self._release_devices, name="cortex-dask-devices", daemon=True).start()

    def close(self, grace: float = CLOSE_GRACE) -> None:
        """End all processes in good order, or kill them after some seconds, and store the rest of the log."""
        with self._changed:
            self.closed = True
            self._changed.notify_all()
        processes = self._processes()
        for process in processes:
            process.close()
        if self._installing.acquire(timeout=_INSTALL_GRACE):  # what installs ends by itself now
            self._installing.release()
        deadline = time.monotonic() + grace
        for process in processes:
            if not process.gone.wait(max(deadline - time.monotonic(), 0)):
                process.kill()
        self._release_devices()
        if self._chunks is not None:
            self._chunks.close()

    def _processes(self) -> list[HandlerProcess]:
        with self._changed:
            return [slot.current for slot in self._slots if slot.current is not None and not slot.current.gone.is_set()]

    def _end_if_over(self) -> None:
        """End processes that were started while the job was being closed or stopped."""
        if self.is_ending:
            for process in self._processes():
                process.kill()
            self._release_devices()

    def make_room(self) -> bool:
        """End an idle process of another job that holds devices; returns whether there was one.

        A scheduler that hands out this worker's devices has given them to this job, so the other one cannot use them
        before this one is done.
        """
        with _lock:
            others = [job for job in _jobs.values() if job is not self]
        return any(job.give_up_devices() for job in others)

    def give_up_devices(self) -> bool:
        """End a process that has nothing to do and holds devices; returns whether there was one."""
        with self._changed:
            slot = next((slot for slot in self._slots if not slot.leased and slot.has_devices), None)
            if slot is None:
                return False
            slot.leased = True  # so that no split gets it meanwhile
        try:
            return slot.retire(wait=False)
        finally:
            with self._changed:
                slot.leased = False

    def _release_devices(self) -> None:
        """Give the devices of all slots back, each when its process has ended."""
        with self._changed:
            slots = [slot for slot in self._slots if slot.has_devices]
        for slot in slots:
            process = slot.current
            if process is not None:
                process.gone.wait(2 * _STOP_GRACE)
            slot.retire()

    # watching ---------------------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        """Have a thread that looks for a request to stop, and ends what nobody uses; with the lock held."""
        if not self._watching:
            self._watching = True
            threading.Thread(target=self._watch_control, name="cortex-dask-control", daemon=True).start()
        else:
            self._changed.notify_all()

    def _watch_control(self) -> None:
        next_poll = time.monotonic()
        while True:
            with self._changed:
                if self.is_ending:
                    return
                busy = any(slot.leased for slot in self._slots)
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
                request = self.directory.stop_request()
                if request is not None:
                    self.stop(request.get("reason") or "")

    def _retire(self) -> None:
        with _lock:
            if _jobs.get(_key(self.url)) is self:
                del _jobs[_key(self.url)]
        self.close()
