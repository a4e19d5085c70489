"""Outcomes that travel ahead of their tasks' results."""

from __future__ import annotations

from cortex_dask.clusters.mailbox import MOST_BYTES, Mailbox, letter


def test_what_is_expected_is_kept_until_it_is_taken_once():
    box = Mailbox("ours")
    box.expect(7, 1)
    event = letter(("ours", 7, 1), b"done")
    assert event is not None
    assert box.put(event)
    assert box.take(7, 1) == b"done"
    assert box.take(7, 1) is None


def test_nothing_is_kept_of_other_coordinators_or_of_attempts_that_have_ended():
    box = Mailbox("ours")
    box.expect(7, 1)
    assert box.put(letter(("theirs", 7, 1), b"done"))
    assert box.put(letter(("ours", 7, 2), b"done"))
    assert box.take(7, 1) is None
    assert box.put(letter(("ours", 7, 1), b"late"))
    assert (box._letters, box._expected) == ({}, set())


def test_other_events_are_not_for_here():
    assert not Mailbox("ours").put({"type": "progress", "split": 7})


def test_a_large_outcome_is_left_to_be_fetched():
    assert letter(("ours", 7, 1), b"x" * MOST_BYTES) is not None
    assert letter(("ours", 7, 1), b"x" * (MOST_BYTES + 1)) is None


def test_the_last_word_counts_when_a_scheduler_has_run_an_attempt_twice():
    box = Mailbox("ours")
    box.expect(7, 1)
    box.put(letter(("ours", 7, 1), b"of a worker that has died since"))
    box.put(letter(("ours", 7, 1), b"of the next"))
    assert box.take(7, 1) == b"of the next"
