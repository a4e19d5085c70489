"""The watch over one handler process while it runs a split: its events, its times, its memory, and how it ends."""

from __future__ import annotations

import contextlib
import queue
import time
from dataclasses import dataclass
from typing import Protocol

from cortex_dask.io.job.records import Cause, Outcome, SplitRecord
from cortex_dask.runtime.frames import (
    Aborted,
    Done,
    Gone,
    InitFailed,
    ProcessEvent,
    Ready,
    Recovered,
    RunSplit,
    SchemaAnswer,
    SchemaAsked,
    Spent,
)
from cortex_dask.runtime.progress_cell import Phase, Snapshot
from cortex_dask.runtime.worker.handler_process import HandlerProcess, describe_exit
from cortex_dask.runtime.worker.slot import Slot

_TICK = 0.1  # seconds between two reads of the progress cell
_MEMORY_SECONDS = 0.2  # between two measurements of the memory, and
_MEMORY_SECONDS_HIGH = 0.05  # when half of it is used
_WARN_SHARE = 0.8  # of the memory limit
_NEAR_SHARE = 0.9  # of the memory limit: a SIGKILL that is not ours is taken for the kernel's out-of-memory killer
SCHEMA_SECONDS = 30.0  # until a split that waits for the output's schema gives its slot back
_STOP_SECONDS = 1.5


@dataclass(frozen=True, slots=True)
class Death:
    """How a process ended before it had run its split."""

    cause: Cause
    message: str
    snapshot: Snapshot | None  # None: it had not started the split
    traceback: str | None


class WatchListener(Protocol):
    """What a watch reports, and asks, while a split runs."""

    def set_state(self, state: str) -> None:
        """Record what the slot is doing."""

    def report_progress(self, snapshot: Snapshot | None) -> None:
        """Receive what the process is doing now; None: it has not begun with the split."""

    def add_event(self, event: ProcessEvent) -> None:
        """Record what became of a batch."""

    def propose_schema(self, schema: str) -> None:
        """Propose the output's schema."""

    def done(self, record: SplitRecord, exhausted: int) -> Outcome:
        """Return the outcome of a split that was run to its end."""

    def stopped(self) -> Outcome:
        """Return the outcome of a split that has to end."""

    @property
    def is_cancelled(self) -> bool:
        """Whether the split is not needed any more."""


