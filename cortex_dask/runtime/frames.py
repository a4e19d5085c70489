"""Framing on the pipes between a supervisor and its handler process: length, kind, body.

Commands go to the process on its standard input, events and log lines come back on a pipe of their own. An event is a
JSON object with a ``type``; a log line is a line of JSON that the supervisor stores as it is. No row ever travels
here.
"""

from __future__ import annotations

import json
import os
import struct
import threading
from collections.abc import Iterator
from typing import Any

import orjson

EVENT = 0
LOG = 1

_HEADER = struct.Struct(">IB")


def encode(event: dict[str, Any]) -> bytes:
    """Return an event as one frame."""
    try:
        body = orjson.dumps(event, option=orjson.OPT_NON_STR_KEYS)
    except TypeError:  # lone surrogates in a user's message, integers of more than 64 bits in a metric
        body = json.dumps(event, ensure_ascii=False).encode(errors="replace")
    return frame(EVENT, body)


def frame(kind: int, body: bytes) -> bytes:
    """Return a body with its header."""
    return _HEADER.pack(len(body), kind) + body


class FrameWriter:
    """Writes whole frames to a pipe, from any thread.

    Parameters
    ----------
    descriptor : int
        The pipe's writing end.

    Raises
    ------
    OSError
        From its methods, when the other side is gone.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._lock = threading.Lock()

    def send(self, event: dict[str, Any]) -> None:
        """Write an event."""
        self._write(encode(event))

    def send_log(self, line: bytes) -> None:
        """Write a log line, without its line feed."""
        self._write(frame(LOG, line))

    def _write(self, data: bytes) -> None:
        with self._lock:
            written = os.write(self._descriptor, data)
            while written < len(data):  # a pipe takes 64 KiB at a time
                written += os.write(self._descriptor, data[written : written + 1_048_576])


class FrameReader:
    """Takes bytes as they come and yields the frames that are whole."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[tuple[int, bytes]]:
        """Add bytes; yields the kind and body of each frame that they complete.

        Bytes of a frame that never becomes whole (its writer was killed) are kept and never yielded.
        """
        self._buffer += data
        start = 0
        while len(self._buffer) - start >= _HEADER.size:
            length, kind = _HEADER.unpack_from(self._buffer, start)
            end = start + _HEADER.size + length
            if end > len(self._buffer):
                break
            yield kind, bytes(self._buffer[start + _HEADER.size : end])
            start = end
        if start:
            del self._buffer[:start]
