"""What a coordinator does with a gateway's cluster once it is there, from outside or beside its scheduler."""

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
from cortex_dask.clusters.gateway.server import ENDED, GatewayApi, GatewayUnreachableError
from cortex_dask.clusters.inventory import RunningCluster
from cortex_dask.clusters.scaling import first_workers
from cortex_dask.errors import ClusterError, CortexDaskError, SpecError
from cortex_dask.formatting import shown
from cortex_dask.io.job.records import Outcome, SplitTask
from cortex_dask.io.job.settings import JobSettings
from cortex_dask.runtime.cluster import Done

if TYPE_CHECKING:
    from dask_gateway.client import ClusterReport
    from distributed import Client, Future

#: The usual idle timeout.
IDLE_SECONDS = 600.0
_SWEEP_SECONDS = 20.0


class GatewayCluster(DaskCluster):
    """A cluster that a Dask Gateway has made for a job.

    A gateway gives a worker as many threads as cores. A slot is not always a thread here: one may need several cores,
    or a GPU. Where workers do not say how many GPUs they have, splits are sent to the workers one by one.
    """

    name = "gateway"
    is_fixed = False

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._slots: int | None = None  # of each worker; None: as many as it has threads
        self._has_gpus = False  # whether workers have GPUs for these slots, though they may not say so
        self._spare = False  # whether workers have more threads than slots, so that splits have to be placed
        self._placed: Counter[str] = Counter()  # running splits that were, by worker
        self._lease: Future[Any] | None = None
        self._is_taken_over = False  # whether an earlier coordinator has used the cluster

    @property
    def options(self) -> dict[str, Any]:
        """The options that the job was submitted with, if it was submitted to a gateway."""
        where = self.settings.cluster
        return where.options if where.name == "gateway" else {}

    def _attend(self, client: Client, facts: dict[str, Any] | None = None) -> None:
        """Let the cluster end when this coordinator has been gone for some time, and not before.

        Parameters
        ----------
        client : distributed.Client
            A connected client.
        facts : dict, optional
            What later coordinators of this cluster have to know; None: an earlier one has told.
        """
        self.check(client)  # before the scheduler is asked to run something that it may not have
        seconds = self.seconds("idle_timeout", IDLE_SECONDS)
        told = client.run_on_scheduler(scheduler.attend, client.id, seconds, facts)
        self._slots = told.get("slots")
        self._has_gpus = bool(told.get("has_gpus"))
        self.threads_per_worker = self._slots or 1
        self._hold(client)

    def _use_client(self, client: Client) -> None:
        super()._use_client(client)
        if self._is_taken_over:
            # What an earlier coordinator had sent occupies threads that the scheduler takes for free.
            self._on_all_workers(_SWEEP_SECONDS, dask_worker.close_job, self._job_url)
            self._is_taken_over = False

    def _hold(self, client: Client) -> None:
        """Keep the cluster from being idle while this client is connected.

        Sites end clusters that are idle, also while a job is planned, or its parts are published. A task that no worker
        can run is work that waits; it ends with its client.
        """
        key = f"lease-{self.settings.job_id}-{self._token}-{time.time_ns()}"
        self._lease = client.submit(int, key=key, pure=False, resources={"cortex-dask-lease": 1})

    @property
    def _first_workers(self) -> int:
        """How many workers are asked for before it is known how many splits there are."""
        if self._slots is None:
            return 1  # which tells how many threads a worker has
        return first_workers(self.settings, self._slots)

    # sizes ----------------------------------------------------------------------------------------------------------

    def resize(self, workers: int) -> None:
        """Ask the cluster's scheduler, which knows who is idle; it tells the gateway."""
        if self._slots is not None and self._slots != self.threads_per_worker:
            workers = -(-workers * self.threads_per_worker // self._slots)
        self.client.run_on_scheduler(scheduler.resize, workers)

    def _count_slots(self) -> dict[str, int]:
        """Return the slots of each worker: by its GPUs where it says how many it has, else as its options make them."""
        threads: dict[str, int] = dict(self.client.nthreads())
        if self._lease is not None and self._lease.cancelled():  # the connection was lost, and is there again
            self._hold(self.client)
        if self.settings.compute.gpu:
            workers = self.workers().values()
            self.has_resources = not self._has_gpus or any("GPU" in worker["resources"] for worker in workers)
            if self.has_resources:
                self._spare = False
                return super()._count_slots()
        if self._slots is None and threads:
            self._slots = min(threads.values())
            self.resize(first_workers(self.settings, self.threads_per_worker))
        slots = {address: min(count, self._slots or count) for address, count in threads.items()}
        self._spare = slots != threads
        return slots

    def is_ready(self) -> bool:
        """Return whether splits can be sent: where devices are needed, not before a worker has said what it has."""
        return super().is_ready() and not (self._has_gpus and self.settings.compute.gpu and not self._threads)

    def queue_depth(self) -> int:
        """Return 0 where a split that waits on a worker would find a free thread there that is no slot."""
        return 0 if self._spare else super().queue_depth()

    def _submit(self, tasks: Sequence[tuple[SplitTask, Done]], place: dict[str, Any]) -> None:
        """Send splits; one by one to the worker with the most free slots, where Dask would fill spare threads."""
        threads = self._threads
        if not self._spare or not threads:
            super()._submit(tasks, place)
            return
        for task, done in tasks:
            possible = [address for address in place.get("workers", ()) if address in threads] or list(threads)
            worker = max(possible, key=lambda address: threads[address] - self._placed[address])
            self._placed[worker] += 1
            # others, should it vanish
            chosen = {**place, "workers": [worker], "allow_other_workers": True}
            super()._submit([(task, partial(self._leave, worker, done))], chosen)

    def _leave(self, worker: str, done: Done, outcome: Outcome | Exception) -> None:
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


_log = logging.getLogger(__name__)

#: The options that are ours, and not the site's.
_OWN_OPTIONS = ("start_timeout", "idle_timeout", "reconnect_timeout")
#: What a job may need that no site has an option for; where one has, it is asked for by its own name.
_UNKNOWN = ("inf", "node_groups", "shm")
_START_SECONDS = 600.0
_POLL_SECONDS = 0.25  # between two looks at a cluster that comes up; grows to the next
_POLL_MOST = 2.0
_PROXY_SECONDS = 30.0  # for the gateway's proxy to know a cluster that has just come up
_CONNECT_SECONDS = 10.0
_CLOSE_SECONDS = 5.0
#: The backend of a coordinator beside the scheduler.
PARENT_SCHEDULER = "cortex_dask.clusters.gateway.detached:GatewayParentScheduler"
#: Of the record of a cluster that the gateway has not named yet.
_UNNAMED = "unnamed-"
#: The variables that say whose a cluster is.
_JOB, _API = "CORTEX_DASK_JOB", "CORTEX_DASK_API"
_STOP_SECONDS = 20.0  # for a gateway that is being restarted to take the word that a cluster is not wanted any more


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
        """Have a cluster made, or find the one that an earlier coordinator of the job has left, and connect to it."""
        limit = self.seconds("start_timeout", _START_SECONDS)
        deadline = time.monotonic() + limit
        api = self._api = GatewayApi()
        choice = self._choose(api)
        self._cluster = self._find(api, choice) or self._create(api, choice)
        report = self._await_running(api, self._cluster, deadline, limit)
        client = self._client_of(report, min(deadline, time.monotonic() + _PROXY_SECONDS))
        try:
            self._attend(client, {"slots": choice.slots, "has_gpus": choice.has_gpus})
            api.scale(self._cluster, self._first_workers)  # not the scheduler: the server knows the user's limits
        except BaseException:
            client.close(timeout=_CLOSE_SECONDS)
            raise
        return client

    def detach(self, job_url: str, settings: JobSettings, *, retry: bool = False) -> None:
        """Have a cluster made, and start the coordinator beside its scheduler; it ends the cluster after the job."""
        from cortex_dask.clusters.detached.scheduler import send_coordinator

        self._job_url, self._settings, self._is_detached = job_url, settings, True
        try:
            client = self.connect()
            try:
                send_coordinator(client, job_url, settings, retry=retry, backend=PARENT_SCHEDULER)
            finally:
                client.close(timeout=_CLOSE_SECONDS)
        except BaseException:
            self.shutdown()
            raise

    def _choose(self, api: GatewayApi) -> ChosenOptions:
        """Return the options for the cluster, from what the site offers and what the job asks for."""
        asked = {key: value for key, value in self.options.items() if key not in _OWN_OPTIONS}
        names = self.settings.cluster.gateway.get("options") or {}
        if not isinstance(names, dict):
            raise SpecError(f"gateway.options in the environment is {shown(names)}; a mapping is needed")
        try:
            choice = choose_options(
                api.options(), asked, needs(self.settings, self.seconds("idle_timeout", IDLE_SECONDS)), names
            )
        except SpecError as error:
            raise SpecError(f"the Dask Gateway at {api.address}: {error}") from None
        compute = self.settings.compute
        said = [f"compute.{name} is said, which no gateway knows" for name in _UNKNOWN if getattr(compute, name)]
        for note in (*choice.warnings, *said):
            _log.warning("%s (the Dask Gateway at %s)", note, api.address)
        return choice

    def _find(self, api: GatewayApi, choice: ChosenOptions) -> str | None:
        """Return the cluster that an earlier coordinator of this job has left, if it is there and is what is needed."""
        left = records.find(self._job_url)
        if left is None or (left.backend, left.where) != (self.name, api.address):
            return None
        report = api.report(left.name)
        if report is None or report.status.name in ENDED:
            return None
        if not choice.options.items() <= report.options.items():
            api.stop(left.name)
            return None
        self._record = self._note(left.name)  # it is ours from now on
        self._is_taken_over = True
        return left.name

    def _create(self, api: GatewayApi, choice: ChosenOptions) -> str:
        # The server gives the name. Until then a record without it says that there may be a cluster.
        before = self._record = self._note(f"{_UNNAMED}{self._token}")
        name = self._cluster = api.create(choice.options)
        self._record = self._note(name)
        records.drop(before)
        return name

    def _note(self, name: str) -> records.ClusterRecord:
        assert self._api is not None
        return records.keep(self._job_url, self.name, name, self._api.address, is_detached=self._is_detached)

    def _await_running(self, api: GatewayApi, name: str, deadline: float, limit: float) -> ClusterReport:
        where, pause, last = f"the cluster {name} of the Dask Gateway at {api.address}", _POLL_SECONDS, "it is pending"
        while not self.closing.is_set():
            try:
                report = api.report(name)
            except GatewayUnreachableError as error:
                last = str(error)  # a gateway that is restarted goes on with its clusters
            else:
                if report is None or report.status.name in ENDED:
                    raise ClusterError(
                        f"{where} could not be started: its scheduler ended before it could be reached; the log of the "
                        "gateway's server tells why, ask its administrator"
                    )
                if report.status.name == "RUNNING":
                    return report
                last = "it is pending, as when there is no room for it"
            if time.monotonic() > deadline:
                raise ClusterError(
                    f"{where} has not come up within {limit:.0f} s: {last} (--cluster-option start_timeout=SECONDS "
                    "allows more time)"
                )
            self.closing.wait(pause)
            pause = min(pause * 1.5, _POLL_MOST)
        raise ClusterError(f"{where} is not waited for any longer")

    def _client_of(self, report: ClusterReport, deadline: float) -> Client:
        from distributed import Client
        from distributed.versions import VersionMismatchWarning

        while True:
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", VersionMismatchWarning)  # they are compared later, by our own rules
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
        """Return a client of the same cluster, which outlives a restart of the gateway.

        Raises
        ------
        ClusterError
            If the cluster has ended: the job can go on with another one, when it is resumed.
        """
        if self._api is None or self._cluster is None:
            return None
        try:
            report = self._api.report(self._cluster)
        except GatewayUnreachableError as error:
            raise ConnectionError(str(error)) from None  # it may be back soon
        if report is None or report.status.name in ENDED:
            raise ClusterError(f"{self._end_reason()} (the job can be resumed)")
        if report.status.name != "RUNNING":
            return None
        try:
            client = self._client_of(report, time.monotonic())
        except ClusterError as error:
            raise ConnectionError(str(error)) from None
        self._attend(client)
        return client

    def explain_missing_workers(self) -> str | None:
        """Return why there are no workers, as far as the gateway tells."""
        if self._api is None or self._cluster is None:
            return None
        try:
            report = self._api.report(self._cluster)
        except CortexDaskError as error:
            return str(error)
        if report is None or report.status.name in ENDED:
            return self._end_reason()
        said = super().explain_missing_workers()
        return f"{said} (the cluster {self._cluster} of the Dask Gateway at {self._api.address})"

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
        except OSError as error:  # a store that fails shall not cost a cluster as well
            _log.warning("the record of the cluster %s cannot be read: %s", self._cluster, error)
        if self._cluster is None or self._stop(api, self._cluster):
            records.drop(record)

    def _stop(self, api: GatewayApi, name: str) -> bool:
        """End a cluster; returns whether the gateway has taken the word."""
        deadline = time.monotonic() + _STOP_SECONDS
        while True:
            try:
                api.stop(name)
            except GatewayUnreachableError as error:
                if time.monotonic() < deadline:
                    time.sleep(1)
                    continue
                seconds = self.seconds("idle_timeout", IDLE_SECONDS)
                _log.warning("%s; its cluster %s ends by itself %.0f s from now", error, name, seconds)
            except CortexDaskError as error:
                _log.warning("the cluster %s could not be ended: %s", name, error)
            else:
                return True
            return False


def running(options: Mapping[str, Any], noted: Sequence[records.ClusterRecord]) -> list[RunningCluster]:
    """Return the user's clusters that run for jobs.

    Parameters
    ----------
    options : mapping
        The environment's cluster options; the gateway is that of Dask's configuration.
    noted : sequence of ClusterRecord
        What the environment's jobs have noted.

    Raises
    ------
    ClusterError, SpecError
        If the gateway does not answer, or there is none.
    """
    api = GatewayApi()
    names = {record.name for record in noted}
    found = []
    for report in api.list():
        tags = next((value for value in report.options.values() if isinstance(value, dict) and _JOB in value), {})
        if report.name in names or tags:
            found.append(
                RunningCluster(
                    "gateway",
                    report.name,
                    api.address,
                    tags.get(_JOB),
                    tags.get(_API),
                    report.start_time.timestamp(),
                )
            )
    return found


def close(cluster: RunningCluster, options: Mapping[str, Any]) -> None:
    """End a cluster.

    Raises
    ------
    ClusterError
        If the gateway does not answer, or is not the one that made it.
    """
    api = GatewayApi()
    if cluster.where != api.address:
        raise ClusterError(
            f"the cluster {cluster.name} was made by the Dask Gateway at {cluster.where}, but Dask's configuration "
            f"names {api.address}: correct gateway.address"
        )
    api.stop(cluster.name)


def needs(settings: JobSettings, idle_timeout: float) -> Needs:
    """Return what a job needs of a gateway's cluster.

    Where the site takes variables, some go with every cluster: whose it is, for those who look for leftovers; and
    Dask's own idle timeout, for the seconds until a coordinator is connected.
    """
    compute = settings.compute
    return Needs(
        cpu=compute.cpu,
        memory=compute.memory,
        gpu=compute.gpu,
        image=settings.handler.extra.get("image"),
        env={
            **settings.handler.env,
            _JOB: settings.job_id,
            _API: settings.api_name,
            "DASK_DISTRIBUTED__SCHEDULER__IDLE_TIMEOUT": f"{idle_timeout:g}s",
        },
        idle_timeout=idle_timeout,
    )
