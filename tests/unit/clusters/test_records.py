"""What is written down about the clusters of jobs."""

from __future__ import annotations

from pathlib import Path

from cortex_dask.clusters import records
from cortex_dask.io.store.store import Store


def test_a_record_is_found_from_the_job_and_from_the_environment(tmp_path: Path) -> None:
    job = str(tmp_path / "store" / "jobs" / "api" / "one")
    kept = records.write(job, "kubernetes", "c-1", "batch", is_detached=True)
    assert records.find(job) == kept
    assert list(records.all_records(Store(str(tmp_path / "store")))) == [kept]
    assert kept.is_detached
    records.delete(kept)
    assert records.find(job) is None
    assert list(records.all_records(Store(str(tmp_path / "store")))) == []
    records.delete(kept)  # once more does no harm


def test_an_older_cluster_that_ends_late_leaves_the_record_of_the_next(tmp_path: Path) -> None:
    job = str(tmp_path / "store" / "jobs" / "api" / "one")
    older = records.write(job, "kubernetes", "c-1", "batch")
    newer = records.write(job, "kubernetes", "c-2", "batch")
    records.delete(older)
    assert records.find(job) == newer
    assert list(records.all_records(Store(str(tmp_path / "store")))) == [newer]


def test_a_job_outside_of_an_environment_has_a_record_too(tmp_path: Path) -> None:
    kept = records.write(str(tmp_path / "alone"), "gateway", "c-1", "http://gateway")
    assert records.find(str(tmp_path / "alone")) == kept
    records.delete(kept)
    assert [path.name for path in (tmp_path / "alone").iterdir()] == []
