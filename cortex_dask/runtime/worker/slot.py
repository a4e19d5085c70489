"""A slot: one place for a handler process, started when a split needs it, on the slot's own devices."""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING, Any

from cortex_dask.io.job.splits import batch_id
from cortex_dask.runtime import job_context
from cortex_dask.runtime.frames import Setup
from cortex_dask.runtime.worker.device_leases import SlotDevices
from cortex_dask.runtime.worker.handler_process import HandlerProcess
from cortex_dask.runtime.worker.launch import launch, slot_environment

if TYPE_CHECKING:
    from cortex_dask.runtime.worker.slots import JobSlots

CLOSE_GRACE = 2.0  # seconds between the request to leave in good order and SIGKILL
_PATIENCE = 3  # batches that may run out of memory in a process before it is replaced; doubled each time


class NoProcessError(Exception):
    """The job was stopped or closed before the slot had a process."""


class Slot:
    """One place for a handler process.

    Attributes
    ----------
    number : int
        From 0 on this worker.
    worker : str
        The slot's name in logs, records and reports.
    failed_starts : int
        How often in a row its process died before the handler was there.
    patience : int
        How many batches may run out of memory in its process before it is replaced.
    """

    def __init__(self, job: JobSlots, number: int) -> None:
        self.job = job
        self.number = number
        self.worker = f"{job.worker}-{number}"
        self.labels = {**job.labels, "workerID": self.worker}
        self.failed_starts = 0
        self.origin: int | None = None  # the split of origin that runs, for the ids of its batches
        self.said = ""  # the state that was reported last
        self.leased = False
        self.patience = _PATIENCE
        self._devices: SlotDevices | None = None
        self._process: HandlerProcess | None = None
        self._planned = False
        self._lock = threading.Lock()

    @property
    def current(self) -> HandlerProcess | None:
        """The process, dead or alive, if there was one."""
        return self._process

    def process(self) -> HandlerProcess:
        """Return the slot's process, started if there is none, and told the plan as soon as there is one.

        Raises
        ------
        NoProcessError
            If the job was stopped or closed while its dependencies were installed.
        CortexDaskError
            If the project cannot be unpacked, its dependencies cannot be installed, or there are too few devices.
        """
        with self._lock:
            process = self._process
            # One that has died before it was looked at still has to say why.
            if process is None or (process.gone.is_set() and process.runs):
                self._process, self._planned = self._start(), False
            assert self._process is not None
            if not self._planned and (plan := self.job.plan()) is not None:
                self._process.send(plan)
                self._planned = True
            return self._process

    @property
    def has_devices(self) -> bool:
        """Whether it holds devices."""
        return self._devices is not None and self._devices.held

    def log(self, level: str, message: str, *, batch: str | None = None, **extra: Any) -> None:
        """Write a line of the engine's own."""
        self.job.chunks.write(level, message, self.labels, batch_id=batch, extra=extra)

    def replace(self) -> None:
        """End the process in good order, so that the next split gets a new one; on the same devices."""
        with self._lock:
            self._end()

    def retire(self, *, wait: bool = True) -> bool:
        """End the process, if there is one, and give its devices back; returns whether it had any.

        Parameters
        ----------
        wait : bool
            Whether to wait for a process that is being started; otherwise the slot is left as it is.
        """
        if not self._lock.acquire(blocking=wait):
            return False
        try:
            if self._devices is None or not self._devices.held:
                return False
            self._end()
            self._devices.release()
            return True
        finally:
            self._lock.release()

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is not None and not process.gone.is_set():
            process.close()
            if not process.gone.wait(CLOSE_GRACE):
                process.kill()

    def _show_devices(self) -> dict[str, str]:
        """Return the variables that show the slot its devices."""
        if self._devices is None:
            self._devices = SlotDevices(self.job.settings.compute)
        # Who starts processes ahead of their splits neither waits nor takes anything from others.
        make_room = self.job.make_room if self.leased else None
        variables = self._devices.lease(os.environ, self.log, make_room, lambda: self.job.is_ending)
        if self.job.is_ending:
            self._devices.release()
            raise NoProcessError
        return variables

    def _start(self) -> HandlerProcess:
        settings = self.job.settings
        devices = self._show_devices() if settings.compute.gpu > 0 or settings.compute.inf > 0 else None
        environment = slot_environment(os.environ, settings.handler.env, cpu=settings.compute.threads, devices=devices)
        executable = None
        if settings.handler.extra.get("dependencies"):
            interpreter = self.job.interpreter(self, environment)
            if interpreter is not None:
                executable, environment = interpreter.executable, interpreter.environment(environment)
        keep = self._devices.descriptors if self._devices is not None else ()
        chunks = self.job.chunks
        process = HandlerProcess(launch(environment, executable, keep), chunks, self.labels, self._batch_id)
        try:
            directory = self.job.project_directory()  # it starts meanwhile
        except BaseException:
            process.kill()
            raise
        process.send(
            Setup(
                settings,
                self.job.url,
                directory,
                self.labels,
                job_context.describe(self.job.url, settings),
                {name: os.environ.get(name) for name, value in environment.items() if os.environ.get(name) != value},
            )
        )
        return process

    def _batch_id(self, index: int) -> str | None:
        return None if self.origin is None else batch_id(self.job.settings.job_id, self.origin, index)
