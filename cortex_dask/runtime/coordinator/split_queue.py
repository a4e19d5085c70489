"""Which split is sent next: in plan order while the output schema is open, the longest first afterwards."""

from __future__ import annotations

import heapq
import itertools
import time
from collections.abc import Callable, Iterator

from cortex_dask.io.job.splits import Split

#: The most splits in memory at a time, and pieces in them: some tens of megabytes, whatever the size of the plan.
_CHUNK_SPLITS, _CHUNK_PIECES = 20_000, 100_000


class SplitQueue:
    """The splits that remain to be done."""

    def __init__(self, splits: Iterator[Split], is_done: Callable[[int], bool]) -> None:
        self._splits = splits  # all of the plan, in input order; read as they are needed
        self._is_done = is_done  # whether a split's number is in the ledger
        self._in_order: list[Split] = []  # reversed: the next one is last
        self._by_size: list[Split] | None = None
        self._sent: set[int] = set()
        self._again: list[tuple[float, int, Split]] = []  # a heap of (not before, order, split)
        self._order = itertools.count()
        self._exhausted = False

    def put_back(self, split: Split, delay: float = 0.0) -> None:
        """Add a split that has to be sent again, when ``delay`` seconds have passed."""
        heapq.heappush(self._again, (time.monotonic() + delay, next(self._order), split))

    def next(self, *, in_order: bool) -> Split | None:
        """Remove and return the split to send now; None when there is none (at the moment)."""
        while self._again and self._again[0][0] <= time.monotonic():
            split = heapq.heappop(self._again)[2]
            if not self._is_done(split.number):  # another coordinator's attempt may have ended meanwhile
                return split
        while True:
            self._fill()
            queue = self._queue(in_order)
            if not queue:
                return None
            split = queue.pop()
            if split.number in self._sent or self._is_done(split.number):
                continue
            self._sent.add(split.number)
            return split

    @property
    def delay(self) -> float | None:
        """Seconds until a split that was put back may be sent; None when there is none."""
        return max(self._again[0][0] - time.monotonic(), 0.0) if self._again else None

    def _queue(self, in_order: bool) -> list[Split]:
        if in_order:
            return self._in_order
        if self._by_size is None:
            # The longest first, so that no long split is left for the end when the other workers have nothing to do.
            self._by_size = sorted(self._in_order, key=lambda split: (split.bytes, -split.number))
        return self._by_size

    def _fill(self) -> None:
        """Drop what has been sent; read the next chunk of the plan when this one is used up."""
        while self._in_order and (self._in_order[-1].number in self._sent or self._is_done(self._in_order[-1].number)):
            self._sent.discard(self._in_order.pop().number)
        if self._by_size is not None and not self._by_size:
            self._in_order = []
        while not self._in_order and not self._exhausted:
            chunk = self._read_chunk()
            self._exhausted = not chunk
            self._in_order = [split for split in reversed(chunk) if not self._is_done(split.number)]
            self._by_size = None
            self._sent.clear()

    def _read_chunk(self) -> list[Split]:
        """Return the next splits of the plan; none at its end."""
        chunk: list[Split] = []
        pieces = 0
        for split in self._splits:
            chunk.append(split)
            pieces += len(split.pieces)
            if len(chunk) == _CHUNK_SPLITS or pieces >= _CHUNK_PIECES:
                break
        return chunk
