"""The progress cell: a few numbers in shared memory by which a supervisor sees what its handler process is doing.

The handler process stores into it without a system call, so each of a million batches can be recorded;
the supervisor reads it about ten times a second, and once more when the process is dead, to see which batch was in
hand. It is a small memory-mapped file that has no name any more, passed on as a file descriptor, and works the same
on Linux and macOS.

Every number is one aligned 64-bit word with one writing thread, so a word is never torn. Words that belong together are
stored in an order that keeps a reader who comes in between on the safe side, see :meth:`ProgressCell.start_call`.
"""

from __future__ import annotations

import mmap
import os
import time
from dataclasses import dataclass
from enum import IntEnum
from typing import Self

_BATCH, _ATTEMPT, _ROWS_IN_HAND, _CALLED, _PHASE, _READING = range(6)
_READ, _DONE, _ROWS, _WRITTEN, _BEATS, _RUN = range(6, 12)
_SIZE = 16 * 8  # sixteen words; mmap rounds up to a page anyway
_NONE = -1


class Phase(IntEnum):
    """What the process is doing."""

    STARTING = 0  # imports, the handler's __init__
    IDLE = 1  # waiting for a split
    RUNNING = 2  # a split's batches
    WAITING = 3  # for the output's schema
    CLOSING = 4  # writing the rest of the part


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What the cell held at one moment."""

    run: int  # which of the runs that the process was sent this is about
    phase: Phase
    batch: int | None  # index of the batch in hand
    attempt: int  # failed attempts at it so far, and the one that runs
    rows_in_hand: int  # of the batch, or of the piece of it that is being handled
    called: float | None  # time.monotonic() at which handle_batch was called; None: not in it now
    reading: int | None  # index of the batch that is being read, where reading and handling take turns
    batches: int  # done with, whether they succeeded or not
    rows: int
    beats: tuple[int, ...]  # changes whenever a batch was read, started, done or written


class ProgressCell:
    """A view of the shared words."""

    def __init__(self, descriptor: int = -1) -> None:  # -1: memory of this process alone
        self._map = mmap.mmap(descriptor, _SIZE)  # stays when the descriptor is closed
        self._words = memoryview(self._map).cast("q")

    @classmethod
    def create(cls) -> tuple[Self, int]:
        """Make a new cell; returns it and the descriptor to pass on, which the caller closes."""
        if hasattr(os, "memfd_create"):
            descriptor = os.memfd_create("cortex-dask-cell")
        else:
            import tempfile

            descriptor, path = tempfile.mkstemp(prefix="cortex-dask-cell-")
            os.unlink(path)  # noqa: PTH108 - it is opened by its descriptor only, and so never has to be removed
        os.write(descriptor, bytes(_SIZE))  # a page that a full disk could not provide later would be a bus error
        return cls(descriptor), descriptor

    def close(self) -> None:
        """Unmap it."""
        self._words.release()
        self._map.close()

    # by the handler process -------------------------------------------------------------------------------------------

    def start_run(self, run: int) -> None:
        """Forget the last split and start another (main thread)."""
        words = self._words
        words[_RUN] = _NONE
        for index in range(_RUN):
            words[index] = 0
        words[_BATCH] = words[_READING] = _NONE
        words[_PHASE] = Phase.RUNNING
        words[_RUN] = run

    def set_phase(self, phase: Phase) -> None:
        """Set what is being done (main thread)."""
        self._words[_PHASE] = phase
        self._words[_BEATS] += 1

    def start_batch(self, index: int) -> None:
        """Set the batch in hand (main thread)."""
        words = self._words
        words[_ATTEMPT] = 0
        words[_ROWS_IN_HAND] = 0
        words[_BATCH] = index

    def start_call(self, attempt: int, rows: int) -> None:
        """Record that ``handle_batch`` is called now, for the batch in hand or for a piece of it (main thread).

        The time is stored last. A reader takes the batch before the time; in between, the batch can only have been
        replaced by a later one with a later time, so nothing is ever taken to have run for longer than it has.
        """
        words = self._words
        words[_ATTEMPT] = attempt
        words[_ROWS_IN_HAND] = rows
        words[_BEATS] += 1
        words[_CALLED] = time.monotonic_ns()

    def end_call(self) -> None:
        """Record that ``handle_batch`` returned or raised (main thread)."""
        self._words[_CALLED] = 0

    def end_batch(self, rows: int) -> None:
        """Count the batch in hand as done (main thread)."""
        words = self._words
        words[_BATCH] = _NONE
        words[_DONE] += 1
        words[_ROWS] += rows

    def start_read(self, index: int) -> None:
        """Set which batch is read next (main thread, where reading and handling take turns)."""
        self._words[_READING] = index

    def end_read(self) -> None:
        """Record that reading has ended for now (main thread, where reading and handling take turns)."""
        self._words[_READING] = _NONE

    def count_read(self) -> None:
        """Count a batch that was read (reader thread)."""
        self._words[_READ] += 1

    def count_written(self, tables: int) -> None:
        """Count tables that were encoded (writer thread)."""
        self._words[_WRITTEN] += tables

    # by the supervisor ------------------------------------------------------------------------------------------------

    def read(self) -> Snapshot:
        """Return what the words are now."""
        words = self._words
        batch = words[_BATCH]
        called = words[_CALLED]
        reading = words[_READING]
        return Snapshot(
            run=words[_RUN],
            phase=Phase(words[_PHASE]),
            batch=None if batch == _NONE else batch,
            attempt=words[_ATTEMPT],
            rows_in_hand=words[_ROWS_IN_HAND],
            called=called / 1e9 if called else None,
            reading=None if reading == _NONE else reading,
            batches=words[_DONE],
            rows=words[_ROWS],
            beats=(words[_PHASE], words[_READ], words[_DONE], words[_WRITTEN], words[_BEATS]),
        )
