"""Metrics that a handler pushes: added up in its process, sent with a split's record, merged for the job.

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

_FORBIDDEN = ("cortex_", "istio_")
_MOST_SERIES = 10_000  # different names and tags of one split; a tag with a row's id in it must not fill the memory
_COARSE = 14  # buckets that are shown as one: 1.05 to the power of 14 is about 2
_LOG_GAMMA = math.log(1.05)  # buckets grow by 5 %, so a quantile is off by 2.5 % at most

Series = dict[str, Any]
_Key = tuple[str, str, tuple[tuple[str, str], ...]]


class MetricsClient:
    """The ``metrics_client`` of a handler; its methods may be called from any thread.

    A name may not start with ``cortex_`` or ``istio_``. Tags are labels with text as values.
    """

    def __init__(self) -> None:
        self._series: dict[_Key, Series] = {}
        self._lock = threading.Lock()

    def increment(self, metric: str, value: float = 1, tags: Mapping[str, str] | None = None) -> None:
        """Add to a counter."""
        value = _number(metric, value)
        series = self._find_series("counter", metric, tags, {"value": 0})
        if series is not None:
            with self._lock:
                series["value"] += value

    def gauge(self, metric: str, value: float, tags: Mapping[str, str] | None = None) -> None:
        """Set the current value of something."""
        value = _number(metric, value)
        series = self._find_series("gauge", metric, tags, {"value": 0, "time": 0})
        if series is not None:
            with self._lock:
                series["value"], series["time"] = value, time.time()

    def histogram(self, metric: str, value: float, tags: Mapping[str, str] | None = None) -> None:
        """Add a value to a distribution."""
        empty = {"count": 0, "sum": 0, "min": math.inf, "max": -math.inf, "buckets": {}}
        value = _number(metric, value)
        series = self._find_series("histogram", metric, tags, empty)
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
        """Put collected series back, merged with what has been pushed since."""
        with self._lock:
            merged = merge([series, list(self._series.values())])
            self._series = {_key(item): item for item in merged}

    def _find_series(self, kind: str, metric: str, tags: Mapping[str, str] | None, empty: Series) -> Series | None:
        if metric.startswith(_FORBIDDEN):
            raise ValueError(f"metric {metric!r}: names that start with cortex_ or istio_ are reserved, choose another")
        labels = tuple(sorted((str(key), str(item)) for key, item in tags.items())) if tags else ()
        key = (kind, metric, labels)
        with self._lock:
            series = self._series.get(key)
            if series is None and len(self._series) < _MOST_SERIES:
                series = self._series[key] = {"metric": metric, "kind": kind, "tags": dict(labels), **empty}
        return series


class Totals:
    """The metrics of several splits: counters added up, the latest value of each gauge, distributions joined.

    It may be used from many threads.
    """

    def __init__(self, most: int | None = _MOST_SERIES) -> None:
        self._most = most
        self._series: dict[_Key, Series] = {}
        self._lock = threading.Lock()
        self.version = 0  # grows with each series that is added
        self.dropped = 0  # series that were left out because there were too many

    def add(self, series: Iterable[Series]) -> None:
        """Add what was collected."""
        with self._lock:
            for item in series:
                self._add(item)
                self.version += 1

    def series(self) -> list[Series]:
        """Return the totals, as copies."""
        with self._lock:
            return [_copy(item) for item in self._series.values()]

    def _add(self, item: Series) -> None:
        key = _key(item)
        known = self._series.get(key)
        if known is None:
            if self._most is not None and len(self._series) >= self._most:
                self.dropped += 1
                return
            self._series[key] = _copy(item)
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


def merge(collected: Iterable[Iterable[Series]]) -> list[Series]:
    """Return what several splits collected as one; see :class:`Totals`."""
    totals = Totals(most=None)
    for series in collected:
        totals.add(series)
    return totals.series()


def describe(series: Iterable[Series]) -> list[dict[str, Any]]:
    """Return series as people read them, in ``metrics.json`` and from ``job.metrics``, by name and tags.

    Every item has ``metric``, ``kind`` and ``tags``; a counter and a gauge have a ``value``, a histogram has ``count``,
    ``sum``, ``min``, ``max``, the quantiles ``p50``, ``p90`` and ``p99`` (within 2.5 %), and ``buckets``: pairs of an
    upper bound and the number of values up to it and above the bound before.
    """
    described = []
    for item in sorted(series, key=lambda item: (item["metric"], item["kind"], sorted(item["tags"].items()))):
        shown = {key: item[key] for key in ("metric", "kind", "tags")}
        if item["kind"] == "histogram":
            shown.update({key: item[key] for key in ("count", "sum", "min", "max")})
            shown.update({f"p{share}": quantile(item, share / 100) for share in (50, 90, 99)})
            shown["buckets"] = [list(pair) for pair in coarse_buckets(item)]
        else:
            shown["value"] = item["value"]
        described.append(shown)
    return described


def coarse_buckets(histogram: Series) -> list[tuple[float, int]]:
    """Return a distribution in buckets about as wide as they are high: pairs of an upper bound and a count, ascending.

    Bounds are the same for all distributions, so that they can be added up.
    """
    counts: dict[float, int] = {}
    for bucket, count in histogram["buckets"].items():
        if bucket == "0":
            bound = 0.0
        elif bucket[0] == "+":
            bound = math.exp(math.ceil(int(bucket[1:]) / _COARSE) * _COARSE * _LOG_GAMMA)
        else:  # values from -gamma^n up to, but not including, -gamma^(n-1)
            bound = -math.exp((int(bucket[1:]) - 1) // _COARSE * _COARSE * _LOG_GAMMA)
        counts[bound] = counts.get(bound, 0) + count
    return sorted(counts.items())


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


def _copy(series: Series) -> Series:
    return {**series, "buckets": dict(series["buckets"])} if "buckets" in series else dict(series)


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
