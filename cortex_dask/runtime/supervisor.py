"""The supervisor: runs a split in a slot's handler process, watches it, and decides what a death means.

It runs in a thread of the Dask worker, so nothing that a handler does can hit the worker: a crash, a hang, a memory
hog end a child process, and the supervisor knows from the :mod:`progress cell <cortex_dask.runtime.progress_cell>`
which batch was in hand. That batch has failed an attempt; the split is run again in a new process that passes over
what has used up its attempts.
"""

from __future__ import annotations

import contextlib
import queue
import socket
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cortex_dask.errors import CortexDaskError, JobNotFoundError
from cortex_dask.io.records import Cause, Outcome, SplitRecord, SplitTask
from cortex_dask.io.settings import JobSettings
from cortex_dask.io.splits import batch_id
from cortex_dask.io.store import Store
from cortex_dask.runtime import exposition, slots
from cortex_dask.runtime.failures import Verdict, one_line
from cortex_dask.runtime.handler_process import HandlerProcess, describe_exit
from cortex_dask.runtime.history import SplitHistory
from cortex_dask.runtime.part import staged_name
from cortex_dask.runtime.progress_cell import Phase, Snapshot
from cortex_dask.runtime.slot import NoProcessError, Slot

__all__ = ["run_completion", "run_split"]

Report = Callable[[dict[str, Any]], None]
Event = dict[str, Any]

_TICK = 0.1  # seconds between two looks at the progress cell
_MEMORY_SECONDS = 0.2  # between two looks at the memory, and
_MEMORY_SECONDS_HIGH = 0.05  # when half of it is used
_WARN_SHARE = 0.8  # of the memory limit
_NEAR_SHARE = 0.9  # of the memory limit: a SIGKILL that is not ours is taken for the kernel's out-of-memory killer
_REPORT_SECONDS = 1.0
_SCHEMA_SECONDS = 30.0  # until a split that waits for the output's schema gives its slot back
_MAX_STARTS = 3  # deaths in a row before the handler was there
_MAX_TRACEBACKS = 1_000  # verdicts of a split that are remembered with their tracebacks
_STOP_SECONDS = 1.5


def run_split(task: SplitTask, report: Report) -> Outcome:
    """Run a split in a handler process of this worker, and return how it ended.

    Parameters
    ----------
    task : SplitTask
        The split.
    report : callable
        Takes events (plain dicts): ``schema``, ``no output``, ``progress`` and ``slot``.
    """
    try:
        with slots.lease(task.job_url) as slot:
            return _Supervision(slot, task, report).run()
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


@dataclass(frozen=True, slots=True)
class _Death:
    """How a process ended before it had run its split."""

    cause: Cause
    message: str
    snapshot: Snapshot | None  # None: it had not begun with the split
    traceback: str | None


@dataclass(frozen=True, slots=True)
class _Spent:
    """That a process is of no more use although it lives."""

    message: str


