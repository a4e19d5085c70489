"""How many workers a job should have at this moment, and asking for them."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from cortex_dask.io.job.settings import JobSettings

__all__ = ["Scaling", "first_workers", "workers_for"]

_log = logging.getLogger(__name__)

_DOWN_SECONDS = 5.0  # between two times that workers are let go: at a job's tail there is less to do every moment
_RETRY_SECONDS = 10.0  # after a cluster has refused


def workers_for(splits_left: int, *, least: int, most: int, threads: int) -> int:
    """Return how many Dask workers there should be.

    Parameters
    ----------
    splits_left : int
        Splits that are not done yet.
    least, most : int
        Slots that the job wants at least, and at most.
    threads : int
        Slots of one Dask worker.

    Returns
    -------
    int
        At least 1: ``on_job_complete`` runs on a worker too.

    Examples
    --------
    >>> workers_for(1000, least=0, most=8, threads=1), workers_for(3, least=0, most=8, threads=2)
    (8, 2)
    """
    slots = min(max(splits_left, least, 1), most)
    return -(-slots // threads)


def first_workers(settings: JobSettings, threads: int) -> int:
    """Return how many Dask workers a cluster is made with, while it is not known how many splits there are."""
    slots = settings.workers if settings.min_workers is None else settings.min_workers
    return -(-slots // threads)


class Scaling:
    """Keeps a cluster at the size that its job can use.

    Parameters
    ----------
    settings : JobSettings
        Says how many workers the job wants: with ``min_workers`` never fewer than those, otherwise as many as
        ``workers`` while there is work for them all.
    threads : int
        Slots of one Dask worker.
    scale : callable
        Asks the cluster for so many Dask workers; may take its time.
    """

    def __init__(self, settings: JobSettings, threads: int, scale: Callable[[int], None]) -> None:
        self._least = settings.min_workers or 0
        self._most = settings.workers
        self._threads = threads
        self._scale = scale
        self._asked = first_workers(settings, threads)
        self._lowered = 0.0
        self._wanted = self._asked
        self._changed = threading.Event()
        self._closed = False
        self._thread: threading.Thread | None = None

    def want(self, splits_left: int) -> None:
        """Take the number of splits that are not done yet."""
        wanted = workers_for(splits_left, least=self._least, most=self._most, threads=self._threads)
        now = time.monotonic()
        if wanted == self._wanted or (wanted < self._wanted and now - self._lowered < _DOWN_SECONDS):
            return
        if wanted < self._wanted:
            self._lowered = now
        self._wanted = wanted
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="cortex-dask-scaling", daemon=True)
            self._thread.start()
        self._changed.set()

    def close(self) -> None:
        """Ask for nothing more."""
        self._closed = True
        self._changed.set()
        if self._thread is not None:
            self._thread.join(_RETRY_SECONDS)

    def _run(self) -> None:
        while True:
            self._changed.wait()
            self._changed.clear()
            if self._closed:
                return
            wanted = self._wanted
            if wanted == self._asked:
                continue
            try:
                self._scale(wanted)
                self._asked = wanted
            except Exception as error:  # noqa: BLE001 - the job goes on with the workers that it has
                _log.warning("the cluster did not take the size of %d workers: %s", wanted, error)
                retry = threading.Timer(_RETRY_SECONDS, self._changed.set)
                retry.daemon = True
                retry.start()
