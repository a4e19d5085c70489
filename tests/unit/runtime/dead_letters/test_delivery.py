"""Failures delivered to a target while a job runs."""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

from cortex_dask.io.job.records import BatchFailure, SplitRecord
from cortex_dask.runtime.dead_letters.delivery import Delivery, make_delivery
from cortex_dask.runtime.dead_letters.target import DeadLetterTarget
from tests.support.failed_job import FailedJob


class GatedTarget(DeadLetterTarget):
    """A target that delivers nothing before its gate is open, and then everything."""

    def __init__(self, expected: int) -> None:
        super().__init__("a gated target")
        self.started, self.gate, self.complete = threading.Event(), threading.Event(), threading.Event()
        self.delivered: list[str] = []
        self._expected = expected

    def receipt_key(self, file: str, batch_id: str) -> str:
        return batch_id

    def check(self) -> None:
        pass

    def deliver(self, files: Mapping[str, Collection[str]]) -> Iterator[list[str]]:
        self.started.set()
        assert self.gate.wait(60)
        for ids in files.values():
            self.delivered += ids
            yield list(ids)
        if len(self.delivered) == self._expected:
            self.complete.set()


def test_records_that_queue_up_behind_a_slow_target_are_all_delivered_while_the_job_runs(tmp_path: Path) -> None:
    target = GatedTarget(expected=351)
    delivery = Delivery(FailedJob(tmp_path).directory, target)
    for number in range(351):
        failure = BatchFailure(0, f"batch-{number}", 10, 3, "exception", "ValueError: no")
        delivery.add(SplitRecord(number, "a", None, 1, 0, (failure,), f"failures/{number:06d}-a.jsonl"))
        assert target.started.wait(60)
    target.gate.set()
    assert target.complete.wait(60)
    assert target.delivered == [f"batch-{number}" for number in range(351)]
    delivery.close()


def test_a_job_without_a_target_has_no_delivery(tmp_path: Path) -> None:
    job = FailedJob(tmp_path)
    assert make_delivery(job.directory, job.settings) is None
