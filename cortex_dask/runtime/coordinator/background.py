"""A coordinator that runs in a thread of this process, so that the main thread stays free for people and signals."""

from __future__ import annotations

import atexit
import contextlib
import sys
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from cortex_dask.errors import CortexDaskError
from cortex_dask.io.job.directory import JobDirectory

if TYPE_CHECKING:
    from cortex_dask.runtime.cluster import Cluster

_EXIT_SECONDS = 15.0  # running handlers end within 5 s; the rest is for what they had finished, to be committed


class BackgroundRun:
    """One run of a job's coordinator.

    On a cluster that runs inline, :meth:`start` runs the whole job in the calling thread, where breakpoints work;
    otherwise it returns at once. When the interpreter exits while the job runs, the job is asked to stop and can be
    resumed: a process never hangs silently at its end, and never leaves handler processes behind.
    """

    def __init__(self, job: JobDirectory, cluster: Cluster, *, retry: bool, resume_hint: str) -> None:
        self._job = job
        self._cluster = cluster
        self._retry = retry
        self._resume_hint = resume_hint
        self._started = False
        self._ended = threading.Event()
        self._error: BaseException | None = None
        self._document: dict[str, Any] | None = None
        self._listener: Callable[[dict[str, Any]], None] | None = None
        #: The last status document that the coordinator has shown.
        self.latest: dict[str, Any] | None = None

    def start(self, on_status: Callable[[dict[str, Any]], None] | None = None) -> None:
        """Start the coordinator; ``on_status`` is called about once a second, from another thread."""
        self._listener = on_status
        self._started = True
        if self._cluster.runs_inline:
            self._run()
            if isinstance(self._error, KeyboardInterrupt):
                raise self._error
            return
        _stop_at_exit(self)
        threading.Thread(target=self._run, name=f"cortex-dask-{self._job.url}", daemon=True).start()

    @property
    def running(self) -> bool:
        """Whether the coordinator is at work."""
        # Not the thread's own word: a signal during Thread.join() makes Python before 3.13 take a thread for ended.
        return self._started and not self._ended.is_set()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until the coordinator has ended; returns whether it has."""
        return self._ended.wait(timeout)

    def result(self) -> dict[str, Any]:
        """Return the final status document, or raise what ended the coordinator."""
        if self._error is not None:
            raise self._error
        assert self._document is not None, "the coordinator has not ended"
        return self._document

    def stop_now(self) -> None:
        """Ask the job to stop, say so, and give it some seconds; called when the interpreter exits."""
        if not self.running:
            return
        sys.stderr.write(
            f"cortex-dask: this process ends, so its job is stopped. Go on with: {self._resume_hint} "
            "(call job.wait() to let a job finish)\n"
        )
        with contextlib.suppress(OSError, CortexDaskError):
            self._job.request_stop("stopped", "the process that ran the job ended")
        self.wait(_EXIT_SECONDS)

    def _run(self) -> None:
        from cortex_dask.runtime.coordinator import coordinator
        from cortex_dask.runtime.worker import spares

        run = coordinator.retry_failed if self._retry else coordinator.run_job
        try:
            self._document = run(self._job.url, self._cluster, on_status=self._show)
        except BaseException as error:  # noqa: BLE001 - whatever it is, it is raised by result() in the thread that waits
            self._error = error
            spares.discard()  # where the coordinator has failed before it had anything to do with its cluster
        finally:
            self._ended.set()

    def _show(self, document: dict[str, Any]) -> None:
        self.latest = document
        if self._listener is not None:
            self._listener(document)


def _stop_at_exit(background: BackgroundRun) -> None:
    # The ordinary hook comes after concurrent.futures has begun to refuse work, which the coordinator needs in order to
    # stop; the one before that has no public name.
    register = getattr(threading, "_register_atexit", atexit.register)
    register(background.stop_now)
