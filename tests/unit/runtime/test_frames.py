"""Framing: whatever pieces the bytes come in, and whoever writes at the same time."""

from __future__ import annotations

import os
import threading

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cortex_dask.runtime.frames import EVENT, LOG, FrameReader, FrameWriter, encode, frame


@given(
    st.lists(st.tuples(st.sampled_from([EVENT, LOG]), st.binary(max_size=300))),
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
    assert list(reader.feed(encode({"type": "a"}) + encode({"type": "b"})[:-1])) == [(EVENT, b'{"type":"a"}')]


def test_threads_that_write_large_frames_do_not_mix_them() -> None:
    read, write = os.pipe()
    writer = FrameWriter(write)
    texts = [letter * 300_000 for letter in "abc"]  # more than a pipe holds
    threads = [threading.Thread(target=lambda t=text: [writer.send({"text": t}) for _ in range(5)]) for text in texts]
    reader, found = FrameReader(), []
    for thread in threads:
        thread.start()
    while len(found) < 15:
        found += reader.feed(os.read(read, 100_000))
    for thread in threads:
        thread.join()
    assert sorted(orjson.loads(body)["text"] for _, body in found) == sorted(texts * 5)
    os.close(read)
    with pytest.raises(BrokenPipeError):
        writer.send_log(b"nobody listens")
    os.close(write)


def test_no_text_or_number_of_a_user_breaks_an_event() -> None:
    ((kind, body),) = FrameReader().feed(encode({"error": "bad \ud800 text", "number": 2**70}))
    assert kind == EVENT
    assert orjson.loads(body)["error"] == "bad ? text"
