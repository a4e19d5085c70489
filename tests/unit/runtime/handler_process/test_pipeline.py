"""The batch loop: stages and their channels, attempts, schemas, in turns and overlapped."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from cortex_dask.errors import StorageError
from cortex_dask.io.arrow.schema import decode_schema, encode_schema
from cortex_dask.io.job.records import NoOutput, SplitTask
from cortex_dask.io.output.part import PartWriter
from cortex_dask.runtime.frames import BatchEvent
from cortex_dask.runtime.handler_process import part as part_module
from cortex_dask.runtime.handler_process import pipeline
from cortex_dask.runtime.handler_process.attempts import SplitRun
from cortex_dask.runtime.handler_process.channel import Channel, ChannelAborted
from cortex_dask.runtime.handler_process.handler import LoadedHandler, LoadedJob
from cortex_dask.runtime.handler_process.part import NeedsSchema
from cortex_dask.runtime.handler_process.pipeline import run_attempt
from cortex_dask.runtime.history import SplitHistory
from cortex_dask.runtime.metrics import MetricsClient
from cortex_dask.runtime.progress_cell import ProgressCell
from tests.support.jobs import TestJob, make_job

PLAIN = "class Handler:\n    def __init__(self, config): pass\n    def handle_batch(self, payload): return payload\n"


class Settled:
    """Settles what is proposed, at once, after some questions, or never."""

    def __init__(self, after: int | None = 0, other: pa.Schema | None = None) -> None:
        self.proposals: list[pa.Schema] = []
        self.asked = 0
        self._after, self._other = after, other

    def propose(self, schema: str) -> None:
        self.proposals.append(decode_schema(schema))

    def answer(self, *, wait: bool) -> str | None:
        self.asked += 1
        if self._after is None or (self.asked <= self._after and not wait):
            return None
        return encode_schema(self._other or self.proposals[0])


class Loop:
    """Runs splits of a job in this process, with any function as handler."""

    def __init__(self, folder: Path, handle: Callable[[Any], Any], **options: Any) -> None:
        self.job = make_job(folder, PLAIN, **options)
        instance = type("Handler", (), {"handle_batch": lambda self, payload: handle(payload)})()
        from cortex_dask.project.contract import HandlerSignature

        header = self.job.directory.plan_header()
        assert header is not None
        settings = self.job.settings
        self.handler = LoadedHandler(instance, HandlerSignature(frozenset(), frozenset({"payload"}), False))
        self.context = LoadedJob(
            settings, header, self.job.directory.store, self.handler, MetricsClient(), ProgressCell()
        )
        self.events: list[BatchEvent] = []

    def run(self, source: Any = None, *, overlap: bool = True, history: SplitHistory | None = None) -> Any:
        task = SplitTask(self.job.url, self.job.splits[0], 1, None)
        split_run = SplitRun(task, "a1", history or SplitHistory(), overlap=overlap)
        return run_attempt(self.context, split_run, source or Settled(), self.events.append)

    def rows(self, record: Any) -> list[dict[str, Any]]:
        return self.job.rows(record)


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DASK_CORTEX_DASK__CACHE", str(tmp_path / "cache"))


@pytest.fixture(params=[True, False], ids=["overlapped", "in turns"])
def overlap(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


def no_threads_left() -> bool:
    return not [thread for thread in threading.enumerate() if thread.name.startswith("cortex-dask-")]


# channel ------------------------------------------------------------------------------------------------------------


def test_everything_comes_through_in_order_whatever_it_weighs() -> None:
    channel: Channel[int] = Channel(1000)

    def produce() -> None:
        for number in range(5000):
            channel.put(number, number % 700)
        channel.finish()

    thread = threading.Thread(target=produce)
    thread.start()
    found: list[int] = []
    while items := channel.pop_items():
        found += items
    thread.join()
    assert found == list(range(5000))


def test_a_producer_of_big_items_stays_two_ahead() -> None:
    channel: Channel[int] = Channel(1000)
    put: list[int] = []

    def produce() -> None:
        for number in range(6):
            channel.put(number, 5000)
            put.append(number)
        channel.finish()

    thread = threading.Thread(target=produce)
    thread.start()
    taken: list[int] = []
    while items := channel.pop_items():
        assert len(items) == 1
        taken += items
        time.sleep(0.02)
        assert len(put) <= len(taken) + 2
    thread.join()
    assert taken == list(range(6))


def test_an_error_comes_after_the_items_before_it() -> None:
    channel: Channel[int] = Channel(1000)
    channel.put(1, 1)
    channel.finish(ValueError("broken"))
    assert channel.pop_items() == [1]
    with pytest.raises(ValueError, match="broken"):
        channel.pop_items()


def test_giving_up_wakes_whoever_waits() -> None:
    channel: Channel[int] = Channel(10)
    raised: list[BaseException] = []

    def produce() -> None:
        try:
            while True:
                channel.put(1, 100)
        except ChannelAborted as error:
            raised.append(error)

    thread = threading.Thread(target=produce)
    thread.start()
    channel.abort()
    thread.join(5)
    assert len(raised) == 1
    with pytest.raises(ChannelAborted):
        channel.pop_items()


# the loop -----------------------------------------------------------------------------------------------------------


def test_rows_come_out_in_order(tmp_path: Path, overlap: bool) -> None:
    loop = Loop(tmp_path, lambda payload: payload, rows=1000, batch_size=7)
    record = loop.run(overlap=overlap)
    assert [row["n"] for row in loop.rows(record)] == list(range(1000))
    assert (record.batches, record.rows_in, record.rows_out) == (143, 1000, 1000)
    assert no_threads_left()


LINES = b"".join(b'{"n": %d, "tags": ["a"]}\n' % number for number in range(1000))


@pytest.mark.parametrize("small", [True, False], ids=["small batches", "large batches"])
@pytest.mark.parametrize("output", ["json", "parquet"])
def test_what_a_handler_does_to_its_records_is_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overlap: bool, small: bool, output: str
) -> None:
    """Second attempts, kept columns and dead letters have the records as they were read."""
    monkeypatch.setattr(pipeline, "SMALL_BATCH", 64_000 if small else 0)
    attempts: dict[int, int] = {}

    def handle(payload: Any) -> Any:
        first = payload[0]["n"]
        attempts[first] = attempts.get(first, 0) + 1
        assert [record["n"] for record in payload] == list(range(first, first + len(payload)))
        assert all(record["tags"] == ["a"] for record in payload)
        for record in payload:
            record["tags"].append("mine")
            record["n"] = -1
        payload.reverse()
        if first in (50, 80) and attempts[first] < 3:
            raise ValueError("again")
        if first == 70:
            raise ValueError("always")
        return [{"first": first} for record in payload]

    keep = {"keep": ("n", "tags")} if output == "parquet" else {}
    loop = Loop(tmp_path, handle, lines=LINES, output={"format": output, **keep})
    record = loop.run(overlap=overlap)
    assert (attempts[50], attempts[70], attempts[90]) == (3, 3, 1)
    assert record.rows_out == 990
    (letter,) = loop.job.letters(record)
    assert letter["payload"] == [{"n": number, "tags": ["a"]} for number in range(70, 80)]
    if output == "parquet":
        expected = [number for number in range(1000) if not 70 <= number < 80]
        assert [(row["n"], row["tags"]) for row in loop.rows(record)] == [(number, ["a"]) for number in expected]
    assert no_threads_left()


def test_records_that_need_columns_and_those_that_do_not_keep_their_order(tmp_path: Path, overlap: bool) -> None:
    """Whole numbers where the schema says floating point take the long way, between batches that take the short one."""

    def handle(payload: Any) -> Any:
        number = payload[0]["n"] // 10
        return [{"n": row["n"], "x": 1 if number % 3 == 1 else 1.5} for row in payload]

    loop = Loop(tmp_path, handle, lines=LINES, output={"format": "json"})
    record = loop.run(overlap=overlap)
    assert record.part is not None
    text = Path(loop.job.settings.output.url, record.part.staged).read_text()
    expected = [f'{{"n":{n},"x":{"1.0" if n // 10 % 3 == 1 else "1.5"}}}' for n in range(1000)]
    assert text.splitlines() == expected
    assert record.failures == ()


def test_a_batch_of_records_that_does_not_fit_fails_alone(tmp_path: Path, overlap: bool) -> None:
    bad = {20: {"n": "text"}, 30: {"n": 1, "more": 2}, 40: {"n": 2**63}, 50: {"n": "\ud800"}}
    loop = Loop(
        tmp_path,
        lambda payload: [bad.get(row["n"], {"n": row["n"]}) for row in payload],
        lines=LINES,
        output={"format": "json"},
    )
    record = loop.run(overlap=overlap)
    assert [failure.batch for failure in record.failures] == [2, 3, 4, 5]
    assert {failure.cause for failure in record.failures} == {"exception"}
    assert record.rows_out == 960


def test_small_batches_are_read_ahead_by_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next block is fetched while the first batch is handled, and its lines are parsed by who handles them."""
    from cortex_dask.io.json import file, reader

    monkeypatch.setattr(file, "LOCAL_BLOCK", 200)
    fetched, parsers = threading.Event(), set()
    real_blocks, real_parse = file.JsonFile.blocks, reader.parse_lines

    def blocks(self: Any, start: int, stop: int) -> Iterator[Any]:
        for number, block in enumerate(real_blocks(self, start, stop)):
            if number == 1:
                fetched.set()
            yield block

    def parse(lines: list[bytes]) -> list[Any]:
        parsers.add(threading.current_thread())
        return real_parse(lines)

    monkeypatch.setattr(file.JsonFile, "blocks", blocks)
    monkeypatch.setattr(reader, "parse_lines", parse)
    loop = Loop(tmp_path, lambda payload: fetched.wait(10) and [{"n": row["n"]} for row in payload], lines=LINES)
    assert loop.run().rows_out == 1000
    assert parsers == {threading.current_thread()}
    assert no_threads_left()


