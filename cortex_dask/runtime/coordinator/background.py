"""A coordinator that runs in a thread of this process, so that the main thread is free for users and signals."""

from __future__ import annotations

import atexit
import contextlib
import sys
import threading

from cortex_dask.errors import CortexDaskError
from cortex_dask.io.job.directory import JobDirectory
from cortex_dask.runtime.cluster import Cluster
from cortex_dask.runtime.coordinator.status_board import Document, Listener

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
        self._document: Document | None = None
        self._listener: Listener | None = None
        #: The last status document that the coordinator has shown.
        self.latest: Document | None = None

    def start(self, on_status: Listener | None = None) -> None:
        """Start the coordinator; ``on_status`` is called about once a second, from another thread."""
        self._listener = on_status
        self._started = True
        if self._cluster.runs_inline:
            self._run_job()
            if isinstance(self._error, KeyboardInterrupt):
                raise self._error
            return
        _stop_at_exit(self)
        threading.Thread(target=self._run_job, name=f"cortex-dask-{self._job.url}", daemon=True).start()

    @property
    def running(self) -> bool:
        """Whether the coordinator runs."""
        # Not the thread's own word: a signal during Thread.join() makes Python before 3.13 take a thread for ended.
        return self._started and not self._ended.is_set()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until the coordinator has ended; returns whether it has."""
        return self._ended.wait(timeout)

    def result(self) -> Document:
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

    def _run_job(self) -> None:
        from cortex_dask.runtime.coordinator import coordinator  # in this thread, while the caller continues

        run = coordinator.retry_failed if self._retry else coordinator.run_job
        try:
            self._document = run(self._job.url, self._cluster, on_status=self._on_status)
        except BaseException as error:  # noqa: BLE001 - raised by result() in the thread that waits
            self._error = error
        finally:
            self._ended.set()

    def _on_status(self, document: Document) -> None:
        self.latest = document
        if self._listener is not None:
            self._listener(document)


def _stop_at_exit(background: BackgroundRun) -> None:
    # The ordinary hook runs after concurrent.futures has started to refuse work, which a coordinator needs in order to
    # stop; the one before has no public name.
    register = getattr(threading, "_register_atexit", atexit.register)
    register(background.stop_now)
