"""A namespace of its own for each process of the test run, and jobs in it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.clusters.jobs import ClusterJob, make_job
from tests.clusters.kubernetes import KubernetesBackend
from tests.conftest import follow_environment
from tests.kubernetes.namespace import Namespace


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.kubernetes)
            item.add_marker(pytest.mark.timeout(900))


@pytest.fixture(scope="session")
def shared_kubernetes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[KubernetesBackend]:
    made = KubernetesBackend(tmp_path_factory.mktemp("kubernetes"))
    try:
        made.up()
        yield made
    finally:
        made.down()


@pytest.fixture
def kubernetes(shared_kubernetes: KubernetesBackend, monkeypatch: pytest.MonkeyPatch) -> KubernetesBackend:
    """The cluster, with the rights of an administrator in the test and of ``cortex-dask`` in its commands."""
    for name, value in shared_kubernetes.environment.items():
        monkeypatch.setenv(name, value)
    follow_environment()
    return shared_kubernetes


@pytest.fixture
def namespace(kubernetes: KubernetesBackend) -> Namespace:
    return kubernetes.namespace


@pytest.fixture
def new_job(kubernetes: KubernetesBackend, tmp_path: Path) -> Iterator[Callable[..., ClusterJob]]:
    """Make jobs; when the test has passed, nothing may be left of them."""
    jobs: list[ClusterJob] = []

    def make(**config: Any) -> ClusterJob:
        jobs.append(make_job(kubernetes, tmp_path / f"job-{len(jobs)}", **config))
        return jobs[-1]

    try:
        yield make
        for job in jobs:
            kubernetes.namespace.wait_for(
                lambda job=job: not job.leftovers(), "nothing to be left behind", kubernetes.leftover_seconds
            )
    finally:
        for job in jobs:
            job.close()
            kubernetes.remove(job)
