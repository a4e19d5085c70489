"""The log of a job as one worker writes it: lines of its handler processes, stored in chunks."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Mapping
from typing import Any

from cortex_dask.io.store.store import Store
from cortex_dask.runtime.log_line import line

FIRST_SECONDS = 0.7  # the first lines are stored within a second, for users who watch a job start
_SECONDS = 4.0  # later ones within five
_CHUNK = 4 * 1024 * 1024  # bytes: a chunk is one small object
MOST_WAITING_BYTES = 64 * 1024 * 1024  # bytes that may wait for a store that does not answer
RETRY_SECONDS = 5.0


class LogWriter:
    """The log of one job as one worker writes it: ``logs/<worker>-<start>-<number>.jsonl``.

    A failure of the store does not stop the job: lines wait in memory, and when there are too many the oldest are
    dropped and their number is logged with ``labels``. The worker's name is unique among the workers of the job.
    """

    def __init__(self, store: Store, worker: str, labels: dict[str, str]) -> None:
        self._store = store
        self._prefix = f"logs/{worker}-{int(time.time() * 1000)}"
        self._labels = labels
        self._lines: deque[bytes] = deque()
        self._size = 0
        self._dropped = 0
        self._number = 0
        self._due: float | None = None
        self._last = time.monotonic()
        self._closing = False
        self._condition = threading.Condition()
        self._upload = threading.Lock()
        self._thread: threading.Thread | None = None

    def add(self, data: bytes) -> None:
        """Add a line; returns at once."""
        with self._condition:
            self._lines.append(data)
            self._size += len(data) + 1
            while self._size > MOST_WAITING_BYTES:
                self._size -= len(self._lines.popleft()) + 1
                self._dropped += 1
            if self._due is None:
                self._due = time.monotonic() + (_SECONDS if self._number else FIRST_SECONDS)
                self._ensure_thread()
            elif self._size >= _CHUNK and self._due > 0:
                self._due = 0.0
                self._condition.notify_all()

    def write(
        self,
        level: str,
        message: str,
        labels: Mapping[str, str],
        *,
        batch_id: str | None = None,
        extra: Mapping[str, Any] | None = None,
    ) -> None:
        """Add a line of the engine's own."""
        self.add(line(level, message, labels, batch_id=batch_id, extra=extra))

    def flush_soon(self) -> None:
        """Store the waiting lines now, or a second after the last chunk was stored."""
        with self._condition:
            if self._due is not None and self._due > 0:
                self._due = min(self._due, max(self._last + 1.0, time.monotonic()))
                self._condition.notify_all()

    def close(self, timeout: float = 10.0) -> None:
        """Store the waiting lines and end the thread; a later line starts a new one."""
        deadline = time.monotonic() + timeout
        with self._condition:
            thread = self._thread
            self._closing = True
            self._condition.notify_all()
        if thread is not None:
            thread.join(max(deadline - time.monotonic(), 0))
        with self._condition:
            self._closing = False

    def _ensure_thread(self) -> None:
        """Start or wake the thread that stores lines; called with the lock held."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._store_chunks, name="cortex-dask-logs", daemon=True)
            self._thread.start()
        else:
            self._condition.notify_all()

    def _store_chunks(self) -> None:
        while True:
            with self._condition:
                while not self._closing and (self._due is None or time.monotonic() < self._due):
                    self._condition.wait(None if self._due is None else self._due - time.monotonic())
                last = self._closing
            stored = self._store_all(once=last)
            with self._condition:
                self._due = None if not self._lines else time.monotonic() + (_SECONDS if stored else RETRY_SECONDS)
                if last:
                    self._thread, self._due = None, None
                    return

    def _store_all(self, *, once: bool) -> bool:
        while True:
            lines, dropped = self._pop_chunk()
            if not lines and not dropped:
                return True
            warning = f"{dropped:,} log lines were dropped: the store took them more slowly than they were written"
            data = [line("WARNING", warning, self._labels), *lines] if dropped else lines
            try:
                self._store.write(f"{self._prefix}-{self._number:05d}.jsonl", b"\n".join(data) + b"\n")
            except Exception:  # noqa: BLE001 - whatever a store raises, the job goes on
                with self._condition:
                    if not once:
                        self._lines.extendleft(reversed(lines))
                        self._size += sum(map(len, lines)) + len(lines)
                        self._dropped += dropped
                return False
            with self._condition:
                self._number += 1
                self._last = time.monotonic()

    def _pop_chunk(self) -> tuple[list[bytes], int]:
        """Return the lines of the next chunk, and how many were dropped before them."""
        with self._condition:
            lines: list[bytes] = []
            size = 0
            while self._lines and size < _CHUNK:
                item = self._lines.popleft()
                size += len(item) + 1
                lines.append(item)
            self._size -= size
            dropped, self._dropped = self._dropped, 0
            return lines, dropped
