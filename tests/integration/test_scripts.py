"""Handler processes of scripts that run a class: which libraries they import, and that none is left behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy
import pytest

from tests.faults.jobs import ROOT

SCRIPT = """
import json, os, sys
import psutil
import cortex_dask as cx
from cortex_dask.errors import CortexDaskError

class Handler:
    def __init__(self, config):
        pass

    def handle_batch(self, payload):
        import numpy
        return [{"id": row["id"], "numpy": numpy.__file__} for row in payload]

if __name__ == "__main__":
    with open("in.jsonl", "w") as file:
        file.writelines(f'{{"id": {number}}}\\n' for number in range(10))
    error_message = ""
    try:
        cx.run(Handler, batch_size=5, batch_format="records", progress=False, **json.loads(sys.argv[1]))
    except CortexDaskError as error:
        error_message = str(error)
    # one that was being launched when the job ended is ended a moment later
    _, alive = psutil.wait_procs(psutil.Process().children(recursive=True), timeout=10)
    print(json.dumps([error_message, [child.pid for child in alive]]))
"""
Run = Callable[..., tuple[str, list[int]]]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Return a function that runs a job by a script; returns the job's error, and the processes that live on."""

    def run_script(prelude: str = "", **options: object) -> tuple[str, list[int]]:
        (tmp_path / "job.py").write_text(prelude + SCRIPT)
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "XDG_DATA_HOME": str(tmp_path / "data")}
        options = {"input": "in.jsonl", "output": {"path": "out", "format": "json"}, "workers": 2, **options}
        command = [sys.executable, "job.py", json.dumps(options)]
        done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        error_message, alive = json.loads(done.stdout.splitlines()[-1])
        return error_message, alive

    return run_script


def rows(folder: Path) -> list[dict[str, object]]:
    parts = sorted((folder / "out").glob("part-*"))
    return sorted((json.loads(line) for part in parts for line in part.read_text().splitlines()), key=lambda r: r["id"])


@pytest.mark.parametrize("options", [{}, {"compute": {"cpu": 2}}])
def test_a_complete_job_leaves_no_process(run: Run, tmp_path: Path, options: dict[str, object]) -> None:
    assert run(**options) == ("", [])
    assert [row["id"] for row in rows(tmp_path)] == list(range(10))


def test_a_refused_submission_leaves_no_process(run: Run) -> None:
    error_message, alive = run(input="nothing-here.jsonl")
    assert "nothing-here.jsonl" in error_message
    assert alive == []


def test_a_job_that_fails_before_it_asks_its_cluster_for_anything_leaves_no_process(run: Run) -> None:
    prelude = """
import errno, sys

def full(event, arguments):
    if event == "os.rename" and str(arguments[1]).endswith("status.json"):
        raise OSError(errno.ENOSPC, "No space left on device", str(arguments[1]))

sys.addaudithook(full)
"""
    error_message, alive = run(prelude)
    assert "status.json" in error_message
    assert alive == []


def test_a_handler_imports_the_libraries_that_its_script_puts_first(run: Run, tmp_path: Path) -> None:
    libraries = tmp_path / "libraries"
    libraries.mkdir()
    (libraries / "numpy").symlink_to(Path(numpy.__file__).parent, target_is_directory=True)
    error_message, _ = run(f"import sys\nsys.path.insert(0, {str(libraries)!r})\n")
    assert error_message == ""
    assert {row["numpy"] for row in rows(tmp_path)} == {str(libraries / "numpy" / "__init__.py")}
