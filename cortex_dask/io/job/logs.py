"""A job's log: reading, filtering and following the chunks of JSON lines that its processes leave behind."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import orjson

from cortex_dask.errors import SpecError

if TYPE_CHECKING:
    import pandas as pd

    from cortex_dask.io.store.store import Store

LogLine = dict[str, Any]

#: Levels from the least to the most important; a filter keeps its level and those after it.
LEVELS = ("debug", "info", "warning", "error", "critical")

_READERS = 16  # concurrent reads of chunks: hides the latency of object stores
_POLL_SECONDS = 1.0  # chunks come at most every few seconds: asking more often shows nothing earlier
_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days"}
#: Keys with a place of their own in text and tables; the others are what the handler gave as ``extra``.
_KNOWN = frozenset({"asctime", "levelname", "message", "process", "batch_id", "labels"})
_TRACEBACKS = ("exc_info", "stack_info")


@dataclass(frozen=True, slots=True)
class LogFilter:
    """Which lines are wanted; every condition that is given has to hold.

    Attributes
    ----------
    level : str or None
        The least important level, one of :data:`LEVELS`.
    batch : str or None
        A batch id, or the beginning of one.
    worker : str or None
        A worker's id, or the beginning of one.
    since : datetime or None
        Nothing older.
    """

    level: str | None = None
    batch: str | None = None
    worker: str | None = None
    since: datetime | None = None

    def __post_init__(self) -> None:
        if self.level is not None and self.level.lower() not in LEVELS:
            raise SpecError(f"level: found {self.level!r}; allowed are {', '.join(LEVELS)}")

    def __call__(self, line: LogLine) -> bool:
        """Whether a line is wanted."""
        if self.level is not None and _rank(line) < LEVELS.index(self.level.lower()):
            return False
        if self.batch is not None and not str(line.get("batch_id") or "").startswith(self.batch):
            return False
        if self.worker is not None and not _worker(line).startswith(self.worker):
            return False
        return self.since is None or _time(line) >= self.since


class JobLogs:
    """The log of one job.

    Parameters
    ----------
    store : Store
        The job directory.
    """

    def __init__(self, store: Store) -> None:
        self._store = store

    def lines(self, where: LogFilter | None = None) -> list[LogLine]:
        """Return the lines that are there now, in order of time."""
        return self._read(self._chunks(), where or LogFilter())

    def follow(
        self,
        where: LogFilter | None = None,
        *,
        over: Callable[[], bool],
        pause: Callable[[float], object] = time.sleep,
    ) -> Iterator[LogLine]:
        """Yield the lines that are there, and then those that come, until the job is over.

        Parameters
        ----------
        where : LogFilter, optional
            Which lines are wanted.
        over : callable
            Whether the job has ended; what it wrote until then is still yielded.
        pause : callable
            Called with seconds to wait before the next look.
        """
        seen: set[str] = set()
        while True:
            last = over()  # asked before the look: what was written before the end is found by this look
            chunks = [name for name in self._chunks() if name not in seen]
            seen.update(chunks)
            yield from self._read(chunks, where or LogFilter())
            if last:
                return
            pause(_POLL_SECONDS)

    def _chunks(self) -> list[str]:
        return [name for name in self._store.names("logs") if name.endswith(".jsonl")]

    def _read(self, chunks: list[str], where: LogFilter) -> list[LogLine]:
        if not chunks:
            return []
        with ThreadPoolExecutor(min(_READERS, len(chunks))) as pool:
            found = [line for lines in pool.map(lambda name: self._wanted(name, where), chunks) for line in lines]
        # The sort is stable: lines of one process with the same millisecond stay in the order in which it wrote them.
        return sorted(found, key=lambda line: str(line.get("asctime", "")))

    def _wanted(self, chunk: str, where: LogFilter) -> list[LogLine]:
        lines = (_decode(line) for line in self._store.read(chunk).splitlines() if line)
        return [line for line in lines if where(line)]


def parse_since(value: str | float | timedelta | datetime | None, *, now: datetime | None = None) -> datetime | None:
    """Return the moment that a user means.

    Parameters
    ----------
    value : str, float, timedelta, datetime or None
        ``"10m"``, ``"90s"``, ``"2h"``, ``"1d"`` or a number of seconds before now; or an ISO 8601 time, in the local
        time zone when it names none.
    now : datetime, optional
        What "before now" starts from.

    Raises
    ------
    SpecError
        If the text is neither.
    """
    if value is None:
        return None
    now = now or datetime.now(UTC)
    if isinstance(value, datetime):
        return value.astimezone(UTC)
    if isinstance(value, int | float):
        return now - timedelta(seconds=value)
    if isinstance(value, timedelta):
        return now - value
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smhd]?)", value.strip())
    if match:
        return now - timedelta(**{_UNITS[match[2] or "s"]: float(match[1])})
    try:
        return datetime.fromisoformat(value).astimezone(UTC)
    except ValueError:
        raise SpecError(
            f"since: found {value!r}; allowed is a time span such as 90s, 10m, 2h or 1d, "
            "or a time such as 2026-01-31T12:00:00"
        ) from None


def to_text(line: LogLine) -> str:
    """Return a line for people: time, level, worker, batch, message, what else was given; a traceback stands below."""
    words = [str(line.get("asctime", "-")), f"{line.get('levelname', '-'):<7}"]
    if _worker(line):
        words.append(f"[{_worker(line)}]")
    if line.get("batch_id"):
        words.append(f"[{line['batch_id']}]")
    words.append(str(line.get("message", "")))
    words += [f"{key}={_plain(value)}" for key, value in line.items() if key not in _KNOWN and key not in _TRACEBACKS]
    return "\n".join([" ".join(words), *(_plain(line[key]) for key in _TRACEBACKS if line.get(key))])


def to_frame(lines: Iterable[LogLine]) -> pd.DataFrame:
    """Return lines as a table: time, level, worker, batch_id, message, process, and one column per ``extra`` key."""
    import pandas as pd

    rows = [
        {
            "time": _time(line),
            "level": str(line.get("levelname", "")).lower(),
            "worker": _worker(line) or None,
            "batch_id": line.get("batch_id"),
            "message": line.get("message"),
            "process": line.get("process"),
            **{key: value for key, value in line.items() if key not in _KNOWN},
        }
        for line in lines
    ]
    columns = ["time", "level", "worker", "batch_id", "message", "process"]
    frame = pd.DataFrame(rows, columns=None if rows else columns)
    frame["time"] = pd.to_datetime(frame["time"], utc=True)
    return frame


def _decode(data: bytes) -> LogLine:
    try:
        line = orjson.loads(data)
    except orjson.JSONDecodeError:
        line = None
    if isinstance(line, dict):
        return line
    # A log is read when something went wrong: a line that is not JSON is shown as it is, never dropped.
    return {"asctime": "", "levelname": "INFO", "message": data.decode(errors="replace")}


def _rank(line: LogLine) -> int:
    name = str(line.get("levelname", "info")).lower()
    return LEVELS.index(name) if name in LEVELS else LEVELS.index("info")


def _worker(line: LogLine) -> str:
    labels = line.get("labels")
    return str(labels.get("workerID") or "") if isinstance(labels, dict) else ""


def _time(line: LogLine) -> datetime:
    """Return when a line was written; log lines carry UTC, as everything in the job directory does."""
    try:
        return datetime.strptime(str(line.get("asctime")), "%Y-%m-%d %H:%M:%S,%f").replace(tzinfo=UTC)
    except ValueError:
        return datetime.fromtimestamp(0, UTC)


def _plain(value: Any) -> str:
    return (
        value if isinstance(value, str) else orjson.dumps(value, default=str, option=orjson.OPT_NON_STR_KEYS).decode()
    )
