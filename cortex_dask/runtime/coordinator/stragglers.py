"""Which splits are started a second time near the end of a job: a pure function of what runs and what has ended.

The rule is that of MapReduce's backup tasks (Dean and Ghemawat, 2004, section 3.6): when most of the work is done, what
runs far longer than its siblings is sent to another worker as well, and the first to commit wins.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

#: The least number of splits that have ended: the median of fewer says little.
LEAST_DONE = 10
#: The least share of the job that is done; before that, free slots have other splits to run.
LEAST_SHARE = 0.5
#: A split is a straggler when it runs for more than this many times what one of its size takes,
TIMES = 3.0
#: and for at least so many seconds: a second attempt would not save time on less.
LEAST_SECONDS = 2.0


@dataclass(frozen=True, slots=True)
class Finished:
    """A split that has ended."""

    seconds: float
    size: int  # bytes to read, as planned; 0: unknown


@dataclass(frozen=True, slots=True)
class Running:
    """A split that runs, once."""

    split: int
    seconds: float  # since it began
    size: int  # as above


def stragglers(running: Iterable[Running], finished: Sequence[Finished], *, done: int, total: int) -> list[int]:
    """Return the numbers of the splits to start a second time, the latest first.

    ``running`` are the splits with one attempt, ``finished`` those that have ended in this run of the job, or the last
    of very many; of the ``total`` splits of the job ``done`` are done.

    >>> siblings = [Finished(4.0, 1000)] * 20
    >>> stragglers([Running(7, 13.0, 1000), Running(8, 13.0, 4000)], siblings, done=20, total=22)
    [7]
    """
    if len(finished) < LEAST_DONE or done < LEAST_SHARE * total:
        return []
    usual = statistics.median(item.seconds for item in finished)
    size = statistics.median(item.size for item in finished)
    late = []
    for item in running:
        # A larger split may take longer. A smaller one is not taken to be faster: it has to start and to end as well.
        expected = usual * max(1.0, item.size / size) if size > 0 else usual
        if item.seconds > max(TIMES * expected, LEAST_SECONDS):
            late.append((item.seconds / max(expected, 1e-9), item.split))
    return [split for _, split in sorted(late, key=lambda pair: (-pair[0], pair[1]))]