class _Supervision:
    """One call of :func:`run_split`."""

    def __init__(self, slot: Slot, task: SplitTask, report: Report) -> None:
        self._slot = slot
        self._job = slot.job
        self._settings: JobSettings = slot.job.settings
        self._task = task
        self._split = task.split
        self._tell = report
        self._history = SplitHistory()
        self._failed_attempts = 0
        self._doubtful: set[int] = set()  # batches that were given up for their memory in the process at hand
        self._writing: str | None = None  # the temporary file of a part on a local file system
        self._loose = 0  # deaths that no batch is to blame for
        self._began = time.monotonic()
        self._reported = self._began  # a split of less than a second needs no report but its record
        slot.origin = task.split.origin
        if task.schema is not None:
            self._job.schema = task.schema
        if task.rows_limit is not None:
            self._job.learn_rows_limit(task.rows_limit, everywhere=True)

    def run(self) -> Outcome:
        """Run the split until it is done, or cannot be."""
        try:
            while True:
                if self._job.stopped is not None or self._job.closed or self.is_abandoned:
                    return self._stopped()
                attempt_id = uuid.uuid4().hex
                if self._slot.current is None:
                    self.say("initializing")  # it may take minutes, if dependencies are installed
                process = self._slot.process()
                ended = _Watch(self, process, attempt_id).run()
                if isinstance(ended, Outcome):
                    if ended.kind != "done":
                        self._remove_leftovers(attempt_id)
                    return ended
                self._remove_leftovers(attempt_id)
                if isinstance(ended, _Spent):
                    self._replace(ended)
                    continue
                self._doubtful.clear()
                outcome = self._learn(ended, process)
                if outcome is not None:
                    return outcome
        except NoProcessError:
            return self._stopped()
        finally:
            self._slot.origin = None
            process_now = self._slot.current
            alive = process_now is not None and not process_now.gone.is_set()
            if not alive:
                self.say("failed")
            self._job.chunks.hasten()

    # what the watch asks for ------------------------------------------------------------------------------------------

    def order(self, attempt_id: str, run: int) -> Event:
        """Return the command that makes a process run the split."""
        schema = self._task.schema or self._job.schema
        return {
            "type": "split",
            "run": run,
            "task": SplitTask(self._task.job_url, self._split, self._task.attempt, schema).to_json(),
            "attempt_id": attempt_id,
            "history": self._history.to_json(),
            "rows_limit": self._job.rows_limit,
            "patience": self._slot.patience,
        }

    def note(self, event: Event) -> None:
        """Take in what a process says of its batches."""
        match event["type"]:
            case "failed attempt":
                self._failed_attempts += 1
                known = self._history.of(event["batch"])
                known.attempts = event["attempts"]
                if event["final"]:
                    many = len(self._history.batches) > _MAX_TRACEBACKS
                    trace = None if many else event["traceback"]
                    known.verdict = Verdict(event["cause"], event["error"], trace, event["attempts"])
                    if event["cause"] == "out of memory":
                        self._doubtful.add(event["batch"])
            case "misfit":
                self._failed_attempts += 1
            case "recovered":
                # What it returned was lost if the process dies later: its attempts are its own again, not used up by
                # others.
                known = self._history.of(event["batch"])
                known.attempts = 0
            case "rows limit":
                self._job.learn_rows_limit(event["rows"], everywhere=event["everywhere"])
            case "writing":
                self._writing = event["path"]
            case "no output":
                self.report({"type": "no output", "split": self._split.number})

    def progress(self, snapshot: Snapshot | None) -> None:
        """Report the progress about once a second."""
        now = time.monotonic()
        if snapshot is None or now - self._reported < _REPORT_SECONDS:
            return
        self._reported = now
        self.report(
            {
                "type": "progress",
                "split": self._split.number,
                "attempt": self._task.attempt,
                "batches": snapshot.batches,
                "rows": snapshot.rows,
                "failed_attempts": self._failed_attempts,
            }
        )

    def say(self, state: str) -> None:
        """Report the slot's state when it changes."""
        if self._slot.said != state:
            self._slot.said = state
            self.report({"type": "slot", "slot": self._slot.worker, "state": state})

    def report(self, event: Event) -> None:
        """Tell the coordinator something; that it cannot be told is no reason to stop."""
        try:
            self._tell(event)
        except Exception as error:  # noqa: BLE001 - whatever a scheduler's connection may raise
            self._slot.log("WARNING", f"a report of type {event['type']} could not be sent: {one_line(error)}")

    def done(self, fields: Event, attempt_id: str) -> Outcome:
        """Return the outcome of a split that was run to its end."""
        record = SplitRecord.from_json(
            {
                **fields,
                "attempt_id": attempt_id,
                "failed_attempts": self._failed_attempts,
                "seconds": time.monotonic() - self._began,
                "worker": self._slot.worker,
                "finished": time.time(),
            }
        )
        if self._job.shared_rows_limit is not None:
            record.extra["rows_limit"] = self._job.shared_rows_limit  # with the next splits it gets to all workers
        exposition.feed(self._settings, record.extra.get("metrics", ()))
        return Outcome("done", self._split.number, record)

    @property
    def is_abandoned(self) -> bool:
        """Whether another attempt at the split has been committed."""
        return self._split.number in self._job.abandoned

    def stopped(self) -> Outcome:
        """Return the outcome of a split whose job was stopped, or which is not needed any more."""
        return self._stopped()

    def name(self, index: int) -> str:
        """Return the id of a batch."""
        return batch_id(self._settings.job_id, self._split.origin, index)

    def _stopped(self) -> Outcome:
        reason = "another attempt was faster" if self.is_abandoned else "the job was closed"
        return Outcome("stopped", self._split.number, message=self._job.stopped or reason)

    def ran(self, exhausted: int) -> None:
        """Take in in how many batches the process has run out of memory; with too many of them it is replaced."""
        if exhausted >= self._slot.patience:
            self._say_replaced(f"{exhausted} batches have run out of memory in it", "the next split gets a new one")

    def _replace(self, spent: _Spent) -> None:
        """End a process in the middle of the split, which is run again in a new one."""
        self._say_replaced(spent.message, f"split {self._split.number} is run again in a new one")
        for index in self._doubtful:  # what was not enough memory for a row there may be enough here
            self._history.of(index).verdict = None
        self._doubtful.clear()

    def _say_replaced(self, reason: str, consequence: str) -> None:
        self._slot.log("WARNING", f"the handler process is replaced: {reason} ({consequence})")
        self._slot.patience *= 2  # if it was the data and not the process, new ones do not help
        self._slot.replace()

    # after a death ----------------------------------------------------------------------------------------------------

    def _learn(self, death: _Death, process: HandlerProcess) -> Outcome | None:
        """Decide what a death means for the batches; returns an outcome when the split cannot be run again."""
        if not process.ready:
            return self._failed_start(death)
        self._history.careful = self._history.careful or death.cause in ("crash", "out of memory")
        snapshot = death.snapshot
        if snapshot is None or snapshot.batch is None:
            return self._nobody_to_blame(death)
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
            batch=self.name(index),
            **({"exc_info": death.traceback} if death.traceback else {}),
        )
        return None

    def _failed_start(self, death: _Death) -> Outcome | None:
        """Count a death before the handler was there."""
        self._slot.failed_starts += 1
        self._slot.log("ERROR", death.message, **({"exc_info": death.traceback} if death.traceback else {}))
        number = self._split.number
        if death.cause == "out of memory":
            return Outcome("out of memory", number, message=death.message)
        if self._slot.failed_starts >= _MAX_STARTS:
            times = f"{self._slot.failed_starts} times in a row"
            return Outcome("worker error", number, message=f"{death.message}, {times}")
        return None

    def _nobody_to_blame(self, death: _Death) -> Outcome | None:
        """Count a death with no batch in hand against the split; in the end, against the batch that was being read."""
        self._loose += 1
        self._history.careful = True
        where = death.snapshot.reading if death.snapshot is not None else None
        message = f"{death.message} while reading batch {where}" if where is not None else death.message
        text = f"split {self._split.number} is run again: {message}"
        self._slot.log("WARNING", text, **({"exc_info": death.traceback} if death.traceback else {}))
        most = max(self._settings.limits.max_attempts, 2)  # the first shows nothing: the stages overlapped
        if self._loose < most:
            return None
        if self._history.unreadable is not None and self._history.unreadable[0] == 0:
            return Outcome("worker error", self._split.number, message=f"{message}, even with no batch to handle")
        self._loose = 0
        first = where or 0
        if self._history.unreadable is not None:
            first = min(first, self._history.unreadable[0] - 1)
        self._history.unreadable = (max(first, 0), Verdict(death.cause, message, death.traceback, most))
        return None

    def _remove_leftovers(self, attempt_id: str) -> None:
        """Delete what an attempt left; nobody sees it, so it is no harm if that fails."""
        with contextlib.suppress(OSError, CortexDaskError):
            if self._writing is not None:
                Path(self._writing).unlink(missing_ok=True)
            output = self._settings.output
            number = self._split.number
            if output is not None:
                Store(output.url).delete(staged_name(self._settings.job_id, number, attempt_id))
            self._job.directory.store.delete(f"failures/{number:06d}-{attempt_id}.jsonl")


