"""The workers of a job as the status document counts them: waited for, starting, at work, ended, failed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence

__all__ = ["STALLED_SECONDS", "Workers", "count_workers"]

#: A worker that is waited for longer than this is stalled: Cortex' own figure.
STALLED_SECONDS = 600.0

_STOPPED = ("stopped", "timed out")  # their workers were ended by us: they neither succeeded nor failed


class Workers:
    """The states of a job's workers, from the reports of slots.

    Parameters
    ----------
    wanted : int
        How many the job asked for.
    clock : callable
        Returns the time in seconds.
    """

    def __init__(self, wanted: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._wanted = wanted
        self._clock = clock
        self._states: dict[str, str] = {}  # by slot, the one that has reported last at the end
        self._missing: list[float] = []  # since when each worker that is not there is waited for
        self._count_missing()

    def report(self, slot: str, state: str) -> None:
        """Take in that a slot is ``initializing``, ``running``, ``idle`` or ``failed``."""
        self._states.pop(slot, None)
        self._states[slot] = state
        # The slots of a host that has vanished never say so; those that took their places have reported since.
        while len(self._states) > self._wanted:
            del self._states[next(iter(self._states))]
        self._count_missing()

    def want(self, count: int) -> None:
        """Say how many can be used: no more than there are splits."""
        self._wanted = count
        self._count_missing()

    def counts(self, final_status: str | None = None) -> dict[str, int]:
        """Return ``worker_counts``; ``final_status`` is that of a job that has ended."""
        return count_workers(self._states.values(), self._missing, self._clock(), final_status)

    def _count_missing(self) -> None:
        missing = max(self._wanted - len(self._states), 0)
        del self._missing[: len(self._missing) - missing]  # who came is taken for the one waited for the longest
        self._missing += [self._clock()] * (missing - len(self._missing))


def count_workers(
    states: Iterable[str], missing_since: Sequence[float], now: float, final_status: str | None = None
) -> dict[str, int]:
    """Count workers as Cortex does.

    Parameters
    ----------
    states : iterable of str
        Of those that are there: ``initializing``, ``running``, ``idle`` (between two splits) or ``failed``.
    missing_since : sequence of float
        For each of those that are not there yet, since when.
    now : float
        The time, by the same clock.
    final_status : str, optional
        The status of a job that has ended; None: it has not.

    Examples
    --------
    >>> count_workers(["running", "idle"], [0.0, 500.0], now=700.0)
    {'pending': 1, 'initializing': 0, 'running': 2, 'succeeded': 0, 'failed': 0, 'stalled': 1}
    """
    counts = dict.fromkeys(("pending", "initializing", "running", "succeeded", "failed", "stalled"), 0)
    if final_status in _STOPPED:
        return counts
    for state in states:
        if final_status is not None:
            counts["failed" if state == "failed" else "succeeded"] += 1
        else:
            counts["running" if state == "idle" else state] += 1
    if final_status is None:
        for since in missing_since:
            counts["stalled" if now - since > STALLED_SECONDS else "pending"] += 1
    return counts
