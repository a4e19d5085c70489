"""The port to the machines: what the coordinator needs of every backend."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

from cortex_dask.io.job.records import Outcome, SplitEvent, SplitTask
from cortex_dask.io.job.settings import JobSettings


class WorkerLost(Exception):  # noqa: N818 - named as the cause that users read in dead letters
    """A split's worker vanished before it returned; its batches are not to blame."""

    def __init__(self, message: str, workers: int = 1) -> None:
        super().__init__(message)
        #: How many workers vanished: a scheduler retries a split on other workers; 0 when the scheduler was lost.
        self.workers = workers


Done = Callable[[Outcome | Exception], None]
Report = Callable[[SplitEvent], None]


class Cluster(ABC):
    """A backend: some slots, each of which runs one split at a time.

    The coordinator calls :meth:`start` once, :meth:`submit` many times, :meth:`stop` when the running splits have to
    end now, and :meth:`close` in any case.
    """

    #: The word for ``--cluster`` and for messages.
    name: str
    #: Whether splits run in the thread that submits them.
    runs_inline = False

    def prepare(self, job_url: str, settings: JobSettings) -> None:  # noqa: B027 - not every backend has to
        """Start what takes time and needs no plan; called before the job is planned."""

    @abstractmethod
    def start(self, job_url: str, settings: JobSettings, report: Report, check: Callable[[], None]) -> None:
        """Bring the slots up, or connect to them.

        ``report`` receives the events of running splits, from any thread. ``check`` is called every second while a
        cluster comes up; it raises when the job has to end.
        """

    @abstractmethod
    def slots(self) -> int:
        """Return how many splits can run at this moment."""

    def queue_depth(self) -> int:
        """Return how many more splits than slots may be sent, so that a slot that becomes free has its next one."""
        return (self.slots() + 3) // 4

    def is_ready(self) -> bool:
        """Return whether splits can be sent; false while a lost scheduler is waited for."""
        return True

    def scale(self, splits_left: int) -> None:  # noqa: B027 - most backends have a fixed size
        """Adapt the number of workers to the splits that are not done yet; called about once a second."""

    @abstractmethod
    def submit(self, tasks: Sequence[tuple[SplitTask, Done]], *, elsewhere: bool = False) -> None:
        """Send splits; each ``done`` is called once, from any thread, with the outcome or with :class:`WorkerLost`.

        ``elsewhere``: they run already, and are to run on other workers too if possible.
        """

    def cancel(self, split: int) -> None:  # noqa: B027 - optional
        """End the attempts at a split that is committed, if that is cheap; returns at once."""

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
        """Return what people should know while the job runs, e.g. why there are no workers."""
        return ""
