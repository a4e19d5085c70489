"""What is to be reached, and whether a run of the benchmark has reached it."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from engines import ENGINES

__all__ = ["goals"]

Run = Mapping[str, Any]

#: Seconds of ours over those of the floor, at most, for the whole process.
WALL = {"W1": 1.5, "W2": 1.15}
#: The same once every worker is at work.
STEADY = {"W1": 1.10, "W2": 1.05, "W3": 1.05, "W4": 1.05, "W6": 1.05}  # W5 is over before all are
#: The share of the time that is spent in computing, of the processors that could be busy, at least.
BUSY = {"W6": 0.90}
#: Seconds at most.
SECONDS = {"W4": 11.0}
#: The same in multiples of what ``import distributed`` takes on the machine: 1.1 s where that takes 0.4 s.
IMPORTS = {"W5": 2.75}
#: Seconds more than the floor, at most.
MORE = {"W3": 1.0}


def goals(results: Sequence[Run], busy: int, distributed: float) -> str:
    """Return a table with a row for each goal of the workloads that were run.

    Parameters
    ----------
    results : sequence of dict
        The runs, as ``run.py`` writes them.
    busy : int
        How many processors a run could keep busy: its workers, or the machine's cores where those are fewer.
    distributed : float
        Seconds that ``import distributed`` takes on the machine.
    """
    names = dict.fromkeys(run["workload"] for run in results)
    rows = [
        row
        for name in names
        for row in _rows(name, [run for run in results if run["workload"] == name], busy, distributed)
    ]
    if not rows:
        return ""
    head = ["| | what | goal | here | |", "| --- | --- | ---: | ---: | --- |"]
    return "\n".join([*head, *rows]) + "\n"


def _rows(name: str, runs: Sequence[Run], busy: int, distributed: float) -> Iterator[str]:
    ours = [run for run in runs if run["engine"] == "ours"]
    floor = [run for run in runs if run["engine"] == "floor"]
    pairs = [(run, base) for run, base in zip(ours, floor, strict=False) if not run["error"] and not base["error"]]
    good = [run for run in ours if not run["error"]]
    if not good:
        return
    wall = statistics.median(run["wall"] for run in good)
    if pairs and name in WALL:
        ratio = statistics.median(run["wall"] / base["wall"] for run, base in pairs)
        yield _row(name, "whole process, to floor", WALL[name], ratio)
    if pairs and name in MORE:
        more = statistics.median(run["wall"] - base["wall"] for run, base in pairs)
        yield _row(name, "whole process, seconds more than floor", MORE[name], more)
    if name in SECONDS:
        yield _row(name, "whole process, seconds", SECONDS[name], wall)
    if name in IMPORTS:
        yield _row(name, "whole process, to `import distributed`", IMPORTS[name], wall / distributed)
    if name in BUSY:
        share = statistics.median(run["cpu"] / (busy * run["wall"]) for run in good)
        yield _row(name, f"CPU seconds over {busy} x wall", BUSY[name], share, least=True)
    timed = [(run, base) for run, base in pairs if run["steady"] is not None and base["steady"]]
    if timed and name in STEADY:
        ratio = statistics.median(run["steady"] / base["steady"] for run, base in timed)
        yield _row(name, "steady, to floor", STEADY[name], ratio)
    yield from _ahead(name, runs, "wall", "seconds", wall, lambda value: f"{value:.2f}")
    memory = statistics.median(run["memory"] for run in good)
    yield from _ahead(name, runs, "memory", "peak MiB", memory, lambda value: f"{value / 2**20:.0f}")


def _ahead(
    name: str, runs: Sequence[Run], key: str, what: str, ours: float, show: Callable[[float], str]
) -> Iterator[str]:
    """Yield the row about the best of the peers."""
    peers = {
        engine: statistics.median(found)
        for engine in ENGINES
        if ENGINES[engine].is_peer
        and (found := [run[key] for run in runs if run["engine"] == engine and not run["error"]])
    }
    if peers:
        best = min(peers, key=lambda engine: peers[engine])
        goal = f"below {show(peers[best])} ({ENGINES[best].title})"
        reached = "reached" if ours < peers[best] else "**not reached**"
        yield f"| {name} | {what}, to the best peer | {goal} | {show(ours)} | {reached} |"


def _row(name: str, what: str, goal: float, here: float, *, least: bool = False) -> str:
    reached = round(here, 2) >= goal if least else round(here, 2) <= goal
    word = "reached" if reached else "**not reached**"
    return f"| {name} | {what} | {'at least' if least else 'at most'} {goal:.2f} | {here:.2f} | {word} |"
