"""When stragglers are looked for, and which of them still wait for a slot."""

from __future__ import annotations

from collections.abc import Container

from cortex_dask.io.splits import Split
from cortex_dask.runtime.window import Window

__all__ = ["Backups"]

_CHECK = 1.0  # seconds between two looks
_STORAGE_TROUBLE = 60.0  # seconds after a failure of a store in which nothing is taken for a straggler


class Backups:
    """The splits that should have a second attempt.

    Parameters
    ----------
    window : Window
        What is in flight.
    workers : int
        Slots of the job: with a single one there is nowhere else to go.
    """

    def __init__(self, window: Window, workers: int) -> None:
        self._window = window
        self._workers = workers
        self._next_check = 0.0
        self._calm_from = 0.0
        self.waiting: list[Split] = []  # for a slot

    def storage_failed(self, now: float) -> None:
        """Take in that a store has failed: what it holds up runs no faster elsewhere."""
        self._calm_from = now + _STORAGE_TROUBLE

    def take(self, free: int, now: float, *, done: int, total: int, lost: Container[int]) -> list[Split]:
        """Return the splits to start a second time now.

        Parameters
        ----------
        free : int
            Slots that have nothing to do.
        now : float
            The time, as ``time.monotonic`` has it.
        done, total : int
            Splits of the job that are done, and all of them.
        lost : container of int
            Splits that have lost a worker: one that takes workers down must not take two.
        """
        if now < self._next_check:
            return []
        self._next_check = now + _CHECK
        late = self._window.stragglers(now, done=done, total=total)
        calm = self._workers > 1 and now >= self._calm_from
        due = [split for split in late if split.number not in lost] if calm else []
        self.waiting = due[free:]
        return due[:free]
