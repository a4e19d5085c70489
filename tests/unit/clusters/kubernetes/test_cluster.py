"""Which workers are removed when a cluster on Kubernetes shrinks."""

from __future__ import annotations

import pytest

from cortex_dask.clusters.kubernetes.cluster import choose_workers_to_remove


@pytest.mark.parametrize(
    ("known", "busy", "count", "chosen"),
    [
        ({"a": "1", "b": "2", "c": "3"}, set(), 1, ["c"]),
        ({"a": "1", "b": "2", "c": "3"}, {"3"}, 2, ["b", "a"]),
        ({"a": "1", "b": "2", "c": "3"}, {"1", "2", "3"}, 2, []),
        ({"a": "1", "c": "3"}, {"1"}, 1, ["b"]),
        ({"a": "1", "c": "3"}, {"1"}, 3, ["b", "c"]),
    ],
)
def test_absent_workers_go_before_idle_ones_and_busy_ones_stay(
    known: dict[str, str], busy: set[str], count: int, chosen: list[str]
) -> None:
    assert choose_workers_to_remove(["a", "b", "c"], known, busy, count) == chosen
