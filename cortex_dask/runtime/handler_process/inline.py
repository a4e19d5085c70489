"""Splits in the calling thread: no processes, no threads, so that debuggers and unit tests see everything.

The same stages, attempts, dead letters and parts as in a handler process. What only a process can do is left out: a
crash or a hang of the handler is one of the caller, and the working directory, the environment and the import path
stay the caller's.
"""

from __future__ import annotations

import sys
import threading
import time
import uuid
import warnings
from dataclasses import dataclass, replace
from pathlib import Path

from cortex_dask.errors import CortexDaskError, HandlerError, StorageError
from cortex_dask.io.job.directory import JobDirectory
from cortex_dask.io.job.records import NoOutput, Outcome, SchemaProposed, SlotState, SplitTask
from cortex_dask.runtime import job_context
from cortex_dask.runtime.cluster import Report
from cortex_dask.runtime.failures import one_line
from cortex_dask.runtime.frames import AttemptFailed, BatchEvent, SchemaMismatch
from cortex_dask.runtime.handler_process.attempts import ProcessSpent, SplitRun
from cortex_dask.runtime.handler_process.handler import LoadedHandler, LoadedJob, job_spec, load_class
from cortex_dask.runtime.handler_process.memory import is_out_of_memory
from cortex_dask.runtime.handler_process.part import NeedsSchema
from cortex_dask.runtime.handler_process.pipeline import run_attempt
from cortex_dask.runtime.history import SplitHistory
from cortex_dask.runtime.metrics import MetricsClient
from cortex_dask.runtime.progress_cell import ProgressCell

_jobs: dict[str, LoadedJob] = {}
_lock = threading.RLock()


def run_split(task: SplitTask, report: Report) -> Outcome:
    """Run a split in the calling thread, as a supervisor runs it in a handler process."""
    started = time.monotonic()
    number = task.split.number
    try:
        job = _job(task.job_url)
    except Exception as error:  # noqa: BLE001 - of the user's __init__; reported as a handler process would
        return _failed_start(error, number)
    if task.rows_limit is not None:
        job.handler.limit_rows(task.rows_limit)
    report(SlotState("inline", "running"))
    counted = _FailureCount(report)
    # What the user's keyboard interrupts is the caller, not a batch.
    split_run = SplitRun(task, uuid.uuid4().hex, SplitHistory(), overlap=False, guard=(Exception, SystemExit))
    try:
        record = run_attempt(
            job, split_run, _FirstProposal(JobDirectory(task.job_url), number, report), counted.add_event
        )
    except NeedsSchema as error:
        return Outcome("needs schema", number, schema=error.schema)
    except StorageError as error:
        return Outcome("storage", number, message=str(error))
    except ProcessSpent as error:
        return Outcome("worker error", number, message=f"{error} (a cluster of processes would start a new one)")
    limit = job.handler.rows_limit
    record = replace(
        record,
        rows_limit=limit or None,
        failed_attempts=counted.failed_attempts,
        seconds=time.monotonic() - started,
        worker="inline",
        finished=time.time(),
    )
    return Outcome("done", number, record)


def run_completion(job_url: str) -> Outcome:
    """Run ``on_job_complete`` on the job's handler."""
    try:
        job = _job(job_url)
    except Exception as error:  # noqa: BLE001 - as in run_split
        return _failed_start(error, -1)
    try:
        job.handler.complete()
    except (Exception, SystemExit) as error:  # noqa: BLE001 - it is the user's code, and its failure is the job's
        return Outcome("worker error", -1, message=f"on_job_complete failed: {one_line(error)}")
    directory = JobDirectory(job_url)
    directory.write_json("completed.json", {"time": time.time(), "metrics": job.metrics.collect()})
    return Outcome("done", -1)


def close_job(job_url: str) -> None:
    """Forget the job's handler."""
    with _lock:
        _jobs.pop(job_url, None)
        if not _jobs:
            job_context.enter(None, {})
            job_context.withdraw_names()


def _job(job_url: str) -> LoadedJob:
    with _lock:
        if job_url not in _jobs:
            _jobs[job_url] = _load(job_url)
        return _jobs[job_url]


def _load(job_url: str) -> LoadedJob:
    directory = JobDirectory(job_url)
    settings = directory.settings()
    header = directory.plan_header()
    if header is None:
        raise HandlerError(f"the job at {job_url} has no plan yet")
    project: str | None = None
    digest = settings.handler.project
    if dependencies := settings.handler.dependencies:
        names = " and ".join(dependencies.values())
        message = f"{names} is not installed for a job that runs inline: the handler finds the packages of this process"
        warnings.warn(message, UserWarning, stacklevel=2)
    if digest is not None:
        from cortex_dask.project.archive import unpack

        project = unpack(lambda: directory.store.read(f"project/{digest}.tar.gz"), digest)
        place = str(Path(project, settings.handler.python_path or "").resolve())
        if place not in sys.path:
            sys.path.insert(0, place)
    job_context.enter(job_context.describe(job_url, settings) if settings.environment else None, {})
    job_context.offer_names()
    handler_class, signature = load_class(settings, directory, project)
    spec = job_spec(settings, total_batch_count=header.batches, start_time=settings.created_time)
    metrics = MetricsClient()
    handler = LoadedHandler.construct(handler_class, signature, settings, spec, metrics, project)
    return LoadedJob(settings, header, directory.store, handler, metrics, ProgressCell())


def _failed_start(error: Exception, split: int) -> Outcome:
    if isinstance(error, CortexDaskError) and isinstance(error, OSError):
        return Outcome("storage", split, message=str(error))
    message = f"the handler cannot be started: {one_line(error)}"
    return Outcome("out of memory" if is_out_of_memory(error) else "worker error", split, message=message)


@dataclass(slots=True)
class _FailureCount:
    """Counts the failed attempts of a split."""

    report: Report
    failed_attempts: int = 0

    def add_event(self, event: BatchEvent) -> None:
        """Record an event of the pipeline."""
        match event:
            case AttemptFailed() | SchemaMismatch():
                self.failed_attempts += 1
            case NoOutput():
                self.report(event)


@dataclass(slots=True)
class _FirstProposal:
    """Decides the output's schema: splits run one after the other, so the first to propose is the first in order."""

    directory: JobDirectory
    split: int
    report: Report
    schema: str | None = None

    def propose(self, schema: str) -> None:
        """Decide it."""
        self.report(SchemaProposed(self.split, schema))
        self.schema = self.directory.settle_schema(schema)

    def answer(self, *, wait: bool) -> str | None:
        """Return what was decided."""
        return self.schema
