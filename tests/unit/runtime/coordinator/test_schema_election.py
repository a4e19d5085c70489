"""The output schema comes from the first split in input order that has output."""

from __future__ import annotations

from cortex_dask.runtime.coordinator.schema_election import SchemaElection


def election(done: set[int] | None = None) -> SchemaElection:
    return SchemaElection(needed=True, is_done=(done or set()).__contains__)


def test_one_split_runs_until_the_schema_is_decided():
    state = election()
    assert state.limit_window(5) == 1
    state.propose(0, "first")
    assert state.winner() == "first"
    state.decide("first")
    assert (state.limit_window(5), state.is_open, state.schema) == (5, False, "first")


def test_a_first_batch_without_output_releases_the_others_but_their_proposals_wait():
    state = election()
    state.report_no_output()
    assert state.limit_window(5) == 5
    state.propose(2, "third")
    assert state.winner() is None
    state.finish(0)
    state.propose(1, "second")
    assert state.winner() == "second"


def test_timing_does_not_matter():
    late = election()
    late.report_no_output()
    for split in (3, 1, 2):
        late.propose(split, str(split))
    assert late.winner() is None
    late.finish(0)
    assert late.winner() == "1"


def test_splits_that_the_ledger_holds_have_no_say():
    state = election({0, 1})
    state.propose(2, "third")
    assert state.winner() == "third"


def test_without_output_nothing_is_held_back():
    state = SchemaElection(needed=False, is_done=lambda split: False)
    assert (state.is_open, state.limit_window(5), state.winner()) == (False, 5, None)