class _Watch:
    """One process at work on the split."""

    def __init__(self, supervision: _Supervision, process: HandlerProcess, attempt_id: str) -> None:
        self._supervision = supervision
        self._slot = supervision._slot
        self._job = self._slot.job
        self._limits = self._job.settings.limits
        self._memory_limit = self._job.settings.compute.memory
        self._process = process
        self._attempt_id = attempt_id
        process.runs += 1
        self._run = process.runs
        self._beats: tuple[int, ...] = ()
        self._beaten = time.monotonic()
        self._memory = 0
        self._measured = 0.0
        self._warned = False
        self._proposal: str | None = None
        self._asked = 0.0
        self._pause = 0.0

    def run(self) -> Outcome | _Death | _Spent:
        """Have the split run; returns its outcome, or how the process died over it, or why it has to be replaced."""
        supervision, process = self._supervision, self._process
        supervision.say("running" if process.ready else "initializing")
        process.tail.clear()
        process.send(supervision.order(self._attempt_id, self._run))
        look = 0.0
        while True:
            try:
                event = process.inbox.get(timeout=self._timeout())
            except queue.Empty:
                event = None
            if event is not None:
                ended = self._take(event)
                if ended is not None:
                    return ended
                if time.monotonic() < look:
                    continue
            look = time.monotonic() + _TICK
            if self._proposal is not None:
                self._answer()
            snapshot = self._snapshot()
            supervision.progress(snapshot)
            death = self._check(snapshot)
            if death is not None:
                return death

    def _timeout(self) -> float:
        if self._proposal is not None:
            return self._pause
        limit = self._limits.batch_timeout or 1.0
        return min(_TICK, max(limit / 10, 0.005))

    def _snapshot(self) -> Snapshot | None:
        snapshot = self._process.progress()
        return snapshot if snapshot.run == self._run else None

    # what the process says --------------------------------------------------------------------------------------------

    def _take(self, event: Event) -> Outcome | _Death | _Spent | None:
        supervision, process = self._supervision, self._process
        number = supervision._split.number
        match event["type"]:
            case "ready":
                process.ready = True
                self._slot.failed_starts = 0
                self._job.has_completion = event["on_job_complete"]
                supervision.say("running")
            case "init failed":
                process.gone.wait(2.0)
                return Outcome(event["kind"], number, message=event["message"])
            case "schema":
                self._proposal, self._asked, self._pause = event["schema"], time.monotonic(), 0.0
                self._answer(first=True)
            case "done" if event["run"] == self._run:
                outcome = supervision.done(event["record"], self._attempt_id)
                supervision.ran(event["exhausted"])
                return outcome
            case "spent" if event["run"] == self._run:
                return _Spent(event["message"])
            case "aborted" if event["run"] == self._run:
                return Outcome(event["kind"], number, schema=event["schema"], message=event["message"])
            case "gone":
                return self._death(None)
            case _:
                supervision.note(event)
        return None

    def _answer(self, *, first: bool = False) -> None:
        """Look whether the schema is settled, and tell the process; after some time, that nobody settles it."""
        proposal = self._proposal
        assert proposal is not None
        schema = self._job.schema or self._read_schema()
        if schema is None and first:
            self._supervision.report({"type": "schema", "split": self._supervision._split.number, "schema": proposal})
            schema = self._read_schema()
        if schema is not None or time.monotonic() - self._asked > _SCHEMA_SECONDS:
            self._job.schema = schema
            self._proposal = None
            self._process.send({"type": "schema", "schema": schema})
            return
        # Usually the answer is there in some milliseconds, the time of a coordinator to write it.
        self._pause = min(max(self._pause * 1.5, 0.002), 0.25)

    def _read_schema(self) -> str | None:
        with contextlib.suppress(OSError):
            return self._job.directory.schema()
        return None

    # limits -----------------------------------------------------------------------------------------------------------

    def _check(self, snapshot: Snapshot | None) -> Outcome | _Death | None:
        if self._job.stopped is not None or self._job.closed:
            self._process.terminate(_STOP_SECONDS)
            return self._supervision.stopped()
        if self._supervision.is_abandoned:
            # Killed and waited for: the slot's next split must not get to a process that is about to end.
            return self._kill("crash", "another attempt at the split was faster")
        death = self._check_memory()
        if death is not None or snapshot is None:
            return death
        return self._check_times(snapshot)

    def _check_memory(self) -> Outcome | _Death | None:
        limit = self._memory_limit
        now = time.monotonic()
        if limit is None:
            return None
        pause = _MEMORY_SECONDS_HIGH if self._memory > limit / 2 else _MEMORY_SECONDS
        if now - self._measured < pause:
            return None
        self._measured = now
        self._memory = used = self._process.memory()
        if used > limit:
            return self._kill(
                "out of memory",
                f"the handler process was killed: it used {_size(used)} of memory, its limit is {_size(limit)}",
            )
        if used > limit * _WARN_SHARE and not self._warned:
            self._warned = True
            self._slot.log("WARNING", f"the handler process uses {_size(used)} of the {_size(limit)} that it may")
        return None

    def _check_times(self, snapshot: Snapshot) -> Outcome | _Death | None:
        now = time.monotonic()
        limit = self._limits.batch_timeout
        if limit is not None and snapshot.called is not None and now - snapshot.called > limit:
            return self._kill("timed out", f"handle_batch took longer than batch_timeout ({limit:g} s)", snapshot)
        if snapshot.beats != self._beats or snapshot.phase == Phase.WAITING:
            self._beats, self._beaten = snapshot.beats, now
        limit = self._limits.stall_timeout
        if limit is not None and now - self._beaten > limit:
            return self._kill(
                "timed out", f"there was no progress for longer than stall_timeout ({limit:g} s)", snapshot
            )
        return None

    def _kill(self, cause: Cause, message: str, seen: Snapshot | None = None) -> Outcome | _Death:
        """Kill the process for a reason."""
        trace = self._process.traceback() if cause == "timed out" else None
        self._process.kill()
        with contextlib.suppress(queue.Empty):  # a process that hangs in the kernel cannot even be killed
            while (event := self._process.inbox.get(timeout=5.0))["type"] != "gone":
                if event["type"] == "recovered" and seen is not None and event["batch"] == seen.batch:
                    continue  # too late: what it returned is lost, and it is blamed for that
                ended = self._take(event)  # it may have ended its split in the last moment
                if isinstance(ended, Outcome):
                    return ended
        return self._death((cause, message), seen, trace)

    def _death(
        self, reason: tuple[Cause, str] | None, seen: Snapshot | None = None, trace: str | None = None
    ) -> Outcome | _Death:
        """Say how the process ended: killed by us for a reason, or by itself."""
        if self._job.stopped is not None or self._job.closed or self._supervision.is_abandoned:
            return self._supervision.stopped()
        if reason is not None:
            # The batch that was seen over its limit is the one to blame. The signal that asked where it hangs may
            # have ended its wait, so that the process has begun with another one before it was killed.
            return _Death(reason[0], reason[1], seen or self._snapshot(), trace)
        snapshot = self._snapshot()
        code = self._process.returncode
        message = f"the handler process {describe_exit(code)}"
        limit = self._memory_limit
        if code == -9 and limit is not None and self._memory > limit * _NEAR_SHARE:
            return _Death("out of memory", f"{message} with {_size(self._memory)} in use", snapshot, None)
        return _Death("crash", message, snapshot, self._process.last_words())


