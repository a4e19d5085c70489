"""Each example as its README has it: install, train, submit; then look at what came out."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from tests.examples.libraries import EXAMPLES, interpreter

pytestmark = [pytest.mark.examples, pytest.mark.timeout(900)]

#: How right the predictions have to be, and of how many rows there are some.
EXPECTED = {
    "scikit-learn": ("accuracy", 0.92, 284),
    "pytorch": ("accuracy", 0.99, 20_000),
    "onnxruntime": ("accuracy", 0.93, 898),
    "xgboost": ("r2", 0.97, 50_000),
    "tensorflow": ("accuracy", 0.98, 20_000),
}


def test_every_example_is_tested() -> None:
    assert {path.parent.name for path in EXAMPLES.glob("*/cortex.yaml")} == set(EXPECTED)


def test_torch_is_pinned() -> None:
    """Another PyTorch would bring gigabytes of CUDA packages."""
    assert (EXAMPLES / "pytorch" / "requirements.txt").read_text() == "torch==2.13.0\n"


@pytest.mark.parametrize("name", EXPECTED)
def test_example(name: str, tmp_path: Path, record_property: Callable[[str, str], None]) -> None:
    times = {}

    def run(step: str, *command: str) -> str:
        started = time.monotonic()
        done = subprocess.run(
            [python, *command], cwd=project, env=environment, capture_output=True, text=True, timeout=400
        )
        times[step] = time.monotonic() - started
        assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
        return done.stdout

    started = time.monotonic()
    python = interpreter(name)
    times["install"] = time.monotonic() - started
    project = tmp_path / name
    shutil.copytree(EXAMPLES / name, project, ignore=shutil.ignore_patterns("data", "model*", "predictions"))
    environment = {
        **os.environ,
        "DASK_CORTEX_DASK__STORE": str(tmp_path / "store"),
        "DASK_CORTEX_DASK__CACHE": str(tmp_path / "cache"),
        "OMP_NUM_THREADS": "1",  # other tests want cores as well
    }
    environment.pop("TF_SERVING_URL", None)
    run("train", "train.py")
    status = json.loads(run("job", "-m", "cortex_dask", "submit", ".", "-o", "json"))
    assert status["status"] == "succeeded"
    found = json.loads(run("evaluate", str(EXAMPLES / "evaluate.py"), "."))
    shown = ", ".join(f"{step} {seconds:.1f} s" for step, seconds in times.items())
    record_property("example", f"examples/{name}: {found}, {shown}")
    measure, least, rows = EXPECTED[name]
    assert found["rows"] == found["predicted"] == rows
    assert found["once"] is True
    assert found[measure] >= least
    assert len(list((project / "predictions").glob("*.parquet"))) > 1  # more than one split, so more than one worker
    assert yaml.safe_load((project / "cortex.yaml").read_text())[0]["job"]["workers"] == 2
