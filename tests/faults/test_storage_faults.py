"""Storage that fails: single requests, an outage, a full disk."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from itertools import cycle, islice
from pathlib import Path

import pytest

from cortex_dask.errors import StorageError
from cortex_dask.io.store import retry
from cortex_dask.runtime.coordinator import lost_split
from tests.faults.checks import committed_only, exactly_once
from tests.faults.jobs import ROOT, FaultJob, make_job
from tests.support.faulty_s3 import FaultyS3

#: Every request fails once in some job of the sweep: the job with the offset r has the requests r, r + STRIDE … fail,
#: in one of these ways after the other.
STRIDE = 6
WAYS = [("before", "drop"), ("after", "drop"), ("before", "503"), ("after", "500")]
BAD = (120, 820)


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Send a split again soon after its store has failed."""
    monkeypatch.setattr(lost_split, "_STORAGE_DELAY", 0.05)


@pytest.mark.s3
@pytest.mark.parametrize("offset", range(1, STRIDE + 1))
def test_requests_that_fail(offset: int, faulty_s3: FaultyS3, tmp_path: Path) -> None:
    job = make_job(f"{faulty_s3.bucket}/store", tmp_path / "marks", files=2, fault="raise", bad=BAD)
    ways = islice(cycle(WAYS), offset, None)
    for k in range(offset, 400, STRIDE):
        when, how = next(ways)
        faulty_s3.fail(k, when, how)

    _run_to_the_end(job)

    assert faulty_s3.failed >= 10
    faulty_s3.heal()
    result = exactly_once(job, status="completed with failures")
    assert result.dead_ids == result.sharing_a_batch(BAD)


@pytest.mark.s3
@pytest.mark.parametrize("how", ["drop", "503"])
def test_an_outage_in_the_middle(how: str, faulty_s3: FaultyS3, tmp_path: Path) -> None:
    job = make_job(f"{faulty_s3.bucket}/store", tmp_path / "marks", files=2)
    faulty_s3.fail(60, how=how, count=40)

    _run_to_the_end(job)

    assert faulty_s3.failed == 40
    exactly_once(job, status="succeeded")


@pytest.mark.s3
def test_an_outage_that_ends_the_job(faulty_s3: FaultyS3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "RETRY_DELAYS", (0.01, 0.01))
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    job = make_job(f"{faulty_s3.bucket}/store", tmp_path / "marks", files=2)
    faulty_s3.fail(2, how="503", match="PUT .*/ledger/", count=None)

    with pytest.raises(StorageError):
        job.run()

    document = job.status()
    assert document["status"] == "worker error"
    assert "can be resumed" in document["status_reason"]
    faulty_s3.heal()
    assert committed_only(job)
    job.run()
    exactly_once(job, status="succeeded")


def _run_to_the_end(job: FaultJob) -> None:
    """Run a job, and resume it while its storage ends it."""
    for _ in range(5):
        document = job.try_to_run()
        if document["status"] != "worker error":
            return
    raise AssertionError(f"the job does not end: {document}")


# a full disk ----------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform != "linux" or shutil.which("unshare") is None, reason="needs mount name spaces")
def test_a_full_disk(tmp_path: Path) -> None:
    from tests.faults.full_disk import NOT_ALLOWED

    as_root = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
    done = subprocess.run(
        ["unshare", "--mount", *as_root, sys.executable, "-W", "error", "-m", "tests.faults.full_disk", str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": ROOT},
        capture_output=True,
        text=True,
        timeout=120,
    )

    if done.returncode == NOT_ALLOWED or "unshare failed" in done.stderr:
        pytest.skip("mounting a small disk is not allowed here")
    assert done.returncode == 0, done.stderr


def test_a_file_that_cannot_grow(local_job: Callable[..., FaultJob]) -> None:
    job = local_job(largest_file=1024, until="room made")

    document = job.try_to_run()

    assert document["status"] == "worker error"
    assert "larger than its file system or the user's limit allows" in document["status_reason"]
    assert committed_only(job) == 0

    job.mark("room made")
    job.run()
    exactly_once(job, status="succeeded")
