"""Keeps a coordinator alive that nobody waits for: beside a scheduler, or in the background on one machine.

A keeper starts the coordinator as a process of its own, looks on, and starts it again when it has died while the job
has no final status. In the process of a scheduler it is a thread: the scheduler's event loop starts nothing, plans
nothing and waits for nothing. There, the coordinator's standard input is its lifeline: when the scheduler's process
ends, however it ends, the coordinator notices and ends itself, with a status that says so.

What a coordinator needs to know, credentials among it, is the first line of its standard input: a command line is seen
by everybody on the host.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Self

from cortex_dask.errors import ClusterError, CortexDaskError
from cortex_dask.runtime.worker.launch import python_command

if TYPE_CHECKING:
    from cortex_dask.io.job.directory import JobDirectory

_log = logging.getLogger(__name__)

#: The exit code of a coordinator that has found another one at the job.
ELSEWHERE = 75  # EX_TEMPFAIL of sysexits.h
#: How often in a row a coordinator is started again without any progress of the job.
_RESTARTS = 5
_PAUSE = 1.0  # seconds before the first of those, doubled each time
_LONGEST_PAUSE = 30.0
_END_SECONDS = 12.0  # a coordinator that has lost its scheduler halts, and writes its status


@dataclass(frozen=True, slots=True)
class CoordinatorOrder:
    """What a coordinator is told when it is started.

    Attributes
    ----------
    job_url : str
        The job directory.
    cluster : str
        Where the splits run: what ``--cluster`` takes, or the scheduler's address.
    backend : str, optional
        The class to be used, as ``module:class``, for a coordinator beside its scheduler; None: what ``cluster`` names.
    retry : bool
        Whether the failed batches are handled again.
    tls : mapping of str to str, optional
        ``ca``, ``cert`` and ``key`` for the scheduler: paths, or the PEM texts themselves.
    """

    job_url: str
    cluster: str
    backend: str | None = None
    retry: bool = False
    tls: Mapping[str, str | None] | None = field(default=None, repr=False)

    def to_json(self) -> dict[str, Any]:
        """Return it as plain JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """Build an order from what :meth:`to_json` returned."""
        return cls(**value)


