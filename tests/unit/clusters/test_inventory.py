"""Clusters that run for jobs, and which of them are needed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import orjson
import pytest

from cortex_dask.clusters import inventory, records
from cortex_dask.clusters.inventory import Backend
from cortex_dask.clusters.records import ClusterRecord, RunningCluster
from cortex_dask.environments import Environment
from cortex_dask.errors import ClusterError
from cortex_dask.io.job.directory import JobDirectory
from cortex_dask.io.job.settings import HandlerSettings, JobSettings
from cortex_dask.io.job.splits import DatasetInput


class Clusters:
    """A backend that runs the clusters that it is told to run."""

    def __init__(self) -> None:
        self.running: list[RunningCluster] = []
        self.ended: list[str] = []

    def list_running(self, options: Mapping[str, Any], recorded: Sequence[ClusterRecord]) -> list[RunningCluster]:
        return self.running

    def close(self, cluster: RunningCluster, options: Mapping[str, Any]) -> None:
        self.ended.append(cluster.name)


@pytest.fixture
def environment(tmp_path: Path) -> Environment:
    return Environment("test", store=str(tmp_path / "store"))


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> Clusters:
    clusters = Clusters()
    monkeypatch.setitem(inventory.BACKENDS, "kubernetes", Backend(clusters.list_running, clusters.close))
    return clusters


def make_job(environment: Environment, job_id: str, status: str | None) -> JobDirectory:
    job = JobDirectory(f"{environment.store}/jobs/api/{job_id}")
    job.create(
        JobSettings(
            job_id, "api", "1", "2026-01-01T12:00:00.000+00:00", HandlerSettings("class"), DatasetInput(("in",))
        )
    )
    if status is not None:
        job.write_json("status.json", {"status": status})
    return job


def start(backend: Clusters, job: JobDirectory, name: str, *, is_detached: bool = False) -> ClusterRecord:
    record = records.write(job.url, "kubernetes", name, "batch", is_detached=is_detached)
    backend.running.append(RunningCluster("kubernetes", name, "batch"))
    return record


def test_a_cluster_is_needed_while_its_job_runs_or_its_coordinator_is_expected(
    environment: Environment, backend: Clusters
) -> None:
    for name, status, is_detached in (
        ("done", "succeeded", False),
        ("killed", "running", False),
        ("coming", None, True),
        ("left", None, False),
    ):
        start(backend, make_job(environment, name, status), name, is_detached=is_detached)

    found, problems = inventory.find_clusters(environment)

    assert problems == []
    assert {cluster.name: (cluster.status, cluster.is_needed) for cluster in found} == {
        "done": ("succeeded", False),
        "killed": ("running, without a coordinator", False),
        "coming": ("enqueuing", True),
        "left": ("enqueuing, without a coordinator", False),
    }
    assert {cluster.job_id for cluster in found} == {"done", "killed", "coming", "left"}


def test_a_cluster_of_another_environment_is_left_alone(environment: Environment, backend: Clusters) -> None:
    start(backend, make_job(environment, "own", "succeeded"), "own")
    backend.running.append(RunningCluster("kubernetes", "other", "batch", job_url="/elsewhere/jobs/api/other"))

    found, _ = inventory.find_clusters(environment)

    assert {cluster.name: cluster.is_needed for cluster in found} == {"own": False, "other": True}


def test_the_record_of_a_cluster_that_is_gone_is_deleted_when_it_is_old(
    environment: Environment, backend: Clusters
) -> None:
    young, old = (make_job(environment, name, "succeeded") for name in ("young", "old"))
    records.write(young.url, "kubernetes", "young", "batch")
    record = records.write(old.url, "kubernetes", "old", "batch")
    aged = orjson.dumps({**orjson.loads(old.store.read("cluster.json")), "created_time": record.created_time - 700})
    old.store.write("cluster.json", aged)
    Path(environment.store, "clusters", "kubernetes-old.json").write_bytes(aged)

    inventory.find_clusters(environment)

    assert records.find(young.url) is not None
    assert records.find(old.url) is None


def test_a_backend_that_does_not_answer_is_a_problem_and_no_error(
    environment: Environment, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(options: Mapping[str, Any], recorded: Sequence[ClusterRecord]) -> list[RunningCluster]:
        raise ClusterError("the API server does not answer")

    monkeypatch.setitem(inventory.BACKENDS, "kubernetes", Backend(fail, Clusters().close))
    records.write(make_job(environment, "one", "running").url, "kubernetes", "c-1", "batch")

    assert inventory.find_clusters(environment) == ([], ["the API server does not answer"])


def test_the_record_of_a_cluster_goes_with_it(environment: Environment, backend: Clusters) -> None:
    job = make_job(environment, "one", "succeeded")
    start(backend, job, "c-1")
    found, _ = inventory.find_clusters(environment)

    assert inventory.end_clusters(environment, found) == found

    assert backend.ended == ["c-1"]
    assert records.find(job.url) is None
