"""Log lines: what becomes of a record, a print, and a store that does not answer."""

from __future__ import annotations

import logging
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson
import pytest

from cortex_dask.errors import StorageError
from cortex_dask.io.job.logs import JobLogs
from cortex_dask.io.store.store import Store
from cortex_dask.runtime.handler_process import log
from cortex_dask.runtime.handler_process.log import BatchLogger, JsonHandler, StreamRecorder
from cortex_dask.runtime.log_line import MAX_LINE, line
from cortex_dask.runtime.worker import log_writer
from cortex_dask.runtime.worker.log_writer import LogWriter
from tests.support.waiting import until

LABELS = {"apiName": "a", "jobID": "j"}


@pytest.fixture
def logger() -> Iterator[tuple[logging.Logger, list[dict[str, Any]]]]:
    """A logger as handlers get it, and the lines that it writes."""
    lines: list[dict[str, Any]] = []
    made = BatchLogger("test", logging.DEBUG)
    made.addHandler(JsonHandler(lambda data: lines.append(orjson.loads(data)), LABELS))
    log.set_batch(lambda: "batch-7")
    yield made, lines
    log.set_batch(None)


def test_a_line_has_the_keys_of_the_contract(logger: Any) -> None:
    made, lines = logger
    made.info("completed processing batch", extra={"confidence": 0.97})
    (found,) = lines
    assert list(found) == ["asctime", "levelname", "message", "process", "batch_id", "confidence", "labels"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3}", found["asctime"])
    assert found["asctime"][:13] in (time.strftime("%Y-%m-%d %H", time.gmtime(time.time() - s)) for s in (0, 5))
    assert (found["levelname"], found["message"], found["batch_id"]) == (
        "INFO",
        "completed processing batch",
        "batch-7",
    )
    assert (found["confidence"], found["labels"]) == (0.97, LABELS)


@pytest.mark.parametrize("key", ["asctime", "levelname", "message", "process", "labels"])
def test_reserved_keys_never_override_and_never_break(logger: Any, key: str) -> None:
    made, lines = logger
    made.warning("text", extra={key: "mine", "other": 1})
    assert lines[0]["other"] == 1
    assert lines[0][key] != "mine"


def test_other_names_of_record_attributes_are_keys_like_any_other(logger: Any) -> None:
    made, lines = logger
    made.info("text", extra={"name": "n", "args": [1], "module": "m", "batch_id": "mine"})
    assert {key: lines[0][key] for key in ("name", "args", "module", "batch_id")} == {
        "name": "n",
        "args": [1],
        "module": "m",
        "batch_id": "mine",
    }


class Odd:
    def __str__(self) -> str:
        raise RuntimeError("no text")


CYCLE: list[Any] = []
CYCLE.append(CYCLE)


@pytest.mark.parametrize(
    "value", [object(), 2**80, float("nan"), "\ud800", CYCLE, Odd(), {1: {2: 3}}, b"\xff", {"a", "b"}, 1j]
)
def test_no_value_breaks_a_line(logger: Any, value: Any) -> None:
    made, lines = logger
    made.info("text", extra={"value": value, "other": 1})
    assert lines[0]["message"] == "text"
    assert lines[0]["other"] == 1
    assert "value" in lines[0]


def test_a_message_with_wrong_arguments_is_written_as_it_is(logger: Any) -> None:
    made, lines = logger
    made.info("%d rows", "three")
    assert lines[0]["message"] == "%d rows ('three',)"


def test_exceptions_are_written_with_their_traceback(logger: Any) -> None:
    made, lines = logger
    try:
        raise KeyError("x")
    except KeyError:
        made.exception("caught")
    assert lines[0]["exc_info"].endswith("KeyError: 'x'")
    assert lines[0]["levelname"] == "ERROR"


def test_a_line_over_the_limit_is_dropped_and_said_to_be(logger: Any) -> None:
    made, lines = logger
    made.info("x" * MAX_LINE)
    made.info("after")
    assert [found["levelname"] for found in lines] == ["WARNING", "INFO"]
    assert re.match(r"a log line of 5,24\d,\d{3} bytes was dropped", lines[0]["message"])


