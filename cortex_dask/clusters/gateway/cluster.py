"""A cluster of a Dask Gateway for each job.

`GatewayCluster` is what every coordinator does with such a cluster; `Gateway` also creates and ends it, through the
gateway's server. A detached coordinator, which cannot reach that server, uses a class of
:mod:`cortex_dask.clusters.gateway.detached`.
"""

from __future__ import annotations

import contextlib
import logging
import time
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from cortex_dask.clusters import dask_worker, records
from cortex_dask.clusters.dask import DaskCluster
from cortex_dask.clusters.gateway import scheduler
from cortex_dask.clusters.gateway.options import ChosenOptions, Needs, choose_options
from cortex_dask.clusters.gateway.scheduler import WorkerSlots
from cortex_dask.clusters.gateway.server import ENDED, GatewayApi, GatewayUnreachableError
from cortex_dask.clusters.records import RunningCluster
from cortex_dask.clusters.scaling import first_workers
from cortex_dask.errors import ClusterError, CortexDaskError, SpecError
from cortex_dask.formatting import shown
from cortex_dask.io.job.records import Outcome, SplitTask
from cortex_dask.io.job.settings import JobSettings
from cortex_dask.runtime.cluster import Done

if TYPE_CHECKING:
    from dask_gateway.client import ClusterReport
    from distributed import Client

#: For the gateway's proxy to route to a cluster that has just come up.
PROXY_SECONDS = 30.0
_START_SECONDS = 600.0
_IDLE_SECONDS = 600.0
_POLL_SECONDS = 0.25  # between two requests for the state of a cluster that comes up, growing to the next
_MAX_POLL_SECONDS = 2.0
_CONNECT_SECONDS = 10.0
_CLOSE_SECONDS = 5.0
_CLEANUP_SECONDS = 20.0
_STOP_SECONDS = 20.0  # for a gateway that is being restarted to accept the end of a cluster

#: Cluster options of this package; all others are the site's.
_OWN_OPTIONS = ("start_timeout", "idle_timeout", "reconnect_timeout")
#: Keys of ``compute`` for which no site has an option; a site that has one has it under its own name.
_UNSUPPORTED = ("inf", "node_groups", "shm")
#: The backend of a detached coordinator, as ``module:class``.
_DETACHED_BACKEND = "cortex_dask.clusters.gateway.detached:GatewayParentScheduler"
#: Prefix of the name in the record of a cluster that the gateway has not named yet.
_UNNAMED = "unnamed-"
#: The variables that identify the job of a cluster.
_JOB, _API = "CORTEX_DASK_JOB", "CORTEX_DASK_API"

_log = logging.getLogger(__name__)


