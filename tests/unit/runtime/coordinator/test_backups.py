"""When stragglers are looked for."""

from __future__ import annotations

from cortex_dask.io.job.splits import Split
from cortex_dask.runtime.coordinator.window import Backups, Window


def late_window(late: int) -> Window:
    """A window in which twenty splits of a second have ended, and some run since the time 0."""
    window = Window()
    slow = [window.open(Split(100 + number, (), None, 1, 1), 0.0) for number in range(late)]
    window.advance(late + 1, 0.0)
    for number in range(20):
        attempt = window.open(Split(number, (), None, 1, 1), float(number))
        window.advance(late + 1, float(number))
        window.close(attempt, number + 1.0, done=True)
        window.settle(number)
    assert len(window) == len(slow)
    return window


def numbers(splits: list[Split]) -> list[int]:
    return [split.number for split in splits]


def take(backups: Backups, free: int, now: float, lost: tuple[int, ...] = ()) -> list[int]:
    return numbers(backups.take(free, now, done=20, total=23, lost=lost))


def test_as_many_as_there_are_free_slots_and_the_others_wait():
    backups = Backups(late_window(3), workers=4)
    assert take(backups, 1, 30.0) == [100]
    assert numbers(backups.waiting) == [101, 102]
    assert take(backups, 0, 31.5) == []
    assert numbers(backups.waiting) == [100, 101, 102]  # nobody has opened the second attempt at 100


def test_no_more_often_than_once_a_second():
    backups = Backups(late_window(2), workers=4)
    assert take(backups, 1, 30.0) == [100]
    assert take(backups, 1, 30.9) == []
    assert take(backups, 1, 31.0) == [100]


def test_never_on_one_slot():
    backups = Backups(late_window(1), workers=1)
    assert take(backups, 5, 30.0) == []
    assert backups.waiting == []


def test_never_while_a_store_fails():
    backups = Backups(late_window(1), workers=4)
    backups.storage_failed(30.0)
    assert take(backups, 5, 89.0) == []
    assert take(backups, 5, 90.0) == [100]


def test_never_what_has_lost_a_worker():
    backups = Backups(late_window(2), workers=4)
    assert take(backups, 5, 30.0, lost=(100,)) == [101]
