"""Reading, filtering and following a job's log."""

from datetime import UTC, datetime, timedelta

import orjson
import pandas as pd
import pytest

from cortex_dask.errors import SpecError
from cortex_dask.io.job.logs import JobLogs, LogFilter, parse_since, to_frame, to_text
from cortex_dask.io.store.store import Store
from cortex_dask.runtime.log_line import line

T0 = datetime(2026, 1, 31, 12, 0, 0, tzinfo=UTC).timestamp()


def logged(message, second=0.0, level="INFO", worker="w-1", batch=None, **extra):
    labels = {"apiName": "digits", "jobID": "job-1", "workerID": worker}
    return line(level, message, labels, batch_id=batch, extra=extra, created=T0 + second)


@pytest.fixture
def store(tmp_path):
    return Store(str(tmp_path))


def put(store, name, *lines):
    store.write(f"logs/{name}.jsonl", b"\n".join(lines) + b"\n")


def messages(lines):
    return [entry["message"] for entry in lines]


def test_a_job_without_logs_has_none(store):
    assert JobLogs(store).lines() == []
    assert to_frame([]).columns.tolist() == ["time", "level", "worker", "batch_id", "message", "process"]


def test_lines_of_all_workers_come_in_order_of_time(store):
    put(store, "w-2-1-00000", logged("b", 1.5, worker="w-2"), logged("d", 3, worker="w-2"))
    put(store, "w-1-1-00000", logged("a", 1), logged("c", 2))

    assert messages(JobLogs(store).lines()) == ["a", "b", "c", "d"]


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        (LogFilter(level="warning"), ["w", "e"]),
        (LogFilter(level="ERROR"), ["e"]),
        (LogFilter(batch="3fa"), ["i"]),
        (LogFilter(worker="w-2"), ["e"]),
        (LogFilter(since=datetime.fromtimestamp(T0 + 2, UTC)), ["e"]),
        (LogFilter(level="info", worker="w-1"), ["i", "w"]),
    ],
)
def test_filters_are_anded(store, where, expected):
    put(
        store,
        "w-1-1-00000",
        logged("d", 0, "DEBUG"),
        logged("i", 1, batch="3fa85f64"),
        logged("w", 1.9, "WARNING", batch="aa"),
    )
    put(store, "w-2-1-00000", logged("e", 2, "ERROR", worker="w-2"))

    assert messages(JobLogs(store).lines(where)) == expected


def test_an_unknown_level_says_which_there_are():
    with pytest.raises(SpecError, match="found 'loud'; allowed are debug, info, warning, error, critical"):
        LogFilter(level="loud")


def test_following_yields_each_line_once_until_the_job_is_over(store):
    put(store, "w-1-1-00000", logged("first"))
    states = iter([False, False, True])
    pauses = []

    def pause(seconds):
        pauses.append(seconds)
        put(store, f"w-1-1-0000{len(pauses)}", logged(f"after {len(pauses)}", len(pauses)))

    followed = JobLogs(store).follow(has_ended=lambda: next(states), pause=pause)

    assert messages(followed) == ["first", "after 1", "after 2"]
    assert len(pauses) == 2


def test_a_line_that_is_no_json_is_kept(store):
    put(store, "w-1-1-00000", b"Segmentation fault \xff", logged("later"))

    assert messages(JobLogs(store).lines()) == ["Segmentation fault �", "later"]


def test_a_line_in_text_has_level_worker_batch_and_extra():
    text = to_text(orjson.loads(logged("done", 1.25, "WARNING", batch="3fa8", confidence=0.97, name="x")))

    assert text == "2026-01-31 12:00:01,250 WARNING [w-1] [3fa8] done confidence=0.97 name=x"


def test_a_traceback_stands_below_its_line():
    text = to_text(orjson.loads(logged("failed", exc_info="Traceback …\nValueError: no")))

    assert text.splitlines()[1:] == ["Traceback …", "ValueError: no"]


def test_the_table_has_times_levels_and_a_column_for_each_extra():
    frame = to_frame([orjson.loads(logged("a", 1, confidence=0.5)), orjson.loads(logged("b", 2, "ERROR"))])

    assert frame["time"].tolist() == [
        pd.Timestamp("2026-01-31 12:00:01", tz="UTC"),
        pd.Timestamp("2026-01-31 12:00:02", tz="UTC"),
    ]
    assert frame["level"].tolist() == ["info", "error"]
    assert frame["confidence"].iloc[0] == 0.5


@pytest.mark.parametrize(
    ("given", "ago"),
    [("90s", 90), ("10m", 600), ("2h", 7200), ("1d", 86400), ("45", 45), (1.5, 1.5), (timedelta(minutes=1), 60)],
)
def test_since_is_a_span_before_now(given, ago):
    now = datetime(2026, 1, 31, tzinfo=UTC)

    assert parse_since(given, now=now) == now - timedelta(seconds=ago)


def test_since_is_a_time():
    assert parse_since("2026-01-31T12:00:00+00:00") == datetime(2026, 1, 31, 12, tzinfo=UTC)
    assert parse_since(None) is None
    with pytest.raises(SpecError, match="found 'yesterday'"):
        parse_since("yesterday")
