"""Jobs that an earlier release has left are read, resumed and retried: ``tests/fixtures/make_earlier.py`` made them."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest

import cortex_dask as cx
from tests.fixtures.make_earlier import MODIFIED
from tests.fixtures.make_earlier import ROOT as FIXTURE


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the fixture, with the paths and times that its job directories name."""
    root = tmp_path / "earlier"
    shutil.copytree(FIXTURE, root)
    for file in root.rglob("*"):
        if file.suffix in (".json", ".jsonl"):
            file.write_text(file.read_text().replace("@ROOT@", str(root)))
    for file in (*(root / "input").iterdir(), root / "lines.jsonl"):
        os.utime(file, (MODIFIED, MODIFIED))
    monkeypatch.setenv("XDG_DATA_HOME", str(root / "data"))
    return root


def test_jobs_are_found_and_described(root: Path) -> None:
    client = cx.Client()

    assert {job.job_id for job in client.list_jobs("earlier")} == {"killed", "failed"}
    document = client.get_job("earlier", "failed").describe()
    assert document["status"] == "completed with failures"
    assert document["batch_metrics"]["succeeded"] == document["total_batch_count"] - 1


def test_a_killed_job_is_resumed(root: Path) -> None:
    job = cx.Client().get_job("earlier", "killed")

    job.resume()
    job.wait()

    assert job.status == "succeeded"
    table = pq.read_table(root / "killed")
    assert sorted(table.to_pylist(), key=lambda row: row["id"]) == [
        {"text": f"row {number}", "id": number, "scaled": 2 * number} for number in range(38)
    ]
    assert {metric["metric"]: metric["value"] for metric in job.metrics} == {"rows": 38}


def test_a_failed_batch_is_retried(root: Path) -> None:
    job = cx.Client().get_job("earlier", "failed")
    assert {"id": 17} in [row for payload in job.failures()["payload"] for row in payload]
    (root / "failed.mark").touch()

    job.retry_failed()
    job.wait()

    assert job.status == "succeeded"
    rows = [json.loads(line) for file in (root / "failed").glob("part-*") for line in file.read_text().splitlines()]
    assert sorted(row["id"] for row in rows) == list(range(40))
    assert all(row["scaled"] == 2 * row["id"] for row in rows)


def test_its_log_is_read(root: Path) -> None:
    assert any("a bad row" in str(line) for line in cx.Client().get_job("earlier", "failed").log_lines())


def test_its_output_is_appended_to(root: Path) -> None:
    (root / "more.jsonl").write_text('{"id": 40}\n')

    cx.run(
        root / "project",
        root / "more.jsonl",
        {"path": str(root / "failed"), "format": "json"},
        mode="append",
        config={"mark": str(root / "failed.mark"), "bad": -1, "deadly": -1, "ledger": ""},
        batch_format="records",
        workers=1,
        progress=False,
    )

    manifest = json.loads((root / "failed" / "_manifest.json").read_text())
    assert len(manifest["parts"]) == len(list((root / "failed").glob("part-*"))) == 8
