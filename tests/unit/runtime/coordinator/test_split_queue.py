"""Which split is sent next."""

from __future__ import annotations

from cortex_dask.io.job.splits import Split
from cortex_dask.runtime.coordinator.split_queue import SplitQueue


def split(number: int, size: int = 0) -> Split:
    return Split(number, (), None, 1, size)


def drain(queue: SplitQueue, in_order: bool) -> list[int]:
    numbers = []
    while (item := queue.next(in_order=in_order)) is not None:
        numbers.append(item.number)
    return numbers


def test_in_order_then_longest_first():
    queue = SplitQueue(iter([split(0, 1), split(1, 5), split(2, 9), split(3, 9)]), lambda number: False)
    assert queue.next(in_order=True).number == 0
    assert drain(queue, in_order=False) == [2, 3, 1]
    assert queue.delay is None


def test_what_the_ledger_holds_is_not_sent():
    queue = SplitQueue(iter([split(number) for number in range(6)]), {1, 4}.__contains__)
    assert drain(queue, in_order=False) == [0, 2, 3, 5]


def test_a_split_that_was_put_back_comes_first_when_its_time_has_come():
    queue = SplitQueue(iter([split(0), split(1)]), lambda number: False)
    first = queue.next(in_order=True)
    queue.put_back(first)
    assert drain(queue, in_order=True) == [0, 1]
    queue.put_back(first, delay=3600)
    assert queue.next(in_order=True) is None
    assert 3590 < queue.delay <= 3600


def test_plans_of_many_chunks_are_streamed():
    handed_out = 0

    def splits():
        nonlocal handed_out
        for number in range(45_000):
            handed_out += 1
            yield split(number, number % 7)

    queue = SplitQueue(splits(), lambda number: False)
    assert queue.next(in_order=True).number == 0
    assert handed_out == 20_000
    rest = drain(queue, in_order=False)
    assert sorted(rest) == list(range(1, 45_000))
    assert queue.delay is None