class GatewayCluster(DaskCluster):
    """A cluster that a Dask Gateway has made for a job.

    A gateway gives a worker as many threads as cores. A slot is not always a thread here: one may need several cores,
    or a GPU. If workers do not report their GPUs, splits are sent to the workers one by one.
    """

    name = "gateway"
    is_fixed = False

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._slots: int | None = None  # of each worker; None: as many as it has threads
        self._has_gpus = False  # whether workers have GPUs for these slots, even if they do not report them
        self._has_spare_threads = False  # more threads than slots, so that each split needs a chosen worker
        self._placed: Counter[str] = Counter()  # running splits with a chosen worker, by worker
        self._is_taken_over = False  # from an earlier coordinator

    @property
    def options(self) -> dict[str, Any]:
        """The options that the job was submitted with, if it was submitted to a gateway."""
        where = self.settings.cluster
        return where.options if where.name == "gateway" else {}

    def _register(self, client: Client, workers: WorkerSlots | None = None) -> None:
        """Have the cluster closed when this coordinator has been gone for some time, and not before.

        The first coordinator passes on what later ones have to know of the workers.
        """
        self.check(client)  # before the scheduler runs a function that it may not have
        seconds = self.seconds("idle_timeout", _IDLE_SECONDS)
        known: WorkerSlots = client.run_on_scheduler(scheduler.add_coordinator, client.id, seconds, workers)
        self._slots, self._has_gpus = known.slots, known.has_gpus
        self.threads_per_worker = self._slots or 1
        self._submit_lease(client)

    def _use_client(self, client: Client) -> None:
        super()._use_client(client)
        if self._is_taken_over:
            # Tasks of an earlier coordinator still occupy threads that the scheduler takes for free.
            self._on_all_workers(_CLEANUP_SECONDS, dask_worker.close_job, self._job_url)
            self._is_taken_over = False

    @property
    def _first_workers(self) -> int:
        """How many workers are requested before the number of splits is known."""
        if self._slots is None:
            return 1  # which shows how many threads a worker has
        return first_workers(self.settings, self._slots)

    # sizes ----------------------------------------------------------------------------------------------------------

    def resize(self, workers: int) -> None:
        """Have the scheduler, which knows the idle workers, request the new size from the gateway."""
        if self._slots is not None and self._slots != self.threads_per_worker:
            workers = -(-workers * self.threads_per_worker // self._slots)
        self.client.run_on_scheduler(scheduler.resize, workers)

    def _count_slots(self) -> dict[str, int]:
        """Return the slots of each worker: by its GPUs if it reports them, else by the cluster's options."""
        threads: dict[str, int] = dict(self.client.nthreads())
        if self._lease is not None and self._lease.cancelled():  # the client has reconnected
            self._submit_lease(self.client)
        if self.settings.compute.gpu:
            workers = self.workers().values()
            self.has_resources = not self._has_gpus or any("GPU" in worker["resources"] for worker in workers)
            if self.has_resources:
                self._has_spare_threads = False
                return super()._count_slots()
        if self._slots is None and threads:
            self._slots = min(threads.values())
            self.resize(first_workers(self.settings, self.threads_per_worker))
        slots = {address: min(count, self._slots or count) for address, count in threads.items()}
        self._has_spare_threads = slots != threads
        return slots

    def is_ready(self) -> bool:
        """Return whether splits can be sent; a job that needs GPUs waits for a worker that may report its own."""
        return super().is_ready() and not (self._has_gpus and self.settings.compute.gpu and not self._threads)

    def queue_depth(self) -> int:
        """Return 0 if a split that waits on a worker would find a free thread there that is no slot."""
        return 0 if self._has_spare_threads else super().queue_depth()

    def _submit(self, tasks: Sequence[tuple[SplitTask, Done]], place: dict[str, Any]) -> None:
        """Send splits; if there are spare threads, which Dask would fill, each to the worker with most free slots."""
        threads = self._threads
        if not self._has_spare_threads or not threads:
            super()._submit(tasks, place)
            return
        for task, done in tasks:
            candidates = [address for address in place.get("workers", ()) if address in threads] or list(threads)
            worker = max(candidates, key=lambda address: threads[address] - self._placed[address])
            self._placed[worker] += 1
            chosen = {**place, "workers": [worker], "allow_other_workers": True}  # others if it vanishes
            super()._submit([(task, partial(self._record_outcome, worker, done))], chosen)

    def _record_outcome(self, worker: str, done: Done, outcome: Outcome | Exception) -> None:
        self._placed[worker] -= 1
        done(outcome)

    def explain_missing_workers(self) -> str | None:
        """Return why there are no workers, as far as can be told without the gateway."""
        gpu = self.settings.compute.gpu
        with contextlib.suppress(Exception):  # the scheduler may be gone as well
            workers = self.workers()
            if workers and gpu:
                return (
                    f"it has {len(workers)} workers, but none that has {gpu:g} GPUs (those of a site say how many they "
                    "have with --resources GPU=n)"
                )
        return (
            "its gateway was asked for workers, and none has come: they find no room, or end as they start; the "
            "gateway's log tells, ask its administrator"
        )


class Gateway(GatewayCluster):
    """A cluster that a Dask Gateway makes for the job."""

    def __init__(self) -> None:
        super().__init__()
        self._api: GatewayApi | None = None
        self._cluster: str | None = None  # the name that the gateway gave it
        self._record: records.ClusterRecord | None = None
        self._is_detached = False

    # coming up ------------------------------------------------------------------------------------------------------

    def connect(self) -> Client:
        """Create a cluster, or take over that of an earlier coordinator of the job, and connect to it."""
        limit = self.seconds("start_timeout", _START_SECONDS)
        deadline = time.monotonic() + limit
        api = self._api = GatewayApi()
        chosen = self._choose_options(api)
        self._cluster = self._find_earlier(api, chosen) or self._create(api, chosen)
        report = self._wait_until_running(api, self._cluster, deadline, limit)
        client = self._connect_to(report, min(deadline, time.monotonic() + PROXY_SECONDS))
        try:
            self._register(client, WorkerSlots(chosen.slots, chosen.has_gpus))
            # Not through the scheduler: the server knows the user's limits.
            api.scale(self._cluster, self._first_workers)
        except BaseException:
            client.close(timeout=_CLOSE_SECONDS)
            raise
        return client

    def detach(self, job_url: str, settings: JobSettings, *, retry: bool = False) -> None:
        """Create a cluster, and start a coordinator on its scheduler's host, which closes it after the job."""
        from cortex_dask.clusters.detached.scheduler import send_coordinator  # imports distributed

        self._job_url, self._settings, self._is_detached = job_url, settings, True
        try:
            client = self.connect()
            try:
                send_coordinator(client, job_url, settings, retry=retry, backend=_DETACHED_BACKEND)
            finally:
                client.close(timeout=_CLOSE_SECONDS)
        except BaseException:
            self.shutdown()
            raise

    def _choose_options(self, api: GatewayApi) -> ChosenOptions:
        """Return the options for the cluster, from those of the site and the needs of the job."""
        requested = {key: value for key, value in self.options.items() if key not in _OWN_OPTIONS}
        names = self.settings.cluster.gateway.get("options") or {}
        if not isinstance(names, dict):
            raise SpecError(f"gateway.options in the environment is {shown(names)}; a mapping is needed")
        try:
            chosen = choose_options(
                api.options(), requested, needs(self.settings, self.seconds("idle_timeout", _IDLE_SECONDS)), names
            )
        except SpecError as error:
            raise SpecError(f"the Dask Gateway at {api.address}: {error}") from None
        compute = self.settings.compute
        unsupported = [
            f"compute.{key} is said, which no gateway knows" for key in _UNSUPPORTED if getattr(compute, key)
        ]
        for warning in (*chosen.warnings, *unsupported):
            _log.warning("%s (the Dask Gateway at %s)", warning, api.address)
        return chosen

    def _find_earlier(self, api: GatewayApi, chosen: ChosenOptions) -> str | None:
        """Return the cluster of an earlier coordinator of this job, if it exists and has these options."""
        record = records.find(self._job_url)
        if record is None or (record.backend, record.where) != (self.name, api.address):
            return None
        report = api.report(record.name)
        if report is None or report.status.name in ENDED:
            return None
        if not chosen.options.items() <= report.options.items():
            api.stop(record.name)
            return None
        self._record = self._write_record(record.name)
        self._is_taken_over = True
        return record.name

    def _create(self, api: GatewayApi, chosen: ChosenOptions) -> str:
        # The server chooses the name. Until then a record without it shows that there may be a cluster.
        unnamed = self._record = self._write_record(f"{_UNNAMED}{self._token}")
        name = self._cluster = api.create(chosen.options)
        self._record = self._write_record(name)
        records.delete(unnamed)
        return name

    def _write_record(self, name: str) -> records.ClusterRecord:
        assert self._api is not None
        return records.write(self._job_url, self.name, name, self._api.address, is_detached=self._is_detached)

    def _wait_until_running(self, api: GatewayApi, name: str, deadline: float, limit: float) -> ClusterReport:
        where = f"the cluster {name} of the Dask Gateway at {api.address}"
        pause, reason = _POLL_SECONDS, "it is pending"
        while not self.closing.is_set():
            try:
                report = api.report(name)
            except GatewayUnreachableError as error:
                reason = str(error)  # a restarted gateway keeps its clusters
            else:
                if report is None or report.status.name in ENDED:
                    raise ClusterError(
                        f"{where} could not be started: its scheduler ended before it could be reached; the log of the "
                        "gateway's server tells why, ask its administrator"
                    )
                if report.status.name == "RUNNING":
                    return report
                reason = "it is pending, as when there is no room for it"
            if time.monotonic() > deadline:
                raise ClusterError(
                    f"{where} has not come up within {limit:.0f} s: {reason} (--cluster-option start_timeout=SECONDS "
                    "allows more time)"
                )
            self.closing.wait(pause)
            pause = min(pause * 1.5, _MAX_POLL_SECONDS)
        raise ClusterError(f"{where} is not waited for any longer")

    def _connect_to(self, report: ClusterReport, deadline: float) -> Client:
        from distributed import Client
        from distributed.versions import VersionMismatchWarning

        while True:
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", VersionMismatchWarning)  # compared later, by our own rules
                    return Client(
                        report.scheduler_address,
                        security=report.security,
                        set_as_default=False,
                        timeout=min(_CONNECT_SECONDS, max(deadline - time.monotonic(), 1)),
                    )
            except (ImportError, TypeError, ValueError, RuntimeError) as error:
                raise ClusterError(
                    f"the scheduler of the cluster {report.name} does not take this client: "
                    f"{type(error).__name__}: {error}"
                ) from error
            except (OSError, TimeoutError) as error:
                if time.monotonic() > deadline or self.closing.is_set():
                    raise ClusterError(
                        f"the gateway's proxy at {report.scheduler_address.rsplit('/', 1)[0]} does not lead to the "
                        f"scheduler of the cluster {report.name} ({type(error).__name__}: {error}): check "
                        "gateway.proxy-address in Dask's configuration"
                    ) from error

    def reconnect(self) -> Client | None:
        """Return a client of the same cluster, which outlives a restart of the gateway; ClusterError if it ended."""
        if self._api is None or self._cluster is None:
            return None
        try:
            report = self._api.report(self._cluster)
        except GatewayUnreachableError as error:
            raise ConnectionError(str(error)) from None  # it may come back
        if report is None or report.status.name in ENDED:
            raise ClusterError(f"{self._end_reason()} (the job can be resumed)")
        if report.status.name != "RUNNING":
            return None
        try:
            client = self._connect_to(report, time.monotonic())
        except ClusterError as error:
            raise ConnectionError(str(error)) from None
        self._register(client)
        return client

    def explain_missing_workers(self) -> str | None:
        """Return why there are no workers, as far as the gateway knows."""
        if self._api is None or self._cluster is None:
            return None
        try:
            report = self._api.report(self._cluster)
        except CortexDaskError as error:
            return str(error)
        if report is None or report.status.name in ENDED:
            return self._end_reason()
        reason = super().explain_missing_workers()
        return f"{reason} (the cluster {self._cluster} of the Dask Gateway at {self._api.address})"

    def _end_reason(self) -> str:
        assert self._api is not None
        return (
            f"the Dask Gateway at {self._api.address} has ended the cluster {self._cluster}: its scheduler was lost, "
            "its workers could not be started, or somebody has stopped it"
        )

    # ending ---------------------------------------------------------------------------------------------------------

    def shutdown(self) -> None:
        """End the cluster, unless another coordinator of the job has taken it over."""
        api, record = self._api, self._record
        if api is None or record is None:
            return
        try:
            if records.find(self._job_url) != record:
                return
        except OSError as error:  # a store that fails does not keep the cluster from being ended
            _log.warning("the record of the cluster %s cannot be read: %s", self._cluster, error)
        if self._cluster is None or self._stop(api, self._cluster):
            records.delete(record)

    def _stop(self, api: GatewayApi, name: str) -> bool:
        """End a cluster; return whether the gateway has accepted that."""
        deadline = time.monotonic() + _STOP_SECONDS
        while True:
            try:
                api.stop(name)
            except GatewayUnreachableError as error:
                if time.monotonic() < deadline:
                    time.sleep(1)
                    continue
                seconds = self.seconds("idle_timeout", _IDLE_SECONDS)
                _log.warning("%s; its cluster %s ends by itself %.0f s from now", error, name, seconds)
            except CortexDaskError as error:
                _log.warning("the cluster %s could not be ended: %s", name, error)
            else:
                return True
            return False


def running_clusters(options: Mapping[str, Any], recorded: Sequence[records.ClusterRecord]) -> list[RunningCluster]:
    """Return the user's clusters that run for jobs, at the gateway of Dask's configuration."""
    api = GatewayApi()
    names = {record.name for record in recorded}
    found = []
    for report in api.list():
        tags = next((value for value in report.options.values() if isinstance(value, dict) and _JOB in value), {})
        if report.name in names or tags:
            found.append(
                RunningCluster(
                    backend="gateway",
                    name=report.name,
                    where=api.address,
                    job_id=tags.get(_JOB),
                    api_name=tags.get(_API),
                    created_time=report.start_time.timestamp(),
                )
            )
    return found


def close_cluster(cluster: RunningCluster, options: Mapping[str, Any]) -> None:
    """End a cluster; raise ClusterError if the gateway does not answer, or is not the one that created it."""
    api = GatewayApi()
    if cluster.where != api.address:
        raise ClusterError(
            f"the cluster {cluster.name} was made by the Dask Gateway at {cluster.where}, but Dask's configuration "
            f"names {api.address}: correct gateway.address"
        )
    api.stop(cluster.name)


def needs(settings: JobSettings, idle_timeout: float) -> Needs:
    """Return what a job needs of a gateway's cluster.

    Among the variables, if the site has an option for them: the job, by which left-over clusters are recognised, and
    Dask's own idle timeout, for the seconds until a coordinator is connected.
    """
    compute = settings.compute
    return Needs(
        cpu=compute.cpu,
        memory=compute.memory,
        gpu=compute.gpu,
        image=settings.handler.image,
        env={
            **settings.handler.env,
            _JOB: settings.job_id,
            _API: settings.api_name,
            "DASK_DISTRIBUTED__SCHEDULER__IDLE_TIMEOUT": f"{idle_timeout:g}s",
        },
        idle_timeout=idle_timeout,
    )
