"""What ends a job before all its splits are done: a request, its timeout, its failures, or another coordinator."""

from __future__ import annotations

import contextlib
import time

from cortex_dask.formatting import plural
from cortex_dask.io.job.directory import JobDirectory
from cortex_dask.io.job.settings import LimitSettings
from cortex_dask.runtime.coordinator.heartbeat import Heartbeat
from cortex_dask.runtime.coordinator.status_board import Document
from cortex_dask.runtime.coordinator.totals import JobTotals

STOP_CHECK = 1.0  # seconds between two checks for a request to stop
STOP_GRACE = 6.0  # seconds in which running splits have to answer "stopped"


class Ended(Exception):  # noqa: N818 - a signal within the coordinator
    """The job ends before all splits are done, with this status and reason."""

    def __init__(self, status: str, reason: str) -> None:
        super().__init__(reason)
        self.status = status
        self.reason = reason


class Overtaken(Exception):  # noqa: N818 - a signal within the coordinator
    """Another coordinator has ended the job, or runs it, because this one seemed dead."""

    def __init__(self, document: Document) -> None:
        super().__init__(f"another coordinator has taken the job over; its status is {document['status']!r}")
        self.document = document


class Limits:
    """The checks of one run of a job; each raises :class:`Ended` or :class:`Overtaken` when the job must not go on."""

    def __init__(self, job: JobDirectory, settings: LimitSettings, heartbeat: Heartbeat, totals: JobTotals) -> None:
        self._job = job
        self._settings = settings
        self._heartbeat = heartbeat
        self._totals = totals
        self._failed_before = 0  # batches that had failed before this run sent its first split
        self._deadline: float | None = None  # planning does not count
        self._next_stop_check = 0.0

    def start_clock(self) -> None:
        """Count the job's time and its new failures from now on, as splits are about to be sent."""
        self._failed_before = self._totals.failed_batches
        self._deadline = time.monotonic() + self._settings.timeout if self._settings.timeout else None

    def check(self) -> None:
        """Check everything."""
        self._check_time()
        self.check_failures()
        self.check_stop()

    def check_end(self) -> None:
        """Check everything but the failures, while none are added."""
        self._check_time()
        self.check_stop()

    def check_failures(self) -> None:
        """Check the number of batches that have failed for good."""
        allowed = self._settings.max_failed_batches
        if allowed is not None:
            bound = allowed if allowed >= 1 or allowed == 0 else allowed * self._totals.total_batches
            # Who resumes a job that was stopped for its failures knows them: from then on, only new ones count.
            known = self._failed_before if self._failed_before > bound else 0
            if self._totals.failed_batches - known > bound:
                failed = plural(self._totals.failed_batches, "batch", "batches")
                raise Ended(
                    "worker error",
                    f"stopped early: {failed} failed for good, max_failed_batches allows {bound:g}",
                )

    def check_stop(self) -> None:
        """Check for a request to stop, if the last check was a moment ago or :meth:`expect_stop` was called."""
        now = time.monotonic()
        if now >= self._next_stop_check:
            self._next_stop_check = now + STOP_CHECK
            request = self._job.stop_request()
            if request is not None:
                raise Ended(request["status"], request["reason"])

    def expect_stop(self) -> None:
        """Have the next check read the request to stop: splits have ended as if there were one."""
        self._next_stop_check = 0.0

    def _check_time(self) -> None:
        """Check the job's time, and that the job is still this coordinator's."""
        self._check_overtaken()
        if self._deadline is not None and time.monotonic() > self._deadline:
            with contextlib.suppress(OSError):
                self._heartbeat.check_overtaken()  # another one may have ended the job while this process slept
            self._check_overtaken()
            timeout = self._settings.timeout
            raise Ended("timed out", f"the job took longer than its timeout of {timeout:g} s")

    def _check_overtaken(self) -> None:
        if self._heartbeat.overtaken is not None:
            raise Overtaken(self._heartbeat.overtaken)
