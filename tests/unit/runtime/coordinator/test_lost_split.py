"""Splits whose worker vanished, or whose store failed: how often they are sent again."""

from __future__ import annotations

from pathlib import Path

import pytest

from cortex_dask.io.job.splits import Split
from cortex_dask.runtime.cluster import WorkerLost
from cortex_dask.runtime.coordinator.limits import Ended
from cortex_dask.runtime.coordinator.lost_split import STORAGE_BUDGET, SUSPICIOUS, WORKER_LOST_BUDGET, LostSplits
from cortex_dask.runtime.coordinator.split_queue import SplitQueue
from tests.support.jobs import TestJob, make_job

HANDLER = """
class Handler:
    def __init__(self, config):
        pass
    def handle_batch(self, payload, batch_id):
        return payload
"""


@pytest.fixture
def job(tmp_path: Path) -> TestJob:
    return make_job(tmp_path, HANDLER)


@pytest.fixture
def queue() -> SplitQueue:
    return SplitQueue(iter(()), lambda number: False)


def next_number(queue: SplitQueue) -> int | None:
    split = queue.next(in_order=True)
    return None if split is None else split.number


def test_a_split_is_sent_again_then_alone_then_given_up(job: TestJob, queue: SplitQueue) -> None:
    split = job.splits[0]
    lost = LostSplits(job.directory, queue)
    for _ in range(SUSPICIOUS - 1):
        assert lost.worker_vanished(split, WorkerLost("gone"), has_other=False) is None
        assert next_number(queue) == split.number
    for count in range(1, WORKER_LOST_BUDGET - SUSPICIOUS + 1):
        assert lost.worker_vanished(split, WorkerLost("gone"), has_other=False) is None
        assert next_number(queue) is None
        assert lost.suspects == [split] * count

    record = lost.worker_vanished(split, WorkerLost("gone"), has_other=False)

    assert record is not None
    assert (record.succeeded, record.part) == (0, None)
    assert {failure.cause for failure in record.failures} == {"worker lost"}
    assert f"its worker was lost {WORKER_LOST_BUDGET} times: gone" in record.failures[0].error
    assert len(record.failures) == record.batches > 0
    assert record.failures_file is not None


def test_another_attempt_in_flight_decides(job: TestJob, queue: SplitQueue) -> None:
    lost = LostSplits(job.directory, queue)
    assert lost.worker_vanished(job.splits[0], WorkerLost("gone"), has_other=True) is None
    assert (next_number(queue), lost.workers) == (None, {job.splits[0].number: 1})


def test_a_lost_scheduler_counts_no_worker(job: TestJob, queue: SplitQueue) -> None:
    lost = LostSplits(job.directory, queue)
    for _ in range(WORKER_LOST_BUDGET + 1):
        assert lost.worker_vanished(job.splits[0], WorkerLost("no scheduler", workers=0), has_other=False) is None
        assert next_number(queue) == job.splits[0].number


def test_a_split_waits_longer_after_each_failure_of_a_store_and_ends_the_job_at_last(
    job: TestJob, queue: SplitQueue
) -> None:
    lost = LostSplits(job.directory, queue)
    split = Split(7, (), None, 1, 0)
    for _ in range(STORAGE_BUDGET - 1):
        lost.storage_failed(split, "no space left")
    assert queue.delay is not None
    assert 0 < queue.delay <= 1

    with pytest.raises(Ended, match=f"no space left .split 7 was tried {STORAGE_BUDGET} times; the job can be resumed"):
        lost.storage_failed(split, "no space left")
