"""Numbers, tables and near misses as text."""

from __future__ import annotations

import pytest

from cortex_dask import formatting


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.04, "0.0 s"),
        (9.94, "9.9 s"),
        (59.7, "1 min 0 s"),
        (3599, "59 min 59 s"),
        (86400 * 2 + 3600, "2 d 1 h"),
        (None, "-"),
    ],
)
def test_durations(seconds: float | None, words: str) -> None:
    assert formatting.duration(seconds) == words


def test_nouns_agree_with_their_number() -> None:
    assert [formatting.plural(number, "file") for number in (0, 1, 1200)] == ["0 files", "1 file", "1,200 files"]
    assert formatting.plural(2, "batch", "batches") == "2 batches"


def test_a_table_has_aligned_columns_and_no_spaces_at_the_end_of_lines() -> None:
    assert formatting.table([["NAME", "ROWS"], ["a", "5"], ["longer", ""]]) == "NAME    ROWS\na       5\nlonger"
    assert formatting.table([]) == ""


def test_the_nearest_name_is_suggested() -> None:
    assert formatting.did_you_mean("batch-size", ["batch_size", "workers"]) == "did you mean batch_size? "
    assert formatting.did_you_mean("x", ["batch_size"]) == ""
