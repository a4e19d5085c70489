"""``cortex-dask logs`` when there is nothing to show: it says so, and its exit code is that of grep."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import dask.config
import pytest
from click.testing import CliRunner, Result

from cortex_dask.cli import main
from cortex_dask.io.job.directory import JobDirectory
from cortex_dask.io.job.settings import HandlerSettings, JobSettings
from cortex_dask.io.job.splits import DatasetInput
from cortex_dask.runtime.coordinator.status_board import StatusBoard
from cortex_dask.runtime.log_line import line

JOB = "20260101-120000-00abcd"


@pytest.fixture
def job(tmp_path: Path) -> Iterator[JobDirectory]:
    settings = JobSettings(
        JOB, "api", "1", "2026-01-01T12:00:00.000+00:00", HandlerSettings("class"), DatasetInput(("in",))
    )
    directory = JobDirectory(str(tmp_path / "jobs" / "api" / JOB))
    directory.create(settings)
    board = StatusBoard(settings)
    board.end("succeeded")
    directory.write_json("status.json", board.document())
    with dask.config.set({"cortex-dask.store": str(tmp_path)}):
        yield directory


def logs(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["logs", "api", *arguments])


def test_no_line_that_matches_is_exit_code_1(job: JobDirectory) -> None:
    job.store.write("logs/w-1-00000.jsonl", line("INFO", "hello", {"workerID": "w-1"}, batch_id="3fa2") + b"\n")
    found = logs("--batch", "3fa")
    assert (found.exit_code, found.stderr) == (0, "")
    assert "hello" in found.stdout
    for follow in ((), ("-f",), ("-o", "json")):
        missed = logs("--batch", "nope", *follow)
        assert (missed.exit_code, missed.stdout) == (1, "")
        told = f"No line in the log of the job {JOB} matches --batch nope; without it all lines are shown.\n"
        assert missed.stderr == told
    both = logs("--batch", "3fa", "--level", "error")
    assert both.exit_code == 1
    assert "matches --level error --batch 3fa; without them all lines are shown" in both.stderr


def test_an_empty_log_is_no_failure(job: JobDirectory) -> None:
    empty = logs()
    assert (empty.exit_code, empty.stdout, empty.stderr) == (0, "", f"The log of the job {JOB} is empty.\n")
