"""Records are gathered, appended and published; what was staged is removed many files at a time."""

from __future__ import annotations

import uuid

import pytest

from cortex_dask.io.job.directory import JobDirectory
from cortex_dask.io.job.ledger import Ledger
from cortex_dask.io.job.records import Part, SplitRecord
from cortex_dask.io.job.settings import OutputSettings
from cortex_dask.io.job.splits import part_name
from cortex_dask.io.output.directory import OutputDirectory, staging_prefix
from cortex_dask.runtime.coordinator.committer import Committer, gather_seconds

JOB = "job-1"


def staged(output: OutputDirectory, split: int, attempt: str) -> SplitRecord:
    name = f"{staging_prefix(JOB)}/{split:06d}-{attempt}"
    output.store.write(name, b"rows")
    part = Part(part_name(JOB, split, ".parquet"), name, 1, 4)
    return SplitRecord(split, attempt, part, 1, 1)


@pytest.fixture
def parts(tmp_path):
    """A job whose output lies in a store that copies."""
    output = OutputDirectory(OutputSettings(f"memory://{uuid.uuid4().hex}/out"), JOB)
    committed: list[SplitRecord] = []
    errors: list[Exception] = []
    job = JobDirectory(str(tmp_path))
    yield job, output, committed, errors
    assert errors == []
    output.store.delete_tree()


def commit(parts, records: list[SplitRecord]) -> None:
    job, output, committed, errors = parts

    def report(result: SplitRecord | Exception) -> None:
        (errors if isinstance(result, Exception) else committed).append(result)

    committer = Committer(job, Ledger(job.store), output, None, report)
    committer.start()
    for record in records:
        committer.commit(record)
    committer.close()


def test_parts_are_published_and_what_was_staged_is_removed_a_number_at_a_time(parts, monkeypatch):
    monkeypatch.setattr("cortex_dask.runtime.coordinator.committer._DELETED_AT_ONCE", 10)
    monkeypatch.setattr("cortex_dask.runtime.coordinator.committer.SEGMENT_RECORDS", 7)
    _, output, committed, _ = parts
    commit(parts, [staged(output, split, "a") for split in range(35)])
    assert [record.split for record in committed] == list(range(35))
    assert len(output.published()) == 35
    assert len(output.store.names(staging_prefix(JOB))) == 5, "ten at a time; the end of the job removes the rest"


def test_an_attempt_that_lost_leaves_nothing(parts):
    _, output, committed, _ = parts
    first, second = staged(output, 0, "a"), staged(output, 0, "b")
    commit(parts, [first, second])
    assert committed == [first]
    assert output.store.names(staging_prefix(JOB)) == [first.part.staged]
    assert list(output.published()) == [first.part.name]


def test_records_are_gathered_longer_the_longer_a_job_runs():
    assert gather_seconds(0) == 0.1
    assert gather_seconds(600) == pytest.approx(1.1)
    assert gather_seconds(86_400) == 5.0
