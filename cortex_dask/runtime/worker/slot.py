"""A slot: one place for a handler process, started when a split needs it, on the slot's own devices."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import Any

from cortex_dask.io.job.splits import batch_id
from cortex_dask.runtime import job_context
from cortex_dask.runtime.frames import Setup
from cortex_dask.runtime.worker.device_leases import SlotDevices
from cortex_dask.runtime.worker.handler_process import HandlerProcess
from cortex_dask.runtime.worker.job_facts import JobFacts, NoProcessError
from cortex_dask.runtime.worker.launch import launch, slot_environment

CLOSE_GRACE = 2.0  # seconds between the request to leave in good order and SIGKILL
_PATIENCE = 3  # batches that may run out of memory in a process before it is replaced; doubled each time


class Slot:
    """One place for a handler process."""

    def __init__(self, job: JobFacts, number: int, make_room: Callable[[], bool]) -> None:
        self.job = job
        self.worker = f"{job.worker}-{number}"  # the slot's name in logs, records and reports
        self._labels = {**job.labels, "workerID": self.worker}
        self._make_room = make_room  # ends an idle process of another job that holds devices
        self._failed_starts = 0
        self._origin: int | None = None
        self._state = ""
        self._leased = False
        self._patience = _PATIENCE
        self._devices: SlotDevices | None = None
        self._process: HandlerProcess | None = None
        self._planned = False
        self._lock = threading.Lock()

    @property
    def is_leased(self) -> bool:
        """Whether a split has the slot."""
        return self._leased

    def set_leased(self, leased: bool) -> None:
        """Lease the slot, or give it back; by its pool, which has the lock."""
        self._leased = leased

    @property
    def patience(self) -> int:
        """How many batches may run out of memory in its process before it is replaced."""
        return self._patience

    def set_origin(self, origin: int | None) -> None:
        """Set the split of origin that runs, for the ids of its batches in native output."""
        self._origin = origin

    def change_state(self, state: str) -> bool:
        """Set the state that is reported; return whether it is another one."""
        changed, self._state = state != self._state, state
        return changed

    def record_failed_start(self) -> int:
        """Count a process that died before the handler was loaded; return how many did in a row."""
        self._failed_starts += 1
        return self._failed_starts

    def record_ready(self, process: HandlerProcess, *, has_completion: bool) -> None:
        """Record that the handler is loaded in the slot's process."""
        process.set_ready()
        self._failed_starts = 0
        self.job.learn_completion(has_completion)

    @property
    def current(self) -> HandlerProcess | None:
        """The process, dead or alive, if there was one."""
        return self._process

    def process(self) -> HandlerProcess:
        """Return the slot's process, started if there is none, and told the plan as soon as there is one.

        Raises NoProcessError if the job was stopped or closed meanwhile, and CortexDaskError if the project cannot be
        unpacked, its dependencies cannot be installed, or there are too few devices.
        """
        with self._lock:
            process = self._process
            # One that has died before its events were read still has to say why.
            if process is None or (process.gone.is_set() and process.has_run):
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
        self.job.log.write(level, message, self._labels, batch_id=batch, extra=extra)

    def replace(self) -> None:
        """End a process that runs out of memory, so that the next split gets a new one; on the same devices."""
        self._patience *= 2  # if it was the data and not the process, new ones do not help
        with self._lock:
            self._end()

    def retire(self, *, wait: bool = True) -> bool:
        """End the process, if there is one, and give its devices back; return whether it had any.

        A process that is being started is waited for, or else the slot is left as it is.
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
        # A process that is started ahead of its splits neither waits for devices nor takes them from others.
        make_room = self._make_room if self._leased else None
        variables = self._devices.lease(os.environ, self.log, make_room, lambda: self.job.end.has_come)
        if self.job.end.has_come:
            self._devices.release()
            raise NoProcessError
        return variables

    def _start(self) -> HandlerProcess:
        settings = self.job.settings
        devices = self._show_devices() if settings.compute.gpu > 0 or settings.compute.inf > 0 else None
        environment = slot_environment(os.environ, settings.handler.env, cpu=settings.compute.threads, devices=devices)
        executable = None
        if settings.handler.dependencies:
            interpreter = self.job.interpreter.get(environment, self.log)
            if interpreter is not None:
                executable, environment = interpreter.executable, interpreter.environment(environment)
        keep = self._devices.descriptors if self._devices is not None else ()
        process = HandlerProcess(launch(environment, executable, keep), self.job.log, self._labels, self._batch_id)
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
                self._labels,
                job_context.describe(self.job.url, settings),
                {name: os.environ.get(name) for name, value in environment.items() if os.environ.get(name) != value},
            )
        )
        return process

    def _batch_id(self, index: int) -> str | None:
        return None if self._origin is None else batch_id(self.job.settings.job_id, self._origin, index)
