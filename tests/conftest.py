"""Fixtures that all tests share: an S3 server, fresh buckets, a server that fails, and stores of each kind."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.support.faulty_s3 import FaultyS3
from tests.tiers import split_tiers

if TYPE_CHECKING:
    from tests.support.gateway_server import GatewayServer
    from tests.support.s3 import S3Server


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3Server]:
    """An S3 server on loopback; one for each process of the test run."""
    from tests.support.s3 import S3Server  # moto takes a second to import

    with S3Server() as server:
        yield server


@pytest.fixture
def s3(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> str:
    """The URL of a fresh bucket; this process and its children reach it through the environment."""
    from tests.support.s3 import ENVIRONMENT

    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_MAX_ATTEMPTS", "AWS_RETRY_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server.url)
    follow_environment()
    return f"s3://{s3_server.make_bucket()}"


@pytest.fixture(scope="session")
def _faulty_server(s3_server: S3Server) -> Iterator[FaultyS3]:
    with FaultyS3(s3_server.url) as proxy:
        yield proxy


@pytest.fixture
def faulty_s3(s3: str, _faulty_server: FaultyS3, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyS3]:
    """A proxy in front of the S3 server that fails on demand, with a fresh bucket; the environment points to it."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", _faulty_server.url)
    follow_environment()
    _faulty_server.bucket = s3
    yield _faulty_server
    _faulty_server.heal()


@pytest.fixture(params=["local", pytest.param("s3", marks=pytest.mark.s3)])
def store_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty folder, on the local file system and on S3 in turn."""
    if request.param == "local":
        return str(tmp_path / "store")
    return f"{request.getfixturevalue('s3')}/store"


@pytest.fixture(scope="session")
def gateway_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GatewayServer]:
    """A Dask Gateway on loopback; one for each process of the test run."""
    from tests.support import gateway_server

    reason = gateway_server.missing()
    if reason is not None:
        pytest.skip(f"no Dask Gateway can be run here: {reason}")
    with gateway_server.GatewayServer(tmp_path_factory.mktemp("gateway")) as server:
        yield server


_caches: dict[frozenset[tuple[str, str]], dict[str, object]] = {}


def follow_environment() -> None:
    """Let fsspec reuse only file systems that were made in this environment: they remember endpoint and credentials.

    Fixtures do this; a test that changes the environment in the middle does it afterwards. Making a file system takes
    longer than most tests, so those of other environments are kept for the next test that has the same.
    """
    from s3fs import S3FileSystem

    environment = frozenset(item for item in os.environ.items() if item[0].startswith(("AWS_", "FSSPEC_")))
    S3FileSystem._cache = _caches.setdefault(environment, {})


@pytest.hookimpl(tryfirst=True)  # before -m reads the markers
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark what only ``make test-all`` runs; see :mod:`tests.tiers`."""
    extended, stale = split_tiers([item.nodeid for item in items])
    for item in items:
        if item.nodeid in extended:
            item.add_marker(pytest.mark.extended)
    if stale and config.args == config.getini("testpaths"):
        raise pytest.UsageError(f"tests/tiers.py: no test matches {', '.join(stale)}: change or remove the pattern")
