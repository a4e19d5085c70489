"""The messages between a supervisor and its handler process, and the frames that carry them: length, kind, body.

Commands go to the process on its standard input; events and log lines come back on a pipe of their own. A message is
a dataclass, in JSON on the pipe; a log line is a line of JSON that the supervisor stores as it is. No row ever travels
here.
"""

from __future__ import annotations

import json
import os
import struct
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

import orjson

from cortex_dask.io.job.records import (
    Metrics,
    NoOutput,
    SchemaProposed,
    SlotState,
    SplitProgress,
    SplitRecord,
    SplitTask,
)
from cortex_dask.io.job.settings import JobSettings
from cortex_dask.io.job.splits import PlanHeader
from cortex_dask.runtime.failures import Verdict
from cortex_dask.runtime.history import SplitHistory

MESSAGE = 0
LOG = 1

_HEADER = struct.Struct(">IB")


# commands to a handler process ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Setup:
    """Load the handler: the first command that a process gets."""

    settings: JobSettings
    job_url: str
    directory: str | None  # the unpacked project; None: the handler is a class that travels by value
    labels: dict[str, str]  # of the log lines
    context: dict[str, Any] | None  # of the job, see :func:`cortex_dask.runtime.job_context.describe`
    variables: dict[str, str | None]  # that were set for this process alone, and their values before


@dataclass(frozen=True, slots=True)
class PlanKnown:
    """The job is planned."""

    header: PlanHeader
    start_time: str


@dataclass(frozen=True, slots=True)
class RunSplit:
    """Run a split."""

    run: int  # counts what the process was sent
    task: SplitTask
    attempt_id: str
    history: SplitHistory
    rows_limit: int | None
    patience: int  # batches that may run out of memory before a single row is tried in a new process


@dataclass(frozen=True, slots=True)
class SchemaAnswer:
    """The output's schema, as an answer to :class:`SchemaAsked`; None: nobody has decided it."""

    schema: str | None


@dataclass(frozen=True, slots=True)
class Complete:
    """Call ``on_job_complete``."""


@dataclass(frozen=True, slots=True)
class Close:
    """End in good order."""


# events of a handler process ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Ready:
    """The handler is loaded."""

    on_job_complete: bool  # whether it has that method


@dataclass(frozen=True, slots=True)
class InitFailed:
    """The handler cannot be loaded; the process ends."""

    kind: Literal["worker error", "out of memory"]
    message: str


@dataclass(frozen=True, slots=True)
class AttemptFailed:
    """A batch has failed once more."""

    batch: int
    verdict: Verdict  # so far: it is valid if it is final
    final: bool


@dataclass(frozen=True, slots=True)
class SchemaMismatch:
    """The rows of a batch, held back until the schema was known, do not fit it: the batch is tried again."""

    batch: int


@dataclass(frozen=True, slots=True)
class Recovered:
    """A batch that had failed before has succeeded."""

    batch: int


@dataclass(frozen=True, slots=True)
class RowsLimit:
    """So many rows at once were not too many for the memory."""

    rows: int
    everywhere: bool  # whether that holds on all workers


@dataclass(frozen=True, slots=True)
class Writing:
    """A temporary file of a part on the local file system is being written."""

    path: str


@dataclass(frozen=True, slots=True)
class SchemaAsked:
    """The process asks for the output's schema, and proposes the one that its own first rows make."""

    schema: str


@dataclass(frozen=True, slots=True)
class Done:
    """A split was run to its end."""

    run: int
    record: SplitRecord  # without what only the supervisor knows
    exhausted: int  # batches that have run out of memory in this process


@dataclass(frozen=True, slots=True)
class Spent:
    """The process cannot be used any more, although it lives: the split has to be run in a new one."""

    run: int
    message: str


@dataclass(frozen=True, slots=True)
class Aborted:
    """A split was given up; nothing of it was kept."""

    run: int
    kind: Literal["needs schema", "storage", "worker error"]
    schema: str | None = None
    message: str = ""


@dataclass(frozen=True, slots=True)
class Completed:
    """``on_job_complete`` was called."""

    message: str  # what it raised; empty: nothing
    metrics: list[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Gone:
    """The process has ended: the last event, added by the supervisor's side."""


Command = Setup | PlanKnown | RunSplit | SchemaAnswer | Complete | Close
#: What is reported of a split's batches while it runs.
BatchEvent = AttemptFailed | SchemaMismatch | Recovered | RowsLimit | Writing | NoOutput
ProcessEvent = Ready | InitFailed | BatchEvent | SchemaAsked | Done | Spent | Aborted | Completed | Gone
#: What may be encoded: also the events of a split on their way from a Dask worker to the coordinator.
Message = Command | ProcessEvent | SplitProgress | SlotState | SchemaProposed | Metrics

_CLASSES: dict[str, type[Any]] = {kind.__name__: kind for kind in Message.__args__}
_NESTED: dict[type[Any], dict[str, Callable[[Any], Any]]] = {
    Setup: {"settings": JobSettings.from_json},
    PlanKnown: {"header": PlanHeader.from_json},
    RunSplit: {"task": SplitTask.from_json, "history": SplitHistory.from_json},
    AttemptFailed: {"verdict": lambda value: Verdict(**value)},
    Done: {"record": SplitRecord.from_json},
}


def encode(message: Message) -> bytes:
    """Return a message as JSON: the name of its class, and its fields."""
    name = type(message).__name__
    try:
        return orjson.dumps([name, message], option=orjson.OPT_NON_STR_KEYS)
    except TypeError:  # lone surrogates in a user's message, integers of more than 64 bits in a metric
        return json.dumps([name, asdict(message)], ensure_ascii=False).encode(errors="replace")


def decode(body: bytes) -> Any:
    """Return the message that :func:`encode` was given."""
    name, fields = orjson.loads(body)
    kind = _CLASSES[name]
    for field, build in _NESTED.get(kind, {}).items():
        fields[field] = build(fields[field])
    return kind(**fields)


# frames ---------------------------------------------------------------------------------------------------------------


def frame(kind: int, body: bytes) -> bytes:
    """Return a body with its header."""
    return _HEADER.pack(len(body), kind) + body


class FrameWriter:
    """Writes whole frames to a pipe, from any thread; its methods raise OSError when the other side is gone."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._lock = threading.Lock()

    def send(self, event: ProcessEvent) -> None:
        """Write an event."""
        self._write(frame(MESSAGE, encode(event)))

    def send_log(self, line: bytes) -> None:
        """Write a log line, without its line feed."""
        self._write(frame(LOG, line))

    def _write(self, data: bytes) -> None:
        with self._lock:
            written = os.write(self._descriptor, data)
            while written < len(data):  # a pipe takes 64 KiB at a time
                written += os.write(self._descriptor, data[written : written + 1_048_576])


class FrameReader:
    """Makes frames of bytes, whatever pieces they are read in."""

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
