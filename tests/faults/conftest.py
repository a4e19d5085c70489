"""Fixtures of the fault tests: a folder on each kind of store."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import pytest

from tests.faults.jobs import FaultJob, make_job


class MakeJob(Protocol):
    """Make a job in the test's store, with its marks in a folder of its own."""

    def __call__(self, **options: Any) -> FaultJob: ...


@pytest.fixture
def new_job(store_url: str, tmp_path: Path) -> Callable[..., FaultJob]:
    """Make a job in the store at hand, local and S3 in turn."""
    return lambda **options: make_job(store_url, tmp_path / "marks", **options)


@pytest.fixture
def local_job(tmp_path: Path) -> Callable[..., FaultJob]:
    """Make a job on the local file system."""
    return lambda **options: make_job(str(tmp_path / "store"), tmp_path / "marks", **options)
