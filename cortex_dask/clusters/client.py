"""What the backends that speak to a Dask scheduler have in common: a client, split tasks, events."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
import uuid
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from cortex_dask.clusters.base import Cluster, Done, Report, WorkerLost
from cortex_dask.errors import JobFailedError
from cortex_dask.io.records import Outcome, SplitTask
from cortex_dask.io.settings import JobSettings

if TYPE_CHECKING:
    from distributed import Client, Future

__all__ = ["DaskCluster"]

_SLOTS_REFRESH = 2.0  # seconds between two looks at who is there
_STOP_SECONDS = 5.0  # running handlers end within this time
_CLOSE_SECONDS = 20.0  # a worker that does not answer for longer is not waited for: it ends its processes by itself


class DaskCluster(Cluster):
    """A backend on top of :class:`distributed.Client`."""

    def __init__(self) -> None:
        self._client: Client | None = None
        self._token = uuid.uuid4().hex[:12]
        self._job_url = ""
        self._job_id = ""
        self._workers = 1
        self._gpu = 0.0
        self._futures: set[Future[Any]] = set()
        self._lock = threading.Lock()
        self._threads: dict[str, int] = {}  # of each Dask worker, by its address
        self._home = ""
        self._slots_seen = -_SLOTS_REFRESH

    def connect(self) -> Client:
        """Return a connected client; to be written by each backend."""
        raise NotImplementedError

    def start(self, job_url: str, settings: JobSettings, report: Report) -> None:
        """Connect, and listen to the events of this job's splits."""
        self._job_url, self._job_id = job_url, settings.job_id
        self._workers, self._gpu = settings.workers, settings.compute.gpu
        self._client = self.connect()
        self._client.subscribe_topic(_topic(job_url), lambda event: report(event[1]))

    @property
    def client(self) -> Client:
        """The connected client."""
        if self._client is None:
            raise RuntimeError("start() has not been called")
        return self._client

    def slots(self) -> int:
        """Return the number of worker threads, at most as many as the job asked for.

        Raises
        ------
        JobFailedError
            If the scheduler is gone and does not come back.
        """
        if time.monotonic() - self._slots_seen > _SLOTS_REFRESH:
            try:
                self._threads = dict(self.client.nthreads())
            except Exception as error:
                # The client tries to reconnect for some time; what it raises meanwhile, and when it gives up, varies.
                if self.client.status not in ("running", "connecting"):
                    raise _scheduler_gone(error) from error
            self._slots_seen = time.monotonic()
        return min(sum(self._threads.values()), self._workers)

    def ahead(self) -> int:
        """Return how many splits may wait on the workers: none where there are more threads than the job may use."""
        return super().ahead() if sum(self._threads.values()) <= self._workers else 0

    def _place(self) -> dict[str, Any]:
        """Return where a task should run: those of a job with one worker in one place, so on one handler."""
        if self._workers > 1 or len(self._threads) < 2:
            return {}
        if self._home not in self._threads:
            self._home = min(self._threads)
        return {"workers": [self._home], "allow_other_workers": True}  # others, should it vanish

    def submit(self, task: SplitTask, done: Done) -> None:
        """Send a split as one Dask task; its future is dropped as soon as it is done."""
        # Tuple keys with one prefix keep the scheduler's own queueing at work; the attempt makes the key new, so that
        # an earlier attempt's result is never returned in its place, nor, with the token, another coordinator's.
        key = (f"split-{self._job_id}", task.split.number, task.attempt, self._token)
        try:
            future = self.client.submit(run_split, task.to_json(), key=key, pure=False, retries=0, **self._place())
        except Exception as error:
            if self.client.status in ("running", "connecting"):
                raise
            raise _scheduler_gone(error) from error
        with self._lock:
            self._futures.add(future)
        future.add_done_callback(lambda ended: self._ended(ended, done))

    def _ended(self, future: Future[Any], done: Done) -> None:
        with self._lock:
            self._futures.discard(future)
        try:
            ended = _outcome(future)
        except Exception as error:  # noqa: BLE001 - whatever a client raises that is going: nobody waits for ever
            ended = WorkerLost(_reason(error))
        try:
            done(ended)
        finally:
            # A finished future that is still held would be computed again if its worker died.
            future.release()

    def complete(self) -> Outcome:
        """Run ``on_job_complete`` on a worker."""
        future = self.client.submit(
            run_completion, self._job_url, key=(f"complete-{self._job_id}", time.time_ns()), pure=False, **self._place()
        )
        try:
            return Outcome.from_json(future.result())
        except Exception as error:  # noqa: BLE001 - whatever ended it, the job has to say it
            return Outcome("worker error", -1, message=f"on_job_complete could not be run: {_reason(error)}")

    def stop(self, reason: str) -> None:
        """End the running splits on all workers."""
        # A scheduler that is gone cannot be told, nor a worker that hangs; the workers see control/stop.json.
        self._on_all_workers(_STOP_SECONDS, _stop_job, self._job_url, reason)

    def close(self) -> None:
        """End the job's handler processes and the connection."""
        if self._client is None:
            return
        with self._lock:
            futures, self._futures = list(self._futures), set()
        with contextlib.suppress(Exception):  # the scheduler may be the reason for closing
            self._client.unsubscribe_topic(_topic(self._job_url))
        with contextlib.suppress(Exception):
            for future in futures:
                future.release()
        self._on_all_workers(_CLOSE_SECONDS, _close_job, self._job_url)
        self._client.close(timeout=_STOP_SECONDS)
        self._client = None

    def _on_all_workers(self, seconds: float, function: Callable[..., Any], *arguments: Any) -> None:
        """Call a function on each worker; what fails, or takes longer than some seconds, is left to itself."""
        client = self.client

        def call() -> None:
            with contextlib.suppress(Exception):  # the scheduler may be gone
                client.run(function, *arguments, on_error="ignore")

        # Client.run waits for the slowest worker, without a limit: one that was suspended would hold up the job's end.
        thread = threading.Thread(target=call, name="cortex-dask-workers", daemon=True)
        thread.start()
        thread.join(seconds)