def test_prints_are_records_line_by_line() -> None:
    lines: list[str] = []
    stream = StreamRecorder(lines.append, 1)
    print("one", file=stream)
    print("two", end="", file=stream)
    assert lines == ["one"]
    print(" halves\nthree\r\n\n", end="", file=stream)
    for share in range(3):
        print(f"\r{share} of 3", end="", file=stream)
    stream.finish_line()
    assert lines == ["one", "two halves", "three", "2 of 3"]
    assert (stream.fileno(), stream.isatty(), stream.writable(), stream.encoding) == (1, False, True, "utf-8")
    stream.write("x" * 200_000)
    assert "".join(lines[4:]) == "x" * 200_000
    stream.buffer.close()


def test_the_logger_is_a_plain_one_outside_of_a_handler_process() -> None:
    code = (
        "import logging; logging.basicConfig(format='%(message)s %(x)s');"
        "from cortex_dask import logger; logger.warning('hello', extra={'x': 1, 'message': 2})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == "hello 1\n"


# chunks -------------------------------------------------------------------------------------------------------------


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
    chunks = LogWriter(store, "w-1", LABELS)
    chunks.add(line("INFO", "first", LABELS))
    began = time.monotonic()
    until(lambda: messages(store) == ["first"], "the first line", 10)
    assert time.monotonic() - began < 2
    chunks.write("WARNING", "of the engine", LABELS, batch_id="b", extra={"a": 1})
    assert messages(store) == ["first"]
    chunks.close()
    assert messages(store) == ["first", "of the engine"]
    assert all(re.fullmatch(r"logs/w-1-\d+-\d{5}\.jsonl", name) for name in store.names())
    chunks.add(line("INFO", "late", LABELS))
    chunks.close()
    assert messages(store) == ["first", "of the engine", "late"]


def test_the_end_of_a_split_hastens_the_log_but_not_too_often(tmp_path: Path) -> None:
    store = Slow(str(tmp_path))
    store.broken, store.writes = False, 0
    chunks = LogWriter(store, "w", LABELS)
    began = time.monotonic()
    while time.monotonic() - began < 0.5:
        chunks.add(line("INFO", "x", LABELS))
        chunks.flush_soon()
        time.sleep(0.002)
    assert store.writes <= 2
    chunks.close()


def test_a_store_that_fails_costs_no_line_and_nobody_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_writer, "_FIRST_SECONDS", 0.05)
    monkeypatch.setattr(log_writer, "_RETRY_SECONDS", 0.05)
    store = Slow(str(tmp_path))
    store.broken, store.writes = True, 0
    chunks = LogWriter(store, "w", LABELS)
    chunks.add(line("INFO", "one", LABELS))
    until(lambda: store.writes >= 2, "two attempts to write", 10)
    chunks.add(line("INFO", "two", LABELS))
    store.broken = False
    until(lambda: messages(store) == ["one", "two"], "both lines", 10)
    chunks.close()


def test_lines_that_no_store_takes_do_not_fill_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_writer, "_LIMIT", 100_000)
    store = Slow(str(tmp_path))
    store.broken, store.writes = True, 0
    chunks = LogWriter(store, "w", LABELS)
    for number in range(3000):
        chunks.add(line("INFO", f"{number} {'x' * 80}", LABELS))
    store.broken = False
    chunks.close()
    kept = messages(store)
    assert any(message.startswith("2999 ") for message in kept)
    dropped = next(message for message in kept if "were dropped" in message)
    assert int(dropped.split()[0].replace(",", "")) == 3000 - (len(kept) - 1)


def test_threads_write_at_the_same_time(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    chunks = LogWriter(store, "w", LABELS)
    threads = [
        threading.Thread(target=lambda t=t: [chunks.add(line("INFO", f"{t} {n}", LABELS)) for n in range(500)])
        for t in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    chunks.close()
    assert sorted(messages(store)) == sorted(f"{t} {n}" for t in range(4) for n in range(500))
