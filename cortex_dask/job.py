"""``Job``: the handle on one job, from any process that reaches its directory."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

from cortex_dask.clusters import detach, make_cluster, records
from cortex_dask.display import Display, SilentDisplay, next_commands, progress_line, status_html
from cortex_dask.errors import (
    CortexDaskError,
    InputError,
    JobFailedError,
    JobRunningError,
    JobStoppedError,
    JobTimedOutError,
    SpecError,
)
from cortex_dask.formatting import duration, parse_time, plural
from cortex_dask.io.job import failures as job_failures
from cortex_dask.io.job import logs as job_logs
from cortex_dask.io.job.directory import JobDirectory
from cortex_dask.io.job.ledger import Ledger
from cortex_dask.io.job.settings import JobSettings
from cortex_dask.io.job.status import COMPLETE_STATUSES, FINAL_STATUSES, Progress
from cortex_dask.io.output.directory import OutputDirectory
from cortex_dask.runtime.cluster import Cluster
from cortex_dask.runtime.coordinator.background import BackgroundRun
from cortex_dask.runtime.coordinator.heartbeat import running_elsewhere
from cortex_dask.runtime.coordinator.status_board import StatusBoard
from cortex_dask.spec.resolution import ResolvedJob

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

    from cortex_dask.io.output.reader import JobOutput


_POLL_SECONDS = 0.5  # the status document is written every second or two
_SHOW_SECONDS = 0.2  # how late a display may be
_START_SECONDS = 60.0  # a job without a coordinator after this long counts as abandoned
_DETACHED_START_SECONDS = 600.0  # a coordinator on its own cluster may have to wait for machines and images
_STOP_SECONDS = 60.0  # running handlers end within 5 s; committing what they had finished may take longer


class Job:
    """A job, whichever process or cluster runs it.

    ::

        job = cx.submit(Handler, "data/in", "data/out", batch_size=1024)
        job.progress, job.wait(), job.logs(level="warning"), job.failures(), job.to_pandas()

        job = cx.Client().get_job("digits", "20260131-120000-1f2e3d")   # in another process, on another day

    Parameters
    ----------
    url : str
        The job directory.
    cluster : str or Cluster, optional
        Where :meth:`resume` and :meth:`retry_failed` run it; None: where it was submitted to.
    environment : str, optional
        The name of the environment, for the commands that messages show; None: the default one.
    """

    def __init__(self, url: str, *, cluster: str | Cluster | None = None, environment: str | None = None) -> None:
        self._directory = JobDirectory(url)
        self._chosen = cluster
        self._environment = environment
        self._background: BackgroundRun | None = None
        self._settings: JobSettings | None = None

    def __repr__(self) -> str:
        try:
            return f"<Job {self.api_name}/{self.job_id}: {progress_line(self.describe()).partition(': ')[2]}>"
        except (CortexDaskError, OSError):
            return f"<Job {self.url}: its directory cannot be read>"

    def _repr_html_(self) -> str:
        return status_html(self.describe())

    @property
    def url(self) -> str:
        """The job directory."""
        return self._directory.url

    @property
    def settings(self) -> JobSettings:
        """The resolved submission.

        Raises
        ------
        JobNotFoundError
            If there is no such job.
        """
        if self._settings is None:  # a cached_property of Python 3.11 lets only one job at a time be read
            self._settings = self._directory.settings()
        return self._settings

    @property
    def cluster(self) -> str | Cluster:
        """Where it runs."""
        return self.settings.cluster.name if self._chosen is None else self._chosen

    def move(self, settings: JobSettings) -> None:
        """Replace the job's settings, with another cluster."""
        self._directory.move(settings)
        self._settings = None

    @property
    def job_id(self) -> str:
        """The job's id."""
        return self.settings.job_id

    @property
    def api_name(self) -> str:
        """The name of the API that the job belongs to."""
        return self.settings.api_name

    @property
    def output(self) -> str | None:
        """The URL of the output directory; None when the job writes none."""
        return None if self.settings.output is None else self.settings.output.url

    def describe(self) -> dict[str, Any]:
        """Return the status document.

        A job whose coordinator has died keeps the last status that it wrote; ``status_reason`` then tells that, and how
        to resume the job, and the key ``abandoned`` is there.
        """
        document: dict[str, Any] | None = self._directory.read_json("status.json")
        if document is None:
            document = self._first_document()
        if self._is_abandoned(document):
            document.update(abandoned=True, eta=None)
            command = dict(next_commands(document, environment=self._environment))["resume"]
            document["status_reason"] = (
                f"no process runs this job (no coordinator is alive{_silence(document)}), go on with: {command}"
            )
        return document

    @property
    def status(self) -> str:
        """One of :data:`STATUSES`."""
        return str(self.describe()["status"])

    @property
    def progress(self) -> Progress:
        """How far the job is."""
        return Progress.from_status(self.describe())

    def logs(
        self,
        level: str | None = None,
        batch: str | None = None,
        worker: str | None = None,
        since: str | float | timedelta | datetime | None = None,
        follow: bool = False,
    ) -> pd.DataFrame | Iterator[dict[str, Any]]:
        """Return the log.

        Parameters
        ----------
        level : str, optional
            The least important level: ``debug``, ``info``, ``warning``, ``error`` or ``critical``.
        batch : str, optional
            Only lines of this batch: its id, or the beginning of it.
        worker : str, optional
            Only lines of this worker: its id, or the beginning of it.
        since : str, float, timedelta or datetime, optional
            Nothing older: ``"10m"``, a number of seconds, a time.
        follow : bool, default False
            Return an iterator over the lines (as dicts) that ends when the job has ended.

        Returns
        -------
        pandas.DataFrame or iterator of dict
            The table has the columns ``time`` (UTC), ``level``, ``worker``, ``batch_id``, ``message``, ``process``, and
            one for every key that the handler gave as ``extra``.
        """
        lines = self.log_lines(level=level, batch=batch, worker=worker, since=since, follow=follow)
        return lines if follow else job_logs.to_frame(lines)

    def log_lines(
        self,
        *,
        level: str | None = None,
        batch: str | None = None,
        worker: str | None = None,
        since: str | float | timedelta | datetime | None = None,
        follow: bool = False,
    ) -> Iterator[dict[str, Any]]:
        """Yield the lines of the log as they were written; takes what :meth:`logs` takes."""
        where = job_logs.LogFilter(level=level, batch=batch, worker=worker, since=job_logs.parse_since(since))
        log = job_logs.JobLogs(self._directory.store)
        return log.follow(where, has_ended=lambda: not self.is_live()) if follow else iter(log.lines(where))

    def failures(self) -> pd.DataFrame:
        """Return the batches and input lines that failed for good: cause, traceback, position in the input, payload.

        Batches that a retry has handled since are not among them.
        """
        return job_failures.to_frame(self._directory)

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """What the handlers pushed through ``metrics_client``, of all batches that are committed by now.

        Every item has ``metric``, ``kind`` and ``tags``; a counter and a gauge have a ``value``, a histogram has
        ``count``, ``sum``, ``min``, ``max``, ``p50``, ``p90``, ``p99`` and ``buckets``, pairs of an upper bound and a
        count. ``metrics.json`` in the job directory holds the same.
        """
        document = self._directory.read_json("metrics.json")
        return [] if document is None else list(document["metrics"])

    def to_arrow(self, *, partial: bool = False) -> pa.Table:
        """Return the output as an Arrow table, in input order.

        Parameters
        ----------
        partial : bool, default False
            Also while the job has no complete output: return what is committed by now.

        Raises
        ------
        InputError
            If the job writes no output, or has no complete one yet.
        """
        return self._output(partial=partial).to_arrow()

    def to_pandas(self, *, partial: bool = False) -> pd.DataFrame:
        """Return the output as a pandas DataFrame, in input order; see :meth:`to_arrow`."""
        frame: pd.DataFrame = self.to_arrow(partial=partial).to_pandas(ignore_metadata=True)
        return frame

    def to_dask(self, *, partial: bool = False) -> Any:
        """Return the output as a :class:`dask.dataframe.DataFrame`, a partition for each part; see :meth:`to_arrow`."""
        return self._output(partial=partial).to_dask()

    def wait(self, timeout: float | None = None) -> Job:
        """Wait until the job has ended, whichever process runs it.

        Parameters
        ----------
        timeout : float, optional
            Seconds to wait; None: as long as it takes.

        Returns
        -------
        Job
            This job, when it succeeded or completed with failures (with a warning then).

        Raises
        ------
        JobFailedError, JobTimedOutError, JobStoppedError
            If it ended without a complete result.
        TimeoutError
            If it has not ended after ``timeout`` seconds; it runs on.
        """
        self.watch(SilentDisplay(), timeout)
        self.raise_unless_complete()
        return self

    def stop(self, *, reason: str = "stopped by a user") -> None:
        """Stop the job: running handlers end within seconds, what is finished is kept, and the job can be resumed.

        Parameters
        ----------
        reason : str
            The ``status_reason`` of the status document.

        Raises
        ------
        JobRunningError
            If its coordinator does not react.
        """
        document = self.describe()
        deadline = time.monotonic() + _STOP_SECONDS
        while document["status"] not in FINAL_STATUSES or self.is_run_here:
            if not self.is_live(document):
                ended = {**document, "status": "stopped", "status_reason": reason, "end_time": _now()}
                ended.pop("abandoned", None)
                self._directory.write_json("status.json", ended)
                return
            if time.monotonic() > deadline:
                why = "its coordinator does not react"
                if self._is_starting(document):
                    why = "its coordinator has not come up yet, and may do so still; stop it again then"
                raise JobRunningError(
                    f"the job {self.job_id} was asked to stop {_STOP_SECONDS:.0f} s ago and has not ended: {why}"
                )
            # Not only once: a coordinator that starts withdraws an old request.
            if document["status"] not in FINAL_STATUSES and self._directory.stop_request() is None:
                self._directory.request_stop("stopped", reason)
            time.sleep(_POLL_SECONDS)
            document = self.describe()

    def resume(self, *, cluster: str | Cluster | None = None) -> Job:
        """Resume a job that was stopped, timed out or failed, or whose coordinator has died; returns at once.

        A job that is complete stays as it is. Use :meth:`wait` to wait for it.

        Parameters
        ----------
        cluster : str or Cluster, optional
            Where to run it; None: the cluster of this handle.
        """
        return self.start(cluster=cluster)

    def retry_failed(self, *, cluster: str | Cluster | None = None) -> Job:
        """Handle the failed batches again, exactly those, and add their rows to the output; returns at once.

        Parameters
        ----------
        cluster : str or Cluster, optional
            As for :meth:`resume`.
        """
        return self.start(cluster=cluster, retry=True)

    # internal: used by the client and the command line --------------------------------------------------------------

    def start(
        self, *, retry: bool = False, cluster: str | Cluster | None = None, display: Display | None = None
    ) -> Job:
        """Start a coordinator in this process; with ``cluster="inline"`` the job has ended when this returns."""
        if self.is_run_here:
            raise JobRunningError(f"the job {self.job_id} is being run by this process: wait for it or stop it first")
        stopped = {"api_name": self.api_name, "job_id": self.job_id, "status": "stopped"}
        hint = dict(next_commands(stopped, environment=self._environment))["resume"]
        try:
            chosen = make_cluster(self.cluster if cluster is None else cluster)
            self._background = BackgroundRun(self._directory, chosen, retry=retry, resume_hint=hint)
            self._background.start(None if display is None else display.update)
        except BaseException:
            if display is not None:
                display.close()
            raise
        return self

    def start_detached(self, *, retry: bool = False) -> None:
        """Start a coordinator that outlives this process: on the scheduler, or in a process of its own."""
        if not isinstance(self.cluster, str):
            raise SpecError("cluster: a job that runs on its own needs the name of a cluster, not an object")
        detach(self.cluster, self.url, self.settings, retry=retry)

    def watch(self, display: Display, timeout: float | None = None) -> dict[str, Any]:
        """Show the job until it has ended and return its last status document, or raise what ended its coordinator."""
        deadline = None if timeout is None else time.monotonic() + timeout
        try:
            while not self._poll(display):
                if deadline is not None and time.monotonic() >= deadline:
                    raise TimeoutError(f"the job {self.job_id} has not ended after {timeout:g} s; it goes on")
            document = self.describe() if self._background is None else self._background.result()
            display.finish(document)
            return document
        finally:
            display.close()

    def _poll(self, display: Display) -> bool:
        """Show the job once and wait a moment; return whether it has ended."""
        if self._background is not None:
            ended = self._background.wait(_SHOW_SECONDS)
            if not ended and self._background.latest is not None:
                display.update(self._background.latest)
            return ended
        document = self.describe()
        if document["status"] in FINAL_STATUSES:
            return True
        if self._is_abandoned(document):
            raise JobFailedError(
                f"the job {self.job_id} has not ended, and {document['status_reason']}", status=str(document["status"])
            )
        display.update(document)
        time.sleep(_POLL_SECONDS)
        return False

    def raise_unless_complete(self, *, warn: bool = True) -> None:
        """Raise the error of the job's final status, if it has no complete result; warn about failed batches."""
        document = self.describe()
        status = str(document["status"])
        if status == "succeeded":
            return
        commands = dict(next_commands(document, environment=self._environment))
        if status != "completed with failures":
            reason = str(document.get("status_reason") or "").strip().rstrip(".")
            message = f"the job {self.job_id} ended with the status {status!r}{f': {reason}' if reason else ''}"
            if "resume" in commands:
                message += f". See its log with: {commands['logs']}. Go on with: {commands['resume']}"
            kind = {"stopped": JobStoppedError, "timed out": JobTimedOutError}.get(status, JobFailedError)
            raise kind(message, status=status)
        if warn:
            failed = document["failed_batches"]
            batches, whose = plural(failed, "batch", "batches"), "its" if failed == 1 else "their"
            warnings.warn(
                f"the job {self.job_id} completed, but {batches} failed for good and {whose} rows are not in the "
                f"output. Look at them with job.failures() or {commands['logs']} --level error; handle them again "
                f"with job.retry_failed() or {commands['retry']}",
                UserWarning,
                stacklevel=3,  # the caller of run or wait
            )

    def _first_document(self) -> dict[str, Any]:
        """Return the status document of a job that has had no coordinator yet."""
        document = StatusBoard(self.settings).document()
        del document["coordinator"]
        return document

    @property
    def is_run_here(self) -> bool:
        """Whether the job's coordinator runs in this process, started by this handle."""
        return self._background is not None and self._background.running

    def is_live(self, document: dict[str, Any] | None = None) -> bool:
        """Whether a coordinator runs the job, or is about to."""
        document = self.describe() if document is None else document
        if self.is_run_here or self._is_starting(document):
            return True
        if document["status"] in FINAL_STATUSES:
            return False
        if "coordinator" not in document:
            created = parse_time(self.settings.created_time)
            return created is not None and (datetime.now(UTC) - created).total_seconds() < _START_SECONDS
        return running_elsewhere(document, "") is not None

    def _is_starting(self, document: dict[str, Any]) -> bool:
        """Whether a coordinator was started on a cluster a short time ago, and has not reported yet."""
        if self.settings.cluster.name in ("local", "inline"):
            return False
        record = records.find(self.url)
        if record is None or not record.is_detached:
            return False
        last_heartbeat = (document.get("coordinator") or {}).get("heartbeat") or 0.0
        return record.created_time > last_heartbeat and time.time() - record.created_time < _DETACHED_START_SECONDS

    def _is_abandoned(self, document: dict[str, Any]) -> bool:
        return document["status"] not in FINAL_STATUSES and not self.is_live(document)

    def _output(self, *, partial: bool) -> JobOutput:
        from cortex_dask.io.output.reader import JobOutput  # imports pyarrow

        settings = self.settings.output
        if settings is None:
            raise InputError(f"the job {self.job_id} writes no output: give it an output directory to have one")
        document = self.describe()
        if document["status"] not in COMPLETE_STATUSES and not partial:
            raise InputError(
                f"the job {self.job_id} has no complete output: its status is {document['status']!r} after "
                f"{Progress.from_status(document).batches_words()}. Wait for it or resume it, "
                "or say partial=True for what is there by now"
            )
        parts = {
            record.part.name: record.split
            for record in Ledger(self._directory.store).records()
            if record.part is not None
        }
        if partial:
            published = OutputDirectory(settings, self.job_id).published()
            parts = {name: split for name, split in parts.items() if name in published}
        return JobOutput(settings, tuple(sorted(parts, key=parts.__getitem__)), self._directory.schema())


def create_directory(directory: JobDirectory, resolved: ResolvedJob) -> None:
    """Write a job, ``job.json`` last, which makes it exist; raise FileExistsError if there is one."""
    if resolved.archive is not None:
        directory.store.write(f"project/{resolved.archive.hash}.tar.gz", resolved.archive.data)
    if resolved.pickled is not None:
        directory.store.write("handler.pkl", resolved.pickled)
    if resolved.items is not None:
        resolved.items.write(directory.store)
    directory.create(resolved.settings)


def _silence(document: dict[str, Any]) -> str:
    """Return how long ago a coordinator gave a sign of life; "" if there was none."""
    heartbeat = (document.get("coordinator") or {}).get("heartbeat")
    return "" if heartbeat is None else f", the last sign of one was {duration(time.time() - heartbeat)} ago"


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
