"""What a worker knows of a job: what it reads once, and what its handlers and its coordinator have told it since."""

from __future__ import annotations

import os
import re
import socket
import threading
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from cortex_dask.errors import CortexDaskError
from cortex_dask.io.job.directory import JobDirectory
from cortex_dask.io.job.settings import JobSettings
from cortex_dask.runtime.frames import PlanKnown
from cortex_dask.runtime.worker.log_writer import LogWriter

if TYPE_CHECKING:
    from cortex_dask.runtime.worker.virtual_environment import Interpreter

Log = Callable[[str, str], None]


class NoProcessError(Exception):
    """The job was stopped or closed before the slot had a process."""


class JobEnd:
    """Whether a job's work here has to end, and which of its splits."""

    def __init__(self) -> None:
        self._reason: str | None = None
        self._closed = False
        self._cancelled: set[int] = set()

    def stop(self, reason: str) -> None:
        """Have every split end: the job was asked to stop."""
        self._reason = reason

    def close(self) -> None:
        """Have every process end: the coordinator is done with the job, or nobody uses it here."""
        self._closed = True

    def cancel_split(self, split: int) -> None:
        """Have the attempts at a split end: another one has brought it into the ledger."""
        self._cancelled.add(split)

    def is_cancelled(self, split: int) -> bool:
        """Whether attempts at a split are not needed any more."""
        return split in self._cancelled

    @property
    def has_come(self) -> bool:
        """Whether the job was stopped or closed."""
        return self._closed or self._reason is not None

    @property
    def reason(self) -> str | None:
        """Why the job was stopped; None if it was not."""
        return self._reason


class JobFacts:
    """What is known here of one job; safe to use from many threads."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.worker = f"{re.sub(r'[^A-Za-z0-9.-]', '-', socket.gethostname())}-{os.getpid()}"
        self.end = JobEnd()
        self._directory: JobDirectory | None = None
        self._settings: JobSettings | None = None
        self._log: LogWriter | None = None
        self._plan: PlanKnown | None = None
        self._project: str | None = None
        self._interpreter = JobInterpreter(self)
        self._reading = threading.RLock()
        self._rows_limit: int | None = None
        self._shared_rows_limit: int | None = None
        self._schema: str | None = None
        self._has_completion: bool | None = None

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
    def log(self) -> LogWriter:
        """The job's log, as this worker writes it."""
        with self._reading:
            if self._log is None:
                labels = {**self.labels, "workerID": self.worker}
                self._log = LogWriter(self.directory.store, self.worker, labels)
            return self._log

    def close_log(self) -> None:
        """Store the rest of the log, if there is one."""
        if self._log is not None:
            self._log.close()

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
                from cortex_dask.project.archive import unpack  # a job of a class needs none

                store = self.directory.store
                self._project = unpack(lambda: store.read(f"project/{digest}.tar.gz"), digest)
            return self._project

    @property
    def interpreter(self) -> JobInterpreter:
        """The interpreter with the project's dependencies."""
        return self._interpreter

    # what was learnt --------------------------------------------------------------------------------------------------

    @property
    def rows_limit(self) -> int | None:
        """The most rows that handlers take at once here, learnt from those that ran out of memory."""
        return self._rows_limit

    @property
    def shared_rows_limit(self) -> int | None:
        """The same for the handlers on all workers: only what a handler has survived."""
        return self._shared_rows_limit

    def learn_rows_limit(self, rows: int, *, everywhere: bool) -> None:
        """Record how many rows were not too many, here or on all workers.

        After a death it is only known that the whole batch was too large, and not which part of it; one huge row has to
        slow one worker down, not all.
        """
        self._rows_limit = min(rows, self._rows_limit or rows)
        if everywhere:
            self._shared_rows_limit = min(rows, self._shared_rows_limit or rows)

    @property
    def schema(self) -> str | None:
        """The output's schema, once it is known here."""
        return self._schema

    def learn_schema(self, schema: str) -> None:
        """Record the output's schema."""
        self._schema = schema

    @property
    def has_completion(self) -> bool | None:
        """Whether the handler has ``on_job_complete``; None until one was loaded."""
        return self._has_completion

    def learn_completion(self, has_completion: bool) -> None:
        """Record whether the handler has ``on_job_complete``."""
        self._has_completion = has_completion


class JobInterpreter:
    """A job's Python interpreter with the project's dependencies, made by the slot that comes first."""

    def __init__(self, job: JobFacts) -> None:
        self._job = job
        self._made: Interpreter | None = None
        self._is_made = False
        self._error: CortexDaskError | None = None
        self._installing = threading.Lock()

    def get(self, environment: Mapping[str, str], log: Log) -> Interpreter | None:
        """Return the interpreter; None where the lists of dependencies are empty.

        What went wrong once is not tried again in this job.
        """
        from cortex_dask.runtime.worker.dependencies import Dependencies
        from cortex_dask.runtime.worker.installation import InstallationCancelledError
        from cortex_dask.runtime.worker.virtual_environment import ensure_interpreter  # most projects have none

        job = self._job
        with self._installing:
            if self._error is not None:
                raise self._error
            if not self._is_made:
                directory = job.project_directory()
                digest = job.settings.handler.project
                assert directory is not None
                assert digest is not None
                names = job.settings.handler.dependencies
                try:
                    dependencies = Dependencies(directory, digest, **names)
                    self._made = ensure_interpreter(dependencies, environment, log, lambda: job.end.has_come)
                except InstallationCancelledError:
                    raise NoProcessError from None
                except CortexDaskError as error:
                    log("ERROR", str(error))
                    self._error = error
                    raise
                self._is_made = True
            return self._made

    def wait_until_idle(self, seconds: float) -> None:
        """Wait for programs that install dependencies: they end by themselves when the job does."""
        if self._installing.acquire(timeout=seconds):
            self._installing.release()
