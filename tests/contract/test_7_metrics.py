"""Contract 7, metrics: counters, gauges and histograms with tags, in ``metrics.json`` and at a worker's HTTP server."""

from __future__ import annotations

import contextlib
import json
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dask.config
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import cortex_dask as cx
from cortex_dask.display import SilentDisplay
from cortex_dask.job import Job
from cortex_dask.runtime.metrics import MetricsClient
from cortex_dask.runtime.worker.prometheus import PREFIX, Exposition

BATCHES, SIZE = 8, 10

HANDLER = """\
from pathlib import Path


class Handler:
    def __init__(self, config, metrics_client):
        self.config = config
        self.metrics = metrics_client
        self.metrics.increment("loaded")

    def handle_batch(self, payload, batch_id):
        first = int(payload["id"].iloc[0])
        self.metrics.increment("rows", len(payload), tags={"half": "low" if first < 40 else "high"})
        self.metrics.increment("batches")
        self.metrics.gauge("last first", first)
        for number in payload["id"]:
            self.metrics.histogram("size", int(number), tags={"job_id": "mine"})
        for name in self.config.get("names", ()):
            self.metrics.increment(name)
        if first in self.config.get("fail", ()) and not Path(self.config["cured"]).exists():
            raise ValueError("no luck")

    def on_job_complete(self):
        self.metrics.increment("completed")
"""


