"""The channel between two stages of the handler process: short, bounded, and cheap for tiny batches.

A consumer takes several items at once where many are waiting, and a producer that had to wait is woken when there is
room for several. So a batch of 32 rows does not cost two switches between threads, and a big one never waits behind
another in memory.
"""

from __future__ import annotations

import threading
from collections import deque
from typing import Generic, TypeVar

T = TypeVar("T")

_AHEAD = 2  # items that may always wait, however big
_MOST = 512  # items that may wait, however small


class ChannelAborted(Exception):  # noqa: N818 - a signal between threads, never shown
    """The other side gave up: items are not wanted any more."""


class Channel(Generic[T]):
    """A bounded queue with one producer and one consumer."""

    def __init__(self, limit: int) -> None:  # bytes that may wait, unless there are no more than two items
        self._limit = limit
        self._items: deque[tuple[T, int]] = deque()
        self._size = 0
        self._finished = False
        self._error: BaseException | None = None
        self._aborted = False
        self._lock = threading.Lock()
        self._filled = threading.Condition(self._lock)
        self._room = threading.Condition(self._lock)
        self._consumer_waits = False

    def put(self, item: T, size: int) -> None:
        """Add an item of about ``size`` bytes, waiting for room; raise ChannelAborted if the consumer has given up."""
        with self._lock:
            while self._is_full(size) and not self._aborted:
                self._room.wait()
            if self._aborted:
                raise ChannelAborted
            self._items.append((item, size))
            self._size += size
            if self._consumer_waits:
                self._filled.notify()

    def finish(self, error: BaseException | None = None) -> None:
        """Add no more items; an error is raised on the other side once the items before it are popped."""
        with self._lock:
            self._finished = True
            self._error = error
            self._filled.notify()

    def pop_items(self) -> list[T]:
        """Return the next items, at least one; none when all are popped and the producer has finished."""
        with self._lock:
            while not self._items and not self._finished and not self._aborted:
                self._consumer_waits = True
                self._filled.wait()
                self._consumer_waits = False
            if self._aborted:
                raise ChannelAborted
            if not self._items:
                if self._error is not None:
                    raise self._error
                return []
            popped: list[T] = []
            size = 0
            while self._items and (not popped or (size < self._limit // 4 and len(popped) < _MOST // 2)):
                item, cost = self._items.popleft()
                popped.append(item)
                size += cost
            self._size -= size
            if len(self._items) <= _MOST // 2:
                self._room.notify()
            return popped

    def abort(self) -> None:
        """Give up, on either side: the other side gets :class:`ChannelAborted`, now or with its next call."""
        with self._lock:
            self._aborted = True
            self._items.clear()
            self._filled.notify_all()
            self._room.notify_all()

    def _is_full(self, size: int) -> bool:
        count = len(self._items)
        return count >= _AHEAD and (self._size + size > self._limit or count >= _MOST)
