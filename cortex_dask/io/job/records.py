"""What travels between coordinator, worker and ledger: the split task, its events and outcome, the ledger's record."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from cortex_dask.io.job.splits import Split

#: Why a batch failed for good, named in dead letters, logs and ``job.failures()``.
Cause = Literal[
    "exception",  # handle_batch raised, or what it returned cannot be used
    "crash",  # the handler process ended: the signal or exit code is in the message
    "out of memory",  # killed over its memory limit, MemoryError or CUDA out of memory, down to one row
    "timed out",  # batch_timeout or stall_timeout
    "malformed input",  # a line that is not a JSON object
    "unreadable input",  # a file that cannot be read or has changed since it was planned
    "worker lost",  # its host vanished more often than the budget allows
]
CAUSES: tuple[str, ...] = Cause.__args__  # type: ignore[attr-defined]


@dataclass(frozen=True, slots=True)
class SplitTask:
    """One attempt at one split, as sent to a worker; small, whatever the size of the job."""

    job_url: str  # the job directory
    split: Split
    attempt: int  # how often the coordinator has sent this split, from 1
    schema: str | None  # the job's settled output schema (base64 of Arrow IPC); None: not settled yet
    rows_limit: int | None = None  # the most rows that are handled at once, learnt from splits that ran out of memory

    def to_json(self) -> dict[str, Any]:
        """Return the task as plain JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> SplitTask:
        """Build a task from what :meth:`to_json` returned."""
        return cls(**{**value, "split": Split.from_json(value["split"])})


@dataclass(frozen=True, slots=True)
class Part:
    """An output part that is whole and durable under its staged name."""

    name: str  # final name in the output directory
    staged: str  # where it lies now, relative to the output directory: ``_temporary/<token>/<split>-<attempt id>``
    rows: int
    bytes: int


@dataclass(frozen=True, slots=True)
class BatchFailure:
    """A batch (or a malformed line) that failed for good; the payload and traceback are in the failures file."""

    batch: int | None  # index in the split of origin; None: a malformed line, which was never part of a batch
    batch_id: str
    rows: int
    attempts: int
    cause: Cause
    error: str  # one line: type and message


@dataclass(frozen=True, slots=True)
class SplitRecord:
    """What one finished attempt did: the ledger's line. The first record of a split in the ledger is the truth."""

    split: int
    attempt_id: str
    part: Part | None  # None: no rows came back
    batches: int  # batches that this split holds (only the selected ones for a retry)
    succeeded: int
    failures: tuple[BatchFailure, ...] = ()
    failures_file: str | None = None  # relative to the job directory
    failed_attempts: int = 0  # failed attempts of all batches, also of those that succeeded later
    rows_in: int = 0
    rows_out: int = 0
    seconds: float = 0.0  # from lease to staged part
    handle_seconds: float = 0.0  # inside handle_batch
    worker: str = ""
    finished: float = 0.0  # seconds since the epoch
    metrics: list[dict[str, Any]] = field(default_factory=list)  # what the handler pushed
    rows_limit: int | None = None  # the most rows that may be handled at once, where memory had run out

    def to_json(self) -> dict[str, Any]:
        """Return the record as plain JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> SplitRecord:
        """Build a record from what :meth:`to_json` returned."""
        part = value.get("part")
        failures = tuple(BatchFailure(**item) for item in value.get("failures", ()))
        value = dict(value)
        value |= value.pop("extra", {})  # where earlier releases kept metrics and rows_limit
        return cls(**{**value, "part": Part(**part) if part else None, "failures": failures})


@dataclass(frozen=True, slots=True)
class Outcome:
    """How one attempt at a split ended, as returned by the split task.

    ``done``: ``record`` is set. ``needs schema``: the split has output but nobody has settled the schema; ``schema`` is
    what its own first rows would make of it; nothing was written, send it again. ``storage``: a store failed after all
    retries; nothing was committed, send it again later. ``worker error`` / ``out of memory``: the handler cannot start,
    the job fails with that status. ``stopped``: the job was asked to stop.
    """

    kind: Literal["done", "needs schema", "storage", "worker error", "out of memory", "stopped"]
    split: int
    record: SplitRecord | None = None
    schema: str | None = None
    message: str = ""

    def to_json(self) -> dict[str, Any]:
        """Return the outcome as plain JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Outcome:
        """Build an outcome from what :meth:`to_json` returned."""
        record = value.get("record")
        return cls(**{**value, "record": SplitRecord.from_json(record) if record else None})


# the events of a running split, which reach the coordinator ----------------------------------------------------------


@dataclass(frozen=True, slots=True)
class SplitProgress:
    """How far an attempt at a split is."""

    split: int
    attempt: int
    batches: int
    rows: int
    failed_attempts: int


@dataclass(frozen=True, slots=True)
class SlotState:
    """What a slot is doing: ``initializing``, ``running`` or ``failed``."""

    slot: str
    state: str


@dataclass(frozen=True, slots=True)
class SchemaProposed:
    """The schema (base64 of Arrow IPC) that the first rows of a split would give the job's output."""

    split: int
    schema: str


@dataclass(frozen=True, slots=True)
class NoOutput:
    """No row came back from the first batch of a split."""

    split: int


@dataclass(frozen=True, slots=True)
class Metrics:
    """What ``on_job_complete`` pushed."""

    metrics: list[dict[str, Any]]


SplitEvent = SplitProgress | SlotState | SchemaProposed | NoOutput | Metrics
