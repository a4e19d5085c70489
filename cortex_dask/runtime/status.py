"""The status document of a job, and the pulse that keeps it fresh.

The document has the keys that a Cortex user knows (``status``, ``total_batch_count``, ``batch_metrics``,
``worker_counts`` …) and ours beside them. It also says which coordinator runs the job, with a heartbeat, so that a
second one does not begin by mistake.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import psutil

from cortex_dask.io.job_directory import JobDirectory
from cortex_dask.io.settings import JobSettings
from cortex_dask.progress import COMPLETE_STATUSES, FINAL_STATUSES
from cortex_dask.runtime.metrics import describe
from cortex_dask.runtime.tally import Tally
from cortex_dask.runtime.workers import Workers

__all__ = ["FINAL_STATUSES", "Pulse", "StatusBoard", "running_elsewhere"]

_log = logging.getLogger(__name__)

#: A coordinator whose heartbeat is older than this is taken for dead: some missed beats, also on a slow store.
HEARTBEAT_LIMIT = 15.0

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
        self.tally: Tally | None = None
        self.splits_total = 0
        self.undelivered = 0  # dead letters that could not be delivered where the submission says
        self._inflight: dict[int, dict[int, dict[str, int]]] = {}  # by split and attempt
        self._workers = Workers(settings.workers)
        self._run_began = time.monotonic()
        self._batches_before = 0
        self._rows_before = 0

    def begin(self, tally: Tally, splits_total: int) -> None:
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


class Pulse:
    """Writes the status document once in a while until it is stopped, and shows it to a listener.

    Parameters
    ----------
    job : JobDirectory
        Where ``status.json`` is written.
    board : StatusBoard
        What is written.
    listener : callable, optional
        Called with each document, from the pulse's thread; not any more once it has raised.
    """

    def __init__(
        self, job: JobDirectory, board: StatusBoard, listener: Callable[[Document], None] | None = None
    ) -> None:
        self._job = job
        self._board = board
        self._listener = listener
        self._metrics_version = 0
        self._stopped = threading.Event()
        self._woken = threading.Event()
        # An object store is asked less often: a request there costs money and tens of milliseconds.
        self._interval = 1.0 if job.store.is_local else 2.0
        self._thread = threading.Thread(target=self._run, name="cortex-dask-pulse", daemon=True)
        self._claimed = False  # by our first document, which replaces whatever an earlier coordinator has left
        self._ended = False  # we have written a final status
        self._beaten = time.time()
        self.errors: list[str] = []
        #: The status document of the coordinator that has taken the job over or ended it; None: it is ours.
        self.overtaken: Document | None = None

    def start(self) -> None:
        """Write the first document and begin."""
        self.beat()
        self._thread.start()

    def beat(self) -> None:
        """Write the document now, unless the job is another coordinator's by now."""
        document = self._board.document()
        if self.look(document["status"]) is not None:
            return
        self._write_metrics()
        self._job.write_json("status.json", document)
        self._claimed, self._beaten = True, time.time()
        self._ended = document["status"] in FINAL_STATUSES
        if self._listener is not None:
            try:
                self._listener(document)
            except Exception:  # noqa: BLE001 - whatever a display raises
                # It only looks on: the job and its heartbeat go on without it.
                self._listener = None
                _log.warning("the job goes on, but is no longer shown: its listener failed", exc_info=True)

    def look(self, status: str = "running") -> Document | None:
        """Look whether another coordinator has ended the job, or has taken it over while this one seemed dead.

        A process that was suspended, or cut off from its store, must not put its own view over the end of the story:
        it would turn a job that succeeded into one that timed out.

        Parameters
        ----------
        status : str
            What this coordinator is about to say. That the output is whole is a fact, whoever finds it out; so it
            stands over another's word that the job was stopped or failed.

        Returns
        -------
        dict or None
            :attr:`overtaken`.
        """
        if self.overtaken is None and self._claimed and not self._ended:
            there: Document | None = self._job.read_json("status.json")
            if there is not None and self._is_overtaken_by(there, status):
                self.overtaken = there
        return self.overtaken

    def _is_overtaken_by(self, there: Document, status: str) -> bool:
        if there["status"] in FINAL_STATUSES:
            return status not in COMPLETE_STATUSES or there["status"] in COMPLETE_STATUSES
        # Two that were started by force share the job; one that was taken for dead leaves it to the other.
        was_dead = time.time() - self._beaten > HEARTBEAT_LIMIT
        return was_dead and (there.get("coordinator") or {}).get("id") != self._board.coordinator_id

    def _write_metrics(self) -> None:
        version = self._board.metrics_version
        if version != self._metrics_version:
            try:
                self._job.write_json("metrics.json", self._board.metrics())
                self._metrics_version = version
            except OSError as error:
                self.errors = [str(error)]  # metrics never end a job

    def soon(self) -> None:
        """Write the document at once, from the pulse's own thread: something has changed that others look for."""
        self._woken.set()

    def stop(self) -> None:
        """Write the last document and end.

        Raises
        ------
        StorageError
            If it cannot be written: whoever reads the status later believes that the job still runs.
        """
        self._stopped.set()
        self._woken.set()
        if self._thread.is_alive():
            self._thread.join()
        self.beat()

    def _run(self) -> None:
        while True:
            self._woken.wait(self._interval)
            self._woken.clear()
            if self._stopped.is_set():
                return
            try:
                self.beat()
            except Exception as error:  # noqa: BLE001 - without a heartbeat, a second coordinator would begin
                # A status that could not be written is written a moment later; it never ends the job.
                self.errors = [str(error)]


def running_elsewhere(document: Document | None, own_id: str) -> Document | None:
    """Return the coordinator that a status document shows to be alive, or None.

    A coordinator on this host is alive when its process is; elsewhere while its heartbeat is younger than
    :data:`HEARTBEAT_LIMIT` seconds.
    """
    if document is None or document["status"] in FINAL_STATUSES:
        return None
    other: Document = document.get("coordinator") or {}
    if not other or other["id"] == own_id:
        return None
    if other["host"] == socket.gethostname():
        fresh = time.time() - other["heartbeat"] < HEARTBEAT_LIMIT
        return other if psutil.pid_exists(other["pid"]) and fresh else None
    return other if time.time() - other["heartbeat"] < HEARTBEAT_LIMIT else None


def _iso(seconds: float | None) -> str | None:
    return None if seconds is None else datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds")
