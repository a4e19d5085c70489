"""Handler metrics at the Dask worker's ``/metrics``, for Prometheus, where ``prometheus_client`` is installed.

A counter ``rows_seen`` appears as ``cortex_dask_handler_rows_seen_total``, with the labels ``api_name`` and ``job_id``
and one for each tag. It grows when a split ends on this worker; the totals of the job are in its ``metrics.json``.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from cortex_dask.runtime.metrics import Series, Totals, coarse_buckets

if TYPE_CHECKING:
    from prometheus_client import Metric

    from cortex_dask.io.job.settings import JobSettings

PREFIX = "cortex_dask_handler_"
#: Seconds after which a job that pushes nothing any more is no longer shown: many times any interval of scraping.
_IDLE = 3600.0
_OWN_LABELS = ("api_name", "job_id")

_lock = threading.Lock()
_exposition: Exposition | None = None


def expose(settings: JobSettings, series: Sequence[Series]) -> None:
    """Add the metrics of a handler process to the worker's; does nothing without ``prometheus_client``."""
    global _exposition
    if not series:
        return
    with _lock:
        if _exposition is None:
            try:
                from prometheus_client import REGISTRY
            except ImportError:
                return
            _exposition = Exposition()
            REGISTRY.register(_exposition)
    _exposition.add(settings.api_name, settings.job_id, series)


class Exposition:
    """A collector of ``prometheus_client``: the totals of each job that this process has worked on."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._jobs: dict[tuple[str, str], tuple[Totals, float]] = {}

    def add(self, api_name: str, job_id: str, series: Sequence[Series]) -> None:
        """Add the series of a job."""
        with self._lock:
            totals, _ = self._jobs.get((api_name, job_id), (Totals(), 0.0))
            self._jobs[api_name, job_id] = totals, self._clock()
        totals.add(map(_renamed, series))

    def describe(self) -> list[Metric]:
        """Return nothing, as the metrics are not known when the collector is registered."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Yield the current metrics, at a request for ``/metrics``."""
        from prometheus_client import Metric

        families: dict[str, Metric] = {}
        for (api_name, job_id), totals in self._shown():
            for item in totals.series():
                name = PREFIX + item["metric"]
                if name in families and families[name].type != item["kind"]:
                    name = f"{name}_{item['kind']}"  # the same name, pushed as two kinds
                family = families.setdefault(name, Metric(name, "Pushed by handlers.", item["kind"]))
                _add_samples(family, item, {"api_name": api_name, "job_id": job_id, **item["tags"]})
        yield from families.values()

    def _shown(self) -> list[tuple[tuple[str, str], Totals]]:
        with self._lock:
            now = self._clock()
            self._jobs = {key: value for key, value in self._jobs.items() if now - value[1] <= _IDLE}
            return [(key, totals) for key, (totals, _) in self._jobs.items()]


def _add_samples(family: Metric, item: Series, labels: dict[str, str]) -> None:
    if item["kind"] == "counter":
        family.add_sample(f"{family.name}_total", labels, item["value"])
    elif item["kind"] == "gauge":
        family.add_sample(family.name, labels, item["value"])
    else:
        count = 0
        for bound, within in coarse_buckets(item):
            count += within
            family.add_sample(f"{family.name}_bucket", {**labels, "le": repr(bound)}, count)
        family.add_sample(f"{family.name}_bucket", {**labels, "le": "+Inf"}, item["count"])
        family.add_sample(f"{family.name}_count", labels, item["count"])
        family.add_sample(f"{family.name}_sum", labels, item["sum"])


def _renamed(item: Series) -> dict[str, Any]:
    """Return a series under names that Prometheus allows."""
    name = re.sub(r"[^a-zA-Z0-9_:]", "_", item["metric"])
    if item["kind"] == "counter":
        name = name.removesuffix("_total")
    return {**item, "metric": name, "tags": {_label(tag): value for tag, value in item["tags"].items()}}


def _label(tag: str) -> str:
    label = re.sub(r"[^a-zA-Z0-9_]", "_", tag)
    reserved = label in (*_OWN_LABELS, "le") or label.startswith("__")
    return f"tag_{label}" if reserved or not label or label[0].isdigit() else label
