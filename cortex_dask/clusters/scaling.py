"""How many workers a job should have at this moment, and asking for them."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from cortex_dask.io.job.settings import JobSettings

_log = logging.getLogger(__name__)

_DOWN_SECONDS = 5.0  # between two reductions: at the end of a job there is less to do every moment
_RETRY_SECONDS = 10.0
_CLOSE_SECONDS = 10.0


def workers_for(splits_left: int, *, least: int, most: int, threads: int) -> int:
    """Return how many Dask workers with so many threads there should be, for ``least`` to ``most`` slots.

    At least one: ``on_job_complete`` runs on a worker too.

    >>> workers_for(1000, least=0, most=8, threads=1), workers_for(3, least=0, most=8, threads=2)
    (8, 2)
    """
    slots = min(max(splits_left, least, 1), most)
    return -(-slots // threads)


def first_workers(settings: JobSettings, threads: int) -> int:
    """Return how many Dask workers a cluster is made with, while the number of splits is unknown."""
    slots = settings.workers if settings.min_workers is None else settings.min_workers
    return -(-slots // threads)


class Scaling:
    """Keeps a cluster at the size that its job can use.

    A job wants as many workers as ``workers`` says while there is work for them all, and never fewer than
    ``min_workers``. The cluster is asked in a thread, as it may take long to answer.
    """

    def __init__(
        self,
        settings: JobSettings,
        threads: int,  # of one Dask worker
        resize: Callable[[int], None],
        retry_seconds: float = _RETRY_SECONDS,  # after which a cluster that has refused is asked again
    ) -> None:
        self._least = settings.min_workers or 0
        self._most = settings.workers
        self._threads = threads
        self._resize = resize
        self._retry_seconds = retry_seconds
        self._requested = first_workers(settings, threads)  # what the cluster was last asked for
        self._wanted = self._requested
        self._reduced = 0.0
        self._changed = threading.Event()
        self._closed = False
        self._thread: threading.Thread | None = None

    def update(self, splits_left: int) -> None:
        """Ask for the workers that the remaining splits can use, if that number has changed."""
        wanted = workers_for(splits_left, least=self._least, most=self._most, threads=self._threads)
        now = time.monotonic()
        if wanted == self._wanted or (wanted < self._wanted and now - self._reduced < _DOWN_SECONDS):
            return
        if wanted < self._wanted:
            self._reduced = now
        self._wanted = wanted
        if self._thread is None:
            self._thread = threading.Thread(target=self._follow, name="cortex-dask-scaling", daemon=True)
            self._thread.start()
        self._changed.set()

    def close(self) -> None:
        """Ask for nothing more."""
        self._closed = True
        self._changed.set()
        if self._thread is not None:
            self._thread.join(_CLOSE_SECONDS)

    def _follow(self) -> None:
        while True:
            self._changed.wait()
            self._changed.clear()
            if self._closed:
                return
            wanted = self._wanted
            if wanted == self._requested:
                continue
            try:
                self._resize(wanted)
                self._requested = wanted
            except Exception as error:  # noqa: BLE001 - the job continues with the workers that it has
                _log.warning("the cluster did not take the size of %d workers: %s", wanted, error)
                retry = threading.Timer(self._retry_seconds, self._changed.set)
                retry.daemon = True
                retry.start()
