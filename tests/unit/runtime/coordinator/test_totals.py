"""The totals of a job, with dead letters and their retries."""

from __future__ import annotations

from collections.abc import Mapping

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


def totals_of(header: PlanHeader, retries: Mapping[int, Split] | None = None) -> JobTotals:
    totals = JobTotals()
    totals.set_plan(header, retries or {})
    return totals


def test_totals_add_up():
    totals = totals_of(header(2, 7))
    totals.add(record(0, 4))
    totals.add(record(1, 3, (failure(2),)))
    assert (totals.splits, totals.batches, totals.succeeded_batches, totals.failed_batches) == (2, 7, 6, 1)
    assert (totals.rows_in, totals.rows_out, totals.parts, totals.failed_attempts) == (70, 60, 2, 3)
    assert totals.retryable() == {1: (2,)}


def test_a_retry_that_succeeds_takes_the_batch_out_of_the_dead_letter():
    retry = Split(2, (), None, 2, 0, base=1, only=(0, 2))
    totals = totals_of(header(2, 7), {2: retry})
    totals.add(record(0, 4))
    totals.add(record(1, 3, (failure(0), failure(2))))
    totals.add(record(2, 2, (failure(2),)))
    assert totals.retryable() == {1: (2,)}
    assert (totals.batches, totals.succeeded_batches, totals.failed_batches) == (7, 6, 1)
    assert totals.splits == 2
    assert totals.rows_out == 40 + 10 + 10


def test_malformed_lines_count_as_failures_but_are_not_retried():
    totals = totals_of(header(1, 2, exact=False))
    totals.add(record(0, 2, (failure(None, "malformed input"), failure(None, "malformed input"))))
    assert totals.failed_batches == 2
    assert totals.succeeded_batches == 2
    assert totals.retryable() == {}


def test_an_estimated_total_becomes_exact():
    totals = totals_of(header(4, 8, exact=False))
    assert (totals.total_batches, totals.total_is_exact) == (8, False)
    totals.add(record(0, 3))
    assert totals.total_batches == 12
    for split in (1, 2, 3):
        totals.add(record(split, 1))
    assert (totals.total_batches, totals.total_is_exact) == (6, True)


def test_without_a_plan_all_is_zero():
    totals = JobTotals()
    assert (totals.total_batches, totals.total_is_exact, totals.splits_left, totals.succeeded_batches) == (
        0,
        False,
        0,
        0,
    )


def test_splits_are_left_until_each_has_a_record():
    totals = totals_of(header(2, 7), {2: Split(2, (), None, 1, 0, base=1, only=(2,))})
    assert (totals.planned_splits, totals.total_splits, totals.splits_left) == (2, 3, 3)
    for split in range(3):
        totals.add(record(split, 1))
    assert (totals.records, totals.splits_left) == (3, 0)
