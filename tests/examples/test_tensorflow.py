"""``type: tensorflow`` with TensorFlow itself: its client, and jobs with models on S3 and with a missing signature."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import fsspec
import pytest

from tests.examples.libraries import EXAMPLES, interpreter

pytestmark = [pytest.mark.examples, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def python() -> str:
    return interpreter("tensorflow")


@pytest.fixture(scope="module")
def trained(python: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example, trained."""
    project = tmp_path_factory.mktemp("trained") / "spirals"
    shutil.copytree(EXAMPLES / "tensorflow", project, ignore=shutil.ignore_patterns("data", "models", "predictions"))
    (project / "requirements.txt").unlink()
    subprocess.run([python, "train.py"], cwd=project, check=True, capture_output=True, timeout=300)
    return project


def submit(python: str, project: Path, folder: Path) -> dict:
    environment = {
        **os.environ,
        "DASK_CORTEX_DASK__STORE": str(folder / "store"),
        "DASK_CORTEX_DASK__CACHE": str(folder / "cache"),
    }
    environment.pop("TF_SERVING_URL", None)
    command = [python, "-m", "cortex_dask", "submit", ".", "-o", "json"]
    done = subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True, timeout=300)
    assert done.stdout, done.stderr
    return json.loads(done.stdout)


def copy(trained: Path, folder: Path, old: str, new: str) -> Path:
    """Copy the trained project, with a change of its configuration."""
    project = folder / "project"
    shutil.copytree(trained, project, ignore=shutil.ignore_patterns("predictions"))
    text = (project / "cortex.yaml").read_text()
    assert old in text
    (project / "cortex.yaml").write_text(text.replace(old, new))
    return project


def test_client(python: str) -> None:
    """The cases of ``tensorflow_client.py``, in an interpreter that has TensorFlow."""
    cases = Path(__file__).parent / "tensorflow_client.py"
    command = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-o", "addopts=", str(cases)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=400)
    assert done.returncode == 0, done.stdout
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout


@pytest.mark.s3
def test_a_job_with_a_model_on_s3(python: str, trained: Path, tmp_path: Path, s3: str) -> None:
    fsspec.filesystem("s3").put(str(trained / "models" / "spirals"), f"{s3}/models/spirals", recursive=True)
    project = copy(trained, tmp_path, "path: models/spirals ", f"path: {s3}/models/spirals ")
    shutil.rmtree(project / "models")
    status = submit(python, project, tmp_path)
    assert status["status"] == "succeeded"
    assert status["rows_out"] == 20_000
    fetched = [path for path in (tmp_path / "cache" / "models").iterdir() if path.is_dir()]
    assert [(path / "saved_model.pb").exists() for path in fetched] == [True]  # by two processes, once


def test_a_job_that_names_no_signature_ends_before_its_first_batch(python: str, trained: Path, tmp_path: Path) -> None:
    project = copy(trained, tmp_path, "signature_key: serving_default", "")
    status = submit(python, project, tmp_path)
    assert status["status"] == "worker error"
    assert "has the signatures serve, serving_default; choose one with models.signature_key" in status["status_reason"]
    assert status["batch_metrics"] == {**status["batch_metrics"], "succeeded": 0, "failed": 0}