def _size(size: int) -> str:
    return f"{size / 1024**2:,.0f} MiB"


def _complete(slot: Slot, report: Report) -> Outcome:
    """Run ``on_job_complete`` in the slot's process, unless it has succeeded already.

    That it has is noted here and not by the coordinator, which may be gone by then: another one must not run it again.
    """
    job = slot.job
    if job.has_completion is False or job.directory.read_json("completed.json") is not None:
        return Outcome("done", -1)
    process = slot.process()
    process.runs += 1
    process.send({"type": "complete"})
    while True:
        event = process.inbox.get()
        match event["type"]:
            case "ready":
                process.ready = True
                job.has_completion = event["on_job_complete"]
            case "init failed":
                return Outcome(event["kind"], -1, message=event["message"])
            case "completed":
                job.chunks.hasten()
                if event["metrics"]:
                    report({"type": "metrics", "metrics": event["metrics"]})
                    exposition.feed(job.settings, event["metrics"])
                if event["message"]:
                    return Outcome("worker error", -1, message=event["message"])
                with contextlib.suppress(OSError):  # the coordinator tries it as well
                    job.directory.write_json("completed.json", {"time": time.time(), "metrics": event["metrics"]})
                return Outcome("done", -1)
            case "gone":
                if job.stopped is not None or job.closed:
                    return Outcome("stopped", -1, message=job.stopped or "the job was closed")
                message = f"on_job_complete failed: the handler process {describe_exit(process.returncode)}"
                trace = process.last_words()
                slot.log("ERROR", message, **({"exc_info": trace} if trace else {}))
                return Outcome("worker error", -1, message=message)
