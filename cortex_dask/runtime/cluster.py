"""The seam between the coordinator and the machines: what every backend does."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

from cortex_dask.errors import SpecError
from cortex_dask.io.job.records import Outcome, SplitTask
from cortex_dask.io.job.settings import JobSettings


class WorkerLost(Exception):  # noqa: N818 - named as the cause that users read in dead letters
    """A split's worker vanished before it returned; its batches are not to blame.

    Attributes
    ----------
    workers : int
        How many workers vanished under it: a scheduler may have tried it on several of its own accord; none, when it
        was the scheduler that was lost.
    """

    def __init__(self, message: str, workers: int = 1) -> None:
        super().__init__(message)
        self.workers = workers


Done = Callable[[Outcome | Exception], None]
Report = Callable[[dict[str, Any]], None]


class Cluster(ABC):
    """A backend: some slots, each of which runs one split at a time.

    The coordinator calls :meth:`start` once, :meth:`submit` many times (never more than its window), :meth:`stop` when
    the running splits have to end now, and :meth:`close` in any case.
    """

    #: The word for ``--cluster`` and for messages.
    name: str
    #: Called every second while :meth:`start` waits for a cluster that has to be made; raises when nobody wants it now.
    look_up: Callable[[], None] = staticmethod(lambda: None)

    def prepare(self, job_url: str, settings: JobSettings) -> None:  # noqa: B027 - not every backend has something to do
        """Begin whatever takes time and needs no plan; called before the job is planned. By default nothing."""

    @abstractmethod
    def start(self, job_url: str, settings: JobSettings, report: Report) -> None:
        """Bring the slots up, or connect to them.

        Parameters
        ----------
        job_url : str
            The job directory.
        settings : JobSettings
            Says how many workers are wanted and what each needs.
        report : callable
            Takes the events of running splits, from any thread.
        """

    @abstractmethod
    def slots(self) -> int:
        """Return how many splits can run at the same time, at this moment."""

    def is_ready(self) -> bool:
        """Return whether splits can be sent; not while a scheduler that was lost is waited for. By default they can."""
        return True

    def want(self, splits_left: int) -> None:  # noqa: B027 - most backends have what they have
        """Take the number of splits that are not done yet, about once a second, to have as many workers as needed."""

    def detach(self, job_url: str, settings: JobSettings, *, retry: bool = False) -> None:
        """Start a coordinator that outlives the caller, and return.

        Parameters
        ----------
        job_url : str
            The job directory.
        settings : JobSettings
            The job's.
        retry : bool, default False
            Whether the failed batches are handled again.

        Raises
        ------
        SpecError
            If this backend has no place for one.
        ClusterError
            If the cluster does not come up.
        """
        raise SpecError(f"cluster: {self.name} cannot run a job on its own; submit it without --detach")

    def ahead(self) -> int:
        """Return how many more splits than slots may be sent, so that a slot that has ended finds its next one there.

        By default a quarter; none where there are more threads than the job may use, for they would run at once.
        """
        return (self.slots() + 3) // 4

    @abstractmethod
    def submit(self, task: SplitTask, done: Done) -> None:
        """Send a split; ``done`` is called once, from any thread, with its outcome or with :class:`WorkerLost`."""

    def submit_many(self, tasks: Sequence[tuple[SplitTask, Done]]) -> None:
        """Send splits, each as :meth:`submit` would; a backend may do so with fewer messages."""
        for task, done in tasks:
            self.submit(task, done)

    def submit_again(self, task: SplitTask, done: Done) -> None:
        """Send a split that runs already, to another worker if that can be had; by default as :meth:`submit`."""
        self.submit(task, done)

    def abandon(self, split: int) -> None:  # noqa: B027 - it is a courtesy
        """End the attempts at a split, which is in the ledger, if that is cheap; returns at once. By default not."""

    @abstractmethod
    def complete(self) -> Outcome:
        """Run ``on_job_complete`` on one worker's handler and wait for it."""

    @abstractmethod
    def stop(self, reason: str) -> None:
        """End the running splits now; they answer with the outcome ``stopped``."""

    @abstractmethod
    def close(self) -> None:
        """End the job's handler processes, and everything that :meth:`start` started."""

    def notice(self) -> str:
        """Return what people should know while the job runs, e.g. why there are no workers; asked for every second."""
        return ""

    def describe(self) -> str:
        """Return one line for people."""
        return f"{self.name} with {self.slots()} slots"
