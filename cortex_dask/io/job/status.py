"""The status words of jobs, and :class:`Progress`, the numbers of a status document.

The status document is the JSON that the coordinator keeps in the job directory.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from cortex_dask.formatting import count, parse_time

#: The words that :attr:`cortex_dask.Job.status` may be, in the order of a job's life.
STATUSES = (
    "enqueuing",
    "running",
    "succeeded",
    "failed while enqueuing",
    "completed with failures",
    "worker error",
    "out of memory",
    "timed out",
    "stopped",
)

#: The statuses that do not change any more, unless the job is resumed or retried.
FINAL_STATUSES = frozenset(STATUSES[2:])

#: The statuses with which the output is complete.
COMPLETE_STATUSES = frozenset({"succeeded", "completed with failures"})


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a job is.

    Attributes
    ----------
    status : str
        One of :data:`STATUSES`.
    batches_done : int
        Batches that need no further attempt: succeeded or failed for good.
    batches_total : int or None
        None while the job has not been planned.
    exact : bool
        Whether ``batches_total`` is a count; False: an estimate, as for JSON input.
    failed_batches : int
        Batches that failed for good.
    rows_in, rows_out : int
        Rows read, and rows that the handler returned, in finished splits.
    rows_per_second : float
        Rows read per second.
    eta : float or None
        Seconds that are probably left; None when unknown.
    seconds : float or None
        Seconds since the job started, or that it took; None before it started.
    workers : int
        Workers that handle batches now.
    """

    status: str
    batches_done: int
    batches_total: int | None
    exact: bool
    failed_batches: int
    rows_in: int
    rows_out: int
    rows_per_second: float
    eta: float | None
    seconds: float | None
    workers: int

    @classmethod
    def from_status(cls, document: Mapping[str, Any], *, now: datetime | None = None) -> Progress:
        """Read a status document; what it lacks is not known yet."""
        total = document.get("total_batch_count")
        started, ended = parse_time(document.get("start_time")), parse_time(document.get("end_time"))
        return cls(
            status=str(document.get("status", "enqueuing")),
            batches_done=int(document.get("batches_done") or 0),
            batches_total=None if total is None else int(total),
            exact=bool(document.get("total_batch_count_exact", True)),
            failed_batches=int(document.get("failed_batches") or 0),
            rows_in=int(document.get("rows_in") or 0),
            rows_out=int(document.get("rows_out") or 0),
            rows_per_second=float(document.get("rows_per_second") or 0.0),
            eta=None if document.get("eta") is None else float(document["eta"]),
            seconds=None if started is None else ((ended or now or datetime.now(UTC)) - started).total_seconds(),
            workers=int((document.get("worker_counts") or {}).get("running") or 0),
        )

    @property
    def share(self) -> float | None:
        """What part of the batches is done, 0 to 1; None while the total is unknown."""
        if self.status in COMPLETE_STATUSES:
            return 1.0
        if not self.batches_total:
            return None
        # An estimated total may turn out too small: a job that is still running is never shown as whole.
        return min(self.batches_done / self.batches_total, 1.0 if self.exact else 0.99)

    @property
    def over(self) -> bool:
        """Whether the job has ended."""
        return self.status in FINAL_STATUSES

    def batches_words(self) -> str:
        """Return e.g. ``"12 of ~40 batches"``; the tilde marks an estimate."""
        if self.batches_total is None:
            return f"{count(self.batches_done)} batches"
        total = max(self.batches_total, self.batches_done)
        return f"{count(self.batches_done)} of {'' if self.exact else '~'}{count(total)} batches"
