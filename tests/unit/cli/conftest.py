"""A folder that commands work in."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import dask.config
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from tests.support.projects import api_document, write_project


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working directory with a project and an input, and a store of its own."""
    project = write_project(tmp_path / "project")
    (project / "cortex.yaml").write_text(yaml.safe_dump([api_document(handler={"env": {"TOKEN": "hush"}})]))
    pq.write_table(pa.table({"x": range(10)}), tmp_path / "in.parquet")
    monkeypatch.chdir(tmp_path)
    with dask.config.set({"cortex-dask.store": str(tmp_path / "store")}):
        yield tmp_path
