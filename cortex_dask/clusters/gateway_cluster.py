"""What a coordinator does with a gateway's cluster once it is there, from outside or beside its scheduler."""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from cortex_dask.clusters import dask_worker, gateway_scheduler
from cortex_dask.clusters.base import Done
from cortex_dask.clusters.client import DaskCluster
from cortex_dask.clusters.scaling import first_workers
from cortex_dask.io.records import Outcome, SplitTask

if TYPE_CHECKING:
    from distributed import Client, Future

__all__ = ["IDLE_SECONDS", "GatewayCluster"]

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
        told = client.run_on_scheduler(gateway_scheduler.attend, client.id, seconds, facts)
        self._slots = told.get("slots")
        self._has_gpus = bool(told.get("has_gpus"))
        self.threads_per_worker = self._slots or 1
        self._hold(client)

    def _enter(self, client: Client) -> None:
        super()._enter(client)
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

    def scale(self, workers: int) -> None:
        """Ask the cluster's scheduler, which knows who is idle; it tells the gateway."""
        if self._slots is not None and self._slots != self.threads_per_worker:
            workers = -(-workers * self.threads_per_worker // self._slots)
        self.client.run_on_scheduler(gateway_scheduler.resize, workers)

    def _count(self) -> dict[str, int]:
        """Return the slots of each worker: by its GPUs where it says how many it has, else as its options make them."""
        threads: dict[str, int] = dict(self.client.nthreads())
        if self._lease is not None and self._lease.cancelled():  # the connection was lost, and is there again
            self._hold(self.client)
        if self.settings.compute.gpu:
            workers = self.workers().values()
            self.has_resources = not self._has_gpus or any("GPU" in worker["resources"] for worker in workers)
            if self.has_resources:
                self._spare = False
                return super()._count()
        if self._slots is None and threads:
            self._slots = min(threads.values())
            self.scale(first_workers(self.settings, self.threads_per_worker))
        slots = {address: min(count, self._slots or count) for address, count in threads.items()}
        self._spare = slots != threads
        return slots

    def is_ready(self) -> bool:
        """Return whether splits can be sent: where devices are needed, not before a worker has said what it has."""
        return super().is_ready() and not (self._has_gpus and self.settings.compute.gpu and not self._threads)

    def ahead(self) -> int:
        """Return 0 where a split that waits on a worker would find a free thread there that is no slot."""
        return 0 if self._spare else super().ahead()

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

    def trouble(self) -> str | None:
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
