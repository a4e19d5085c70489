"""The supervisor: runs a split in a slot's handler process, under a watch, and decides what a death means.

It runs in a thread of the Dask worker, or on one machine in the coordinator's process. A handler that crashes, hangs or
fills the memory ends a child process and nothing else, and the supervisor knows from the
:mod:`progress cell <cortex_dask.runtime.progress_cell>` which batch was in hand. That batch has failed an attempt; the
split is run again in a new process that passes over what has used up its attempts.
"""

from __future__ import annotations

import contextlib
import socket
import time
import uuid
from dataclasses import replace
from pathlib import Path

from cortex_dask.errors import CortexDaskError, JobNotFoundError
from cortex_dask.io.job.records import (
    Metrics,
    NoOutput,
    Outcome,
    SchemaProposed,
    SlotState,
    SplitEvent,
    SplitProgress,
    SplitRecord,
    SplitTask,
)
from cortex_dask.io.job.settings import JobSettings
from cortex_dask.io.job.splits import batch_id
from cortex_dask.io.output.directory import AttemptName
from cortex_dask.io.store.store import Store
from cortex_dask.runtime.cluster import Report
from cortex_dask.runtime.failures import Verdict, one_line
from cortex_dask.runtime.frames import (
    AttemptFailed,
    Complete,
    Completed,
    Gone,
    InitFailed,
    ProcessEvent,
    Ready,
    Recovered,
    RowsLimit,
    RunSplit,
    SchemaMismatch,
    Spent,
    Writing,
)
from cortex_dask.runtime.history import SplitHistory
from cortex_dask.runtime.progress_cell import Snapshot
from cortex_dask.runtime.worker import prometheus, slots
from cortex_dask.runtime.worker.handler_process import HandlerProcess, describe_exit
from cortex_dask.runtime.worker.job_facts import NoProcessError
from cortex_dask.runtime.worker.slot import Slot
from cortex_dask.runtime.worker.watch import Death, Watch, WatchListener

_REPORT_SECONDS = 1.0
_MAX_STARTS = 3  # deaths in a row before the handler was loaded
_MAX_TRACEBACKS = 1_000  # verdicts of a split that are remembered with their tracebacks


def run_split(task: SplitTask, report: Report) -> Outcome:
    """Run a split in a handler process of this worker, and return how it ended."""
    try:
        with slots.lease(task.job_url) as slot:
            return Supervision(slot, task, report).run_to_end()
    except (CortexDaskError, OSError) as error:
        return _cannot_run(error, task.split.number)


def run_completion(job_url: str, report: Report) -> Outcome:
    """Run ``on_job_complete`` on one handler of the job: with one worker, on the one that handled the batches."""
    try:
        with slots.lease(job_url) as slot:
            return _complete(slot, report)
    except NoProcessError:
        return Outcome("stopped", -1, message="the job was stopped")
    except (CortexDaskError, OSError) as error:
        return _cannot_run(error, -1)


def _cannot_run(error: CortexDaskError | OSError, split: int) -> Outcome:
    if isinstance(error, JobNotFoundError):
        where = f"{error}, seen from {socket.gethostname()}: give the environment a store that all hosts reach"
        return Outcome("worker error", split, message=where)
    # A store that fails may answer later, as may a host that has no process left to give; everything else (no such
    # job, a damaged project) stays as it is.
    return Outcome("storage" if isinstance(error, OSError) else "worker error", split, message=str(error))


