"""What is in flight, when it started, which attempt decides about a split, and which splits get a second one."""

from __future__ import annotations

from cortex_dask.io.job.splits import Split
from cortex_dask.runtime.coordinator.window import Backups, Window


def split(number: int, size: int = 100) -> Split:
    return Split(number, (), None, 1, size)


def test_attempts_are_numbered_until_the_split_is_done():
    window = Window()
    first = window.add(split(7), 0.0)
    assert (first.number, len(window), 7 in window) == (1, 1, True)
    assert window.remove(first, 1.0, done=False)
    assert not window
    second = window.add(split(7), 0.0)
    assert second.number == 2
    assert window.remove(second, 1.0, done=True)
    assert not window.mark_done(7)
    assert window.add(split(7), 0.0).number == 1


def test_what_was_sent_first_begins_first_and_no_more_than_there_are_slots():
    window = Window()
    attempts = [window.add(split(number), 9.0) for number in range(4)]
    window.assign_slots(2, 10.0)
    assert [attempt.started for attempt in attempts] == [10.0, 10.0, None, None]
    window.assign_slots(2, 11.0)
    assert attempts[2].started is None
    window.remove(attempts[1], 12.0, done=True)
    assert [attempt.started for attempt in attempts] == [10.0, 10.0, 12.0, None]
    window.remove(attempts[3], 13.0, done=False)  # it has waited all the time
    assert len(window) == 2
    window.assign_slots(9, 14.0)
    assert attempts[2].started == 12.0


def test_one_of_two_attempts_does_not_decide_about_the_split_unless_it_is_the_last():
    window = Window()
    first, backup = window.add(split(3), 0.0), window.add(split(3), 0.0)
    assert backup.number == 2
    assert not window.remove(first, 1.0, done=False)  # lost: the other one is still there
    assert window.remove(backup, 2.0, done=False)
    assert 3 not in window


def test_an_attempt_after_the_winner_decides_nothing():
    window = Window()
    first, backup = window.add(split(3), 0.0), window.add(split(3), 0.0)
    window.remove(backup, 1.0, done=True)
    assert window.mark_done(3)
    assert window.is_done(3)
    assert window.mark_done(3)  # when it has got into the ledger
    assert not window.remove(first, 2.0, done=False)
    assert not window.is_done(3)
    assert not window.mark_done(3)


def filled(count: int) -> Window:
    """A window through which so many splits have gone, of a second each."""
    window = Window()
    for number in range(count):
        attempt = window.add(split(number), float(number))
        window.assign_slots(1, float(number))
        window.remove(attempt, number + 1.0, done=True)
        window.mark_done(number)
    return window


def test_a_straggler_gets_one_more_attempt_and_not_two():
    window = filled(20)
    slow = window.add(split(20), 20.0)
    window.assign_slots(2, 20.0)
    late = {"done": 20, "total": 21}
    assert list(window.stragglers(22.9, **late)) == []
    assert list(window.stragglers(23.1, **late)) == [slow.split]
    backup = window.add(slow.split, 24.0)
    window.assign_slots(2, 24.0)
    assert list(window.stragglers(99.0, **late)) == []
    window.remove(backup, 99.0, done=False)  # it was lost: the split may have another
    assert list(window.stragglers(99.0, **late)) == [slow.split]
    window.mark_done(20)
    assert list(window.stragglers(99.0, **late)) == []


def test_what_waits_for_a_slot_is_no_straggler():
    window = filled(20)
    window.add(split(20), 20.0)
    window.add(split(21), 20.0)
    window.assign_slots(1, 20.0)
    assert [item.number for item in window.stragglers(99.0, done=20, total=22)] == [20]


def test_the_time_of_what_failed_says_nothing():
    window = filled(9)
    failed = window.add(split(9), 9.0)
    window.assign_slots(1, 9.0)
    window.remove(failed, 10.0, done=False)
    window.add(split(10), 10.0)
    window.assign_slots(1, 10.0)
    assert list(window.stragglers(99.0, done=9, total=11)) == []


def test_many_that_end_at_once_are_counted_although_they_were_not_seen_to_begin():
    window = Window()
    attempts = [window.add(split(number), 0.0) for number in range(12)]
    window.assign_slots(2, 0.0)
    for attempt in reversed(attempts):
        window.remove(attempt, 1.0, done=True)
        window.mark_done(attempt.split.number)
    slow = window.add(split(12), 1.0)
    window.assign_slots(2, 1.0)
    assert list(window.stragglers(4.1, done=12, total=13)) == [slow.split]


def late_window(late: int) -> Window:
    """A window in which twenty splits of a second have ended, and some run since the time 0."""
    window = Window()
    slow = [window.add(Split(100 + number, (), None, 1, 1), 0.0) for number in range(late)]
    window.assign_slots(late + 1, 0.0)
    for number in range(20):
        attempt = window.add(Split(number, (), None, 1, 1), float(number))
        window.assign_slots(late + 1, float(number))
        window.remove(attempt, number + 1.0, done=True)
        window.mark_done(number)
    assert len(window) == len(slow)
    return window


def numbers(splits: list[Split]) -> list[int]:
    return [split.number for split in splits]


def due(backups: Backups, free: int, now: float, lost: tuple[int, ...] = ()) -> list[int]:
    return numbers(backups.due(free, now, done=20, total=23, lost=lost))


def test_as_many_stragglers_start_as_there_are_free_slots_and_the_others_wait():
    backups = Backups(late_window(3), workers=4)
    assert due(backups, 1, 30.0) == [100]
    assert numbers(backups.waiting) == [101, 102]
    assert due(backups, 0, 31.5) == []
    assert numbers(backups.waiting) == [100, 101, 102]  # the second attempt at 100 has not been added


def test_stragglers_are_looked_for_once_a_second():
    backups = Backups(late_window(2), workers=4)
    assert due(backups, 1, 30.0) == [100]
    assert due(backups, 1, 30.9) == []
    assert due(backups, 1, 31.0) == [100]


def test_no_second_attempt_on_one_slot():
    backups = Backups(late_window(1), workers=1)
    assert due(backups, 5, 30.0) == []
    assert backups.waiting == []


def test_no_second_attempt_while_a_store_fails():
    backups = Backups(late_window(1), workers=4)
    backups.pause(30.0)
    assert due(backups, 5, 89.0) == []
    assert due(backups, 5, 90.0) == [100]


def test_no_second_attempt_at_a_split_that_has_lost_a_worker():
    backups = Backups(late_window(2), workers=4)
    assert due(backups, 5, 30.0, lost=(100,)) == [101]
