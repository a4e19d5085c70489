"""Metrics that a handler pushes: added up in its process, handed on with a split's record, merged for the job.

    class Handler:
        def __init__(self, config, metrics_client):
            self.metrics = metrics_client

        def handle_batch(self, payload, batch_id):
            self.metrics.increment("rows_seen", len(payload), tags={"kind": "image"})

Because they travel with the record that commits a split, they count each batch once, whatever was tried in between.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterable, Mapping
from numbers import Integral
from typing import Any

__all__ = ["MetricsClient", "merge", "quantile"]

_FORBIDDEN = ("cortex_", "istio_")
_MOST_SERIES = 10_000  # different names and tags of one split; a tag with a row's id in it must not fill the memory
_LOG_GAMMA = math.log(1.05)  # buckets grow by 5 %, so a quantile is off by 2.5 % at most

Series = dict[str, Any]
_Key = tuple[str, str, tuple[tuple[str, str], ...]]


class MetricsClient:
    """What a handler that declares ``metrics_client`` gets; its methods may be called from any thread.

    A name may not start with ``cortex_`` or ``istio_``. Tags are labels with text as values.
    """

    def __init__(self) -> None:
        self._series: dict[_Key, Series] = {}
        self._lock = threading.Lock()

    def increment(self, metric: str, value: float = 1, tags: Mapping[str, str] | None = None) -> None:
        """Add to a counter."""
        value = _number(metric, value)
        series = self._of("counter", metric, tags, {"value": 0})
        if series is not None:
            with self._lock:
                series["value"] += value

    def gauge(self, metric: str, value: float, tags: Mapping[str, str] | None = None) -> None:
        """Set the current value of something."""
        value = _number(metric, value)
        series = self._of("gauge", metric, tags, {"value": 0, "time": 0})
        if series is not None:
            with self._lock:
                series["value"], series["time"] = value, time.time()

    def histogram(self, metric: str, value: float, tags: Mapping[str, str] | None = None) -> None:
        """Add a value to a distribution."""
        empty = {"count": 0, "sum": 0, "min": math.inf, "max": -math.inf, "buckets": {}}
        value = _number(metric, value)
        series = self._of("histogram", metric, tags, empty)
        if series is not None:
            with self._lock:
                series["count"] += 1
                series["sum"] += value
                series["min"], series["max"] = min(series["min"], value), max(series["max"], value)
                bucket = _bucket(value)
                series["buckets"][bucket] = series["buckets"].get(bucket, 0) + 1

    def collect(self) -> list[Series]:
        """Return what was pushed since the last call, as plain JSON values."""
        with self._lock:
            series, self._series = list(self._series.values()), {}
        return series

    def restore(self, series: list[Series]) -> None:
        """Put back what :meth:`collect` returned, beside what has been pushed since."""
        with self._lock:
            merged = merge([series, list(self._series.values())])
            self._series = {_key(item): item for item in merged}

    def _of(self, kind: str, metric: str, tags: Mapping[str, str] | None, empty: Series) -> Series | None:
        if metric.startswith(_FORBIDDEN):
            raise ValueError(f"metric {metric!r}: names that start with cortex_ or istio_ are reserved, choose another")
        labels = tuple(sorted((str(key), str(item)) for key, item in tags.items())) if tags else ()
        key = (kind, metric, labels)
        with self._lock:
            series = self._series.get(key)
            if series is None and len(self._series) < _MOST_SERIES:
                series = self._series[key] = {"metric": metric, "kind": kind, "tags": dict(labels), **empty}
        return series


def merge(collected: Iterable[Iterable[Series]]) -> list[Series]:
    """Add up what several splits collected: counters are summed, the latest gauge stands, distributions are joined."""
    merged: dict[_Key, Series] = {}
    for series in collected:
        for item in series:
            key = _key(item)
            known = merged.get(key)
            if known is None:
                merged[key] = {**item, "buckets": dict(item["buckets"])} if "buckets" in item else dict(item)
            elif item["kind"] == "counter":
                known["value"] += item["value"]
            elif item["kind"] == "gauge":
                if item["time"] >= known["time"]:
                    known["value"], known["time"] = item["value"], item["time"]
            else:
                known["count"] += item["count"]
                known["sum"] += item["sum"]
                known["min"], known["max"] = min(known["min"], item["min"]), max(known["max"], item["max"])
                for bucket, count in item["buckets"].items():
                    known["buckets"][bucket] = known["buckets"].get(bucket, 0) + count
    return list(merged.values())


def quantile(histogram: Series, share: float) -> float:
    """Return the value below which a share of a distribution lies, within 2.5 %.

    Examples
    --------
    >>> client = MetricsClient()
    >>> for value in range(1, 101):
    ...     client.histogram("seconds", value)
    >>> round(quantile(client.collect()[0], 0.5) / 50, 1)
    1.0
    """
    wanted = share * histogram["count"]
    seen = 0
    ordered = sorted((_middle(bucket), count) for bucket, count in histogram["buckets"].items())
    for value, count in ordered:
        seen += count
        if seen >= wanted:
            return float(min(max(value, histogram["min"]), histogram["max"]))
    return float(histogram["max"])


def _number(metric: str, value: float) -> float:
    """Return a plain number, also for one of numpy."""
    if not math.isfinite(value):
        raise ValueError(f"metric {metric!r}: its value is {value!r}; a finite number is needed")
    return int(value) if isinstance(value, Integral) else float(value)


def _key(series: Series) -> _Key:
    return series["kind"], series["metric"], tuple(sorted(series["tags"].items()))


def _bucket(value: float) -> str:
    if value == 0:
        return "0"
    return f"{'-' if value < 0 else '+'}{math.ceil(math.log(abs(value)) / _LOG_GAMMA)}"


def _middle(bucket: str) -> float:
    if bucket == "0":
        return 0.0
    # between gamma^(n-1) and gamma^n, where the error relative to both ends is the same
    size = 2 * math.exp(int(bucket[1:]) * _LOG_GAMMA) / (1 + math.exp(_LOG_GAMMA))
    return -size if bucket[0] == "-" else size
