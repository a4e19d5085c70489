"""When stragglers are looked for, and which of them still wait for a slot."""

from __future__ import annotations

from collections import deque
from collections.abc import Container, Iterator
from dataclasses import dataclass

from cortex_dask.io.job.splits import Split
from cortex_dask.runtime.coordinator.stragglers import Finished, Running, stragglers

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


_REMEMBERED = 1000  # splits that have ended: enough for a median, and for one that follows a change of their length


@dataclass(slots=True, eq=False)
class Attempt:
    """One sending of a split."""

    split: Split
    number: int  # from 1; of all attempts at this split in this run of the job
    sent: float  # as time.monotonic has it
    began: float | None = None  # when it got a slot, as far as can be told from outside


class Window:
    """The attempts in flight.

    Which of them run and which wait for a slot is told by their order: workers take first what was sent first.
    """

    def __init__(self) -> None:
        self._attempts: dict[int, list[Attempt]] = {}
        self._waiting: deque[Attempt] = deque()
        self._running = 0
        self._slots = 0
        self._tries: dict[int, int] = {}  # of splits that are not in the ledger
        self._settled: set[int] = set()  # in flight although an attempt has come to its end
        self._finished: deque[Finished] = deque(maxlen=_REMEMBERED)

    def __len__(self) -> int:
        """Return the number of attempts in flight."""
        return self._running + len(self._waiting)

    def __contains__(self, split: int) -> bool:
        """Return whether an attempt at a split is in flight."""
        return split in self._attempts

    def open(self, split: Split, now: float) -> Attempt:
        """Count a new attempt at a split, which is about to be sent."""
        tries = self._tries[split.number] = self._tries.get(split.number, 0) + 1
        attempt = Attempt(split, tries, now)
        self._attempts.setdefault(split.number, []).append(attempt)
        self._waiting.append(attempt)
        return attempt

    def close(self, attempt: Attempt, now: float, *, done: bool) -> bool:
        """Take out an attempt that has ended.

        Parameters
        ----------
        attempt : Attempt
            The attempt.
        now : float
            The time, as ``time.monotonic`` has it.
        done : bool
            Whether it has come to its end: how long it took says how long others will take.

        Returns
        -------
        bool
            Whether the split is the caller's to decide about: not when another attempt at it has come to its end, or
            is still in flight.
        """
        number = attempt.split.number
        others = self._attempts[number]
        others.remove(attempt)
        if attempt.began is None:
            self._waiting.remove(attempt)
        else:
            self._running -= 1
        if done:
            # One that overtook others has begun at some time after it was sent.
            began = attempt.sent if attempt.began is None else attempt.began
            self._finished.append(Finished(now - began, attempt.split.bytes))
        self.advance(self._slots, now)
        settled = number in self._settled
        if not others:
            del self._attempts[number]
            self._settled.discard(number)
        return not settled and not others

    def settle(self, split: int) -> bool:
        """Take in that a split needs no further attempt; returns whether one is in flight all the same."""
        self._tries.pop(split, None)
        if split not in self._attempts:
            return False
        self._settled.add(split)
        return True

    def is_settled(self, split: int) -> bool:
        """Return whether the attempts at a split that are in flight are not needed any more."""
        return split in self._settled

    def advance(self, slots: int, now: float) -> None:
        """Let the attempts that were sent first begin, as many as there are slots."""
        self._slots = slots
        while self._waiting and self._running < slots:
            self._waiting.popleft().began = now
            self._running += 1

    def stragglers(self, now: float, *, done: int, total: int) -> Iterator[Split]:
        """Yield the splits that should have a second attempt, the one that is latest first.

        Parameters
        ----------
        now : float
            The time, as ``time.monotonic`` has it.
        done, total : int
            Splits of the job that are done, and all of them.
        """
        running = (
            Running(number, now - attempts[0].began, attempts[0].split.bytes)
            for number, attempts in self._attempts.items()
            if len(attempts) == 1 and number not in self._settled and attempts[0].began is not None
        )
        for number in stragglers(running, self._finished, done=done, total=total):
            yield self._attempts[number][0].split
