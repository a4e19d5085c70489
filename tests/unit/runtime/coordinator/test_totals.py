"""The totals of a job, with dead letters and their retries."""

from __future__ import annotations

from cortex_dask.io.job.records import BatchFailure, Part, SplitRecord
from cortex_dask.io.job.splits import PlanHeader, Split
from cortex_dask.runtime.coordinator.totals import JobTotals


def header(splits: int, batches: int, exact: bool = True) -> PlanHeader:
    return PlanHeader("parquet", 10, None, None, None, 1, splits, batches, exact, batches * 10, 0)


def failure(batch: int | None, cause: str = "exception") -> BatchFailure:
    return BatchFailure(batch, f"id-{batch}", 10, 3, cause, "ValueError: no")  # type: ignore[arg-type]


def record(split: int, batches: int, failures: tuple[BatchFailure, ...] = ()) -> SplitRecord:
    failed = sum(1 for item in failures if item.batch is not None)
    rows = (batches - failed) * 10
    part = Part(f"part-{split}", "", rows, rows * 8)
    return SplitRecord(split, "a", part, batches, batches - failed, failures, None, 3 * failed, batches * 10, rows)


def test_totals_add_up():
    tally = JobTotals(header(2, 7), {})
    tally.add(record(0, 4))
    tally.add(record(1, 3, (failure(2),)))
    assert (tally.splits, tally.batches, tally.succeeded_batches, tally.failed_batches) == (2, 7, 6, 1)
    assert (tally.rows_in, tally.rows_out, tally.parts, tally.failed_attempts) == (70, 60, 2, 3)
    assert tally.retryable() == {1: (2,)}


def test_a_retry_that_succeeds_takes_the_batch_out_of_the_dead_letter():
    retry = Split(2, (), None, 2, 0, base=1, only=(0, 2))
    tally = JobTotals(header(2, 7), {2: retry})
    tally.add(record(0, 4))
    tally.add(record(1, 3, (failure(0), failure(2))))
    tally.add(record(2, 2, (failure(2),)))
    assert tally.retryable() == {1: (2,)}
    assert (tally.batches, tally.succeeded_batches, tally.failed_batches) == (7, 6, 1)
    assert tally.splits == 2
    assert tally.rows_out == 40 + 10 + 10


def test_malformed_lines_count_as_failures_but_are_not_retried():
    tally = JobTotals(header(1, 2, exact=False), {})
    tally.add(record(0, 2, (failure(None, "malformed input"), failure(None, "malformed input"))))
    assert tally.failed_batches == 2
    assert tally.succeeded_batches == 2
    assert tally.retryable() == {}


def test_an_estimated_total_becomes_exact():
    tally = JobTotals(header(4, 8, exact=False), {})
    assert (tally.total_batches, tally.total_is_exact) == (8, False)
    tally.add(record(0, 3))
    assert tally.total_batches == 12
    for split in (1, 2, 3):
        tally.add(record(split, 1))
    assert (tally.total_batches, tally.total_is_exact) == (6, True)
