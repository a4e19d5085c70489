"""The log of a job, which its processes write as chunks of JSON lines: read, filtered, followed."""

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
from cortex_dask.io.store.store import Store

if TYPE_CHECKING:
    import pandas as pd

LogLine = dict[str, Any]

#: Levels from the least to the most important; a filter keeps its level and those after it.
LEVELS = ("debug", "info", "warning", "error", "critical")

_CONCURRENT_READS = 16  # hides the latency of object stores
_POLL_SECONDS = 1.0  # processes write chunks every few seconds at most
_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days"}
#: Keys with a place of their own in text and tables; handlers gave the others as ``extra``.
_KNOWN = frozenset({"asctime", "levelname", "message", "process", "batch_id", "labels"})
_TRACEBACKS = ("exc_info", "stack_info")


@dataclass(frozen=True, slots=True)
class LogFilter:
    """Matches the lines that meet every given condition."""

    level: str | None = None  # the least important one of LEVELS
    batch: str | None = None  # a batch id, or the beginning of one
    worker: str | None = None  # a worker's id, or the beginning of one
    since: datetime | None = None  # no older lines

    def __post_init__(self) -> None:
        if self.level is not None and self.level.lower() not in LEVELS:
            raise SpecError(f"level: found {self.level!r}; allowed are {', '.join(LEVELS)}")

    def matches(self, line: LogLine) -> bool:
        """Tell whether a line meets every condition."""
        if self.level is not None and _rank(line) < LEVELS.index(self.level.lower()):
            return False
        if self.batch is not None and not str(line.get("batch_id") or "").startswith(self.batch):
            return False
        if self.worker is not None and not _worker(line).startswith(self.worker):
            return False
        return self.since is None or _time(line) >= self.since


class JobLogs:
    """The log of one job."""

    def __init__(self, store: Store) -> None:
        self._store = store  # of the job directory

    def lines(self, where: LogFilter | None = None) -> list[LogLine]:
        """Return the present lines in order of time."""
        return self._read(self._chunks(), where or LogFilter())

    def follow(
        self,
        where: LogFilter | None = None,
        *,
        has_ended: Callable[[], bool],
        pause: Callable[[float], object] = time.sleep,
    ) -> Iterator[LogLine]:
        """Yield the present lines, and new ones until the job has ended."""
        seen: set[str] = set()
        while True:
            last = has_ended()  # before the chunks are listed, so that those written before the end are among them
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
        with ThreadPoolExecutor(min(_CONCURRENT_READS, len(chunks))) as pool:
            found = [line for lines in pool.map(lambda name: self._read_chunk(name, where), chunks) for line in lines]
        # The sort is stable: lines of one process with the same millisecond stay in the order in which it wrote them.
        return sorted(found, key=lambda line: str(line.get("asctime", "")))

    def _read_chunk(self, chunk: str, where: LogFilter) -> list[LogLine]:
        lines = (_decode(line) for line in self._store.read(chunk).splitlines() if line)
        return [line for line in lines if where.matches(line)]


def parse_since(value: str | float | timedelta | datetime | None, *, now: datetime | None = None) -> datetime | None:
    """Return the time of a span before now (seconds, ``"10m"``, ``"2h"``) or of an ISO 8601 text, local by default."""
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
    """Return a line as text: time, level, worker, batch, message, other keys; a traceback follows on its own lines."""
    words = [str(line.get("asctime", "-")), f"{line.get('levelname', '-'):<7}"]
    if _worker(line):
        words.append(f"[{_worker(line)}]")
    if line.get("batch_id"):
        words.append(f"[{line['batch_id']}]")
    words.append(str(line.get("message", "")))
    words += [
        f"{key}={_to_words(value)}" for key, value in line.items() if key not in _KNOWN and key not in _TRACEBACKS
    ]
    return "\n".join([" ".join(words), *(_to_words(line[key]) for key in _TRACEBACKS if line.get(key))])


def to_frame(lines: Iterable[LogLine]) -> pd.DataFrame:
    """Return lines as a table, with a column for each key that a handler gave as ``extra``."""
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
    # A line that is not JSON may be what explains a failure, so it is kept as it is.
    return {"asctime": "", "levelname": "INFO", "message": data.decode(errors="replace")}


def _rank(line: LogLine) -> int:
    name = str(line.get("levelname", "info")).lower()
    return LEVELS.index(name) if name in LEVELS else LEVELS.index("info")


def _worker(line: LogLine) -> str:
    labels = line.get("labels")
    return str(labels.get("workerID") or "") if isinstance(labels, dict) else ""


def _time(line: LogLine) -> datetime:
    """Return when a line was written, in UTC."""
    try:
        return datetime.strptime(str(line.get("asctime")), "%Y-%m-%d %H:%M:%S,%f").replace(tzinfo=UTC)
    except ValueError:
        return datetime.fromtimestamp(0, UTC)


def _to_words(value: Any) -> str:
    return (
        value if isinstance(value, str) else orjson.dumps(value, default=str, option=orjson.OPT_NON_STR_KEYS).decode()
    )