class Supervision(WatchListener):
    """One call of :func:`run_split`."""

    def __init__(self, slot: Slot, task: SplitTask, report: Report) -> None:
        self._slot = slot
        self._job = slot.job
        self._settings: JobSettings = slot.job.settings
        self._task = task
        self._split = task.split
        self._send_report = report
        self._history = SplitHistory()
        self._failed_attempts = 0
        self._doubtful: set[int] = set()  # batches that were given up for their memory in the process at hand
        self._writing: str | None = None  # the temporary file of a part on a local file system
        self._unblamed = 0  # deaths that no batch is to blame for
        self._started = time.monotonic()
        self._reported = self._started  # a split of less than a second needs no report but its record
        if task.schema is not None:
            self._job.learn_schema(task.schema)
        if task.rows_limit is not None:
            self._job.learn_rows_limit(task.rows_limit, everywhere=True)

    def run_to_end(self) -> Outcome:
        """Run the split until it is done, or cannot be."""
        self._slot.set_origin(self._split.origin)
        try:
            while True:
                if self._job.end.has_come or self.is_cancelled:
                    return self.stopped()
                attempt_id = uuid.uuid4().hex
                if self._slot.current is None:
                    self.set_state("initializing")  # it may take minutes, if dependencies are installed
                process = self._slot.process()
                ended = Watch(self._slot, process, self._command(attempt_id, process.start_run()), self).run_split()
                if isinstance(ended, Outcome):
                    if ended.kind != "done":
                        self._remove_leftovers(attempt_id)
                    return ended
                self._remove_leftovers(attempt_id)
                if isinstance(ended, Spent):
                    self._replace(ended)
                    continue
                self._doubtful.clear()
                outcome = self._decide(ended, process)
                if outcome is not None:
                    return outcome
        except NoProcessError:
            return self.stopped()
        finally:
            self._slot.set_origin(None)
            process_now = self._slot.current
            alive = process_now is not None and not process_now.gone.is_set()
            if not alive:
                self.set_state("failed")
            self._job.log.flush_soon()

    def _command(self, attempt_id: str, run: int) -> RunSplit:
        """Return the command that makes a process run the split."""
        schema = self._task.schema or self._job.schema
        task = SplitTask(self._task.job_url, self._split, self._task.attempt, schema)
        return RunSplit(run, task, attempt_id, self._history, self._job.rows_limit, self._slot.patience)

    # what the watch reports -------------------------------------------------------------------------------------------

    def add_event(self, event: ProcessEvent) -> None:
        """Record what a process says of its batches."""
        match event:
            case AttemptFailed(batch, verdict, final):
                self._failed_attempts += 1
                known = self._history.of(batch)
                known.attempts = verdict.attempts
                if final:
                    many = len(self._history.batches) > _MAX_TRACEBACKS
                    known.verdict = replace(verdict, traceback=None) if many else verdict
                    if verdict.cause == "out of memory":
                        self._doubtful.add(batch)
            case SchemaMismatch():
                self._failed_attempts += 1
            case Recovered(batch):
                # What it returned was lost if the process dies later: its attempts are its own again, not used up by
                # others.
                self._history.of(batch).attempts = 0
            case RowsLimit(rows, everywhere):
                self._job.learn_rows_limit(rows, everywhere=everywhere)
            case Writing(path):
                self._writing = path
            case NoOutput():
                self._report(event)

    def report_progress(self, snapshot: Snapshot | None) -> None:
        """Report the progress about once a second."""
        now = time.monotonic()
        if snapshot is None or now - self._reported < _REPORT_SECONDS:
            return
        self._reported = now
        number, attempt = self._split.number, self._task.attempt
        self._report(SplitProgress(number, attempt, snapshot.batches, snapshot.rows, self._failed_attempts))

    def set_state(self, state: str) -> None:
        """Report the slot's state when it changes."""
        if self._slot.change_state(state):
            self._report(SlotState(self._slot.worker, state))

    def _report(self, event: SplitEvent) -> None:
        """Report an event to the coordinator; an error is no reason to stop."""
        try:
            self._send_report(event)
        except Exception as error:  # noqa: BLE001 - whatever a scheduler's connection may raise
            self._slot.log("WARNING", f"a report ({type(event).__name__}) could not be sent: {one_line(error)}")

    def propose_schema(self, schema: str) -> None:
        """Propose the output's schema to the coordinator."""
        self._report(SchemaProposed(self._split.number, schema))

    def done(self, record: SplitRecord, exhausted: int) -> Outcome:
        """Return the outcome of a split that was run to its end; a process that ran out of memory often is replaced."""
        shared = self._job.shared_rows_limit
        record = replace(
            record,
            failed_attempts=self._failed_attempts,
            seconds=time.monotonic() - self._started,
            worker=self._slot.worker,
            finished=time.time(),
            # with the next splits the limit gets to all workers
            rows_limit=shared,
        )
        prometheus.expose(self._settings, record.metrics)
        if exhausted >= self._slot.patience:
            self._replace_process(f"{exhausted} batches have run out of memory in it", "the next split gets a new one")
        return Outcome("done", self._split.number, record)

    @property
    def is_cancelled(self) -> bool:
        """Whether another attempt at the split has been committed."""
        return self._job.end.is_cancelled(self._split.number)

    def stopped(self) -> Outcome:
        """Return the outcome of a split whose job was stopped, or which is not needed any more."""
        reason = "another attempt was faster" if self.is_cancelled else "the job was closed"
        return Outcome("stopped", self._split.number, message=self._job.end.reason or reason)

    def _replace(self, spent: Spent) -> None:
        """End a process in the middle of the split, which is run again in a new one."""
        self._replace_process(spent.message, f"split {self._split.number} is run again in a new one")
        for index in self._doubtful:  # what was not enough memory for a row there may be enough here
            self._history.of(index).verdict = None
        self._doubtful.clear()

    def _replace_process(self, reason: str, consequence: str) -> None:
        self._slot.log("WARNING", f"the handler process is replaced: {reason} ({consequence})")
        self._slot.replace()

    # after a death ----------------------------------------------------------------------------------------------------

    def _decide(self, death: Death, process: HandlerProcess) -> Outcome | None:
        """Decide what a death means for the batches; return an outcome when the split cannot be run again."""
        if not process.is_ready:
            return self._failed_start(death)
        self._history.careful = self._history.careful or death.cause in ("crash", "out of memory")
        snapshot = death.snapshot
        if snapshot is None or snapshot.batch is None:
            return self._blame_no_batch(death)
        index = snapshot.batch
        self._failed_attempts += 1
        known = self._history.of(index)
        rows = snapshot.rows_in_hand or self._settings.dataset.batch_size
        most = self._settings.limits.max_attempts
        if death.cause == "out of memory" and rows > 1:
            known.rows_limit = (rows + 1) // 2
            what = f"it is tried again with {known.rows_limit} rows at once"
        elif death.cause == "out of memory":
            known.verdict = Verdict(death.cause, death.message, death.traceback, known.attempts + 1)
            what = "with a single row, so it is not tried again"
        else:
            known.attempts += 1
            what = f"attempt {known.attempts} of {most}"
            if known.attempts >= most:
                known.verdict = Verdict(death.cause, death.message, death.traceback, known.attempts)
        self._slot.log(
            "ERROR" if known.verdict else "WARNING",
            f"batch {index} of split {self._split.number}: {death.message} ({what})",
            batch=batch_id(self._settings.job_id, self._split.origin, index),
            **({"exc_info": death.traceback} if death.traceback else {}),
        )
        return None

    def _failed_start(self, death: Death) -> Outcome | None:
        """Count a death before the handler was loaded."""
        starts = self._slot.record_failed_start()
        self._slot.log("ERROR", death.message, **({"exc_info": death.traceback} if death.traceback else {}))
        number = self._split.number
        if death.cause == "out of memory":
            return Outcome("out of memory", number, message=death.message)
        if starts >= _MAX_STARTS:
            times = f"{starts} times in a row"
            return Outcome("worker error", number, message=f"{death.message}, {times}")
        return None

    def _blame_no_batch(self, death: Death) -> Outcome | None:
        """Count a death with no batch in hand against the split; in the end, against the batch that was being read."""
        self._unblamed += 1
        self._history.careful = True
        where = death.snapshot.reading if death.snapshot is not None else None
        message = f"{death.message} while reading batch {where}" if where is not None else death.message
        text = f"split {self._split.number} is run again: {message}"
        self._slot.log("WARNING", text, **({"exc_info": death.traceback} if death.traceback else {}))
        most = max(self._settings.limits.max_attempts, 2)  # the first shows nothing: the stages overlapped
        if self._unblamed < most:
            return None
        if self._history.unreadable is not None and self._history.unreadable[0] == 0:
            return Outcome("worker error", self._split.number, message=f"{message}, even with no batch to handle")
        self._unblamed = 0
        first = where or 0
        if self._history.unreadable is not None:
            first = min(first, self._history.unreadable[0] - 1)
        self._history.unreadable = (max(first, 0), Verdict(death.cause, message, death.traceback, most))
        return None

    def _remove_leftovers(self, attempt_id: str) -> None:
        """Delete what an attempt left; a file that cannot be deleted is never part of the output."""
        with contextlib.suppress(OSError, CortexDaskError):
            if self._writing is not None:
                Path(self._writing).unlink(missing_ok=True)
            output = self._settings.output
            number = self._split.number
            if output is not None:
                Store(output.url).delete(AttemptName(self._settings.job_id, number, attempt_id).staged)
            self._job.directory.store.delete(f"failures/{number:06d}-{attempt_id}.jsonl")


