"""A simulated job on 10 to 10,000 workers: how efficient it is, what it costs, and which part becomes the limit.

    python benchmarks/simulate.py                               # all tables
    python benchmarks/simulate.py size --seconds 10 --splits 100000
    python benchmarks/simulate.py size --job s3://bucket/jobs/api/20260101-…    # with the split times of a real job

The window, the order of the splits, the rule for stragglers and the time for which records are gathered are the
engine's own code; workers, scheduler, ledger and store are models with the parameters of :class:`Setting`, whose
defaults were measured (`docs/performance.md`). A run is a pure function of its setting and its seed.
"""

from __future__ import annotations

import argparse
import heapq
import math
import random
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from types import SimpleNamespace

from cortex_dask.io.job.splits import Split
from cortex_dask.runtime.cluster import Cluster
from cortex_dask.runtime.coordinator.committer import PUBLISHERS, SEGMENT_RECORDS, gather_seconds
from cortex_dask.runtime.coordinator.split_queue import SplitQueue
from cortex_dask.runtime.coordinator.window import Attempt, Window

BACKUP_CHECK = 1.0  # seconds, as in the coordinator
READY = {"first_worker": 0.0, "per_second": 1e9, "load": 0.0}  # all workers are there from the first moment
NEVER = 20  # a job that has taken an hour and so many times its share of the work does not end


@dataclass(frozen=True)
class Setting:
    """What is simulated. Times are in seconds."""

    workers: int = 100  # with one slot each
    splits: int = 10_000
    seconds: float = 10.0  # the median split
    spread: float = 0.3  # sigma of the logarithm of their sizes, which the planner knows
    noise: float = 0.1  # and of what it does not know
    measured: tuple[float, ...] = ()  # times of real splits, to draw from instead
    first_worker: float = 30.0  # until the cluster has its first worker
    per_second: float = 20.0  # workers that come up in a second after that
    load: float = 10.0  # of a handler
    loss_per_hour: float = 0.0  # of a worker
    replace: float = 60.0  # until a lost worker is replaced
    slow_share: float = 0.0  # of the attempts: on a host that is ill, a disk that fails, a neighbour that is loud
    slow_factor: float = 10.0  # times longer; infinite: it hangs
    backups: bool = True  # whether stragglers are started a second time
    tasks_per_second: float = 900.0  # that one scheduler and one coordinator do
    append: float = 0.05  # to write a segment of the ledger
    copy: float = 0.05  # to put a part in place on an object store; 0: nothing is to be done
    publishers: int = PUBLISHERS
    price: float = 0.10  # of a worker's hour
    seed: int = 0


@dataclass
class Result:
    """What came of it."""

    setting: Setting
    work: float = 0.0  # seconds of handling that count
    makespan: float = math.inf
    alive: float = 0.0  # seconds of workers that are paid for
    attempts: int = 0
    backups: int = 0
    losses: int = 0
    committed: dict[int, int] = field(default_factory=dict)  # by split: how often its record was taken
    busy: dict[str, float] = field(default_factory=dict)  # share of the makespan for which a part was at work
    segments: int = 0
    lag: float = 0.0  # the longest time between the end of an attempt and its place in the ledger

    @property
    def efficiency(self) -> float:
        """Handling as a share of what all workers could have done from the first moment to the last."""
        return self.work / (self.setting.workers * self.makespan)

    @property
    def rate(self) -> float:
        """Splits a second."""
        return self.setting.splits / self.makespan

    @property
    def cost(self) -> float:
        """What the workers cost."""
        return self.alive / 3600 * self.setting.price

    @property
    def ideal_cost(self) -> float:
        """What the handling alone would."""
        return self.work / 3600 * self.setting.price

    @property
    def limit(self) -> str:
        """The part that was busy nearly all the time, if there is one."""
        name = max(self.busy, key=lambda part: self.busy[part], default="")
        return name if name and self.busy[name] > 0.85 else "-"


class Server:
    """A part that does one thing (or some) at a time, in the order in which they come."""

    def __init__(self, lines: int = 1) -> None:
        self._free = [0.0] * lines
        self.busy = 0.0

    def serve(self, now: float, seconds: float) -> float:
        """Return when something that comes now has been done."""
        ended = max(now, heapq.heappop(self._free)) + seconds
        heapq.heappush(self._free, ended)
        self.busy += seconds / len(self._free)
        return ended

    def backlog(self, now: float) -> float:
        """Return for how long something that comes now would wait."""
        return max(0.0, self._free[0] - now)


@dataclass(eq=False)
class Worker:
    """One slot."""

    attempt: Attempt | None = None
    epoch: int = 0  # grows when what it does is taken from it


