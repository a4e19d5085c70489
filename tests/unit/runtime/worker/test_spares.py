"""Handler processes that are launched before their job is known, as real processes of real scripts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cortex_dask.runtime.worker import spares
from tests.faults.jobs import ROOT, lives, until

SCRIPT = """
import json, os, sys
import psutil
import cortex_dask as cx
from cortex_dask.errors import CortexDaskError

launched = {"early": 0, "later": 0}

def note(event, arguments):
    if event == "subprocess.Popen" and "cortex_dask.runtime.handler_process.main" in str(arguments[1]):
        launched["early" if arguments[1][-1] == "early" else "later"] += 1

sys.addaudithook(note)

class Handler:
    def __init__(self, config):
        pass

    def handle_batch(self, payload):
        import numpy
        return [{"id": row["id"], "pid": os.getpid(), "numpy": numpy.__file__} for row in payload]

if __name__ == "__main__":
    with open("in.jsonl", "w") as file:
        file.writelines(f'{{"id": {number}}}\\n' for number in range(10))
    said = ""
    try:
        cx.run(Handler, batch_size=5, batch_format="records", progress=False, **json.loads(sys.argv[1]))
    except CortexDaskError as error:
        said = str(error)
    # one that was being launched when the job ended is ended a moment later
    _, alive = psutil.wait_procs(psutil.Process().children(recursive=True), timeout=10)
    print(json.dumps([launched, said, [child.pid for child in alive]]))
"""


@pytest.fixture
def run(tmp_path: Path):
    """Return a function that runs a job by a script; returns what was launched, the error, and who lives on."""

    def call(prelude: str = "", **options: object) -> tuple[dict[str, int], str, list[int]]:
        (tmp_path / "job.py").write_text(prelude + SCRIPT)
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "XDG_DATA_HOME": str(tmp_path / "data")}
        command = [sys.executable, "job.py", json.dumps({"input": "in.jsonl", "output": "out", **options})]
        done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        launched, said, alive = json.loads(done.stdout.splitlines()[-1])
        return launched, said, alive

    return call


def rows(tmp_path: Path) -> list[dict[str, object]]:
    parts = sorted((tmp_path / "out").glob("part-*"))
    return sorted((json.loads(line) for part in parts for line in part.read_text().splitlines()), key=lambda r: r["id"])


def test_a_job_takes_them(run, tmp_path: Path) -> None:
    launched, said, alive = run(workers=2, output={"path": "out", "format": "json"})

    assert (launched, said, alive) == ({"early": 2, "later": 0}, "", [])
    assert [row["id"] for row in rows(tmp_path)] == list(range(10))


def test_a_refused_submission_leaves_none(run) -> None:
    launched, said, alive = run(workers=2, input="nothing-here.jsonl")

    assert "nothing-here.jsonl" in said
    assert launched["early"] <= 2  # it may be refused before the second is launched
    assert alive == []


def test_a_job_that_fails_before_its_cluster_is_asked_for_anything_leaves_none(run) -> None:
    prelude = """
import errno, sys

def full(event, arguments):
    if event == "os.rename" and str(arguments[1]).endswith("status.json"):
        raise OSError(errno.ENOSPC, "No space left on device", str(arguments[1]))

sys.addaudithook(full)
"""
    launched, said, alive = run(prelude, workers=2)

    assert "status.json" in said
    assert launched["early"] == 2
    assert alive == []


def test_another_job_may_need_others(run, tmp_path: Path) -> None:
    """What a handler needs is said with ``compute``: the processes that take it are launched when it is known."""
    launched, said, alive = run(workers=2, compute={"cpu": 2}, output={"path": "out", "format": "json"})

    assert (launched, said, alive) == ({"early": 0, "later": 2}, "", [])
    assert len(rows(tmp_path)) == 10


def test_a_script_with_libraries_of_its_own(run, tmp_path: Path) -> None:
    """They are imported from where the script has them, so nothing is imported before that is known."""
    import numpy

    (tmp_path / "libraries").mkdir()
    (tmp_path / "libraries" / "numpy").symlink_to(Path(numpy.__file__).parent, target_is_directory=True)
    prelude = "import sys\nsys.path.insert(0, '" + str(tmp_path / "libraries") + "')\n"

    launched, said, _ = run(prelude, workers=2, output={"path": "out", "format": "json"})

    assert (launched, said) == ({"early": 0, "later": 2}, "")
    assert {row["numpy"] for row in rows(tmp_path)} == {str(tmp_path / "libraries" / "numpy" / "__init__.py")}


def test_they_are_taken_only_for_the_same_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLOUR", "red")
    environment = spares.slot_environment(os.environ, {}, cpu=1)
    try:
        spares.prepare(1)
        until(lambda: spares._spares, "a process")
        pid = spares._spares[0][1].popen.pid

        assert spares.take({**environment, "COLOUR": "blue"}) is None
        taken = spares.take(environment)
        assert taken is not None
        assert taken.popen.pid == pid
        assert spares.take(environment) is None
        taken.discard()
    finally:
        spares.discard()
    assert not lives(pid)
