"""The benchmark of many splits that do nothing: it runs, resumes, and every split is in the ledger."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from cortex_dask.io.job.ledger import Ledger
from cortex_dask.io.store.store import Store

SCALE = Path(__file__).parents[2] / "benchmarks" / "scale.py"


@pytest.mark.parametrize("cluster", ["null", "local"])
def test_splits_and_resume(cluster: str, tmp_path: Path) -> None:
    command = [sys.executable, str(SCALE), "splits", "--count", "2000", "--cluster", cluster, "--workers", "8"]
    options = ["--resume", "300", "--interval", "0.2", "--cores", "0", "--keep", "--folder", str(tmp_path)]

    run = subprocess.run([*command, *options], capture_output=True, text=True, timeout=120)

    assert run.returncode == 0, run.stderr
    assert run.stdout.count("status: succeeded") == 2, run.stdout
    assert re.search(r"resume: [\d.]+ s", run.stdout)
    (job,) = tmp_path.glob("*/job")
    assert sorted(record.split for record in Ledger(Store(str(job))).records()) == list(range(2000))
