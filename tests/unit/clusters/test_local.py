"""The local cluster's threads end with it, also those that hang."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from cortex_dask.clusters import local
from cortex_dask.io.job.records import SplitTask
from cortex_dask.io.job.splits import Split
from tests.faults.jobs import make_job


def test_threads_that_hang_are_not_waited_for_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "_CLOSE_SECONDS", 1.0)
    count, go_on = 30, threading.Event()
    job = make_job(str(tmp_path / "store"), tmp_path / "marks", workers=count)
    cluster = local.LocalThreads()
    cluster.start(job.url, job.settings, lambda event: None, lambda: None)
    cluster.stop("it was stopped")
    ended = []
    try:
        for number in range(count):
            task = SplitTask(job.url, Split(number, (), None, 1, 1), 1, None)
            cluster.submit([(task, lambda outcome: (ended.append(outcome), go_on.wait(60)))])
        began = time.monotonic()
        cluster.close()
        took = time.monotonic() - began
    finally:
        go_on.set()
    assert took < 15, "a second for all of them"
    assert {outcome.kind for outcome in ended} == {"stopped"}