class Watch:
    """The watch over one process at work on one split."""

    def __init__(self, slot: Slot, process: HandlerProcess, command: RunSplit, listener: WatchListener) -> None:
        self._listener = listener
        self._slot = slot
        self._job = slot.job
        self._limits = self._job.settings.limits
        self._memory_limit = self._job.settings.compute.memory
        self._process = process
        self._command = command
        self._beats: tuple[int, ...] = ()
        self._beaten = time.monotonic()
        self._memory = 0
        self._measured = 0.0
        self._warned = False
        self._proposal: str | None = None
        self._asked = 0.0
        self._pause = 0.0

    def run_split(self) -> Outcome | Death | Spent:
        """Have the split run; return its outcome, or how the process died over it, or why it has to be replaced."""
        listener, process = self._listener, self._process
        listener.set_state("running" if process.is_ready else "initializing")
        process.tail.clear()
        process.send(self._command)
        next_check = 0.0
        while True:
            try:
                event = process.inbox.get(timeout=self._timeout())
            except queue.Empty:
                event = None
            if event is not None:
                ended = self._handle(event)
                if ended is not None:
                    return ended
                if time.monotonic() < next_check:
                    continue
            next_check = time.monotonic() + _TICK
            if self._proposal is not None:
                self._answer()
            snapshot = self._snapshot()
            listener.report_progress(snapshot)
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
        return snapshot if snapshot.run == self._command.run else None

    # what the process reports -----------------------------------------------------------------------------------------

    def _handle(self, event: ProcessEvent) -> Outcome | Death | Spent | None:
        own, number = self._command.run, self._command.task.split.number
        match event:
            case Ready(on_job_complete):
                self._slot.record_ready(self._process, has_completion=on_job_complete)
                self._listener.set_state("running")
            case InitFailed(kind, message):
                self._process.gone.wait(2.0)
                return Outcome(kind, number, message=message)
            case SchemaAsked(schema):
                self._proposal, self._asked, self._pause = schema, time.monotonic(), 0.0
                self._answer(first=True)
            case Done(run, record, exhausted) if run == own:
                return self._listener.done(record, exhausted)
            case Spent(run) if run == own:
                return event
            case Aborted(run, reason, schema, message) if run == own:
                return Outcome(reason, number, schema=schema, message=message)
            case Gone():
                return self._death(None)
            case _:
                self._listener.add_event(event)
        return None

    def _answer(self, *, first: bool = False) -> None:
        """Send the process the schema if it is decided; after some time, that there is none."""
        proposal = self._proposal
        assert proposal is not None
        schema = self._job.schema or self._read_schema()
        if schema is None and first:
            self._listener.propose_schema(proposal)
            schema = self._read_schema()
        if schema is not None or time.monotonic() - self._asked > SCHEMA_SECONDS:
            if schema is not None:
                self._job.learn_schema(schema)
            self._proposal = None
            self._process.send(SchemaAnswer(schema))
            return
        # Usually the answer is there in some milliseconds: a coordinator has to write it.
        self._pause = min(max(self._pause * 1.5, 0.002), 0.25)

    def _read_schema(self) -> str | None:
        with contextlib.suppress(OSError):
            return self._job.directory.schema()
        return None

    # limits -----------------------------------------------------------------------------------------------------------

    def _check(self, snapshot: Snapshot | None) -> Outcome | Death | None:
        if self._job.end.has_come:
            self._process.terminate(_STOP_SECONDS)
            return self._listener.stopped()
        if self._listener.is_cancelled:
            # Killed and waited for: the slot's next split must not get to a process that is about to end.
            return self._kill("crash", "another attempt at the split was faster")
        death = self._check_memory()
        if death is not None or snapshot is None:
            return death
        return self._check_times(snapshot)

    def _check_memory(self) -> Outcome | Death | None:
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

    def _check_times(self, snapshot: Snapshot) -> Outcome | Death | None:
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

    def _kill(self, cause: Cause, message: str, seen: Snapshot | None = None) -> Outcome | Death:
        """Kill the process for a reason."""
        trace = self._process.traceback() if cause == "timed out" else None
        self._process.kill()
        with contextlib.suppress(queue.Empty):  # a process that hangs in the kernel cannot even be killed
            while not isinstance(event := self._process.inbox.get(timeout=5.0), Gone):
                if isinstance(event, Recovered) and seen is not None and event.batch == seen.batch:
                    continue  # too late: what it returned is lost, and it is blamed for that
                ended = self._handle(event)  # it may have ended its split in the last moment
                if isinstance(ended, Outcome):
                    return ended
        return self._death((cause, message), seen, trace)

    def _death(
        self, reason: tuple[Cause, str] | None, seen: Snapshot | None = None, trace: str | None = None
    ) -> Outcome | Death:
        """Return how the process ended: killed by us for a reason, or by itself."""
        if self._job.end.has_come or self._listener.is_cancelled:
            return self._listener.stopped()
        if reason is not None:
            # The batch that was seen over its limit is the one to blame. The signal that asked where it hangs may
            # have ended its wait, so that the process has begun with another one before it was killed.
            return Death(reason[0], reason[1], seen or self._snapshot(), trace)
        snapshot = self._snapshot()
        code = self._process.returncode
        message = f"the handler process {describe_exit(code)}"
        limit = self._memory_limit
        if code == -9 and limit is not None and self._memory > limit * _NEAR_SHARE:
            return Death("out of memory", f"{message} with {_size(self._memory)} in use", snapshot, None)
        return Death("crash", message, snapshot, self._process.last_words())


def _size(size: int) -> str:
    return f"{size / 1024**2:,.0f} MiB"
