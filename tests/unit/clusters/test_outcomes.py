"""Outcomes that arrive as events before their tasks have ended."""

from __future__ import annotations

from typing import Any

from cortex_dask.clusters.outcomes import LARGEST_EVENT, OutcomeEvents, outcome_event


def event(token: str, split: int, attempt: int, outcome: bytes = b"done") -> dict[str, Any]:
    made = outcome_event((token, split, attempt), outcome)
    assert made is not None
    return made


def test_an_expected_outcome_is_kept_until_it_is_popped_once() -> None:
    outcomes = OutcomeEvents("ours")
    outcomes.expect(7, 1)
    assert outcomes.receive(event("ours", 7, 1))
    assert outcomes.pop(7, 1) == b"done"
    assert outcomes.pop(7, 1) is None


def test_outcomes_of_other_coordinators_and_of_attempts_that_have_ended_are_dropped() -> None:
    outcomes = OutcomeEvents("ours")
    outcomes.expect(7, 1)
    assert outcomes.receive(event("theirs", 7, 1))
    assert outcomes.receive(event("ours", 7, 2))
    assert outcomes.pop(7, 1) is None
    assert outcomes.receive(event("ours", 7, 1, b"late"))
    assert outcomes.pop(7, 1) is None
    assert len(outcomes) == 0


def test_other_events_are_no_outcomes() -> None:
    assert not OutcomeEvents("ours").receive({"event": b"[]"})


def test_a_large_outcome_is_left_to_be_fetched() -> None:
    assert outcome_event(("ours", 7, 1), b"x" * LARGEST_EVENT) is not None
    assert outcome_event(("ours", 7, 1), b"x" * (LARGEST_EVENT + 1)) is None


def test_the_last_outcome_counts_when_a_scheduler_has_run_an_attempt_twice() -> None:
    outcomes = OutcomeEvents("ours")
    outcomes.expect(7, 1)
    outcomes.receive(event("ours", 7, 1, b"of a worker that has died since"))
    outcomes.receive(event("ours", 7, 1, b"of the next"))
    assert outcomes.pop(7, 1) == b"of the next"