class Simulation:
    """One run."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.result = Result(setting)
        self._random = random.Random(setting.seed)
        self._events: list[tuple[float, int, object, tuple[object, ...]]] = []
        self._order = 0
        self._sizes = self._draw_sizes()
        self._times = [size * math.exp(self._random.gauss(0, setting.noise)) for size in self._sizes]
        splits = (Split(number, (), None, 1, int(size * 1e6)) for number, size in enumerate(self._sizes))
        self._splits = SplitQueue(splits, self._is_committed)
        self._window = Window()
        self._scheduler, self._ledger = Server(), Server()
        self._publisher = Server(setting.publishers)
        self._idle: deque[Worker] = deque()
        self._alive = 0
        self._changed = 0.0  # when the number of workers last did
        self._queue: deque[Attempt] = deque()  # at the scheduler, waiting for a worker
        self._where: dict[Attempt, Worker] = {}
        self._records: list[tuple[float, Attempt]] = []  # to be appended
        self._gathering = False
        self._next_check = 0.0

    def run(self) -> Result:
        """Run until every split is in the ledger."""
        setting = self.setting
        for number in range(setting.workers):
            self._at(setting.first_worker + number / setting.per_second + setting.load, self._come, Worker())
        limit = 3600 + NEVER * sum(self._times) / setting.workers
        now = 0.0
        while len(self.result.committed) < setting.splits and self._events:
            now, _, call, arguments = heapq.heappop(self._events)
            if now > limit:
                return self.result
            call(now, *arguments)  # type: ignore[operator]
        if len(self.result.committed) == setting.splits:
            self._end(now)
        return self.result

    def _end(self, now: float) -> None:
        result = self.result
        self._count_alive(now)
        now += self._publisher.backlog(now)
        result.makespan = now
        result.work = sum(self._times)
        servers = {"scheduler": self._scheduler, "ledger": self._ledger, "copies": self._publisher}
        result.busy = {name: server.busy / now for name, server in servers.items()}

    def _draw_sizes(self) -> list[float]:
        setting, draw = self.setting, self._random
        if setting.measured:
            return draw.choices(setting.measured, k=setting.splits)
        return [setting.seconds * math.exp(draw.gauss(0, setting.spread)) for _ in range(setting.splits)]

    def _is_committed(self, split: int) -> bool:
        return split in self.result.committed

    def _at(self, time: float, call: object, *arguments: object) -> None:
        self._order += 1
        heapq.heappush(self._events, (time, self._order, call, arguments))

    # workers --------------------------------------------------------------------------------------------------------

    def _come(self, now: float, worker: Worker) -> None:
        self._count_alive(now)
        self._alive += 1
        self._idle.append(worker)
        self._fill(now)
        self._start(now)

    def _count_alive(self, now: float) -> None:
        self.result.alive += self._alive * (now - self._changed)
        self._changed = now

    def _start(self, now: float) -> None:
        """Give idle workers what waits."""
        setting, draw = self.setting, self._random
        while self._idle and self._queue:
            worker, attempt = self._idle.popleft(), self._queue.popleft()
            worker.attempt = attempt
            self._where[attempt] = worker
            self.result.attempts += 1
            seconds = self._times[attempt.split.number]
            if setting.slow_share and draw.random() < setting.slow_share:
                seconds *= setting.slow_factor
            life = draw.expovariate(setting.loss_per_hour / 3600) if setting.loss_per_hour else math.inf
            if life < seconds:
                self._at(now + life, self._lose, worker, worker.epoch)
            elif seconds < math.inf:
                self._at(now + seconds, self._finish, worker, worker.epoch)

    def _finish(self, now: float, worker: Worker, epoch: int) -> None:
        if epoch != worker.epoch:
            return
        attempt = self._release(worker)
        self._idle.append(worker)
        self._start(now)
        self._at(self._scheduler.serve(now, self._task_seconds / 2), self._ended, attempt, True)

    def _lose(self, now: float, worker: Worker, epoch: int) -> None:
        if epoch != worker.epoch:
            return
        attempt = self._release(worker)
        self._count_alive(now)
        self._alive -= 1
        self.result.losses += 1
        self._at(now + self.setting.replace + self.setting.load, self._come, worker)
        self._at(now, self._ended, attempt, False)

    def _release(self, worker: Worker) -> Attempt:
        attempt, worker.attempt = worker.attempt, None
        worker.epoch += 1
        assert attempt is not None
        del self._where[attempt]
        return attempt

    # the coordinator ------------------------------------------------------------------------------------------------

    @property
    def _task_seconds(self) -> float:
        return 1 / self.setting.tasks_per_second

    def _fill(self, now: float) -> None:
        """Keep the window full; at the end, look for stragglers."""
        slots = self._alive
        ahead = Cluster.queue_depth(SimpleNamespace(slots=lambda: slots))  # type: ignore[arg-type]
        while len(self._window) < slots + ahead:
            split = self._splits.next(in_order=False)
            if split is None:
                break
            self._send(now, split)
        self._window.assign_slots(slots, now)
        if len(self._window) < slots and now >= self._next_check:
            self._next_check = now + BACKUP_CHECK
            self._at(self._next_check, self._look)
            if self.setting.backups and self.setting.workers > 1:
                done = len(self.result.committed)
                late = list(self._window.stragglers(now, done=done, total=self.setting.splits))
                for split in late[: slots - len(self._window)]:
                    self.result.backups += 1
                    self._send(now, split)
                self._window.assign_slots(slots, now)

    def _look(self, now: float) -> None:
        self._fill(now)

    def _send(self, now: float, split: Split) -> None:
        attempt = self._window.add(split, now)
        self._at(self._scheduler.serve(now, self._task_seconds / 2), self._arrive, attempt)

    def _arrive(self, now: float, attempt: Attempt) -> None:
        self._queue.append(attempt)
        self._start(now)

    def _ended(self, now: float, attempt: Attempt, done: bool) -> None:
        number = attempt.split.number
        undecided = self._window.remove(attempt, now, done=done)
        if done:
            self._window.mark_done(number)
            self._records.append((now, attempt))
            self._gather(now)
        elif undecided and not self._is_committed(number):
            self._splits.put_back(attempt.split)
        self._fill(now)

    # the ledger -----------------------------------------------------------------------------------------------------

    def _gather(self, now: float) -> None:
        if self._gathering or not self._records:
            return
        self._gathering = True
        # Nobody waits for more where nothing more is to come.
        pause = gather_seconds(now) if self._window and len(self._records) < SEGMENT_RECORDS else 0.0
        self._at(now + pause, self._append)

    def _append(self, now: float) -> None:
        segment, self._records = self._records[:SEGMENT_RECORDS], self._records[SEGMENT_RECORDS:]
        self.result.segments += 1
        # A store that copies more slowly than parts come makes the committer wait, and so the job.
        start = now + max(0.0, self._publisher.backlog(now) - self.setting.copy * 10_000 / self.setting.publishers)
        self._at(self._ledger.serve(start, self.setting.append), self._appended, segment)

    def _appended(self, now: float, segment: list[tuple[float, Attempt]]) -> None:
        for ended, attempt in segment:
            number = attempt.split.number
            if number in self.result.committed:
                continue  # it came too late
            self.result.committed[number] = 1
            self.result.lag = max(self.result.lag, now - ended)
            if self.setting.copy:
                self._publisher.serve(now, self.setting.copy)
            if self._window.mark_done(number):
                self._abandon(now, number)
        self._gathering = False
        self._gather(now)

    def _abandon(self, now: float, number: int) -> None:
        """End the other attempt at a split."""
        for attempt, worker in list(self._where.items()):
            if attempt.split.number == number:
                self._release(worker)
                self._at(now + 1.0, self._free, worker)
                self._at(now, self._ended, attempt, False)

    def _free(self, now: float, worker: Worker) -> None:
        self._idle.append(worker)
        self._start(now)


def simulate(setting: Setting) -> Result:
    """Simulate a job."""
    return Simulation(setting).run()


def measured_times(job_url: str) -> tuple[float, ...]:
    """Return how long the splits of a real job took, from its ledger."""
    from cortex_dask.io.job.directory import JobDirectory
    from cortex_dask.io.job.ledger import Ledger

    return tuple(record.seconds for record in Ledger(JobDirectory(job_url).store).records() if record.seconds > 0)


# tables ---------------------------------------------------------------------------------------------------------------


def row(*cells: object) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


def head(*titles: str) -> Iterator[str]:
    yield row(*titles)
    yield row(*("---:" for _ in titles))


def duration(seconds: float) -> str:
    if seconds == math.inf:
        return "never ends"
    if seconds < 1200:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def by_size(base: Setting, workers: Sequence[int]) -> Iterator[str]:
    """A job of a fixed size on more and more workers."""
    yield from head("workers", "time", "efficiency", "cost", "of that handling", "splits/s", "scheduler busy", "limit")
    for count in workers:
        result = simulate(replace(base, workers=count))
        share = result.ideal_cost / result.cost
        busy = f"{result.busy['scheduler']:.0%}"
        cells = (f"{result.efficiency:.0%}", f"${result.cost:,.2f}", f"{share:.0%}", f"{result.rate:,.0f}", busy)
        yield row(f"{count:,}", duration(result.makespan), *cells, result.limit)


def by_length(base: Setting, workers: Sequence[int], lengths: Sequence[float], each: int) -> Iterator[str]:
    """How long splits have to be: the efficiency once workers are there, where parts need not be copied."""
    yield from head("workers", *(f"splits of {length:g} s" for length in lengths))
    for count in workers:
        cells = []
        for length in lengths:
            result = simulate(replace(base, **READY, workers=count, splits=count * each, seconds=length, copy=0.0))
            cells.append(f"{result.efficiency:.0%}" + (f" ({result.limit})" if result.limit != "-" else ""))
        yield row(f"{count:,}", *cells)


def by_trouble(base: Setting) -> Iterator[str]:
    """What losses and stragglers cost, with second attempts and without."""
    yield from head("trouble", "time", "without second attempts", "second attempts", "lost workers", "cost")
    troubles = {
        "none": {},
        "1 % of the attempts take 10 times as long": {"slow_share": 0.01},
        "0.1 % of the attempts hang": {"slow_share": 0.001, "slow_factor": math.inf},
        "each worker is lost once in 10 hours": {"loss_per_hour": 0.1},
        "each worker is lost once in an hour (spot, on a bad day)": {"loss_per_hour": 1.0},
        "all three": {"slow_share": 0.01, "loss_per_hour": 1.0},
    }
    for name, trouble in troubles.items():
        with_backups = simulate(replace(base, **trouble))
        without = simulate(replace(base, **trouble, backups=False))
        cells = (with_backups.backups, with_backups.losses, f"${with_backups.cost:,.2f}")
        yield row(name, duration(with_backups.makespan), duration(without.makespan), *cells)


def by_store(base: Setting) -> Iterator[str]:
    """What the ledger and the publication on an object store bear."""
    yield from head("append", "copy", "copies at a time", "splits/s", "segments", "longest lag", "ledger busy", "limit")
    cases = ((0.02, 0.0, 1), (0.05, 0.0, 1), (0.2, 0.0, 1), (0.05, 0.05, 8), (0.05, 0.05, 32), (0.05, 0.05, 128))
    for append, copy, lines in cases:
        setting = replace(base, **READY, tasks_per_second=1e6, append=append, copy=copy, publishers=lines)
        result = simulate(setting)
        cells = (f"{result.rate:,.0f}", result.segments, f"{result.lag:.1f} s", f"{result.busy['ledger']:.0%}")
        copies = (f"{copy * 1000:.0f} ms", lines) if copy else ("none", "-")
        yield row(f"{append * 1000:.0f} ms", *copies, *cells, result.limit)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", nargs="?", choices=["all", "size", "length", "trouble", "store"], default="all")
    parser.add_argument("--splits", type=int, default=100_000, metavar="N")
    parser.add_argument("--seconds", type=float, default=10.0, metavar="S", help="the median split")
    parser.add_argument("--job", metavar="URL", help="draw the splits' times from this job's ledger")
    parser.add_argument("--workers", type=int, nargs="*", default=[10, 30, 100, 300, 1000, 3000, 10_000], metavar="N")
    parser.add_argument(
        "--tasks", type=float, default=Setting.tasks_per_second, metavar="N", help="scheduler, a second"
    )
    parser.add_argument("--append", type=float, default=Setting.append, metavar="S", help="to write a segment")
    parser.add_argument("--price", type=float, default=Setting.price, metavar="X", help="of a worker's hour")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    base = Setting(
        splits=given.splits,
        seconds=given.seconds,
        measured=measured_times(given.job) if given.job else (),
        tasks_per_second=given.tasks,
        append=given.append,
        price=given.price,
        seed=given.seed,
    )
    tables = {
        "size": (f"A job of {base.splits:,} splits", lambda: by_size(base, given.workers)),
        "length": ("10 splits a worker", lambda: by_length(base, given.workers, (0.1, 1.0, 10.0, 60.0), 10)),
        "trouble": ("1,000 workers, 20,000 splits", lambda: by_trouble(replace(base, workers=1000, splits=20_000))),
        "store": (
            "10,000 workers, splits of a second",
            lambda: by_store(replace(base, workers=10_000, splits=100_000, seconds=1.0)),
        ),
    }
    for name, (title, lines) in tables.items():
        if given.table in (name, "all"):
            print(f"\n{title}\n", flush=True)
            for line in lines():
                print(line, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