def _complete(slot: Slot, report: Report) -> Outcome:
    """Run ``on_job_complete`` in the slot's process, unless it has succeeded already.

    That is recorded here and not by the coordinator, which may be gone by then: another one must not run it again.
    """
    job = slot.job
    if job.has_completion is False or job.directory.read_json("completed.json") is not None:
        return Outcome("done", -1)
    process = slot.process()
    process.start_run()
    process.send(Complete())
    while True:
        match process.inbox.get():
            case Ready(on_job_complete):
                slot.record_ready(process, has_completion=on_job_complete)
            case InitFailed(kind, message):
                return Outcome(kind, -1, message=message)
            case Completed(message, metrics):
                job.log.flush_soon()
                if metrics:
                    report(Metrics(metrics))
                    prometheus.expose(job.settings, metrics)
                if message:
                    return Outcome("worker error", -1, message=message)
                with contextlib.suppress(OSError):  # the coordinator tries it as well
                    job.directory.write_json("completed.json", {"time": time.time(), "metrics": metrics})
                return Outcome("done", -1)
            case Gone():
                if job.end.has_come:
                    return Outcome("stopped", -1, message=job.end.reason or "the job was closed")
                message = f"on_job_complete failed: the handler process {describe_exit(process.returncode)}"
                trace = process.last_words()
                slot.log("ERROR", message, **({"exc_info": trace} if trace else {}))
                return Outcome("worker error", -1, message=message)