@pytest.fixture
def folder(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    (tmp_path / "project").mkdir()
    (tmp_path / "project/handler.py").write_text(HANDLER)
    api = "- name: digits\n  kind: BatchAPI\n  handler: {type: python, path: handler.py}\n"
    (tmp_path / "project/cortex.yaml").write_text(api)
    pq.write_table(pa.table({"id": range(BATCHES * SIZE)}), tmp_path / "in.parquet", row_group_size=SIZE)
    cache = str(tmp_path_factory.getbasetemp() / "cache")
    monkeypatch.setenv("DASK_CORTEX_DASK__STORE", str(tmp_path / "store"))
    monkeypatch.setenv("DASK_CORTEX_DASK__CACHE", cache)
    with dask.config.set({"cortex-dask.store": str(tmp_path / "store"), "cortex-dask.cache": cache}):
        yield tmp_path


def run(folder: Path, **options: Any) -> Job:
    config = {"cured": str(folder / "cured"), **options.pop("config", {})}
    given = {"batch_size": SIZE, "workers": 2, "job_id": "job-1", **options, "config": config}
    job = cx.submit(folder / "project", folder / "in.parquet", **given)
    with contextlib.suppress(cx.CortexDaskError):  # its status tells
        job.watch(SilentDisplay(), 60)
    return job


def by_name(metrics: list[dict[str, Any]]) -> dict[tuple[str, ...], dict[str, Any]]:
    return {(item["metric"], *item["tags"].values()): item for item in metrics}


@pytest.mark.parametrize("cluster", ["local", "inline"])
def test_what_all_workers_push_adds_up_in_the_job(folder: Path, cluster: str) -> None:
    job = run(folder, cluster=cluster)
    assert job.status == "succeeded"
    found = by_name(job.metrics)
    assert found["rows", "low"] == {"metric": "rows", "kind": "counter", "tags": {"half": "low"}, "value": 40}
    assert found["rows", "high"]["value"] == 40
    assert (found["batches",]["value"], found["completed",]["value"]) == (BATCHES, 1)
    assert found["loaded",]["value"] == (1 if cluster == "inline" else pytest.approx(1.5, abs=0.5))  # 1 or 2 workers
    assert found["last first",]["kind"] == "gauge"
    assert found["last first",]["value"] in range(0, 80, 10)
    size = found["size", "mine"]
    ids = list(range(80))
    assert {key: size[key] for key in ("kind", "count", "sum", "min", "max")} == {
        "kind": "histogram",
        "count": 80,
        "sum": sum(ids),
        "min": 0,
        "max": 79,
    }
    assert size["p50"] == pytest.approx(39, rel=0.03)
    low = float("-inf")
    for bound, count in size["buckets"]:
        assert count == sum(low < number <= bound for number in ids)
        low = bound
    assert sum(count for _, count in size["buckets"]) == 80
    document = json.loads((folder / "store/jobs/digits/job-1/metrics.json").read_text())
    assert (document["metrics"], document["job_id"], document["dropped"]) == (job.metrics, "job-1", 0)


def test_a_retry_adds_to_the_metrics_and_resuming_does_not(folder: Path) -> None:
    job = run(folder, config={"fail": [20]}, max_attempts=1)
    assert job.status == "completed with failures"
    before = by_name(job.metrics)
    (folder / "cured").touch()
    job.retry_failed().wait(60)
    after = by_name(job.metrics)
    assert after["batches",]["value"] == before["batches",]["value"] + 1 == BATCHES + 1
    assert after["completed",]["value"] == 1
    job.resume().wait(60)
    assert by_name(job.metrics) == after


def test_a_job_without_metrics_has_none(folder: Path) -> None:
    handler = folder / "project/handler.py"
    handler.write_text(
        "class Handler:\n    def __init__(self, config): ...\n    def handle_batch(self, payload): ...\n"
    )
    assert run(folder).metrics == []


@pytest.mark.parametrize("name", ["cortex_requests", "istio_requests"])
def test_reserved_names_are_refused(folder: Path, name: str) -> None:
    job = run(folder, config={"names": [name]}, max_attempts=1)
    assert job.status == "completed with failures"
    assert set(job.failures()["error"]) == {
        f"ValueError: metric '{name}': names that start with cortex_ or istio_ are reserved, choose another"
    }


def test_a_store_that_does_not_take_the_metrics_does_not_fail_the_job(folder: Path) -> None:
    (folder / "store/jobs/digits/job-1/metrics.json").mkdir(parents=True)  # a directory in the file's place
    job = run(folder)
    assert job.status == "succeeded"


def test_a_dask_worker_shows_them_to_prometheus(folder: Path) -> None:
    from distributed import LocalCluster

    with LocalCluster(
        n_workers=1,
        threads_per_worker=2,
        processes=False,
        protocol="tcp://",
        host="127.0.0.1",
        dashboard_address="127.0.0.1:0",
        worker_dashboard_address="127.0.0.1:0",
    ) as cluster:
        job = run(folder, cluster=cluster.scheduler_address, job_id="job-prometheus")
        assert job.status == "succeeded", job.describe()
        (worker,) = cluster.workers.values()
        with urllib.request.urlopen(f"http://127.0.0.1:{worker.http_server.port}/metrics", timeout=30) as answer:
            text = answer.read().decode()
    from prometheus_client.parser import text_string_to_metric_families

    values = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = dict(sample.labels)
            if labels.pop("job_id", None) == "job-prometheus":
                assert labels.pop("api_name") == "digits"
                values[sample.name.removeprefix(PREFIX), *labels.values()] = sample.value
    assert values["batches_total",] == BATCHES
    assert values["rows_total", "low"] == 40
    assert values["completed_total",] == 1
    assert values["size_count", "mine"] == 80
    assert values["size_bucket", "+Inf", "mine"] == 80
    assert values["last_first",] in range(0, 80, 10)
    assert f"# TYPE {PREFIX}rows_total counter" in text
    assert f"# TYPE {PREFIX}size histogram" in text
    assert "dask_worker_tasks" in text  # Dask's own are still there


class TestExposition:
    class Clock:
        now = 0.0

        def __call__(self) -> float:
            return self.now

    def pushed(self, *, names: tuple[str, ...] = ("n",), tags: dict[str, str] | None = None) -> list[dict[str, Any]]:
        client = MetricsClient()
        for name in names:
            client.increment(name, tags=tags)
        return client.collect()

    def samples(self, exposition: Exposition) -> dict[str, float]:
        return {
            f"{sample.name} {sorted(sample.labels.values())}": sample.value
            for family in exposition.collect()
            for sample in family.samples
        }

    def test_names_are_made_fit_and_what_is_the_same_then_is_added_up(self) -> None:
        exposition = Exposition()
        tags = {"le": "1", "__x": "2", "api-name": "3", "1": "4"}
        exposition.add("a", "j", self.pushed(names=("a.b", "a-b", "a_b_total"), tags=tags))
        assert self.samples(exposition) == {f"{PREFIX}a_b_total ['1', '2', '3', '4', 'a', 'j']": 3}
        (family,) = exposition.collect()
        assert set(family.samples[0].labels) == {"api_name", "job_id", "tag_le", "tag___x", "tag_api_name", "tag_1"}

    def test_one_name_for_two_kinds(self) -> None:
        client = MetricsClient()
        client.increment("n")
        client.gauge("n", 7)
        client.histogram("n", 5)
        exposition = Exposition()
        exposition.add("a", "j", client.collect())
        families = {family.name: family.type for family in exposition.collect()}
        assert families == {f"{PREFIX}n": "counter", f"{PREFIX}n_gauge": "gauge", f"{PREFIX}n_histogram": "histogram"}

    def test_jobs_are_kept_apart_and_forgotten_when_they_push_no_more(self) -> None:
        clock = self.Clock()
        exposition = Exposition(clock)
        exposition.add("a", "j1", self.pushed())
        clock.now = 3000
        exposition.add("a", "j2", self.pushed())
        assert len(self.samples(exposition)) == 2
        clock.now = 4000
        assert self.samples(exposition) == {f"{PREFIX}n_total ['a', 'j2']": 1}

    def test_buckets_are_cumulative_and_ascending_also_below_zero(self) -> None:
        client = MetricsClient()
        values = (-100, -2, -1, -0.5, 0, 0.5, 1, 2, 2.1, 1000)
        for value in values:
            client.histogram("v", value)
        exposition = Exposition()
        exposition.add("a", "j", client.collect())
        (family,) = exposition.collect()
        buckets = [(float(s.labels["le"]), s.value) for s in family.samples if s.name.endswith("_bucket")]
        assert buckets == sorted(buckets)
        for bound, count in buckets:
            assert count == sum(value <= bound for value in values), bound
