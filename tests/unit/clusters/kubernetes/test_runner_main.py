"""What the pod of a runner does without a Kubernetes: stopped jobs, and jobs that cannot run."""

from __future__ import annotations

from pathlib import Path

import pytest

from cortex_dask.clusters.kubernetes.runner_main import coordinate
from cortex_dask.io.job.directory import JobDirectory
from cortex_dask.io.job.settings import ClusterSettings, HandlerSettings, JobSettings
from cortex_dask.io.job.splits import DatasetInput


@pytest.fixture
def job(tmp_path: Path) -> JobDirectory:
    """A job without an image, so that it cannot run on Kubernetes."""
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jsonl").write_text('{"n": 1}\n')
    directory = JobDirectory(str(tmp_path / "job"))
    directory.create(
        JobSettings(
            job_id="job-1",
            api_name="demo",
            api_id="a",
            created_time="2026-01-01T00:00:00.000+00:00",
            handler=HandlerSettings("project"),
            dataset=DatasetInput((str(tmp_path / "in"),)),
            cluster=ClusterSettings("kubernetes"),
        )
    )
    return directory


def test_a_job_that_was_stopped_before_its_runner_started_does_not_run(job: JobDirectory) -> None:
    job.request_stop("stopped", "by a user")

    assert coordinate(job.url) == 0

    document = job.read_json("status.json")
    assert (document["status"], document["status_reason"]) == ("stopped", "by a user")


def test_a_job_that_cannot_run_ends_with_the_reason_and_is_not_restarted(job: JobDirectory) -> None:
    assert coordinate(job.url) == 0

    document = job.read_json("status.json")
    assert document["status"] == "worker error"
    assert "kubernetes: no image is named" in document["status_reason"]


def test_a_runner_that_cannot_read_the_job_is_restarted(tmp_path: Path) -> None:
    (tmp_path / "job").write_text("a file and no directory")

    assert coordinate(str(tmp_path / "job")) == 1
