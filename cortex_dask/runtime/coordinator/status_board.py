"""The status document of a job, made from its totals and from the reports of running splits.

The document has the keys that a Cortex user knows (``status``, ``total_batch_count``, ``batch_metrics``,
``worker_counts`` …) and ours beside them. It also says which coordinator runs the job, with a heartbeat, so that a
second one does not start by mistake.
"""

from __future__ import annotations

import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime
from typing import Any

from cortex_dask.io.job.records import SlotState, SplitEvent, SplitProgress
from cortex_dask.io.job.settings import JobSettings
from cortex_dask.io.job.status import FINAL_STATUSES
from cortex_dask.runtime.coordinator.totals import JobTotals
from cortex_dask.runtime.metrics import describe

Document = dict[str, Any]
Listener = Callable[[Document], None]

#: A worker that is missing for longer than this is stalled: Cortex' own figure.
STALLED_SECONDS = 600.0

_STOPPED = ("stopped", "timed out")  # their workers were ended by us: they neither succeeded nor failed


class StatusBoard:
    """The facts behind the status document; written by the coordinator, read by the heartbeat from its thread."""

    def __init__(
        self,
        settings: JobSettings,
        totals: JobTotals | None = None,
        notice: Callable[[], str] = lambda: "",  # what people should know while the job runs
    ) -> None:
        self._settings = settings
        self._totals = totals or JobTotals()
        self._shown_totals = JobTotals()  # none, until the job runs
        self._notice = notice
        self._lock = threading.Lock()
        self.coordinator_id = uuid.uuid4().hex
        self.status = "enqueuing"
        self._reason = ""
        self._start_time: float | None = None
        self._end_time: float | None = None
        self._undelivered = 0  # failures that could not be delivered where the submission says
        self._in_flight: dict[int, dict[int, SplitProgress]] = {}  # by split and attempt
        self._workers = WorkerStates(settings.workers)
        self._run_started = time.monotonic()
        self._batches_before = 0
        self._rows_before = 0

    def resume(self, previous: Document | None) -> None:
        """Keep the start time of an earlier run of the job, by its last document."""
        started = None if previous is None else previous.get("start_time")
        self._start_time = None if started is None else datetime.fromisoformat(started).timestamp()

    def start_running(self) -> None:
        """Set the status ``running``: the plan is made, and splits are about to be sent."""
        with self._lock:
            totals = self._shown_totals = self._totals
            self._workers.set_wanted(min(self._settings.workers, max(totals.planned_splits, 1)))
            self._run_started = time.monotonic()
            self._batches_before, self._rows_before = totals.batches, totals.rows_in
            self.status = "running"
            self._start_time = self._start_time or time.time()

    def add_event(self, event: SplitEvent) -> None:
        """Record a report of a worker."""
        with self._lock:
            match event:
                case SplitProgress():
                    self._in_flight.setdefault(event.split, {})[event.attempt] = event
                case SlotState(slot, state):
                    self._workers.report(slot, state)

    def remove_attempt(self, split: int, attempt: int) -> None:
        """Forget the progress of an attempt that has ended."""
        with self._lock:
            attempts = self._in_flight.get(split, {})
            attempts.pop(attempt, None)
            if not attempts:
                self._in_flight.pop(split, None)

    def remove_split(self, split: int) -> None:
        """Forget the progress of all attempts at a split that is in the ledger."""
        with self._lock:
            self._in_flight.pop(split, None)

    def set_undelivered(self, count: int) -> None:
        """Record how many failures could not be delivered."""
        self._undelivered = count

    def end(self, status: str, reason: str = "") -> None:
        """Set the final status."""
        with self._lock:
            self.status, self._reason = status, reason
            self._end_time = time.time()
            self._in_flight.clear()

    def document(self) -> Document:
        """Return the status document of this moment."""
        with self._lock:
            return self._document()

    def metrics(self) -> Document:
        """Return what ``metrics.json`` holds."""
        metrics = self._shown_totals.metrics
        return {
            "job_id": self._settings.job_id,
            "api_name": self._settings.api_name,
            "time": _iso(time.time()),
            "metrics": describe(metrics.series()),
            "dropped": metrics.dropped,
        }

    @property
    def metrics_version(self) -> int:
        """Grows when there are new metrics."""
        return self._shown_totals.metrics.version

    def _document(self) -> Document:
        settings, totals = self._settings, self._shown_totals
        is_final = self.status in FINAL_STATUSES
        # Of two attempts at a split only one will count.
        running = [max(attempts.values(), key=lambda item: item.batches) for attempts in self._in_flight.values()]
        done = totals.batches + sum(item.batches for item in running)
        rows_in = totals.rows_in + sum(item.rows for item in running)
        total = max(totals.total_batches, done)
        elapsed = max((self._end_time or time.time()) - self._start_time, 1e-9) if self._start_time else 0.0
        run_elapsed = max(time.monotonic() - self._run_started, 1e-9)
        batch_rate = (done - self._batches_before) / run_elapsed
        row_rate = (rows_in - self._rows_before) / (run_elapsed if not is_final else max(elapsed, 1e-9))
        return {
            "job_id": settings.job_id,
            "api_name": settings.api_name,
            "kind": "BatchAPI",
            "api_id": settings.api_id,
            "workers": settings.workers,
            "config": settings.job_config,
            "timeout": settings.limits.timeout,
            "status": self.status,
            "status_reason": self._reason or ("" if is_final else self._notice()),
            "total_batch_count": total,
            "total_batch_count_exact": totals.total_is_exact,
            "batches_in_queue": max(total - done, 0),
            "batches_done": done,
            "failed_batches": totals.failed_batches,
            "undelivered": self._undelivered,
            "batch_metrics": {
                "succeeded": totals.succeeded_batches + sum(item.batches for item in running),
                "failed": totals.failed_attempts + sum(item.failed_attempts for item in running),
                "avg_time_per_batch": totals.handle_seconds / totals.batches if totals.batches else None,
            },
            "worker_counts": self._workers.counts(self.status if is_final else None),
            "splits": {"total": totals.planned_splits, "done": totals.splits},
            "rows_in": rows_in,
            "rows_out": totals.rows_out,
            "bytes_out": totals.bytes_out,
            "parts": totals.parts,
            "rows_per_second": row_rate,
            "eta": (total - done) / batch_rate if batch_rate > 0 and not is_final else None,
            "output": settings.output.url if settings.output else None,
            "created_time": settings.created_time,
            "start_time": _iso(self._start_time),
            "end_time": _iso(self._end_time),
            "coordinator": {
                "id": self.coordinator_id,
                "host": socket.gethostname(),
                "pid": os.getpid(),
                "heartbeat": time.time(),
            },
        }


