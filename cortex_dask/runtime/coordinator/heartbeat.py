"""The thread that writes a job's status document with a heartbeat, and who else runs the job by that document."""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
import time
from datetime import UTC, datetime
from types import TracebackType
from typing import Self

import psutil

from cortex_dask.io.job.directory import JobDirectory
from cortex_dask.io.job.status import COMPLETE_STATUSES, FINAL_STATUSES
from cortex_dask.runtime.coordinator.status_board import Document, Listener, StatusBoard
from cortex_dask.runtime.coordinator.totals import JobTotals

_log = logging.getLogger(__name__)

#: A coordinator whose heartbeat is older than this is taken for dead: some missed beats, also on a slow store.
HEARTBEAT_LIMIT = 15.0
#: Seconds between two documents on a local disk, and on an object store, where a request costs money and time.
_LOCAL_SECONDS, _REMOTE_SECONDS = 1.0, 2.0


class Heartbeat:
    """Writes the status document once in a while, and shows it to a listener; a context around the run of a job.

    The listener is called from the thread, and not any more once it has raised.
    """

    def __init__(
        self,
        job: JobDirectory,
        board: StatusBoard,
        listener: Listener | None = None,
        interval: float | None = None,
    ) -> None:
        self._job = job
        self._board = board
        self._listener = listener
        self._interval = interval or (_LOCAL_SECONDS if job.store.is_local else _REMOTE_SECONDS)
        self._metrics_version = 0
        self._stopped = threading.Event()
        self._woken = threading.Event()
        self._thread = threading.Thread(target=self._beat_on, name="cortex-dask-heartbeat", daemon=True)
        self._claimed = False  # by our first document, which replaces the one of an earlier coordinator
        self._ended = False  # we have written a final status
        self._last_beat = time.time()
        self.errors: list[str] = []
        #: The status document of the coordinator that has taken the job over or ended it; None: it is ours.
        self.overtaken: Document | None = None

    def __enter__(self) -> Self:
        """Write the first document and start the thread."""
        self.beat()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop the thread and write the last document.

        Raises :class:`StorageError` if it cannot be written, as readers of the status would believe that the job still
        runs; unless another exception ends the run already.
        """
        self._stopped.set()
        self._woken.set()
        self._thread.join()
        with contextlib.nullcontext() if error is None else contextlib.suppress(OSError):
            self.beat()

    def beat(self) -> None:
        """Write the document now, unless the job is another coordinator's by now."""
        document = self._board.document()
        if self.check_overtaken(document["status"]) is not None:
            return
        self._write_metrics()
        self._job.write_json("status.json", document)
        self._claimed, self._last_beat = True, time.time()
        self._ended = document["status"] in FINAL_STATUSES
        if self._listener is not None:
            try:
                self._listener(document)
            except Exception:  # noqa: BLE001 - a display may raise anything, and the job does not depend on it
                self._listener = None
                _log.warning("the job goes on, but is no longer shown: its listener failed", exc_info=True)

    def beat_soon(self) -> None:
        """Write the document at once, from the thread: something has changed that other processes wait for."""
        self._woken.set()

    def check_overtaken(self, status: str = "running") -> Document | None:
        """Return the document of the coordinator that has ended the job, or has taken it over from this one, if any.

        A process that was suspended, or cut off from its store, must not overwrite a final status: it would turn a job
        that succeeded into one that timed out. ``status`` is what this coordinator is about to write. That the output
        is complete is a fact, whichever coordinator finds it out; so it replaces another one's ``stopped`` or failure.
        """
        if self.overtaken is None and self._claimed and not self._ended:
            stored: Document | None = self._job.read_json("status.json")
            if stored is not None and self._is_overtaken_by(stored, status):
                self.overtaken = stored
        return self.overtaken

    def _is_overtaken_by(self, stored: Document, status: str) -> bool:
        if stored["status"] in FINAL_STATUSES:
            return status not in COMPLETE_STATUSES or stored["status"] in COMPLETE_STATUSES
        # Two that were started by force share the job; one that was taken for dead leaves it to the other.
        seemed_dead = time.time() - self._last_beat > HEARTBEAT_LIMIT
        return seemed_dead and (stored.get("coordinator") or {}).get("id") != self._board.coordinator_id

    def _write_metrics(self) -> None:
        version = self._board.metrics_version
        if version != self._metrics_version:
            try:
                self._job.write_json("metrics.json", self._board.metrics())
                self._metrics_version = version
            except OSError as error:
                self.errors = [str(error)]  # metrics never end a job

    def _beat_on(self) -> None:
        while True:
            self._woken.wait(self._interval)
            self._woken.clear()
            if self._stopped.is_set():
                return
            try:
                self.beat()
            except Exception as error:  # noqa: BLE001 - without a heartbeat, a second coordinator would start
                # A status that could not be written is written a moment later; it never ends the job.
                self.errors = [str(error)]


def running_elsewhere(document: Document | None, own_id: str) -> Document | None:
    """Return the other coordinator that a status document shows to be alive, or None.

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


def write_failure(job: JobDirectory, reason: str) -> None:
    """Write ``worker error`` as the status of a job whose coordinator could not run, unless the job has ended."""
    document = job.read_json("status.json")
    if document is None:
        document = StatusBoard(job.settings(), JobTotals()).document()
    if document["status"] in FINAL_STATUSES:
        return
    ended = datetime.now(UTC).isoformat(timespec="milliseconds")
    job.write_json(
        "status.json", {**document, "status": "worker error", "status_reason": reason, "end_time": ended, "eta": None}
    )
