"""How many workers a job asks its cluster for."""

from __future__ import annotations

import queue
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cortex_dask.clusters.scaling import Scaling, first_workers, workers_for
from cortex_dask.io.job.settings import HandlerSettings, JobSettings
from cortex_dask.io.job.splits import DatasetInput


def settings(workers: int, least: int | None = None) -> JobSettings:
    handler, dataset = HandlerSettings("class"), DatasetInput(("in",))
    return JobSettings("j", "a", "i", "2026-01-01T00:00:00Z", handler, dataset, workers=workers, min_workers=least)


@given(st.integers(0, 10**6), st.integers(0, 50), st.integers(1, 500), st.integers(1, 8))
def test_there_is_always_one_and_never_more_than_allowed(left: int, least: int, most: int, threads: int) -> None:
    least = min(least, most)
    workers = workers_for(left, least=least, most=most, threads=threads)
    assert 1 <= workers <= -(-most // threads)
    assert workers * threads >= min(max(left, least), most)  # enough slots
    assert (workers - 1) * threads < max(min(max(left, least), most), 1)  # and none too many


@pytest.mark.parametrize(
    ("workers", "least", "threads", "first"), [(8, None, 1, 8), (8, 0, 1, 0), (8, 2, 1, 2), (5, None, 2, 3)]
)
def test_a_cluster_is_made_with_the_least_or_with_all(
    workers: int, least: int | None, threads: int, first: int
) -> None:
    assert first_workers(settings(workers, least), threads) == first


def test_sizes_go_up_at_once_and_down_with_pauses() -> None:
    asked: queue.Queue[int] = queue.Queue()
    scaling = Scaling(settings(8, 0), 1, asked.put)
    try:
        scaling.update(100)
        assert asked.get(timeout=10) == 8
        scaling.update(5)
        assert asked.get(timeout=10) == 5
        scaling.update(4)  # not yet: it was lowered a moment ago
        scaling.update(7)
        assert asked.get(timeout=10) == 7
        assert asked.empty()
    finally:
        scaling.close()


def test_a_cluster_that_refuses_is_asked_again() -> None:
    asked: list[int] = []
    taken = threading.Event()

    def resize(workers: int) -> None:
        asked.append(workers)
        if len(asked) == 1:
            raise OSError("no answer")
        taken.set()

    scaling = Scaling(settings(3, 0), 1, resize, retry_seconds=0.05)
    try:
        scaling.update(2)
        assert taken.wait(10)
        assert asked == [2, 2]
    finally:
        scaling.close()
