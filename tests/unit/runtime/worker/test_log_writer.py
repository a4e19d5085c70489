"""The log of a job as one worker stores it, in chunks, also where the store does not answer."""

from __future__ import annotations

import re
import threading
import time
from pathlib import Path

import pytest

from cortex_dask.errors import StorageError
from cortex_dask.io.job.logs import JobLogs
from cortex_dask.io.store.store import Store
from cortex_dask.runtime.log_line import line
from cortex_dask.runtime.worker import log_writer
from cortex_dask.runtime.worker.log_writer import LogWriter
from tests.support.waiting import until

LABELS = {"apiName": "a", "jobID": "j"}


class Slow(Store):
    """A store that fails until it is told not to."""

    __slots__ = ("broken", "writes")

    def write(self, name: str, data: bytes) -> None:
        self.writes += 1
        if self.broken:
            raise StorageError("no answer")
        super().write(name, data)


def messages(store: Store) -> list[str]:
    return [found["message"] for found in JobLogs(store).lines()]


def test_the_first_lines_are_stored_within_a_second_and_the_rest_at_the_end(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    writer = LogWriter(store, "w-1", LABELS)
    writer.add(line("INFO", "first", LABELS))
    until(lambda: messages(store) == ["first"], "the first line, which does not wait as long as later ones", 3)
    writer.write("WARNING", "of the engine", LABELS, batch_id="b", extra={"a": 1})
    assert messages(store) == ["first"]
    writer.close()
    assert messages(store) == ["first", "of the engine"]
    assert all(re.fullmatch(r"logs/w-1-\d+-\d{5}\.jsonl", name) for name in store.names())
    writer.add(line("INFO", "late", LABELS))
    writer.close()
    assert messages(store) == ["first", "of the engine", "late"]


def test_the_end_of_a_split_flushes_the_log_but_not_too_often(tmp_path: Path) -> None:
    store = Slow(str(tmp_path))
    store.broken, store.writes = False, 0
    writer = LogWriter(store, "w", LABELS)
    began = time.monotonic()
    while time.monotonic() - began < 0.5:
        writer.add(line("INFO", "x", LABELS))
        writer.flush_soon()
        time.sleep(0.002)
    assert store.writes <= 2
    writer.close()


def test_a_store_that_fails_costs_no_line_and_blocks_no_caller(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_writer, "FIRST_SECONDS", 0.05)
    monkeypatch.setattr(log_writer, "RETRY_SECONDS", 0.05)
    store = Slow(str(tmp_path))
    store.broken, store.writes = True, 0
    writer = LogWriter(store, "w", LABELS)
    writer.add(line("INFO", "one", LABELS))
    until(lambda: store.writes >= 2, "two attempts to write", 10)
    writer.add(line("INFO", "two", LABELS))
    store.broken = False
    until(lambda: messages(store) == ["one", "two"], "both lines", 10)
    writer.close()


def test_lines_that_no_store_takes_do_not_fill_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_writer, "MOST_WAITING_BYTES", 100_000)
    store = Slow(str(tmp_path))
    store.broken, store.writes = True, 0
    writer = LogWriter(store, "w", LABELS)
    for number in range(3000):
        writer.add(line("INFO", f"{number} {'x' * 80}", LABELS))
    store.broken = False
    writer.close()
    kept = messages(store)
    assert any(message.startswith("2999 ") for message in kept)
    dropped = next(message for message in kept if "were dropped" in message)
    assert int(dropped.split()[0].replace(",", "")) == 3000 - (len(kept) - 1)


def test_threads_write_at_the_same_time(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    writer = LogWriter(store, "w", LABELS)
    threads = [
        threading.Thread(target=lambda t=t: [writer.add(line("INFO", f"{t} {n}", LABELS)) for n in range(500)])
        for t in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    writer.close()
    assert sorted(messages(store)) == sorted(f"{t} {n}" for t in range(4) for n in range(500))
