"""Fixtures of the conformance suite: each backend in turn, and jobs on it."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.clusters.backend import Backend
from tests.clusters.jobs import ClusterJob, make_job
from tests.conftest import follow_environment
from tests.support.waiting import until

#: Module and class of each backend, below ``tests.clusters``, and the marks of its tests.
BACKENDS: dict[str, tuple[str, tuple[pytest.MarkDecorator, ...]]] = {
    "local": ("LocalBackend", ()),
    "address": ("AddressBackend", ()),
    "gateway": ("GatewayBackend", ()),
    "kubernetes": ("KubernetesBackend", (pytest.mark.kubernetes, pytest.mark.timeout(900))),
}


def _parameters() -> list[Any]:
    here = Path(__file__).parent
    return [pytest.param(name, marks=marks) for name, (_, marks) in BACKENDS.items() if (here / f"{name}.py").exists()]


@pytest.fixture(scope="session", params=_parameters())
def shared_backend(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Backend]:
    """A backend, once for each process of the test run."""
    module = importlib.import_module(f"tests.clusters.{request.param}")
    made: Backend = getattr(module, BACKENDS[request.param][0])(tmp_path_factory.mktemp(request.param))
    try:
        made.up()
        yield made
    finally:
        made.down()


@pytest.fixture
def backend(shared_backend: Backend, monkeypatch: pytest.MonkeyPatch) -> Backend:
    """A backend that is as good as new."""
    for name, value in shared_backend.environment.items():
        monkeypatch.setenv(name, value)
    if shared_backend.environment:
        follow_environment()
    shared_backend.fresh()
    return shared_backend


@pytest.fixture
def new_job(backend: Backend, tmp_path: Path) -> Iterator[Callable[..., ClusterJob]]:
    """Make jobs; when the test has passed, nothing may be left of them."""
    jobs: list[ClusterJob] = []

    def make(**config: Any) -> ClusterJob:
        jobs.append(make_job(backend, tmp_path / f"job-{len(jobs)}", **config))
        return jobs[-1]

    try:
        yield make
        for job in jobs:
            found: list[str] = []

            def nothing_left(job: ClusterJob = job, found: list[str] = found) -> bool:
                found[:] = job.leftovers()
                return not found

            try:
                until(nothing_left, "nothing to be left behind", backend.leftover_seconds)
            except AssertionError as error:
                raise AssertionError(f"{error}: {found}; {job.said()}") from None
    finally:
        for job in jobs:
            job.close()
