"""Framing: whatever pieces the bytes come in, and whoever writes at the same time."""

from __future__ import annotations

import os
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cortex_dask.io.job.records import (
    BatchFailure,
    Metrics,
    NoOutput,
    Part,
    SchemaProposed,
    SlotState,
    SplitProgress,
    SplitRecord,
    SplitTask,
)
from cortex_dask.io.job.settings import HandlerSettings, JobSettings, OutputSettings
from cortex_dask.io.job.splits import DatasetInput, Piece, PlanHeader, Split
from cortex_dask.runtime.failures import Verdict
from cortex_dask.runtime.frames import (
    LOG,
    MESSAGE,
    Aborted,
    AttemptFailed,
    Close,
    Complete,
    Completed,
    Done,
    FrameReader,
    FrameWriter,
    Gone,
    InitFailed,
    Message,
    PlanKnown,
    Ready,
    Recovered,
    RowsLimit,
    RunSplit,
    SchemaAnswer,
    SchemaAsked,
    SchemaMismatch,
    Setup,
    Spent,
    Writing,
    decode,
    encode,
    frame,
)
from cortex_dask.runtime.history import BatchHistory, SplitHistory


@given(
    st.lists(st.tuples(st.sampled_from([MESSAGE, LOG]), st.binary(max_size=300))),
    st.lists(st.integers(1, 50), min_size=1),
)
def test_frames_come_whole_whatever_pieces_they_are_read_in(frames: list[tuple[int, bytes]], sizes: list[int]) -> None:
    data = b"".join(frame(kind, body) for kind, body in frames)
    reader, found, start, turn = FrameReader(), [], 0, 0
    while start < len(data):
        size = sizes[turn % len(sizes)]
        found += reader.feed(data[start : start + size])
        start, turn = start + size, turn + 1
    assert found == frames


def test_a_frame_that_was_cut_off_is_not_yielded() -> None:
    reader = FrameReader()
    assert list(reader.feed(frame(MESSAGE, b"whole") + frame(LOG, b"cut off")[:-1])) == [(MESSAGE, b"whole")]


def test_threads_that_write_large_frames_do_not_mix_them() -> None:
    read, write = os.pipe()
    writer = FrameWriter(write)
    texts = [letter * 300_000 for letter in "abc"]  # more than a pipe holds
    threads = [threading.Thread(target=lambda t=text: [writer.send(Writing(t)) for _ in range(5)]) for text in texts]
    reader, found = FrameReader(), []
    for thread in threads:
        thread.start()
    while len(found) < 15:
        found += reader.feed(os.read(read, 100_000))
    for thread in threads:
        thread.join()
    assert sorted(decode(body).path for _, body in found) == sorted(texts * 5)
    os.close(read)
    with pytest.raises(BrokenPipeError):
        writer.send_log(b"nobody listens")
    os.close(write)


def test_every_message_comes_back_as_it_was() -> None:
    settings = JobSettings(
        "job",
        "api",
        "api-1",
        "2026-01-01T00:00:00Z",
        HandlerSettings("project", path="handler.py", sys_path=("a", "b")),
        DatasetInput(("in",), batch_size=10),
        output=OutputSettings("out", keep=("id",)),
    )
    header = PlanHeader("parquet", 10, None, ("n",), None, 1, 1, 10, True, 100, 1000, warnings=("small",))
    split = Split(0, (Piece("in/a", 0, 100, 100, 0, 1000),), 100, 10, 1000, only=(1, 2))
    verdict = Verdict("exception", "ValueError: no", "Traceback", 2)
    history = SplitHistory({3: BatchHistory(2, 5, verdict), 4: BatchHistory()}, (7, verdict), careful=True)
    failure = BatchFailure(3, "id", 10, 2, "exception", "ValueError: no")
    part = Part("part-0", "_temporary/part-0", 90, 500)
    record = SplitRecord(0, "a1", part, 10, 9, (failure,), "failures/0.jsonl")
    messages: list[Message] = [
        Setup(settings, "job", None, {"jobID": "job"}, {"name": "local"}, {"HOME": None, "A": "b"}),
        PlanKnown(header, "2026-01-01T00:00:00Z"),
        RunSplit(1, SplitTask("job", split, 1, None), "a1", history, None, 3),
        SchemaAnswer(None),
        Complete(),
        Close(),
        Ready(on_job_complete=True),
        InitFailed("worker error", "no such module"),
        AttemptFailed(3, verdict, final=False),
        SchemaMismatch(3),
        Recovered(3),
        RowsLimit(5, everywhere=True),
        Writing("/tmp/part"),
        SchemaAsked("abc"),
        Done(1, record, 0),
        Spent(1, "the device is lost"),
        Aborted(1, "storage", message="the bucket is gone"),
        Completed("", [{"name": "seen", "value": 1.5}]),
        Gone(),
        NoOutput(0),
        SplitProgress(0, 1, 3, 30, 1),
        SlotState("host-1-0", "running"),
        SchemaProposed(0, "abc"),
        Metrics([{"name": "seen", "value": 1.5}]),
    ]
    assert [decode(encode(message)) for message in messages] == messages


def test_no_text_or_number_of_a_user_breaks_a_message() -> None:
    message = decode(encode(Completed("bad \ud800 text", [{"value": 2**70}])))
    assert message.message == "bad ? text"
    message = decode(encode(AttemptFailed(3, Verdict("exception", "bad \ud800 text", None, 1), final=True)))
    assert message.verdict.error == "bad ? text"
