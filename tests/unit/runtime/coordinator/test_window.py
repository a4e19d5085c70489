"""What is in flight, when it began, and who decides about a split with two attempts."""

from __future__ import annotations

from cortex_dask.io.job.splits import Split
from cortex_dask.runtime.coordinator.window import Window


def split(number: int, size: int = 100) -> Split:
    return Split(number, (), None, 1, size)


def test_attempts_are_numbered_until_the_split_is_settled():
    window = Window()
    first = window.open(split(7), 0.0)
    assert (first.number, len(window), 7 in window) == (1, 1, True)
    assert window.close(first, 1.0, done=False)
    assert not window
    second = window.open(split(7), 0.0)
    assert second.number == 2
    assert window.close(second, 1.0, done=True)
    assert not window.settle(7)
    assert window.open(split(7), 0.0).number == 1


def test_what_was_sent_first_begins_first_and_no_more_than_there_are_slots():
    window = Window()
    attempts = [window.open(split(number), 9.0) for number in range(4)]
    window.advance(2, 10.0)
    assert [attempt.began for attempt in attempts] == [10.0, 10.0, None, None]
    window.advance(2, 11.0)
    assert attempts[2].began is None
    window.close(attempts[1], 12.0, done=True)
    assert [attempt.began for attempt in attempts] == [10.0, 10.0, 12.0, None]
    window.close(attempts[3], 13.0, done=False)  # it has waited all the time
    assert len(window) == 2
    window.advance(9, 14.0)
    assert attempts[2].began == 12.0


def test_one_of_two_attempts_does_not_decide_about_the_split_unless_it_is_the_last():
    window = Window()
    first, backup = window.open(split(3), 0.0), window.open(split(3), 0.0)
    assert backup.number == 2
    assert not window.close(first, 1.0, done=False)  # lost: the other one is still there
    assert window.close(backup, 2.0, done=False)
    assert 3 not in window


def test_what_comes_after_the_winner_decides_nothing():
    window = Window()
    first, backup = window.open(split(3), 0.0), window.open(split(3), 0.0)
    window.close(backup, 1.0, done=True)
    assert window.settle(3)
    assert window.is_settled(3)
    assert window.settle(3)  # when it has got into the ledger
    assert not window.close(first, 2.0, done=False)
    assert not window.is_settled(3)
    assert not window.settle(3)


def filled(count: int) -> Window:
    """A window through which so many splits have gone, of a second each."""
    window = Window()
    for number in range(count):
        attempt = window.open(split(number), float(number))
        window.advance(1, float(number))
        window.close(attempt, number + 1.0, done=True)
        window.settle(number)
    return window


def test_a_straggler_gets_one_more_attempt_and_not_two():
    window = filled(20)
    slow = window.open(split(20), 20.0)
    window.advance(2, 20.0)
    late = {"done": 20, "total": 21}
    assert list(window.stragglers(22.9, **late)) == []
    assert list(window.stragglers(23.1, **late)) == [slow.split]
    backup = window.open(slow.split, 24.0)
    window.advance(2, 24.0)
    assert list(window.stragglers(99.0, **late)) == []
    window.close(backup, 99.0, done=False)  # it was lost: the split may have another
    assert list(window.stragglers(99.0, **late)) == [slow.split]
    window.settle(20)
    assert list(window.stragglers(99.0, **late)) == []


def test_what_waits_for_a_slot_is_no_straggler():
    window = filled(20)
    window.open(split(20), 20.0)
    window.open(split(21), 20.0)
    window.advance(1, 20.0)
    assert [item.number for item in window.stragglers(99.0, done=20, total=22)] == [20]


def test_the_time_of_what_failed_says_nothing():
    window = filled(9)
    failed = window.open(split(9), 9.0)
    window.advance(1, 9.0)
    window.close(failed, 10.0, done=False)
    window.open(split(10), 10.0)
    window.advance(1, 10.0)
    assert list(window.stragglers(99.0, done=9, total=11)) == []


def test_many_that_end_at_once_are_counted_although_they_were_not_seen_to_begin():
    window = Window()
    attempts = [window.open(split(number), 0.0) for number in range(12)]
    window.advance(2, 0.0)
    for attempt in reversed(attempts):
        window.close(attempt, 1.0, done=True)
        window.settle(attempt.split.number)
    slow = window.open(split(12), 1.0)
    window.advance(2, 1.0)
    assert list(window.stragglers(4.1, done=12, total=13)) == [slow.split]
