"""A job's status document as numbers, and how numbers are put in words.

The status document is the JSON that the coordinator keeps in the job directory; :class:`Progress` is what people ask
of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

__all__ = [
    "COMPLETE_STATUSES",
    "FINAL_STATUSES",
    "STATUSES",
    "Progress",
    "count",
    "duration",
    "moment",
    "parse_time",
    "rate",
    "size",
]

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

#: The statuses with which the output is whole.
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
        """Read the status document; whatever it lacks counts as not known yet."""
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
        if self.status in ("succeeded", "completed with failures"):
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


def parse_time(text: str | None) -> datetime | None:
    """Return an ISO 8601 time of the status document as an aware datetime; None for None."""
    if not text:
        return None
    time = datetime.fromisoformat(text)
    return time if time.tzinfo else time.replace(tzinfo=UTC)


def moment(text: str | None) -> str:
    """Return a time of the status document in the reader's own time zone, to the second; ``"-"`` for None."""
    time = parse_time(text)
    return "-" if time is None else time.astimezone().strftime("%Y-%m-%d %H:%M:%S")


def count(number: int) -> str:
    """Return a whole number with separators.

    Examples
    --------
    >>> count(1234567)
    '1,234,567'
    """
    return f"{number:,}"


def duration(seconds: float | None) -> str:
    """Return seconds as people say them.

    Examples
    --------
    >>> duration(0.25), duration(65), duration(7322)
    ('0.2 s', '1 min 5 s', '2 h 2 min')
    """
    if seconds is None:
        return "-"
    if seconds < 10:
        return f"{max(seconds, 0):.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    if whole < 86400:
        return f"{whole // 3600} h {whole % 3600 // 60} min"
    return f"{whole // 86400} d {whole % 86400 // 3600} h"


def rate(rows_per_second: float) -> str:
    """Return rows per second, with a decimal only where it says something.

    Examples
    --------
    >>> rate(12345.6), rate(0.25)
    ('12,346 rows/s', '0.2 rows/s')
    """
    return f"{rows_per_second:,.0f} rows/s" if rows_per_second >= 10 else f"{rows_per_second:.1f} rows/s"


def size(number: float) -> str:
    """Return bytes in binary units.

    Examples
    --------
    >>> size(512), size(1536), size(3 * 2**30)
    ('512 B', '1.5 KiB', '3.0 GiB')
    """
    if number < 1024:
        return f"{number:.0f} B"
    for unit in ("KiB", "MiB", "GiB", "TiB"):
        number /= 1024
        if number < 1024 or unit == "TiB":
            break
    return f"{number:.1f} {unit}"
