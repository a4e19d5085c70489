"""The status document of a job, and the pulse that keeps it fresh.

The document has the keys that a Cortex user knows (``status``, ``total_batch_count``, ``batch_metrics``,
``worker_counts`` …) and ours beside them. It also says which coordinator runs the job, with a heartbeat, so that a
second one does not begin by mistake.
"""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime

import psutil

from cortex_dask.io.job.directory import JobDirectory
from cortex_dask.io.job.status import COMPLETE_STATUSES, FINAL_STATUSES
from cortex_dask.runtime.coordinator.status_board import Document, StatusBoard

_log = logging.getLogger(__name__)

#: A coordinator whose heartbeat is older than this is taken for dead: some missed beats, also on a slow store.
HEARTBEAT_LIMIT = 15.0


class Heartbeat:
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


def write_failure(job: JobDirectory, reason: str) -> None:
    """Write ``worker error`` as the status of a job whose coordinator could not run, unless the job has ended."""
    document = job.read_json("status.json")
    if document is None:
        document = StatusBoard(job.settings()).document()
    if document["status"] in FINAL_STATUSES:
        return
    ended = datetime.now(UTC).isoformat(timespec="milliseconds")
    job.write_json(
        "status.json", {**document, "status": "worker error", "status_reason": reason, "end_time": ended, "eta": None}
    )
