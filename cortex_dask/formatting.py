"""The parts that sentences about a user's mistakes are made of; the standard library only, so it costs nothing."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime


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


def plural(number: int, noun: str, nouns: str | None = None) -> str:
    """Return a number with its noun; ``nouns`` is for those that do not just take an s.

    Examples
    --------
    >>> plural(1, "file"), plural(1200, "file"), plural(2, "batch", "batches")
    ('1 file', '1,200 files', '2 batches')
    """
    return f"{count(number)} {noun if number == 1 else nouns or f'{noun}s'}"


def align(rows: Sequence[Sequence[str]]) -> list[list[str]]:
    """Return rows with their cells padded to the widths of the columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in rows]


def table(rows: Sequence[Sequence[str]]) -> str:
    """Return rows as lines with aligned columns."""
    return "\n".join("  ".join(cells).rstrip() for cells in align(rows))


_LONGEST = 80  # characters of a value that a message shows
_SECRET = re.compile(r"(?<=://)[^/@\s]*@")  # user and password in a URL


def nearest(name: str, known: Iterable[str]) -> str | None:
    """Return the known name that a misspelt one most likely means."""
    by_simple = {_simple(item): item for item in known}
    matches = difflib.get_close_matches(_simple(name), by_simple, n=1, cutoff=0.6)
    return by_simple[matches[0]] if matches else None


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return ``"did you mean …? "`` with the nearest known name; "" if none is near."""
    near = nearest(name, known)
    return f"did you mean {near}? " if near else ""


def shown(value: object) -> str:
    """Return a value as a message shows it: short, and without a password."""
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Mapping):
        return "a mapping"
    if isinstance(value, list | tuple | set) and len(value) > 3:
        return f"a list of {len(value)}"
    text = _SECRET.sub("…@", repr(value))
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"


def _simple(name: str) -> str:
    return name.lower().replace("-", "_")


_ERROR_LENGTH = 2_000  # characters of an exception's message that are kept


def one_line(error: BaseException) -> str:
    """Return an exception's type and message on one line."""
    try:
        message = " ".join(str(error).split())
    except Exception:  # noqa: BLE001 - a __str__ that raises hides only itself
        message = "(its message cannot be shown)"
    name = type(error).__name__
    text = f"{name}: {message}" if message else name
    return text if len(text) <= _ERROR_LENGTH else f"{text[:_ERROR_LENGTH]}…"
