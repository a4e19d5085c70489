"""``DaskCluster``: what all backends with a Dask scheduler share.

From top to bottom: what a backend overrides, connecting, the number of slots, a scheduler that is lost, sending splits,
and ending.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import orjson

from cortex_dask.clusters import dask_worker, versions
from cortex_dask.clusters.notice import ClusterNotice
from cortex_dask.clusters.outcomes import OutcomeEvents, outcome_of, reason_of
from cortex_dask.clusters.scaling import Scaling
from cortex_dask.errors import ClusterError, SpecError
from cortex_dask.io.job.records import Outcome, SplitTask
from cortex_dask.io.job.settings import JobSettings
from cortex_dask.runtime.cluster import Cluster, Done, Report, WorkerLost
from cortex_dask.runtime.frames import decode
from cortex_dask.runtime.timeout import BackgroundCall, call_with_timeout

if TYPE_CHECKING:
    from distributed import Client, Future

_SLOTS_REFRESH = 2.0  # seconds between two counts of the workers
_STOP_SECONDS = 5.0  # running handlers end within this time
_CLOSE_SECONDS = 20.0  # a worker that does not answer within this time ends its processes by itself
_START_SECONDS = 600.0  # for a cluster to come up, and for a first worker to come back
_RECONNECT_SECONDS = 120.0  # for a scheduler to come back
_RECONNECT_PAUSE = 2.0
_POLL_SECONDS = 1.0
#: The tasks, as source text. A reference to our function would end a worker that lacks this package when it reads the
#: message, and then the next one that its nanny starts; an expression raises an error that says so.
_CALL = "__import__('cortex_dask.clusters.dask_worker', fromlist=['run_split'])"
_RUN_SPLIT = f"{_CALL}.run_split(data, needed)"
_RUN_COMPLETION = f"{_CALL}.run_completion(job_url)"
#: The most tasks, and pieces of files in them, in one message of at most some megabytes.
_MESSAGE_TASKS, _MESSAGE_PIECES = 100, 10_000


class DaskCluster(Cluster):
    """A backend on top of :class:`distributed.Client`.

    A backend overrides :meth:`connect`, and what it can of :meth:`resize`, :meth:`shutdown`, :meth:`reconnect` and
    :meth:`explain_missing_workers`. ``self.settings`` and ``self.options`` are set before any of these is called.
    """

    #: Slots of one Dask worker, for those that the backend starts.
    threads_per_worker: int = 1
    #: Whether workers have the resource ``GPU``: then splits go only where one is free.
    has_resources: bool = True
    #: Whether all workers exist before the job, and the backend can start no more.
    is_fixed: bool = True
    #: How long to wait for a first worker; the option ``start_timeout`` overrides it.
    start_seconds: float = _START_SECONDS

    def __init__(self) -> None:
        self._client: Client | None = None
        self._token = uuid.uuid4().hex[:12]
        self._job_url = ""
        self._settings: JobSettings | None = None
        self._limit = sys.maxsize  # slots that the job may use
        self._pending: dict[Future[Any], tuple[SplitTask, Done]] = {}  # attempts that were sent and have not ended
        self._lock = threading.Lock()
        self._threads: dict[str, int] = {}  # slots of each Dask worker, by its address
        self._only_worker = ""  # of a job with one slot
        self._slots_counted = -_SLOTS_REFRESH
        self._empty_since: float | None = None  # since when there has been no worker
        self._scaling: Scaling | None = None
        self._report: Report = lambda event: None
        self._outcomes = OutcomeEvents(self._token)
        self._connecting: BackgroundCall[Client] | None = None
        self._recovering: threading.Thread | None = None
        self._lost: ClusterError | None = None  # why the scheduler is not waited for any more
        self._needed: dict[str, str | None] = {}  # the versions that a worker must have
        self._lease: Future[Any] | None = None
        self._notice = ClusterNotice(self.explain_missing_workers)
        #: Set when the job is over: a backend stops waiting for its cluster.
        self.closing = threading.Event()

    # what a backend overrides ---------------------------------------------------------------------------------------

    def connect(self) -> Client:
        """Bring the cluster up, or find it, and return a connected client.

        Raises :class:`ClusterError` with the reason if it does not come up within ``start_timeout``.
        """
        raise NotImplementedError

    def resize(self, workers: int) -> None:
        """Ask for so many Dask workers; idle ones are released first. By default the size is fixed."""

    def shutdown(self) -> None:
        """End what :meth:`connect` has started; called also when it has failed."""

    def reconnect(self) -> Client | None:
        """Return a client of the scheduler that replaces a lost one; None while there is none.

        :class:`ClusterError` says that there will be none; after other exceptions it is called again.
        """
        return None

    def explain_missing_workers(self) -> str | None:
        """Return why there are no workers, as a clause, if the backend knows."""
        return None

    @property
    def settings(self) -> JobSettings:
        """The job's settings."""
        if self._settings is None:
            raise RuntimeError("neither prepare() nor start() has been called")
        return self._settings

    @property
    def options(self) -> dict[str, Any]:
        """The cluster's options: none where the job was submitted to another kind of cluster."""
        where = self.settings.cluster
        return where.options if where.name == self.name else {}

    def seconds(self, option: str, default: float) -> float:
        """Return an option that is a number of seconds; raises :class:`SpecError` if it is something else."""
        value = self.options.get(option, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
            raise SpecError(f"cluster option {option}: found {value!r}; allowed is a number of seconds above 0")
        return float(value)

    # connecting -----------------------------------------------------------------------------------------------------

    def prepare(self, job_url: str, settings: JobSettings) -> None:
        """Let a cluster that has to be made come up while the job is planned."""
        self._job_url, self._settings = job_url, settings
        if not self.is_fixed:
            self._connecting = BackgroundCall(self.connect)

    def start(self, job_url: str, settings: JobSettings, report: Report, check: Callable[[], None]) -> None:
        """Connect, compare versions, and listen to the events of this job's splits."""
        self._job_url, self._settings, self._report = job_url, settings, report
        self._limit = settings.workers if settings.workers_said or not self.is_fixed else sys.maxsize
        client = self.connect() if self._connecting is None else self._connecting.result(check=check)
        self._use_client(client)
        if not self.is_fixed:
            self._scaling = Scaling(settings, self.threads_per_worker, self.resize)

    def _use_client(self, client: Client) -> None:
        """Check the cluster behind a new client, and listen to the events of this job's splits."""
        self._client = client
        self._slots_counted = -_SLOTS_REFRESH
        self.check(client)
        client.subscribe_topic(dask_worker.topic(self._job_url), lambda event: self._on_event(event[1]))

    def check(self, client: Client) -> None:
        """Compare versions before anything is sent; workers that come later compare their own before each split.

        Raises :class:`ClusterError` if they do not fit, or a worker cannot read the job directory.
        """
        versions.check(client, self.settings, self._job_url)
        self._needed = versions.needed_versions(self.settings)

    def _submit_lease(self, client: Client) -> None:
        """Keep the cluster from being idle while this client is connected, and no longer.

        Gateways and the Dask operator close idle clusters, also while a job is planned, its parts are published, or its
        workers wait for a node. A task that no worker can run counts as work that waits; it ends with its client.
        """
        key = f"lease-{self.settings.job_id}-{self._token}-{time.time_ns()}"
        self._lease = client.submit(int, key=key, pure=False, resources={"cortex-dask-lease": 1})

    @property
    def client(self) -> Client:
        """The connected client."""
        if self._client is None:
            raise RuntimeError("start() has not been called")
        return self._client

    # sizes ----------------------------------------------------------------------------------------------------------

    def slots(self) -> int:
        """Return how many splits can run: the workers' threads, or their GPUs, at most as many as the job asked for.

        Raises :class:`ClusterError` if the scheduler is gone and does not come back, or no worker comes.
        """
        if self._lost is not None:
            raise self._lost
        if self._is_connected and time.monotonic() - self._slots_counted > _SLOTS_REFRESH:
            try:
                self._threads = self._count_slots()
            except Exception as error:  # noqa: BLE001 - what a client raises while it reconnects, or gives up, varies
                if not self._is_live():
                    self._recover(error)
            else:
                self._slots_counted = time.monotonic()
                self._check_start_timeout()
        return min(sum(self._threads.values()), self._limit)

    def _count_slots(self) -> dict[str, int]:
        """Return the slots of each worker."""
        gpu = self.settings.compute.gpu
        if not gpu or not self.has_resources:
            return dict(self.client.nthreads())
        workers = self.workers()
        devices = {address: float(worker["resources"].get("GPU", 0)) for address, worker in workers.items()}
        return {
            address: min(int(devices[address] / gpu + 1e-9), worker["nthreads"])
            for address, worker in workers.items()
            if devices[address] >= gpu
        }

    def workers(self) -> dict[str, dict[str, Any]]:
        """Return what the scheduler knows of each worker, by its address.

        Not by ``Client.scheduler_info``: a timer replaces what that returns by the same without the workers.
        """
        scheduler: Any = self.client.scheduler
        found: dict[str, dict[str, Any]] = self.client.sync(scheduler.identity, n_workers=-1)["workers"]
        return found

    def _check_start_timeout(self) -> None:
        """Raise :class:`ClusterError` when there has been no worker for too long."""
        if any(self._threads.values()):
            self._empty_since = None
            return
        now = time.monotonic()
        if self._empty_since is None:
            self._empty_since = now
        limit = self.seconds("start_timeout", self.start_seconds)
        if now - self._empty_since > limit:
            reason = self.explain_missing_workers() or "its scheduler is there, but no worker that the job can use"
            raise ClusterError(
                f"the cluster ({self.name}) has had no worker for {limit:.0f} s: {reason} (the job can be resumed)"
            )

    def queue_depth(self) -> int:
        """Return 0 where there are more threads than the job may use: they would run further splits at once."""
        return super().queue_depth() if sum(self._threads.values()) <= self._limit else 0

    def scale(self, splits_left: int) -> None:
        """Ask for as many workers as the remaining splits can use."""
        self._notice.update(is_missing=self._is_connected and self._lacks_workers())
        if self._scaling is not None and self._is_connected:
            self._scaling.update(splits_left)

    def _lacks_workers(self) -> bool:
        """Return whether workers are missing and people should know why: by default when there is none at all."""
        return not any(self._threads.values())

    def notice(self) -> str:
        """Return why workers are missing."""
        return self._notice.text

    # a scheduler that is lost ---------------------------------------------------------------------------------------

    @property
    def _is_connected(self) -> bool:
        return self._recovering is None

    def is_ready(self) -> bool:
        """Return whether splits can be sent."""
        return self._is_connected

    def _is_live(self) -> bool:
        """Return whether the client is connected or reconnects, which it gives up after some time."""
        return self.client.status in ("running", "connecting")

    def _recover(self, error: Exception) -> None:
        """Wait for the scheduler to come back, in the background: the coordinator still has to check its limits.

        A client that gives up calls back for the futures that it knows, and never for those that are sent while it
        closes, such as the next attempts at the same splits. So all pending attempts end here.
        """
        with self._lock:
            if self._recovering is not None:
                return
            self._threads = {}
            self._recovering = threading.Thread(
                target=self._await_scheduler, args=(error,), name="cortex-dask-reconnect", daemon=True
            )
            pending, self._pending = self._pending, {}
            self._recovering.start()
        self._lose(pending.values(), error)

    def _await_scheduler(self, error: Exception) -> None:
        end = time.monotonic() + self.seconds("reconnect_timeout", _RECONNECT_SECONDS)
        reason = reason_of(error)
        old = self._client
        while not self.closing.is_set() and time.monotonic() < end:
            try:
                client = self.reconnect()
                if client is not None:
                    self._use_client(client)
                    break
                reason = reason_of(error)
            except ClusterError as failed:
                self._lost = failed
                break
            except Exception as failed:  # noqa: BLE001 - the next try may succeed; the last failure is the reason
                reason = reason_of(failed)
            self.closing.wait(_RECONNECT_PAUSE)
        else:
            lost = f"the connection to the Dask scheduler was lost and did not come back ({reason})"
            self._lost = ClusterError(f"{lost} (the job can be resumed)")
        if old is not None and old is not self._client:
            with contextlib.suppress(Exception):  # its scheduler is gone
                old.close(timeout=_STOP_SECONDS)
        self._recovering = None

    # splits ---------------------------------------------------------------------------------------------------------

    def _place(self) -> dict[str, Any]:
        """Return the scheduler's restrictions for a task: resources and workers."""
        wanted: dict[str, Any] = {}
        if self.settings.compute.gpu and self.has_resources:
            # Slightly less: Dask adds and subtracts shares, and n parts of 1/n have to fit in spite of rounding.
            wanted["resources"] = {"GPU": self.settings.compute.gpu * (1 - 1e-9)}
        if self._limit > 1 or len(self._threads) < 2:
            return wanted
        if self._only_worker not in self._threads:  # a job with one slot stays on one worker, so with one handler
            self._only_worker = min(self._threads)
        return {**wanted, "workers": [self._only_worker], "allow_other_workers": True}  # others, should it vanish

    def _on_event(self, event: dict[str, Any]) -> None:
        if not self._outcomes.receive(event):
            self._report(decode(event["event"]))

    def submit(self, tasks: Sequence[tuple[SplitTask, Done]], *, elsewhere: bool = False) -> None:
        """Send each split as one Dask task, many in one message; its future is dropped as soon as it is done."""
        if elsewhere:
            for task, done in tasks:
                self._submit([(task, done)], self._place_elsewhere(task))
            return
        place = self._place()
        for few in _messages(tasks):
            self._submit(few, place)

    def _place_elsewhere(self, task: SplitTask) -> dict[str, Any]:
        """Return where a task should run that runs already: on a worker that does not have it."""
        place = self._place()
        with contextlib.suppress(Exception):  # then anywhere
            same = self._key(task)[:2]
            processing = self.client.processing().items()
            busy = {worker for worker, keys in processing if any(key[:2] == same for key in keys)}
            if others := sorted(self._threads.keys() - busy):
                place |= {"workers": others, "allow_other_workers": True}
        return place

    def cancel(self, split: int) -> None:
        """Have the workers end the attempts at a split that still run."""
        self._on_all_workers(0.0, dask_worker.cancel_split, self._job_url, split)

    def _key(self, task: SplitTask) -> tuple[str, int, int, str]:
        # Tuple keys with one prefix make the scheduler queue the tasks as one group. The attempt and the token keep it
        # from returning the result of an earlier attempt, or of another coordinator's.
        return f"split-{self.settings.job_id}", task.split.number, task.attempt, self._token

    def _submit(self, tasks: Sequence[tuple[SplitTask, Done]], place: dict[str, Any]) -> None:
        for task, _ in tasks:
            self._outcomes.expect(task.split.number, task.attempt)
        try:
            futures = self.client.map(
                eval,
                [_RUN_SPLIT] * len(tasks),
                [{"data": orjson.dumps(task), "needed": self._needed} for task, _ in tasks],
                key=[self._key(task) for task, _ in tasks],
                pure=False,
                retries=0,
                **place,
            )
        except Exception as error:
            if self._is_live():
                raise
            self._recover(error)
            self._lose(tasks, error)
            return
        with self._lock:
            is_lost = not self._is_connected  # meanwhile
            if not is_lost:
                self._pending.update(zip(futures, tasks, strict=True))
        if is_lost:
            self._lose(tasks, ConnectionError("the connection to the Dask scheduler was lost"))
            return
        for future in futures:
            future.add_done_callback(self._on_done)

    def _lose(self, tasks: Iterable[tuple[SplitTask, Done]], error: Exception) -> None:
        """Report attempts that were sent, or could not be, as lost with the scheduler."""
        for task, done in tasks:
            self._outcomes.pop(task.split.number, task.attempt)
            done(WorkerLost(reason_of(error), workers=0))

    def _on_done(self, future: Future[Any]) -> None:
        with self._lock:
            pending = self._pending.pop(future, None)
        if pending is None:
            return  # it was reported as lost
        task, done = pending
        event = self._outcomes.pop(task.split.number, task.attempt)
        outcome: Outcome | Exception
        try:
            outcome = outcome_of(future, event)
        except Exception as error:  # noqa: BLE001 - a client that is closing may raise anything
            outcome = WorkerLost(reason_of(error), workers=0)
        try:
            done(outcome)
        finally:
            # A finished future that is still held would be computed again if its worker died.
            future.release()

    def complete(self) -> Outcome:
        """Run ``on_job_complete`` on a worker."""
        key = (f"complete-{self.settings.job_id}", time.time_ns(), self._token)
        call = {"job_url": self._job_url}
        future = self.client.submit(eval, _RUN_COMPLETION, call, key=key, pure=False, **self._place())
        try:
            done = threading.Event()
            future.add_done_callback(lambda _: done.set())
            while not done.wait(_POLL_SECONDS):
                if not self._is_live():  # a client that is closed may leave its future pending
                    raise ConnectionError("the connection to the Dask scheduler was lost (the job can be resumed)")
            return Outcome.from_json(future.result())
        except Exception as error:  # noqa: BLE001 - the job ends with the reason, whatever it is
            return Outcome("worker error", -1, message=f"on_job_complete could not be run: {reason_of(error)}")

    # ending ---------------------------------------------------------------------------------------------------------

    def stop(self, reason: str) -> None:
        """End the running splits on all workers; where there are none, cancel those that wait for workers."""
        if self._client is not None and not any(self._threads.values()):
            with self._lock:
                waiting = list(self._pending)
            with contextlib.suppress(Exception):  # the scheduler may be gone
                self._client.cancel(waiting)
            return
        # Workers that cannot be reached this way see control/stop.json.
        self._on_all_workers(_STOP_SECONDS, dask_worker.stop_job, self._job_url, reason)

    def close(self) -> None:
        """End the job's handler processes and the connection, then what was started for the job."""
        self.closing.set()
        if self._connecting is not None:
            with contextlib.suppress(Exception):  # start() has raised it, or has not been called
                client = self._connecting.result()
                self._client = self._client or client
        if self._scaling is not None:
            self._scaling.close()
        try:
            self._disconnect()
        finally:
            self.shutdown()

    def _disconnect(self) -> None:
        if self._client is None:
            return
        with self._lock:
            futures = list(self._pending)
            self._pending.clear()
        with contextlib.suppress(Exception):  # the scheduler may be the reason for closing
            self._client.unsubscribe_topic(dask_worker.topic(self._job_url))
        with contextlib.suppress(Exception):
            for future in futures:
                future.release()
        self._on_all_workers(_CLOSE_SECONDS, dask_worker.close_job, self._job_url)
        with contextlib.suppress(Exception):
            self._client.close(timeout=_STOP_SECONDS)
        self._client = None

    def _on_all_workers(self, seconds: float, function: Callable[..., Any], *arguments: Any) -> None:
        """Call a function on each worker, and wait some seconds at most; failures are ignored."""
        client = self._client
        if client is None or self._lost is not None:
            return
        # Client.run waits for the slowest worker, without a limit: a suspended one would delay the job's end.
        with contextlib.suppress(Exception):  # the scheduler may be gone
            call_with_timeout(lambda: client.run(function, *arguments, on_error="ignore"), seconds)


def _messages(tasks: Sequence[tuple[SplitTask, Done]]) -> Iterator[list[tuple[SplitTask, Done]]]:
    """Divide tasks into messages."""
    message: list[tuple[SplitTask, Done]] = []
    pieces = 0
    for task, done in tasks:
        if message and (len(message) == _MESSAGE_TASKS or pieces + len(task.split.pieces) > _MESSAGE_PIECES):
            yield message
            message, pieces = [], 0
        message.append((task, done))
        pieces += len(task.split.pieces)
    if message:
        yield message
