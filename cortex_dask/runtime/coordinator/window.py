"""The attempts in flight, and which splits get a second one."""

from __future__ import annotations

from collections import deque
from collections.abc import Container, Iterator
from dataclasses import dataclass

from cortex_dask.io.job.splits import Split
from cortex_dask.runtime.coordinator.stragglers import Finished, Running, stragglers

_REMEMBERED = 1000  # splits that have ended: enough for a median, and for one that follows a change of their length
_CHECK_SECONDS = 1.0  # between two checks for stragglers
_STORAGE_PAUSE = 60.0  # seconds after a failure of a store in which no split is called a straggler


@dataclass(slots=True, eq=False)
class Attempt:
    """One sending of a split; times are those of ``time.monotonic``."""

    split: Split
    number: int  # from 1; of all attempts at this split in this run of the job
    sent: float
    started: float | None = None  # when it got a slot, as far as can be told from outside


class Window:
    """The attempts in flight.

    Their order tells which of them run and which wait for a slot: workers start first what was sent first.
    """

    def __init__(self) -> None:
        self._attempts: dict[int, list[Attempt]] = {}
        self._waiting: deque[Attempt] = deque()
        self._running = 0
        self._slots = 0
        self._tries: dict[int, int] = {}  # of splits that are not in the ledger
        self._done: set[int] = set()  # splits with attempts in flight although one of them has succeeded
        self._finished: deque[Finished] = deque(maxlen=_REMEMBERED)

    def __len__(self) -> int:
        """Return the number of attempts in flight."""
        return self._running + len(self._waiting)

    def __contains__(self, split: int) -> bool:
        """Return whether an attempt at a split is in flight."""
        return split in self._attempts

    def add(self, split: Split, now: float) -> Attempt:
        """Add a new attempt at a split, which is about to be sent."""
        tries = self._tries[split.number] = self._tries.get(split.number, 0) + 1
        attempt = Attempt(split, tries, now)
        self._attempts.setdefault(split.number, []).append(attempt)
        self._waiting.append(attempt)
        return attempt

    def remove(self, attempt: Attempt, now: float, *, done: bool) -> bool:
        """Remove an attempt that has ended, and return whether it decides what becomes of the split.

        It does not when another attempt has succeeded or is still in flight. The time of an attempt that is ``done``
        tells how long others will take.
        """
        number = attempt.split.number
        others = self._attempts[number]
        others.remove(attempt)
        if attempt.started is None:
            self._waiting.remove(attempt)
        else:
            self._running -= 1
        if done:
            # One that overtook others has started at some time after it was sent.
            started = attempt.sent if attempt.started is None else attempt.started
            self._finished.append(Finished(now - started, attempt.split.bytes))
        self.assign_slots(self._slots, now)
        is_done = number in self._done
        if not others:
            del self._attempts[number]
            self._done.discard(number)
        return not is_done and not others

    def mark_done(self, split: int) -> bool:
        """Record that a split needs no further attempt; return whether one is in flight all the same."""
        self._tries.pop(split, None)
        if split not in self._attempts:
            return False
        self._done.add(split)
        return True

    def is_done(self, split: int) -> bool:
        """Return whether the attempts at a split that are in flight are not needed any more."""
        return split in self._done

    def assign_slots(self, slots: int, now: float) -> None:
        """Start the attempts that were sent first, as many as there are slots."""
        self._slots = slots
        while self._waiting and self._running < slots:
            self._waiting.popleft().started = now
            self._running += 1

    def stragglers(self, now: float, *, done: int, total: int) -> Iterator[Split]:
        """Yield the splits that are to start a second time, when ``done`` of ``total`` have ended; the latest first."""
        running = (
            Running(number, now - attempts[0].started, attempts[0].split.bytes)
            for number, attempts in self._attempts.items()
            if len(attempts) == 1 and number not in self._done and attempts[0].started is not None
        )
        for number in stragglers(running, self._finished, done=done, total=total):
            yield self._attempts[number][0].split


class Backups:
    """The splits of a window that should have a second attempt now, or when a slot is free."""

    def __init__(self, window: Window, workers: int) -> None:
        self._window = window
        self._workers = workers  # slots of the job: with a single one a second attempt has no place to run
        self._next_check = 0.0
        self._paused_until = 0.0
        self.waiting: list[Split] = []  # for a slot

    def pause(self, now: float) -> None:
        """Call no split a straggler for a while, because a store has failed: elsewhere it would be slow too."""
        self._paused_until = now + _STORAGE_PAUSE

    def due(self, free: int, now: float, *, done: int, total: int, lost: Container[int]) -> list[Split]:
        """Return the splits to start a second time in the free slots, when ``done`` of ``total`` have ended.

        None of them has ``lost`` a worker: a split that takes workers down must not take two at a time.
        """
        if now < self._next_check:
            return []
        self._next_check = now + _CHECK_SECONDS
        late = self._window.stragglers(now, done=done, total=total)
        is_allowed = self._workers > 1 and now >= self._paused_until
        splits = [split for split in late if split.number not in lost] if is_allowed else []
        self.waiting = splits[free:]
        return splits[:free]
