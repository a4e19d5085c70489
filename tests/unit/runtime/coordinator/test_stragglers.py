"""Which splits are started a second time."""

from __future__ import annotations

from cortex_dask.runtime.coordinator.stragglers import Finished, Running, stragglers

SIBLINGS = [Finished(4.0, 1000)] * 20


def late(*running: Running, finished=SIBLINGS, done=20, total=22) -> list[int]:
    return stragglers(running, finished, done=done, total=total)


def test_over_three_times_the_median_and_not_at_it():
    assert late(Running(1, 12.0, 1000)) == []
    assert late(Running(1, 12.1, 1000)) == [1]


def test_the_median_is_not_moved_by_some_slow_ones():
    finished = [Finished(4.0, 1000)] * 11 + [Finished(400.0, 1000)] * 9
    assert late(Running(1, 12.1, 1000), finished=finished) == [1]


def test_ten_have_to_be_done_in_this_run():
    assert late(Running(1, 99.0, 1000), finished=SIBLINGS[:9], done=9, total=10) == []
    assert late(Running(1, 99.0, 1000), finished=SIBLINGS[:10], done=10, total=11) == [1]
    assert late(Running(1, 99.0, 1000), finished=SIBLINGS[:9], done=900, total=910) == []  # a resumed job


def test_half_of_the_job_has_to_be_done():
    assert late(Running(1, 99.0, 1000), done=49, total=99) == []
    assert late(Running(1, 99.0, 1000), done=50, total=100) == [1]


def test_a_larger_split_may_take_longer_and_a_smaller_one_is_not_expected_to_be_faster():
    assert late(Running(1, 47.0, 4000)) == []
    assert late(Running(1, 49.0, 4000)) == [1]
    assert late(Running(1, 11.0, 10)) == []
    assert late(Running(1, 13.0, 10)) == [1]


def test_without_sizes_times_are_compared_as_they_are():
    finished = [Finished(4.0, 0)] * 20
    assert late(Running(1, 13.0, 0), Running(2, 13.0, 99), Running(3, 11.0, 0), finished=finished) == [1, 2]


def test_what_takes_no_time_is_not_started_again_for_little():
    finished = [Finished(0.001, 1000)] * 20
    assert late(Running(1, 1.9, 1000), finished=finished) == []
    assert late(Running(1, 2.1, 1000), finished=finished) == [1]
    assert late(Running(1, 2.1, 1000), finished=[Finished(0.0, 0)] * 20) == [1]


def test_the_latest_for_its_size_comes_first():
    running = [Running(1, 20.0, 1000), Running(2, 50.0, 4000), Running(3, 30.0, 1000), Running(4, 30.0, 1000)]
    assert late(*running) == [3, 4, 1, 2]
