"""What the backends that speak to a Dask scheduler have in common: a client, split tasks, events, sizes."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import orjson

from cortex_dask.clusters import dask_worker
from cortex_dask.clusters.mailbox import Mailbox
from cortex_dask.clusters.scaling import Scaling
from cortex_dask.errors import ClusterError, SpecError
from cortex_dask.io.job.records import Outcome, SplitTask
from cortex_dask.io.job.settings import JobSettings
from cortex_dask.runtime.cluster import Cluster, Done, Report, WorkerLost
from cortex_dask.runtime.timeout import BackgroundCall, call_with_timeout

if TYPE_CHECKING:
    from distributed import Client, Future

_SLOTS_REFRESH = 2.0  # seconds between two looks at who is there
_STOP_SECONDS = 5.0  # running handlers end within this time
_CLOSE_SECONDS = 20.0  # a worker that does not answer for longer is not waited for: it ends its processes by itself
_START_SECONDS = 600.0  # for a cluster to come up, and for a first worker to come back
_RECONNECT_SECONDS = 120.0  # for a scheduler to come back
_RECONNECT_PAUSE = 2.0
_LOOK_UP_SECONDS = 1.0
#: What a worker does, as the source of an expression. A function of ours, by name, would end a worker that has not got
#: this package, when it reads the message; and the next one, when its nanny has started that. So it can say so.
_CALL = "__import__('cortex_dask.clusters.dask_worker', fromlist=['run_split'])"
_RUN_SPLIT = f"{_CALL}.run_split(data, needed)"
_RUN_COMPLETION = f"{_CALL}.run_completion(job_url)"
_TASKS_AT_ONCE = 100  # and of so many pieces of files together, for a message of some megabytes at most
_PIECES_AT_ONCE = 10_000


class DaskCluster(Cluster):
    """A backend on top of :class:`distributed.Client`.

    A backend writes :meth:`connect`, and what it can of :meth:`resize`, :meth:`shutdown`, :meth:`reconnect` and
    :meth:`trouble`. ``self.settings`` and ``self.options`` are there before any of these is called.
    """

    #: Slots of one Dask worker, for those that the backend starts.
    threads_per_worker: int = 1
    #: Whether workers say how many GPUs they have: then splits go only where one is free.
    has_resources: bool = True
    #: Whether all workers are there before the job: then nobody can wait for more.
    is_fixed: bool = True
    #: How long a first worker is waited for, unless ``start_timeout`` says so.
    start_seconds: float = _START_SECONDS

    def __init__(self) -> None:
        self._client: Client | None = None
        self._token = uuid.uuid4().hex[:12]
        self._job_url = ""
        self._settings: JobSettings | None = None
        self._pending: dict[Future[Any], tuple[SplitTask, Done]] = {}  # attempts that were sent and have not ended
        self._lock = threading.Lock()
        self._threads: dict[str, int] = {}  # slots of each Dask worker, by its address
        self._home = ""
        self._slots_seen = -_SLOTS_REFRESH
        self._nobody_since: float | None = None
        self._scaling: Scaling | None = None
        self._report: Report = lambda event: None
        self._mailbox = Mailbox(self._token)
        self._connecting: BackgroundCall[Client] | None = None
        self._recovering: threading.Thread | None = None
        self._lost: ClusterError | None = None
        self._needed: dict[str, str | None] = {}  # the versions that a worker has to have
        self._notice = Notice(self.trouble)
        #: Set when the cluster is not wanted any more: whoever waits for it to come up gives up.
        self.closing = threading.Event()

    # what a backend writes ------------------------------------------------------------------------------------------

    def connect(self) -> Client:
        """Bring the cluster up, or find it, and return a client that is connected to it.

        Raises
        ------
        ClusterError
            If it does not come up within ``start_timeout``; with the reason.
        """
        raise NotImplementedError

    def resize(self, workers: int) -> None:
        """Ask for so many Dask workers; those that have nothing to do go first. By default nobody can be asked."""

    def shutdown(self) -> None:
        """End what :meth:`connect` has started; called in any case, also when it has failed."""

    def reconnect(self) -> Client | None:
        """Return a client of the scheduler that took the place of one that was lost; None: there is none, yet.

        Raises
        ------
        ClusterError
            If there will be none; whatever else is raised, it is tried again.
        """
        return None

    def trouble(self) -> str | None:
        """Return why there are no workers, as a sentence without an end, where the backend knows."""
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
        """Return an option that is a number of seconds.

        Raises
        ------
        SpecError
            If it is something else.
        """
        value = self.options.get(option, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
            raise SpecError(f"cluster option {option}: found {value!r}; allowed is a number of seconds above 0")
        return float(value)

    # coming up ------------------------------------------------------------------------------------------------------

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
        self._enter(client)
        if not self.is_fixed:
            self._scaling = Scaling(settings, self.threads_per_worker, self.resize)

    def _enter(self, client: Client) -> None:
        """Take a client into use."""
        self._client = client
        self._slots_seen = -_SLOTS_REFRESH
        self.check(client)
        client.subscribe_topic(dask_worker.topic(self._job_url), lambda event: self._hear(event[1]))

    def check(self, client: Client) -> None:
        """Compare versions before anything is sent; those of workers that come later are compared by their splits.

        Raises
        ------
        ClusterError
            If they do not fit, or a worker cannot read the job directory.
        """
        from cortex_dask.clusters import versions

        versions.check(client, self.settings, self._job_url)
        self._needed = versions.expected(self.settings)

    @property
    def client(self) -> Client:
        """The connected client."""
        if self._client is None:
            raise RuntimeError("start() has not been called")
        return self._client

    # sizes ----------------------------------------------------------------------------------------------------------

    def slots(self) -> int:
        """Return how many splits can run: the workers' threads, or their GPUs, at most as many as the job asked for.

        Raises
        ------
        ClusterError
            If the scheduler is gone and does not come back, or no worker comes.
        """
        if self._lost is not None:
            raise self._lost
        if self._is_connected and time.monotonic() - self._slots_seen > _SLOTS_REFRESH:
            try:
                self._threads = self._count()
            except Exception as error:  # noqa: BLE001 - as is said below
                # The client tries to reconnect for some time; what it raises meanwhile, and when it gives up, varies.
                if not self._is_live():
                    self._recover(error)
            else:
                self._slots_seen = time.monotonic()
                self._check_somebody()
        return min(sum(self._threads.values()), self._limit)

    def _count(self) -> dict[str, int]:
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

        The client's ``scheduler_info`` would not do: a timer of its own replaces what that returns by the same without
        the workers, at times before it is returned.
        """
        scheduler: Any = self.client.scheduler
        found: dict[str, dict[str, Any]] = self.client.sync(scheduler.identity, n_workers=-1)["workers"]
        return found

    def _check_somebody(self) -> None:
        """Give up when there has been no worker for too long."""
        if any(self._threads.values()):
            self._nobody_since = None
            return
        now = time.monotonic()
        if self._nobody_since is None:
            self._nobody_since = now
        limit = self.seconds("start_timeout", self.start_seconds)
        if now - self._nobody_since > limit:
            reason = self.trouble() or "its scheduler is there, but no worker that the job can use"
            raise ClusterError(
                f"the cluster ({self.name}) has had no worker for {limit:.0f} s: {reason} (the job can be resumed)"
            )

    def queue_depth(self) -> int:
        """Return how many splits may wait on the workers: none where there are more slots than the job may use."""
        return super().queue_depth() if sum(self._threads.values()) <= self._limit else 0

    def scale(self, splits_left: int) -> None:
        """Ask for as many workers as there is work for."""
        self._notice.look(is_missing=self._is_connected and self._is_short(splits_left))
        if self._scaling is not None and self._is_connected:
            self._scaling.want(splits_left)

    # a scheduler that is lost ---------------------------------------------------------------------------------------

    def _is_short(self, splits_left: int) -> bool:
        """Whether workers are missing, and :meth:`trouble` tells why: by default when there is none at all."""
        return not any(self._threads.values())

    def notice(self) -> str:
        """Return why workers are missing."""
        return self._notice.text

    @property
    def _is_connected(self) -> bool:
        return self._recovering is None

    def is_ready(self) -> bool:
        """Return whether splits can be sent."""
        return self._is_connected

    def _is_live(self) -> bool:
        """Return whether the client is connected, or tries to be again; it gives that up after some time."""
        return self.client.status in ("running", "connecting")

    def _recover(self, error: Exception) -> None:
        """Wait for the scheduler to come back, in the background: the coordinator goes on to look for limits.

        A client that gives up calls back for the futures that it knows, and never for those that are sent while it
        closes, such as the next attempts at the same splits. So whatever is pending ends here.
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
                    self._enter(client)
                    break
                reason = reason_of(error)
            except ClusterError as failed:  # it does not come back
                self._lost = failed
                break
            except Exception as failed:  # noqa: BLE001 - it is tried again, and the last failure is the reason
                reason = reason_of(failed)
            self.closing.wait(_RECONNECT_PAUSE)
        else:
            lost = f"the connection to the Dask scheduler was lost and did not come back ({reason})"
            self._lost = ClusterError(f"{lost} (the job can be resumed)")
        if old is not None and old is not self._client:
            with contextlib.suppress(Exception):  # there is nobody at its other end
                old.close(timeout=_STOP_SECONDS)
        self._recovering = None

    # splits ---------------------------------------------------------------------------------------------------------

    def _place(self) -> dict[str, Any]:
        """Return where a task should run, and what it needs there."""
        wanted: dict[str, Any] = {}
        if self.settings.compute.gpu and self.has_resources:
            # A trifle less: Dask adds and subtracts shares, and n parts of 1/n have to fit in spite of rounding.
            wanted["resources"] = {"GPU": self.settings.compute.gpu * (1 - 1e-9)}
        if self._limit > 1 or len(self._threads) < 2:
            return wanted
        if self._home not in self._threads:  # a job with one worker stays in one place, so on one handler
            self._home = min(self._threads)
        return {**wanted, "workers": [self._home], "allow_other_workers": True}  # others, should it vanish

    def _hear(self, event: dict[str, Any]) -> None:
        if not self._mailbox.put(event):
            self._report(event)

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
        """Have the workers end the attempts at a split that run on."""
        self._on_all_workers(0.0, dask_worker.abandon_split, self._job_url, split)

    def _key(self, task: SplitTask) -> tuple[str, int, int, str]:
        # Tuple keys with one prefix keep the scheduler's own queueing at work; the attempt makes the key new, so that
        # an earlier attempt's result is never returned in its place, nor, with the token, another coordinator's.
        return f"split-{self.settings.job_id}", task.split.number, task.attempt, self._token

    def _submit(self, tasks: Sequence[tuple[SplitTask, Done]], place: dict[str, Any]) -> None:
        for task, _ in tasks:
            self._mailbox.expect(task.split.number, task.attempt)
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
            given_up = not self._is_connected  # meanwhile
            if not given_up:
                self._pending.update(zip(futures, tasks, strict=True))
        if given_up:
            self._lose(tasks, ConnectionError("the connection to the Dask scheduler was lost"))
            return
        for future in futures:
            future.add_done_callback(self._ended)

    def _lose(self, tasks: Iterable[tuple[SplitTask, Done]], error: Exception) -> None:
        """Say of attempts that were sent, or could not be, that nothing will be heard of them."""
        for task, done in tasks:
            self._mailbox.take(task.split.number, task.attempt)
            done(WorkerLost(reason_of(error), workers=0))

    def _ended(self, future: Future[Any]) -> None:
        with self._lock:
            pending = self._pending.pop(future, None)
        if pending is None:
            return  # it was given up when the client was
        task, done = pending
        outcome = self._mailbox.take(task.split.number, task.attempt)
        ended: Outcome | Exception
        try:
            ended = outcome_of(future, outcome)
        except Exception as error:  # noqa: BLE001 - whatever a client raises that is going: nobody waits for ever
            ended = WorkerLost(reason_of(error), workers=0)
        try:
            done(ended)
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
            while not done.wait(_LOOK_UP_SECONDS):
                if not self._is_live():  # a client that is closed may leave its future pending
                    raise ConnectionError("the connection to the Dask scheduler was lost (the job can be resumed)")
            return Outcome.from_json(future.result())
        except Exception as error:  # noqa: BLE001 - whatever ended it, the job has to say it
            return Outcome("worker error", -1, message=f"on_job_complete could not be run: {reason_of(error)}")

    # ending ---------------------------------------------------------------------------------------------------------

    def stop(self, reason: str) -> None:
        """End the running splits on all workers, and those that wait for workers that do not come."""
        if self._client is not None and not any(self._threads.values()):
            with self._lock:
                waiting = list(self._pending)
            with contextlib.suppress(Exception):  # the scheduler may be gone
                self._client.cancel(waiting)
            return
        # A scheduler that is gone cannot be told, nor a worker that hangs; the workers see control/stop.json.
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
        """Call a function on each worker; what fails, or takes longer than some seconds, is left to itself."""
        client = self._client
        if client is None or self._lost is not None:
            return
        # Client.run waits for the slowest worker, without a limit: one that was suspended would hold up the job's end.
        with contextlib.suppress(Exception):  # the scheduler may be gone
            call_with_timeout(lambda: client.run(function, *arguments, on_error="ignore"), seconds)


def _messages(tasks: Sequence[tuple[SplitTask, Done]]) -> Iterator[list[tuple[SplitTask, Done]]]:
    """Put tasks together that are sent in one message."""
    few: list[tuple[SplitTask, Done]] = []
    pieces = 0
    for task, done in tasks:
        if few and (len(few) == _TASKS_AT_ONCE or pieces + len(task.split.pieces) > _PIECES_AT_ONCE):
            yield few
            few, pieces = [], 0
        few.append((task, done))
        pieces += len(task.split.pieces)
    if few:
        yield few


def outcome_of(future: Future[Any], sent: bytes | None) -> Outcome | Exception:
    """Return how an attempt has ended, whose outcome may have been sent ahead."""
    if future.status == "finished":
        try:
            return Outcome.from_json(orjson.loads(future.result() if sent is None else sent))
        except Exception as error:  # noqa: BLE001 - the result could not be fetched: its worker is gone
            return WorkerLost(reason_of(error))
    if future.status == "cancelled":
        lost = "the scheduler dropped the task: it was restarted, or the connection to it was lost"
        return WorkerLost(lost, workers=0)
    raised: Exception = future.exception()
    if isinstance(raised, ImportError) and str(raised.name or "").partition(".")[0] == "cortex_dask":
        return ClusterError(
            f"a worker of the cluster cannot import cortex_dask ({raised}): start workers with the same environment, "
            "or the same image, as the others; the job can be resumed"
        )
    # the scheduler's own attempts: it sends a task whose worker has died to another one, some times
    return WorkerLost(reason_of(raised), getattr(raised, "allowed_failures", 0) + 1) if _is_loss(raised) else raised


def _is_loss(error: BaseException) -> bool:
    from distributed import CancelledError, KilledWorker
    from distributed.comm.core import CommClosedError

    return isinstance(error, KilledWorker | CancelledError | CommClosedError)


def reason_of(error: BaseException) -> str:
    """Return an error as the reason in a sentence."""
    if type(error).__name__ == "KilledWorker":
        return "the workers that ran the split ended: killed, out of memory, or their hosts vanished"
    return f"{type(error).__name__}: {error}"


_PATIENCE = 10.0  # seconds in which workers come, as a rule, and nothing has to be said
_AGAIN = 15.0  # seconds between two times that the cluster is asked


class Notice:
    """Asks a cluster in the background why workers are missing, and holds its answer while they are.

    Parameters
    ----------
    trouble : callable
        Returns the reason as a sentence without an end, or None; may take its time, and may raise.
    """

    def __init__(self, trouble: Callable[[], str | None]) -> None:
        self._trouble = trouble
        self._missing_since: float | None = None
        self._asked = 0.0
        self._thread: threading.Thread | None = None
        #: The answer; "" while nothing is missing, or known.
        self.text = ""

    def say(self, text: str) -> None:
        """Tell something else, as long as nobody looks for workers."""
        self.text = text

    def look(self, *, is_missing: bool) -> None:
        """Take whether workers are missing; called again and again."""
        now = time.monotonic()
        if not is_missing:
            self._missing_since, self.text = None, ""
            return
        if self._missing_since is None:
            self._missing_since = now
        is_asking = self._thread is not None and self._thread.is_alive()
        if now - self._missing_since < _PATIENCE or now - self._asked < _AGAIN or is_asking:
            return
        self._asked = now
        self._thread = threading.Thread(target=self._ask, name="cortex-dask-notice", daemon=True)
        self._thread.start()

    def _ask(self) -> None:
        with contextlib.suppress(Exception):  # it only says more
            reason = self._trouble()
            if self._missing_since is not None:
                self.text = f"waiting for workers: {reason}" if reason else ""
