"""Fixtures of the fault tests: a folder on each kind of store."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults.jobs import FaultJob, make_job


def on_stores(*cases: tuple[str, str]) -> pytest.MarkDecorator:
    """Run a test for pairs of a case and a kind of store, ``local`` or ``s3``."""
    parameters = [
        pytest.param(case, kind, id=f"{kind}-{case}", marks=[pytest.mark.s3] if kind == "s3" else [])
        for case, kind in cases
    ]
    return pytest.mark.parametrize(("case", "store_url"), parameters, indirect=["store_url"])


@pytest.fixture
def new_job(store_url: str, tmp_path: Path) -> Callable[..., FaultJob]:
    """Make a job in the store at hand, local and S3 in turn."""
    return lambda **options: make_job(store_url, tmp_path / "marks", **options)


@pytest.fixture
def local_job(tmp_path: Path) -> Callable[..., FaultJob]:
    """Make a job on the local file system."""
    return lambda **options: make_job(str(tmp_path / "store"), tmp_path / "marks", **options)
