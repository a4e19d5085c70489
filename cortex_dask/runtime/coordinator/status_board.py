"""The status document of a job, and the pulse that keeps it fresh.

The document has the keys that a Cortex user knows (``status``, ``total_batch_count``, ``batch_metrics``,
``worker_counts`` …) and ours beside them. It also says which coordinator runs the job, with a heartbeat, so that a
second one does not begin by mistake.
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

from cortex_dask.io.job.settings import JobSettings
from cortex_dask.io.job.status import FINAL_STATUSES
from cortex_dask.runtime.coordinator.totals import JobTotals
from cortex_dask.runtime.metrics import describe

Document = dict[str, Any]


class StatusBoard:
    """The facts behind the status document; written by the coordinator, read by the pulse from its thread."""

    def __init__(self, settings: JobSettings) -> None:
        self._settings = settings
        self._lock = threading.Lock()
        self.coordinator_id = uuid.uuid4().hex
        self.status = "enqueuing"
        self.reason = ""
        self.notice: Callable[[], str] = lambda: ""  # what people should know while the job runs
        self.start_time: float | None = None
        self.end_time: float | None = None
        self.tally: JobTotals | None = None
        self.splits_total = 0
        self.undelivered = 0  # dead letters that could not be delivered where the submission says
        self._inflight: dict[int, dict[int, dict[str, int]]] = {}  # by split and attempt
        self._workers = Workers(settings.workers)
        self._run_began = time.monotonic()
        self._batches_before = 0
        self._rows_before = 0

    def begin(self, tally: JobTotals, splits_total: int) -> None:
        """Say that the plan is made and that splits are about to be sent."""
        with self._lock:
            self.tally = tally
            self.splits_total = splits_total
            self._workers.want(min(self._settings.workers, max(splits_total, 1)))
            self._run_began = time.monotonic()
            self._batches_before, self._rows_before = tally.batches, tally.rows_in
            self.status = "running"
            self.start_time = self.start_time or time.time()

    def event(self, event: Document) -> None:
        """Take in a report of a worker."""
        with self._lock:
            if event["type"] == "progress":
                self._inflight.setdefault(event["split"], {})[event.get("attempt", 1)] = {
                    "batches": event.get("batches", 0),
                    "rows": event.get("rows", 0),
                    "failed_attempts": event.get("failed_attempts", 0),
                }
            elif event["type"] == "slot":
                self._workers.report(event["slot"], event["state"])

    def attempt_ended(self, split: int, attempt: int) -> None:
        """Forget the progress of an attempt that has ended."""
        with self._lock:
            attempts = self._inflight.get(split, {})
            attempts.pop(attempt, None)
            if not attempts:
                self._inflight.pop(split, None)

    def split_done(self, split: int) -> None:
        """Forget the progress of all attempts at a split that is in the ledger."""
        with self._lock:
            self._inflight.pop(split, None)

    def end(self, status: str, reason: str = "") -> None:
        """Say how the job ended."""
        with self._lock:
            self.status, self.reason = status, reason
            self.end_time = time.time()
            self._inflight.clear()

    def document(self) -> Document:
        """Return the status document of this moment."""
        with self._lock:
            return self._document()

    def metrics(self) -> Document:
        """Return what ``metrics.json`` holds."""
        totals = self.tally.metrics if self.tally else None
        return {
            "job_id": self._settings.job_id,
            "api_name": self._settings.api_name,
            "time": _iso(time.time()),
            "metrics": describe(totals.series()) if totals else [],
            "dropped": totals.dropped if totals else 0,
        }

    @property
    def metrics_version(self) -> int:
        """Grows when there are new metrics."""
        return self.tally.metrics.version if self.tally else 0

    def _document(self) -> Document:
        settings, tally = self._settings, self.tally
        final = self.status in FINAL_STATUSES
        # Of two attempts at a split only one will count.
        live = [max(attempts.values(), key=lambda item: item["batches"]) for attempts in self._inflight.values()]
        done = (tally.batches if tally else 0) + sum(item["batches"] for item in live)
        failed = tally.failed_batches if tally else 0
        succeeded = tally.succeeded_batches if tally else 0
        rows_in = (tally.rows_in if tally else 0) + sum(item["rows"] for item in live)
        total = max(tally.total_batches, done) if tally else 0
        elapsed = max((self.end_time or time.time()) - self.start_time, 1e-9) if self.start_time else 0.0
        run_elapsed = max(time.monotonic() - self._run_began, 1e-9)
        batch_rate = (done - self._batches_before) / run_elapsed
        row_rate = (rows_in - self._rows_before) / (run_elapsed if not final else max(elapsed, 1e-9))
        handled = tally.batches if tally else 0
        return {
            "job_id": settings.job_id,
            "api_name": settings.api_name,
            "kind": "BatchAPI",
            "api_id": settings.api_id,
            "workers": settings.workers,
            "config": settings.job_config,
            "timeout": settings.limits.timeout,
            "status": self.status,
            "status_reason": self.reason or ("" if final else self.notice()),
            "total_batch_count": total,
            "total_batch_count_exact": tally.total_is_exact if tally else False,
            "batches_in_queue": max(total - done, 0),
            "batches_done": done,
            "failed_batches": failed,
            "undelivered": self.undelivered,
            "batch_metrics": {
                "succeeded": succeeded + sum(item["batches"] for item in live),
                "failed": (tally.failed_attempts if tally else 0) + sum(item["failed_attempts"] for item in live),
                "avg_time_per_batch": tally.handle_seconds / handled if tally and handled else None,
            },
            "worker_counts": self._workers.counts(self.status if final else None),
            "splits": {"total": self.splits_total, "done": tally.splits if tally else 0},
            "rows_in": rows_in,
            "rows_out": tally.rows_out if tally else 0,
            "bytes_out": tally.bytes_out if tally else 0,
            "parts": tally.parts if tally else 0,
            "rows_per_second": row_rate,
            "eta": (total - done) / batch_rate if batch_rate > 0 and not final else None,
            "output": settings.output.url if settings.output else None,
            "created_time": settings.created_time,
            "start_time": _iso(self.start_time),
            "end_time": _iso(self.end_time),
            "coordinator": {
                "id": self.coordinator_id,
                "host": socket.gethostname(),
                "pid": os.getpid(),
                "heartbeat": time.time(),
            },
        }


def _iso(seconds: float | None) -> str | None:
    return None if seconds is None else datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds")


#: A worker that is waited for longer than this is stalled: Cortex' own figure.
STALLED_SECONDS = 600.0

_STOPPED = ("stopped", "timed out")  # their workers were ended by us: they neither succeeded nor failed


class Workers:
    """The states of a job's workers, from the reports of slots.

    Parameters
    ----------
    wanted : int
        How many the job asked for.
    clock : callable
        Returns the time in seconds.
    """

    def __init__(self, wanted: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._wanted = wanted
        self._clock = clock
        self._states: dict[str, str] = {}  # by slot, the one that has reported last at the end
        self._missing: list[float] = []  # since when each worker that is not there is waited for
        self._count_missing()

    def report(self, slot: str, state: str) -> None:
        """Take in that a slot is ``initializing``, ``running``, ``idle`` or ``failed``."""
        self._states.pop(slot, None)
        self._states[slot] = state
        # The slots of a host that has vanished never say so; those that took their places have reported since.
        while len(self._states) > self._wanted:
            del self._states[next(iter(self._states))]
        self._count_missing()

    def want(self, count: int) -> None:
        """Say how many can be used: no more than there are splits."""
        self._wanted = count
        self._count_missing()

    def counts(self, final_status: str | None = None) -> dict[str, int]:
        """Return ``worker_counts``; ``final_status`` is that of a job that has ended."""
        return count_workers(self._states.values(), self._missing, self._clock(), final_status)

    def _count_missing(self) -> None:
        missing = max(self._wanted - len(self._states), 0)
        del self._missing[: len(self._missing) - missing]  # who came is taken for the one waited for the longest
        self._missing += [self._clock()] * (missing - len(self._missing))


def count_workers(
    states: Iterable[str], missing_since: Sequence[float], now: float, final_status: str | None = None
) -> dict[str, int]:
    """Count workers as Cortex does.

    Parameters
    ----------
    states : iterable of str
        Of those that are there: ``initializing``, ``running``, ``idle`` (between two splits) or ``failed``.
    missing_since : sequence of float
        For each of those that are not there yet, since when.
    now : float
        The time, by the same clock.
    final_status : str, optional
        The status of a job that has ended; None: it has not.

    Examples
    --------
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
