"""Fixtures that all tests share: an S3 server, fresh buckets, a server that fails, and stores of each kind."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.faulty_s3 import FaultyS3

if TYPE_CHECKING:
    from tests.s3 import S3Server


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3Server]:
    """An S3 server on loopback; one for each process of the test run."""
    from tests.s3 import S3Server  # moto takes a second to import

    with S3Server() as server:
        yield server


@pytest.fixture
def s3(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The URL of a fresh bucket; this process and its children reach it through the environment."""
    from tests.s3 import ENVIRONMENT

    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_MAX_ATTEMPTS", "AWS_RETRY_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server.url)
    forget_file_systems()
    yield f"s3://{s3_server.make_bucket()}"
    forget_file_systems()


@pytest.fixture
def faulty_s3(s3: str, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyS3]:
    """A proxy in front of the S3 server that fails on demand, with a fresh bucket; the environment points to it."""
    with FaultyS3(s3_server.url, bucket=s3) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        forget_file_systems()
        yield proxy
        forget_file_systems()


@pytest.fixture(params=["local", pytest.param("s3", marks=pytest.mark.s3)])
def store_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty folder, on the local file system and on S3 in turn."""
    if request.param == "local":
        return str(tmp_path / "store")
    return f"{request.getfixturevalue('s3')}/store"


def forget_file_systems() -> None:
    """Drop the file systems that fsspec keeps: they remember the endpoint and the credentials of an earlier test."""
    import fsspec
    from s3fs import S3FileSystem

    S3FileSystem.clear_instance_cache()
    fsspec.filesystem("memory").store.clear()
    fsspec.filesystem("memory").pseudo_dirs[:] = [""]
