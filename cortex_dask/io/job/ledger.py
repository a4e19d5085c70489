"""The ledger: an append-only log of finished splits, and the only judge of which attempt at a split counts.

The log is a sequence of *segments*, ``ledger/0000000000.jsonl``, ``ledger/0000000001.jsonl`` …, each made with one
atomic conditional create and never changed. Whoever appends must have read all segments before, so two coordinators
that append at once conflict on the number: the loser reads the winner's segment, drops its own records of splits that
are in it, and takes the next number. The first record of a split in log order is the truth; later ones never get in.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import orjson

from cortex_dask.io.job.records import SplitRecord
from cortex_dask.io.store.store import Store

_READERS = 16  # concurrent reads of segments: hides the latency of object stores
_READ_AHEAD = 64  # segments in memory at a time, each of up to some MB: memory does not grow with the log


@dataclass(frozen=True, slots=True)
class Appended:
    """What an append did."""

    accepted: tuple[SplitRecord, ...]  # ours, now in the ledger
    dropped: tuple[SplitRecord, ...]  # ours, but another attempt was first
    foreign: tuple[SplitRecord, ...]  # of another coordinator, read on the way


class Ledger:
    """The ledger of the job in a store.

    Parameters
    ----------
    store : Store
        The job directory.

    Examples
    --------
    >>> ledger = Ledger(job.store)                    # doctest: +SKIP
    >>> sum(record.rows_out for record in ledger.records())  # doctest: +SKIP
    1797
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._next = 0
        self._caught_up = 0  # the segment at which the latest reading began
        self._seen = bytearray()  # one byte per split: a million splits are one megabyte
        self.count = 0

    def __contains__(self, split: int) -> bool:
        return split < len(self._seen) and bool(self._seen[split])

    def is_empty(self) -> bool:
        """Return whether nothing was ever appended, with one request."""
        return self._next == 0 and _read_or_none(self._store, 0) is None

    def refresh(self) -> Iterator[SplitRecord]:
        """Yield the records that were not read before, in log order; only the first of each split."""
        self._caught_up = self._next
        while segments := self._read_from(self._next):
            for segment in segments:
                self._next += 1
                yield from self._absorb(segment)

    def records(self) -> Iterator[SplitRecord]:
        """Yield all records in log order; only the first of each split."""
        yield from Ledger(self._store).refresh()

    def append(self, records: Sequence[SplitRecord]) -> Appended:
        """Append the records of splits that the ledger does not hold yet.

        When it returns, the accepted records are durable and final.

        Raises
        ------
        StorageError
            If the store fails after all retries. Nothing is known then of what the log holds: a later append or
            :meth:`refresh` finds out.
        """
        own = {record.attempt_id for record in records}
        accepted: list[SplitRecord] = []
        foreign: list[SplitRecord] = []
        while fresh := self._fresh(records):
            try:
                self._store.create(_segment(self._next), b"\n".join(orjson.dumps(record) for record in fresh))
            except FileExistsError:
                # Another coordinator was first, or an append of ours took effect although it was reported as failed.
                for record in self.refresh():
                    (accepted if record.attempt_id in own else foreign).append(record)
            else:
                self._next += 1
                for record in fresh:
                    self._mark(record.split)
                accepted.extend(fresh)
        ours = {record.attempt_id for record in accepted}
        dropped = tuple(record for record in records if record.attempt_id not in ours)
        return Appended(tuple(accepted), dropped, tuple(foreign))

    def _fresh(self, records: Sequence[SplitRecord]) -> list[SplitRecord]:
        """Return the first record of each split that the ledger does not hold."""
        fresh: dict[int, SplitRecord] = {}
        for record in records:
            if record.split not in self:
                fresh.setdefault(record.split, record)
        return list(fresh.values())

    def _read_from(self, first: int) -> list[bytes]:
        """Read segments from a number on, until one is missing; a bounded number at a time.

        Each wave is twice as wide as the one before: whoever has to catch up with one segment does not ask for sixteen
        that are not there.
        """
        data = _read_or_none(self._store, first)
        if data is None:
            return []
        segments = [data]
        width = 1 if first == self._caught_up else _READERS  # it is a long log
        with ThreadPoolExecutor(_READERS) as pool:
            while len(segments) < _READ_AHEAD:
                start = first + len(segments)
                wave = range(start, start + min(width, _READ_AHEAD - len(segments)))
                for found in pool.map(lambda number: _read_or_none(self._store, number), wave):
                    if found is None:
                        return segments
                    segments.append(found)
                width = min(2 * width, _READERS)
        return segments

    def _absorb(self, segment: bytes) -> Iterator[SplitRecord]:
        for line in segment.splitlines():
            record = SplitRecord.from_json(orjson.loads(line))
            if record.split not in self:
                self._mark(record.split)
                yield record

    def _mark(self, split: int) -> None:
        if split >= len(self._seen):
            self._seen.extend(bytes(max(split + 1 - len(self._seen), len(self._seen))))
        self._seen[split] = 1
        self.count += 1


def _segment(number: int) -> str:
    return f"ledger/{number:010d}.jsonl"


def _read_or_none(store: Store, number: int) -> bytes | None:
    try:
        return store.read(_segment(number))
    except FileNotFoundError:
        return None