def run_split(task: dict[str, Any]) -> dict[str, Any]:
    """Run one split on a Dask worker (the task that the scheduler sees)."""
    from distributed import get_worker

    from cortex_dask.runtime.supervisor import run_split as supervise

    worker = get_worker()
    topic = _topic(task["job_url"])
    outcome: dict[str, Any] = supervise(
        SplitTask.from_json(task), lambda event: worker.log_event(topic, event)
    ).to_json()
    return outcome


def run_completion(job_url: str) -> dict[str, Any]:
    """Run ``on_job_complete`` on a Dask worker."""
    from distributed import get_worker

    from cortex_dask.runtime.supervisor import run_completion as supervise

    worker = get_worker()
    topic = _topic(job_url)
    return supervise(job_url, lambda event: worker.log_event(topic, event)).to_json()


def _stop_job(job_url: str, reason: str) -> None:
    from cortex_dask.runtime import slots

    slots.stop_job(job_url, reason)


async def _close_job(job_url: str) -> None:
    from cortex_dask.runtime import slots

    # It waits for handler processes, and must not do so on the event loop: other jobs are on the worker as well.
    await asyncio.to_thread(slots.close_job, job_url)


def _topic(job_url: str) -> str:
    return f"cortex-dask {job_url}"


def _outcome(future: Future[Any]) -> Outcome | Exception:
    if future.status == "finished":
        try:
            return Outcome.from_json(future.result())
        except Exception as error:  # noqa: BLE001 - the result could not be fetched: its worker is gone
            return WorkerLost(_reason(error))
    if future.status == "cancelled":
        return WorkerLost("the scheduler dropped the task: it was restarted, or the connection to it was lost")
    raised: Exception = future.exception()
    # the scheduler's own attempts: it sends a task whose worker has died to another one, some times
    return WorkerLost(_reason(raised), getattr(raised, "allowed_failures", 0) + 1) if _is_loss(raised) else raised


def _scheduler_gone(error: Exception) -> JobFailedError:
    return JobFailedError(f"the connection to the Dask scheduler was lost and did not come back ({_reason(error)})")


def _is_loss(error: BaseException) -> bool:
    from distributed import CancelledError, KilledWorker
    from distributed.comm.core import CommClosedError

    return isinstance(error, KilledWorker | CancelledError | CommClosedError)


def _reason(error: BaseException) -> str:
    if type(error).__name__ == "KilledWorker":
        return "the workers that ran the split ended: killed, out of memory, or their hosts vanished"
    return f"{type(error).__name__}: {error}"
