"""The calling thread: no processes, no threads, for debuggers and unit tests."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from cortex_dask.io.job.records import Outcome, SplitTask
from cortex_dask.io.job.settings import JobSettings
from cortex_dask.runtime.cluster import Cluster, Done, Report
from cortex_dask.runtime.handler_process import inline


class Inline(Cluster):
    """Runs every split where it is submitted; breakpoints in the handler work."""

    name = "inline"
    runs_inline = True

    def __init__(self) -> None:
        self._job_url = ""
        self._report: Report = lambda event: None

    def start(self, job_url: str, settings: JobSettings, report: Report, check: Callable[[], None]) -> None:
        """Remember the job; there is nothing to start."""
        self._job_url, self._report = job_url, report

    def slots(self) -> int:
        """Return 1."""
        return 1

    def queue_depth(self) -> int:
        """Return 0: a split has ended when it has been sent."""
        return 0

    def submit(self, tasks: Sequence[tuple[SplitTask, Done]], *, elsewhere: bool = False) -> None:
        """Run the splits now."""
        for task, done in tasks:
            done(inline.run_split(task, self._report))

    def complete(self) -> Outcome:
        """Run ``on_job_complete`` on the job's only handler."""
        return inline.run_completion(self._job_url)

    def stop(self, reason: str) -> None:
        """Do nothing: between two splits nothing runs."""

    def close(self) -> None:
        """Forget the job's handler."""
        inline.close_job(self._job_url)