class WorkerStates:
    """The states of a job's workers, from the reports of slots."""

    def __init__(self, wanted: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._wanted = wanted
        self._clock = clock
        self._states: dict[str, str] = {}  # by slot, the one that has reported last at the end
        self._missing: list[float] = []  # since when each worker that is not there is waited for
        self._count_missing()

    def report(self, slot: str, state: str) -> None:
        """Record that a slot is ``initializing``, ``running``, ``idle`` or ``failed``."""
        self._states.pop(slot, None)
        self._states[slot] = state
        # The slots of a host that has vanished never report that; those that replaced them have reported since.
        while len(self._states) > self._wanted:
            del self._states[next(iter(self._states))]
        self._count_missing()

    def set_wanted(self, count: int) -> None:
        """Set how many workers can be used: no more than there are splits."""
        self._wanted = count
        self._count_missing()

    def counts(self, final_status: str | None = None) -> dict[str, int]:
        """Return ``worker_counts``; ``final_status`` is that of a job that has ended."""
        return count_workers(self._states.values(), self._missing, self._clock(), final_status)

    def _count_missing(self) -> None:
        missing = max(self._wanted - len(self._states), 0)
        del self._missing[: len(self._missing) - missing]  # one that came counts as the one waited for the longest
        self._missing += [self._clock()] * (missing - len(self._missing))


def count_workers(
    states: Iterable[str], missing_since: Sequence[float], now: float, final_status: str | None = None
) -> dict[str, int]:
    """Count workers as Cortex does: by the states of those that are there, and since when the others are missing.

    >>> count_workers(["running", "idle"], [0.0, 500.0], now=700.0)
    {'pending': 1, 'initializing': 0, 'running': 2, 'succeeded': 0, 'failed': 0, 'stalled': 1}
    """
    counts = dict.fromkeys(("pending", "initializing", "running", "succeeded", "failed", "stalled"), 0)
    if final_status in _STOPPED:
        return counts
    for state in states:
        if final_status is not None:
            counts["failed" if state == "failed" else "succeeded"] += 1
        else:
            counts["running" if state == "idle" else state] += 1
    if final_status is None:
        for since in missing_since:
            counts["stalled" if now - since > STALLED_SECONDS else "pending"] += 1
    return counts


def _iso(seconds: float | None) -> str | None:
    return None if seconds is None else datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds")
