"""The watchdog of a detached coordinator: it starts the coordinator, and restarts it when it dies.

In the background of one machine it is a process. On a scheduler it is a thread of the scheduler's process, so that the
event loop is never blocked; there the coordinator's standard input stays open, and its end tells the coordinator that
the scheduler's process has ended, however that happened.

What a coordinator needs to know, credentials among it, is the first line of its standard input: everybody on the host
can read a command line.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Self

import orjson

from cortex_dask.errors import ClusterError, CortexDaskError
from cortex_dask.io.job.directory import JobDirectory
from cortex_dask.io.job.status import FINAL_STATUSES
from cortex_dask.runtime.coordinator.heartbeat import running_elsewhere, write_failure
from cortex_dask.runtime.worker.launch import python_command

_log = logging.getLogger(__name__)

#: The exit code of a coordinator whose job is run by another one.
ELSEWHERE = 75  # EX_TEMPFAIL of sysexits.h
#: Restarts in a row without any progress of the job.
RESTARTS = 5
_PAUSE = 1.0  # seconds before the first restart, doubled each time
_LONGEST_PAUSE = 30.0
_EXIT_SECONDS = 12.0  # a coordinator that has lost its scheduler stops its splits, and writes its status


@dataclass(frozen=True, slots=True)
class CoordinatorOrder:
    """What a coordinator reads when it starts."""

    job_url: str
    cluster: str  # what --cluster takes, or the scheduler's address
    backend: str | None = None  # on a scheduler, the class to be used as module:class; None: what cluster names
    retry: bool = False  # whether the failed batches are handled again
    tls: Mapping[str, str | None] | None = field(default=None, repr=False)  # ca, cert and key: paths or PEM texts

    def to_json(self) -> dict[str, Any]:
        """Return it as plain JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """Build an order from what :meth:`to_json` returned."""
        return cls(**value)


class Watchdog:
    """Starts a coordinator, and restarts it as long as that helps."""

    def __init__(self, order: CoordinatorOrder, *, restarts: int = RESTARTS, pause: float = _PAUSE) -> None:
        self._order = order
        self._most_restarts = restarts
        self._pause = pause  # seconds before the first restart
        self._process: subprocess.Popen[bytes] | None = None
        self._closing = threading.Event()
        self._finished = threading.Event()
        self._lock = threading.RLock()  # a signal may come while it is held
        self._restarts = 0  # since the job last made progress
        self._progress: tuple[int, ...] = ()
        self._status_at_start: dict[str, Any] | None = None

    @functools.cached_property
    def _job(self) -> JobDirectory:
        # Not in the constructor, which a scheduler's event loop calls: a remote store takes time to open.
        return JobDirectory(self._order.job_url)

    @property
    def is_finished(self) -> bool:
        """Whether the coordinator has ended and is not restarted any more."""
        return self._finished.is_set()

    def start_coordinator(self) -> int:
        """Start the coordinator and return its process id; raises OSError if no process can be started."""
        with contextlib.suppress(CortexDaskError, OSError):
            self._status_at_start = self._job.read_json("status.json")
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
        with contextlib.suppress(BrokenPipeError):  # it has died at once, which watch() will see
            process.stdin.write(orjson.dumps(self._order.to_json()) + b"\n")
            process.stdin.flush()
        if self._order.backend is None:
            process.stdin.close()  # it outlives this process
        if self._closing.is_set():
            process.terminate()
        return process.pid

    def watch(self) -> None:
        """Wait for the end of the coordinator, and restart it, until the job has ended or restarts do not help."""
        try:
            while True:
                assert self._process is not None
                code = self._process.wait()
                if self._process.stdin is not None:
                    self._process.stdin.close()
                if not self._should_restart(code):
                    return
                try:
                    self.start_coordinator()
                except ClusterError:
                    return
                except OSError as error:
                    _log.warning("the coordinator of %s cannot be started: %s", self._order.job_url, error)
        finally:
            self._finished.set()

    def close(self) -> None:
        """End the coordinator cleanly, because the scheduler ends; returns when it has ended."""
        with self._lock:
            self._closing.set()
            process = self._process
        if process is None:
            return
        if process.stdin is not None:
            process.stdin.close()  # which tells it to end
        try:
            process.wait(_EXIT_SECONDS)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(OSError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def interrupt(self) -> None:
        """Have the coordinator stop cleanly; it is not restarted."""
        with self._lock:
            self._closing.set()
            if self._process is not None:
                self._process.terminate()

    # when it has ended ----------------------------------------------------------------------------------------------

    def _should_restart(self, code: int) -> bool:
        """Decide whether to restart a coordinator that ended with this exit code, and pause before the restart."""
        if code in (0, ELSEWHERE) or self._closing.is_set():
            return False
        try:
            if self._has_job_ended():
                return False
            progress = self._measure_progress()
        except (CortexDaskError, OSError) as error:
            _log.warning("the job directory %s cannot be read: %s", self._order.job_url, error)
            progress = self._progress  # as if there were none: the store may answer later
        if progress != self._progress:
            self._progress, self._restarts = progress, 0
        self._restarts += 1
        if self._restarts > self._most_restarts:
            self._give_up(code)
            return False
        pause = min(self._pause * 2 ** (self._restarts - 1), _LONGEST_PAUSE)
        end = _describe_exit(code)
        _log.warning("the coordinator of %s %s; it is started again in %g s", self._order.job_url, end, round(pause, 1))
        return not self._closing.wait(pause)

    def _has_job_ended(self) -> bool:
        """Return whether the job has a final status, or another coordinator."""
        document = self._job.read_json("status.json")
        if document is None or document == self._status_at_start:
            return False  # the coordinator has died before it wrote a status
        return document["status"] in FINAL_STATUSES or running_elsewhere(document, "") is not None

    def _measure_progress(self) -> tuple[int, ...]:
        """Return numbers that grow with the job."""
        store = self._job.store
        return (len(store.names("plan/")), len(store.names("ledger/")), len(store.names("delivered/")))

    def _give_up(self, code: int) -> None:
        reason = (
            f"the coordinator has died {self._restarts} times in a row without progress; the last one "
            f"{_describe_exit(code)} on {socket.gethostname()} (the job can be resumed)"
        )
        _log.error("%s: %s", self._order.job_url, reason)
        with contextlib.suppress(CortexDaskError, OSError):
            write_failure(self._job, reason)


def _describe_exit(code: int) -> str:
    if code >= 0:
        return f"ended with exit code {code}"
    try:
        return f"was killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"was killed by signal {-code}"
