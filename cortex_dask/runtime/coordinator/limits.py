"""What ends a job before all its splits are done: a request, its timeout, its failures, or another coordinator."""

from __future__ import annotations

import contextlib
import time

from cortex_dask.io.job.directory import JobDirectory
from cortex_dask.io.job.settings import LimitSettings
from cortex_dask.runtime.coordinator.heartbeat import Heartbeat
from cortex_dask.runtime.coordinator.status_board import Document
from cortex_dask.runtime.coordinator.totals import JobTotals

STOP_CHECK = 1.0  # seconds between two looks for a request to stop
STOP_GRACE = 6.0  # seconds that what runs gets to answer "stopped"


class Ended(Exception):  # noqa: N818 - a signal within the coordinator
    """The job ends before all splits are done, with this status and reason."""

    def __init__(self, status: str, reason: str) -> None:
        super().__init__(reason)
        self.status = status
        self.reason = reason


class Overtaken(Exception):  # noqa: N818 - a signal within the coordinator
    """Another coordinator has ended the job, or runs it, since this one was taken for dead."""

    def __init__(self, document: Document) -> None:
        super().__init__(f"another coordinator has taken the job over; its status is {document['status']!r}")
        self.document = document


class Limits:
    """The checks of one run of a job; each raises :class:`Ended` or :class:`Overtaken` when the job is not to go on.

    Parameters
    ----------
    job : JobDirectory
        Where a request to stop lies.
    settings : LimitSettings
        The job's limits.
    pulse : Pulse
        Knows whether another coordinator has the job.
    """

    def __init__(self, job: JobDirectory, settings: LimitSettings, pulse: Heartbeat) -> None:
        self._job = job
        self._settings = settings
        self._pulse = pulse
        self._deadline: float | None = None  # until splits are about to be sent, time does not count
        self._next_stop_check = 0.0

    def begin(self, tally: JobTotals) -> None:
        """Say that splits are about to be sent: the job's time and its new failures count from now on."""
        self._tally = tally
        self._failed_before = tally.failed_batches
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
            bound = allowed if allowed >= 1 or allowed == 0 else allowed * self._tally.total_batches
            # Whoever goes on with a job that was stopped for its failures has seen them: from then on, new ones count.
            seen = self._failed_before if self._failed_before > bound else 0
            if self._tally.failed_batches - seen > bound:
                raise Ended(
                    "worker error",
                    f"stopped early: {_batches(self._tally.failed_batches)} failed for good, "
                    f"max_failed_batches allows {bound:g}",
                )

    def check_stop(self) -> None:
        """Look for a request to stop, not more often than is useful."""
        now = time.monotonic()
        if now >= self._next_stop_check:
            self._next_stop_check = now + STOP_CHECK
            request = self._job.stop_request()
            if request is not None:
                raise Ended(request["status"], request["reason"])

    def expect_stop(self) -> None:
        """Take in that the job may have been stopped: the next check looks for the request."""
        self._next_stop_check = 0.0

    def _check_time(self) -> None:
        """Check the job's time, and that the job is still this coordinator's."""
        self._check_overtaken()
        if self._deadline is not None and time.monotonic() > self._deadline:
            with contextlib.suppress(OSError):
                self._pulse.look()  # the time may have passed while this process slept, and another one ended the job
            self._check_overtaken()
            timeout = self._settings.timeout
            raise Ended("timed out", f"the job took longer than its timeout of {timeout:g} s")

    def _check_overtaken(self) -> None:
        if self._pulse.overtaken is not None:
            raise Overtaken(self._pulse.overtaken)


def _batches(number: int) -> str:
    return "1 batch" if number == 1 else f"{number} batches"