def test_small_batches_are_cut_from_what_was_decoded_ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from cortex_dask.io.parquet import reader

    monkeypatch.setattr(reader, "ROWS_AT_A_TIME", 25)
    decoded, decoders = threading.Event(), set()
    real = reader.RowReader.rows

    def rows(self: Any, *where: Any) -> Iterator[Any]:
        for number, stretch in enumerate(real(self, *where)):
            decoders.add(threading.current_thread().name)
            if number == 1:
                decoded.set()
            yield stretch

    monkeypatch.setattr(reader.RowReader, "rows", rows)
    loop = Loop(tmp_path, lambda payload: decoded.wait(10) and payload)
    record = loop.run()
    assert [row["n"] for row in loop.rows(record)] == list(range(100))
    assert decoders == {"cortex-dask-reader"}
    assert no_threads_left()


def test_stages_overlap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reader fetches the third batch while the first is handled, and it does not wait for the writer."""
    seen = threading.Event()
    real = pipeline.read_split

    def read_split(split: Any, header: Any, *ahead: Any) -> Iterator[Any]:
        for item in real(split, header, *ahead):
            if item.index == 2:
                seen.set()
            yield item

    monkeypatch.setattr(pipeline, "read_split", read_split)
    monkeypatch.setattr(pipeline, "SMALL_BATCH", 0)
    loop = Loop(tmp_path, lambda payload: seen.wait(10) and payload)
    assert loop.run().rows_out == 100


def test_what_raises_outside_of_the_handler_unwinds_everything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overlap: bool
) -> None:
    """Reader, handler and writer in turn; the others end, and nothing is left behind."""
    loop = Loop(tmp_path, lambda payload: payload, rows=100_000, batch_size=100)
    real_read, real_write = pipeline.read_split, PartWriter.write
    tables: list[pa.Table] = []

    def broken_read(split: Any, header: Any, *ahead: Any) -> Iterator[Any]:
        for item in real_read(split, header, *ahead):
            if item.index == 500:
                raise StorageError("reading fails")
            yield item

    def broken_write(self: PartWriter, table: pa.Table) -> None:
        tables.append(table)
        if len(tables) == 3:
            raise StorageError("writing fails")
        real_write(self, table)

    for target, name, broken, words in (
        (pipeline, "read_split", broken_read, "reading fails"),
        (PartWriter, "write", broken_write, "writing fails"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(target, name, broken)
            with pytest.raises(StorageError, match=words):
                loop.run(overlap=overlap)
        assert no_threads_left()
        assert loop.job.staged() == []
    assert loop.run(overlap=overlap).rows_out == 100_000


def test_a_reader_that_fails_in_the_middle_keeps_what_it_had_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overlap: bool
) -> None:
    real = pipeline.read_split

    def read_split(split: Any, header: Any, *ahead: Any) -> Iterator[Any]:
        for item in real(split, header, *ahead):
            if item.index == 6:
                raise OSError("the disk is gone")
            yield item

    monkeypatch.setattr(pipeline, "read_split", read_split)
    loop = Loop(tmp_path, lambda payload: payload)
    record = loop.run(overlap=overlap)
    assert [row["n"] for row in loop.rows(record)] == list(range(60))
    assert [(failure.batch, failure.cause, failure.rows) for failure in record.failures] == [
        (index, "unreadable input", 10) for index in (6, 7, 8, 9)
    ]
    assert "the disk is gone" in record.failures[0].error


def test_a_reader_that_ends_too_early_loses_nothing_in_silence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = pipeline.read_split
    monkeypatch.setattr(pipeline, "read_split", lambda split, header, *ahead: list(real(split, header, *ahead))[:8])
    record = Loop(tmp_path, lambda payload: payload).run()
    assert [failure.batch for failure in record.failures] == [8, 9]


def test_memory_is_bounded_by_a_few_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    real = pipeline.read_split

    def read_split(split: Any, header: Any, *ahead: Any) -> Iterator[Any]:
        for item in real(split, header, *ahead):
            read.append(item.index)
            yield item

    monkeypatch.setattr(pipeline, "read_split", read_split)
    monkeypatch.setattr(pipeline, "READ_AHEAD", 1000)
    handled: list[int] = []

    def handle(payload: Any) -> None:
        time.sleep(0.002)
        assert len(read) <= len(handled) + 5
        handled.append(1)

    record = Loop(tmp_path, handle, rows=30_000, batch_size=1000).run()
    assert record.failures == ()


def test_a_split_that_repeats_failures_handles_only_those(tmp_path: Path, overlap: bool) -> None:
    from dataclasses import replace

    loop = Loop(tmp_path, lambda payload: payload)
    loop.job.splits[0] = replace(loop.job.splits[0], number=7, base=0, only=(2, 5))
    record = loop.run(overlap=overlap)
    assert [row["n"] for row in loop.rows(record)] == [*range(20, 30), *range(50, 60)]
    assert (record.split, record.batches, record.succeeded) == (7, 2, 2)


def test_metrics_of_a_split_that_fails_do_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loop = Loop(tmp_path, lambda payload: loop.context.metrics.increment("rows", len(payload)))
    loop.context.metrics.increment("started")  # as by __init__
    monkeypatch.setattr(pipeline, "read_split", lambda *arguments: (_ for _ in ()).throw(StorageError("no")))
    with pytest.raises(StorageError):
        loop.run()
    monkeypatch.undo()
    metrics = {item["metric"]: item["value"] for item in loop.run().metrics}
    assert metrics == {"started": 1, "rows": 100}


# the schema ---------------------------------------------------------------------------------------------------------


def by_batch(values: dict[int, Any], default: Any) -> Callable[[Any], Any]:
    return lambda payload: [values.get(payload[0]["n"] // 10, default)] * len(payload)


def test_the_first_batches_that_settle_every_column_make_the_schema(tmp_path: Path, overlap: bool) -> None:
    source = Settled()
    loop = Loop(tmp_path, by_batch({0: {"a": None}, 1: {"a": None}, 9: {"a": None}}, {"a": 1.5}))
    record = loop.run(source, overlap=overlap)
    assert source.proposals == [pa.schema({"a": pa.float64()})]
    assert [row["a"] for row in loop.rows(record)] == [None] * 20 + [1.5] * 70 + [None] * 10


def test_an_answer_that_takes_its_time_holds_nothing_up(tmp_path: Path) -> None:
    source = Settled(after=5)
    record = Loop(tmp_path, lambda payload: payload).run(source)
    assert record.rows_out == 100
    assert source.asked == 6


def test_a_column_without_any_value_stays_one_of_nulls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(part_module, "MOST_BATCHES", 3)
    source = Settled()
    loop = Loop(tmp_path, by_batch({7: {"a": 1, "b": 5}}, {"a": 1, "b": None}))
    record = loop.run(source)
    assert source.proposals == [pa.schema({"a": pa.int64(), "b": pa.null()})]
    (failure,) = record.failures
    assert failure.batch == 7
    assert "declare" in failure.error
    assert record.rows_out == 90


def test_batches_that_do_not_fit_what_was_settled_fail_and_the_others_do_not(tmp_path: Path, overlap: bool) -> None:
    source = Settled(other=pa.schema({"a": pa.int64()}))
    loop = Loop(tmp_path, by_batch({0: {"a": 2.5}, 1: {"a": 3.5}}, {"a": 4.0}), limits={"max_attempts": 2})
    record = loop.run(source, overlap=overlap)
    assert [failure.batch for failure in record.failures][:1] == [0]
    assert [row["a"] for row in loop.rows(record)] == [4] * (100 - 10 * len(record.failures))
    assert {failure.attempts for failure in record.failures} == {2}


def test_a_schema_that_nobody_settles_is_asked_for(tmp_path: Path, overlap: bool) -> None:
    class Nobody(Settled):
        def answer(self, *, wait: bool) -> str | None:
            return None

    loop = Loop(tmp_path, lambda payload: payload)
    with pytest.raises(NeedsSchema) as caught:
        loop.run(Nobody(), overlap=overlap)
    assert decode_schema(caught.value.schema) == pa.schema({"n": pa.int64()})
    assert loop.job.staged() == []
    assert no_threads_left()


def test_a_handler_that_returns_nothing_holds_no_batch_back(tmp_path: Path) -> None:
    loop = Loop(tmp_path, lambda payload: None, rows=3000)
    record = loop.run()
    assert (record.part, record.rows_out, loop.job.staged()) == (None, 0, [])
    assert loop.events == [NoOutput(0)]


def test_output_that_begins_late_has_its_schema_too(tmp_path: Path) -> None:
    source = Settled()
    loop = Loop(tmp_path, lambda payload: payload if payload[0]["n"] >= 2000 else None, rows=3000)
    record = loop.run(source)
    assert record.rows_out == 1000
    assert len(source.proposals) == 1


def test_results_are_not_looked_at_without_an_output(tmp_path: Path) -> None:
    record = Loop(tmp_path, lambda payload: "anything", has_output=False).run()
    assert (record.failures, record.rows_out, record.succeeded) == ((), 0, 10)


# inline -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def job(tmp_path: Path) -> Iterator[TestJob]:
    handler = """
    class Handler:
        def __init__(self, config, job_spec):
            self.total = job_spec["total_batch_count"]
            self.rows = 0
        def handle_batch(self, payload, batch_id):
            if payload[0]["n"] == 30:
                raise ValueError("bad")
            self.rows += len(payload)
            return payload
        def on_job_complete(self):
            assert self.rows == 90, self.rows
    """
    with contextlib.closing(make_job(tmp_path, handler)) as made:
        yield made


def test_inline_is_the_same_loop_without_threads_and_processes(job: TestJob) -> None:
    from cortex_dask.runtime.handler_process import inline

    before = threading.active_count()
    record = job.record(in_line=True)
    assert threading.active_count() == before
    assert [row["n"] for row in job.rows(record)] == [n for n in range(100) if not 30 <= n < 40]
    assert (record.failed_attempts, [failure.batch for failure in record.failures]) == (3, [3])
    assert inline.run_completion(job.url).kind == "done"


def test_a_keyboard_interrupt_leaves_the_inline_loop(tmp_path: Path) -> None:
    with contextlib.closing(make_job(tmp_path, PLAIN.replace("return payload", "raise KeyboardInterrupt"))) as made:
        with pytest.raises(KeyboardInterrupt):
            made.run(in_line=True)
        assert made.staged() == []


def test_an_init_that_fails_inline_is_an_outcome(tmp_path: Path) -> None:
    handler = PLAIN.replace("config): pass", "config): raise ValueError('no')")
    with contextlib.closing(make_job(tmp_path, handler)) as made:
        outcome = made.run(in_line=True)
    assert (outcome.kind, outcome.message) == ("worker error", "the handler cannot be started: ValueError: no")
