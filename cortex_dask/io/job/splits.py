"""The plan of a job as values: pieces of files, splits of pieces, and the plan's header.

A *piece* is a contiguous stretch of one file. A *split* is a list of pieces; it is the unit of
scheduling: one split = one task = at most one output part = one ledger record. A *batch* is the unit
of handling: ``batch_size`` consecutive rows of a split's row stream (the pieces one after the other).

These values travel as JSON (through the job directory and in tasks), so every field is plain.
"""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

#: Name space of batch ids (any fixed uuid will do; it never changes, so ids are reproducible).
BATCH_NAMESPACE = uuid.UUID("6a0f5c2e-6f5b-5b7e-9a51-0c7f3a1d2b47")

BatchFormat = Literal["pandas", "pyarrow", "polars", "numpy", "records"]
FileFormat = Literal["parquet", "json"]


@dataclass(frozen=True, slots=True)
class DatasetInput:
    """What is to be read, as the submission says it (already validated by ``spec``)."""

    paths: tuple[str, ...]
    format: Literal["auto", "parquet", "json"] = "auto"
    columns: tuple[str, ...] | None = None
    #: pyarrow-style filters in disjunctive normal form: a list of (column, op, value), or a list of such lists.
    filters: Any = None
    batch_size: int = 1024


@dataclass(frozen=True, slots=True)
class Piece:
    """A contiguous stretch of one file.

    Parquet: rows ``start`` to ``stop`` of row group ``group``; ``rows`` is how many of them pass the filters.
    JSON lines: the lines that start in bytes ``start`` to ``stop`` (whole file: 0 to ``size``; for compressed files and
    arrays always the whole file); ``rows`` is None (unknown until read).
    Samples (JSON lines of any value, blank ones left out): of those, the first ``skip`` left out, the next ``rows``.
    """

    path: str  # absolute URL or local path, as fsspec takes it
    start: int
    stop: int
    rows: int | None
    group: int | None = None
    size: int = 0  # of the whole file in bytes, when planned
    tag: str = ""  # the file's ETag or modification time when planned: a later change is an error, never a mix
    keys: tuple[tuple[str, str], ...] = ()  # Hive partition keys and their values as written in the path
    skip: int = 0  # samples in ``start`` to ``stop`` that belong to the piece before

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Piece:
        """Build a piece from the mapping that :func:`dataclasses.asdict` made."""
        fields = dict(value)
        fields["keys"] = tuple((key, text) for key, text in fields.get("keys", ()))
        return cls(**fields)


@dataclass(frozen=True, slots=True)
class Split:
    """The unit of scheduling.

    ``number`` is unique in the job. A retry of dead letters adds splits with new numbers whose ``base`` is the number
    of the split that they repeat and whose ``only`` lists the batch indexes to handle again; their batch ids are those
    of the base split.
    """

    number: int
    pieces: tuple[Piece, ...]
    rows: int | None  # rows that pass the filters; None: unknown until read
    batches: int | None  # None: unknown until read
    bytes: int  # estimated uncompressed size of the columns read
    base: int | None = None
    only: tuple[int, ...] | None = None

    @property
    def origin(self) -> int:
        """The number under which this split's batches are named."""
        return self.number if self.base is None else self.base

    def to_json(self) -> dict[str, Any]:
        """Return the split as plain JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Split:
        """Build a split from what :meth:`to_json` returned."""
        fields = dict(value)
        fields["pieces"] = tuple(Piece.from_json(piece) for piece in fields["pieces"])
        if fields.get("only") is not None:
            fields["only"] = tuple(fields["only"])
        return cls(**fields)


@dataclass(frozen=True, slots=True)
class PlanHeader:
    """What all splits of a plan have in common, and the totals."""

    format: FileFormat
    batch_size: int
    #: The settled input schema (after ``columns``, with partition keys last), as base64 of Arrow IPC; None for JSON.
    schema: str | None
    columns: tuple[str, ...] | None
    filters: Any
    files: int
    splits: int
    batches: int
    batches_exact: bool  # False: ``batches`` and ``rows`` are estimates (JSON)
    rows: int
    bytes: int
    warnings: tuple[str, ...] = ()
    keys: dict[str, str] = field(default_factory=dict)  # the Arrow type of each partition key, by its name
    filter_schema: str | None = None  # of the columns that the filters use, as base64 of Arrow IPC
    any_json: bool = False  # lines may hold any JSON value, and not only objects

    def to_json(self) -> dict[str, Any]:
        """Return the header as plain JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> PlanHeader:
        """Build a header from what :meth:`to_json` returned."""
        fields = dict(value)
        if (earlier := fields.pop("extra", None)) is not None:  # where earlier releases kept what has fields now
            fields["any_json"] = earlier.get("json") == "any"
            fields |= {key: earlier[key] for key in ("keys", "filter_schema") if key in earlier}
        if fields.get("columns") is not None:
            fields["columns"] = tuple(fields["columns"])
        fields["warnings"] = tuple(fields.get("warnings", ()))
        return cls(**fields)


@dataclass(frozen=True, slots=True)
class Plan:
    """A header and the splits, in input order."""

    header: PlanHeader
    splits: tuple[Split, ...]

    def __iter__(self) -> Iterator[Split]:
        return iter(self.splits)


def batch_id(job_id: str, split: int, index: int) -> str:
    """Return the id of a batch: the same batch of the same job has the same id in every attempt.

    Examples
    --------
    >>> batch_id("job-1", 0, 0) == batch_id("job-1", 0, 0)
    True
    """
    return str(uuid.uuid5(BATCH_NAMESPACE, f"{job_id}/{split}/{index}"))


def part_token(job_id: str) -> str:
    """Return the eight hexadecimal digits that tell a job's parts from those of others in the same directory."""
    return hashlib.sha256(job_id.encode()).hexdigest()[:8]


def part_name(job_id: str, split: int, suffix: str) -> str:
    """Return the name of a split's output part, e.g. ``part-000042-1f2e3d4c.parquet``."""
    return f"part-{split:06d}-{part_token(job_id)}{suffix}"