class Watchdog:
    """Starts a coordinator, and starts it again as long as that helps.

    Parameters
    ----------
    order : Order
        For the coordinator.
    """

    def __init__(self, order: CoordinatorOrder) -> None:
        self._order = order
        self._process: subprocess.Popen[bytes] | None = None
        self._closing = threading.Event()
        self._over = threading.Event()
        self._lock = threading.RLock()  # a signal may come while it is held
        self._restarts = 0
        self._progress: tuple[int, ...] = ()
        self._before: dict[str, Any] | None = None

    @property
    def over(self) -> bool:
        """Whether there is nothing left to look after."""
        return self._over.is_set()

    def begin(self) -> int:
        """Start the coordinator; returns its process id.

        Raises
        ------
        OSError
            If no process can be started.
        """
        import orjson

        self._before = self._status()
        with self._lock:
            if self._closing.is_set():
                raise ClusterError("the scheduler is closing")
            process = subprocess.Popen(
                [sys.executable, *python_command("cortex_dask.clusters.detached.main", "coordinate")],
                stdin=subprocess.PIPE,
                cwd="/",  # the folder of this process may be removed while the job runs
                start_new_session=True,  # the terminal's Ctrl-C is not for it
            )
            self._process = process
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has died at once, which is seen in a moment
            process.stdin.write(orjson.dumps(self._order.to_json()) + b"\n")
            process.stdin.flush()
        if self._order.backend is None:
            process.stdin.close()  # it outlives this process
        if self._closing.is_set():
            process.terminate()
        return process.pid

    def watch(self) -> None:
        """Look on until the job has ended, or cannot be helped."""
        try:
            while True:
                assert self._process is not None
                code = self._process.wait()
                if self._process.stdin is not None:
                    self._process.stdin.close()
                if not self._goes_on(code):
                    return
                try:
                    self.begin()
                except ClusterError:
                    return
                except OSError as error:
                    _log.warning("the coordinator of %s cannot be started: %s", self._order.job_url, error)
        finally:
            self._over.set()

    def close(self) -> None:
        """End the coordinator in good order, because the scheduler ends; returns when it has ended."""
        with self._lock:
            self._closing.set()
            process = self._process
        if process is None:
            return
        if process.stdin is not None:
            process.stdin.close()  # its lifeline
        try:
            process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(OSError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def interrupt(self) -> None:
        """Have the coordinator stop in good order; it is not started again."""
        with self._lock:
            self._closing.set()
            if self._process is not None:
                self._process.terminate()

    # when it has ended ----------------------------------------------------------------------------------------------

    def _goes_on(self, code: int) -> bool:
        """Decide whether to start it again, and wait for the moment."""
        if code in (0, ELSEWHERE) or self._closing.is_set():
            return False
        try:
            if self._is_final():
                return False
            progress = self._measure()
        except (CortexDaskError, OSError) as error:
            _log.warning("the job directory %s cannot be read: %s", self._order.job_url, error)
            progress = self._progress  # as if there were none: it may answer later
        if progress != self._progress:
            self._progress, self._restarts = progress, 0
        self._restarts += 1
        if self._restarts > _RESTARTS:
            self._give_up(code)
            return False
        pause = min(_PAUSE * 2 ** (self._restarts - 1), _LONGEST_PAUSE)
        _log.warning(
            "the coordinator of %s %s; it is started again in %g s", self._order.job_url, _how(code), round(pause, 1)
        )
        return not self._closing.wait(pause)

    def _is_final(self) -> bool:
        from cortex_dask.io.job.status import FINAL_STATUSES
        from cortex_dask.runtime.coordinator.heartbeat import running_elsewhere

        document = self._read_status()
        if document is None or document == self._before:
            return False  # it has died before it could say anything
        return document["status"] in FINAL_STATUSES or running_elsewhere(document, "") is not None

    def _measure(self) -> tuple[int, ...]:
        """Return numbers that grow with the job."""
        store = self._directory().store
        return (len(store.names("plan/")), len(store.names("ledger/")), len(store.names("delivered/")))

    def _give_up(self, code: int) -> None:
        reason = (
            f"the coordinator has died {_RESTARTS + 1} times in a row without progress; the last one {_how(code)} on "
            f"{socket.gethostname()} (the job can be resumed)"
        )
        _log.error("%s: %s", self._order.job_url, reason)
        with contextlib.suppress(CortexDaskError, OSError):
            note_end(self._directory(), reason)

    def _status(self) -> dict[str, Any] | None:
        try:
            return self._read_status()
        except (CortexDaskError, OSError):
            return None

    def _read_status(self) -> dict[str, Any] | None:
        document: dict[str, Any] | None = self._directory().read_json("status.json")
        return document

    def _directory(self) -> JobDirectory:
        from cortex_dask.io.job.directory import JobDirectory

        return JobDirectory(self._order.job_url)


def note_end(job: JobDirectory, reason: str) -> None:
    """Write ``worker error`` as the status of a job whose coordinator cannot do it, unless it has ended by itself."""
    from datetime import UTC, datetime

    from cortex_dask.io.job.status import FINAL_STATUSES
    from cortex_dask.runtime.coordinator.status_board import StatusBoard

    document = job.read_json("status.json")
    if document is None:
        document = StatusBoard(job.settings()).document()
    if document["status"] in FINAL_STATUSES:
        return
    ended = datetime.now(UTC).isoformat(timespec="milliseconds")
    job.write_json(
        "status.json", {**document, "status": "worker error", "status_reason": reason, "end_time": ended, "eta": None}
    )


def _how(code: int) -> str:
    if code >= 0:
        return f"ended with exit code {code}"
    try:
        return f"was killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"was killed by signal {-code}"
