"""Whether the benchmark's report says rightly which goals a run has reached."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
from goals import goals


def run(engine: str, wall: float, *, workload: str = "W1", memory: int = 100, **more: Any) -> dict[str, Any]:
    return {
        "workload": workload,
        "engine": engine,
        "wall": wall,
        "steady": wall / 2,
        "cpu": wall * 4,
        "memory": memory << 20,
        "rows": 1,
        "error": "",
        **more,
    }


def rows_of(table: str) -> dict[str, str]:
    cells = [line.strip("| ").split(" | ") for line in table.splitlines()[2:]]
    return {f"{workload} {what}": reached.strip(" *") for workload, what, _, _, reached in cells}


@pytest.mark.parametrize(("seconds", "reached"), [(15.0, "reached"), (15.2, "not reached")])
def test_ratios_are_taken_within_a_round(seconds: float, reached: str) -> None:
    # A slow round is slow for both: the ratio of the medians would be another.
    found = rows_of(
        goals([run("floor", 10), run("ours", seconds), run("floor", 100), run("ours", 10 * seconds)], 4, 0.4)
    )

    assert found["W1 whole process, to floor"] == reached


def test_the_best_peer_counts_and_a_failed_run_does_not() -> None:
    runs = [run("floor", 1), run("ours", 2, memory=90), run("daft", 3, memory=80), run("spark", 9, memory=300)]
    failed = run("dask_client", 1, memory=1, error="wrong output")

    found = rows_of(goals([*runs, failed], 4, 0.4))

    assert found["W1 seconds, to the best peer"] == "reached"
    assert found["W1 peak MiB, to the best peer"] == "not reached"


def test_seconds_and_shares() -> None:
    runs = [run("floor", 1, workload="W3"), run("ours", 2.0, workload="W3"), run("ours", 1.2, workload="W5")]
    runs += [run("ours", 10, workload="W6", cpu=35.9)]

    found = rows_of(goals(runs, 4, 0.4))

    assert found["W3 whole process, seconds more than floor"] == "reached"
    assert found["W5 whole process, to `import distributed`"] == "not reached"
    assert found["W6 CPU seconds over 4 x wall"] == "reached", "it is 0.8975, and what is shown is 0.90"
    assert goals([], 4, 0.4) == ""
