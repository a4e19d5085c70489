"""Log lines: what becomes of a record, a print, and a store that does not answer."""

from __future__ import annotations

import logging
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import orjson
import pytest

from cortex_dask.runtime.handler_process import log
from cortex_dask.runtime.handler_process.log import BatchLogger, JsonHandler, StreamRecorder
from cortex_dask.runtime.log_line import MAX_LINE

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
