"""A job of very many splits that do nothing: what the engine itself costs, and whether that cost stays flat.

    python benchmarks/scale.py splits --count 1000000                      # scheduler and coordinator in one process
    python benchmarks/scale.py splits --count 1000000 --cluster processes  # scheduler, worker: a process each
    python benchmarks/scale.py splits --count 1000000 --cluster null       # no scheduler at all: the coordinator alone

The coordinator, its window, the ledger, the committer and the status writer are the real ones, and so is the scheduler;
only the task is not. Everything that takes part shares ``--cores`` cores (2 by default, where the system can pin
processes). This process looks on from outside: it reads the status as a user does, and the memory from the system.
Afterwards the end of the ledger is taken away and the job is resumed, by a new process.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import queue
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import dask
import orjson
import psutil
from distributed import Client, LocalCluster
from idle_split import dask_setup, outcome_of

from cortex_dask.clusters.address import Address
from cortex_dask.clusters.dask import DaskCluster
from cortex_dask.io.job.directory import JobDirectory
from cortex_dask.io.job.records import Outcome, SplitTask
from cortex_dask.io.job.settings import HandlerSettings, JobSettings
from cortex_dask.io.job.splits import DatasetInput, Piece, PlanHeader, Split
from cortex_dask.job import Job
from cortex_dask.runtime.cluster import Cluster, Done, Report

HERE = Path(__file__).resolve().parent
MIB = 1024 * 1024
ROWS = 1000  # of a split


# the job --------------------------------------------------------------------------------------------------------------


def make_job(url: str, count: int, workers: int) -> JobDirectory:
    """Write a job whose plan has so many splits of one row group each."""
    job = JobDirectory(url)
    dataset = DatasetInput(("s3://bucket/dataset/",), batch_size=ROWS)
    settings = JobSettings(
        job_id="20260101-000000-5ca1ab1e",
        api_name="scale",
        api_id="scale-1",
        created_time="2026-01-01T00:00:00.000+00:00",
        handler=HandlerSettings("class"),
        dataset=dataset,
        workers=workers,
    )
    job.create(settings)
    header = PlanHeader(
        format="parquet",
        batch_size=ROWS,
        schema=None,
        columns=None,
        filters=None,
        files=count,
        splits=count,
        batches=count,
        batches_exact=True,
        rows=count * ROWS,
        bytes=count * ROWS * 64,
    )
    job.write_plan(header, (make_split(number) for number in range(count)))
    return job


def make_split(number: int) -> Split:
    path = f"s3://bucket/dataset/day={number // 1000:05d}/part-{number:08d}.parquet"
    tag, keys = "5d41402abc4b2a76b9719d911017c592", (("day", f"{number // 1000:05d}"),)
    piece = Piece(path, 0, ROWS, ROWS, 0, 71_234, tag, keys)
    return Split(number, (piece,), ROWS, 1, ROWS * 64 + number % 97)


# backends whose splits do nothing -------------------------------------------------------------------------------------


class Idle:
    """What a backend of this benchmark leaves out: handler processes."""

    first_sent: float | None = None
    messages = 0

    def prepare(self, job_url: str, settings: JobSettings) -> None:
        """Start no handler process."""

    def submit(self, tasks: Sequence[tuple[SplitTask, Done]], *, elsewhere: bool = False) -> None:
        """Send splits, and note when the first was, and how often that was done."""
        if self.first_sent is None:
            self.first_sent = time.time()
        self.messages += 1
        super().submit(tasks, elsewhere=elsewhere)  # type: ignore[misc]

    def complete(self) -> Outcome:
        """Say that there is no ``on_job_complete``."""
        return Outcome("done", -1)


#: The latest messages, transitions and events, which Dask keeps for its developers: a thousand of each by default, and
#: with some hundred short splits in a message that is some hundred megabytes.
CONFIGURATION = {"distributed.admin.low-level-log-length": 20}


class InProcess(DaskCluster):
    """Scheduler, worker and coordinator in one process."""

    name = "in process"

    def connect(self) -> Client:
        with dask.config.set(CONFIGURATION):
            self._cluster = LocalCluster(
                n_workers=1,
                threads_per_worker=self.settings.workers,
                processes=False,
                protocol="inproc://",
                dashboard_address="127.0.0.1:0",
                worker_dashboard_address="127.0.0.1:0",
                memory_limit=0,
                silence_logs=logging.ERROR,
            )
        return Client(self._cluster, set_as_default=False)

    def check(self, client: Client) -> None:
        """Do nothing: it is all one process."""

    def shutdown(self) -> None:
        self._cluster.close()


class IdleThreads(Idle, InProcess):
    """Scheduler, worker and coordinator in one process."""


class IdleAddress(Idle, Address):
    """An existing scheduler."""


class _Null(Cluster):
    name = "null"

    def __init__(self) -> None:
        self._workers = 1
        self._tasks: queue.SimpleQueue[tuple[SplitTask, Done] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self, job_url: str, settings: JobSettings, report: Report, check: Callable[[], None]) -> None:
        self._workers = settings.workers
        self._thread.start()

    def slots(self) -> int:
        return self._workers

    def submit(self, tasks: Sequence[tuple[SplitTask, Done]], *, elsewhere: bool = False) -> None:
        for item in tasks:
            self._tasks.put(item)

    def _run(self) -> None:
        while (item := self._tasks.get()) is not None:
            task, done = item
            done(outcome_of(task.split.number, task.split.rows or 0))

    def stop(self, reason: str) -> None:
        pass

    def close(self) -> None:
        self._tasks.put(None)

    def complete(self) -> Outcome:
        return Outcome("done", -1)


class Null(Idle, _Null):
    """No scheduler: a thread answers."""


def coordinate(arguments: argparse.Namespace) -> None:
    """Run the coordinator of a job in this process, and say how it went (the child of ``splits``)."""
    from cortex_dask.runtime.coordinator import coordinator

    began = psutil.Process().create_time()
    make: dict[str, Callable[[], Any]] = {"null": Null, "local": IdleThreads}
    cluster = make[arguments.cluster]() if arguments.cluster in make else IdleAddress(arguments.cluster)
    dask_setup(None)  # for the backend whose worker is in this process
    run: Callable[[], Any] = coordinator.Coordinator(JobDirectory(arguments.job), cluster).run
    if arguments.profile:
        import cProfile

        profile = cProfile.Profile()
        document = profile.runcall(run)
        profile.dump_stats(arguments.profile)
    else:
        document = run()
    ended = time.time()
    Path(arguments.answer).write_bytes(
        orjson.dumps(
            {
                "status": document["status"],
                "reason": document["status_reason"],
                "until_first_split": (cluster.first_sent or ended) - began,
                "seconds": ended - began,
                "peak": peak_memory(),
                "messages": cluster.messages,
            }
        )
    )


def peak_memory() -> int:
    """Return the most memory that this process ever had, in bytes."""
    import resource

    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return size if sys.platform == "darwin" else size * 1024


# looking on -----------------------------------------------------------------------------------------------------------


@dataclass
class Sample:
    """One look at a running job."""

    time: float
    done: int
    memory: dict[str, int]  # bytes by process
    read: float  # seconds that reading the status took


@dataclass
class Run:
    """One run of a coordinator, as seen from outside."""

    samples: list[Sample] = field(default_factory=list)
    cpu: dict[str, float] = field(default_factory=dict)
    answer: dict[str, Any] = field(default_factory=dict)

    def rate(self, first: float = 0.0, last: float = 1.0) -> float:
        """Return splits a second between two shares of the run."""
        if len(self.samples) < 2:
            return float("nan")
        at = [self.samples[round(share * (len(self.samples) - 1))] for share in (first, last)]
        return (at[1].done - at[0].done) / max(at[1].time - at[0].time, 1e-9)

    def memory(self, process: str, share: float) -> float:
        """Return a process' memory in MiB at a share of the run."""
        sample = self.samples[round(share * (len(self.samples) - 1))]
        return sample.memory.get(process, 0) / MIB


def watch(job: Job, processes: dict[str, psutil.Process], child: subprocess.Popen[bytes], interval: float) -> Run:
    """Look at a job until its coordinator has ended."""
    run = Run()
    while child.poll() is None:
        began = time.perf_counter()
        with contextlib.suppress(Exception):  # between two states of a beginning job
            done = job.describe()["splits"]["done"]
            read = time.perf_counter() - began
            memory = {name: process.memory_info().rss for name, process in processes.items()}
            run.cpu = {name: sum(process.cpu_times()[:2]) for name, process in processes.items()}
            run.samples.append(Sample(time.time(), done, memory, read))
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(interval)
    while len(run.samples) > 1 and run.samples[1].done == run.samples[0].done:
        del run.samples[0]  # it had not begun
    return run


def run_job(job: Job, cluster: str, others: dict[str, psutil.Process], arguments: argparse.Namespace) -> Run:
    """Run a job in a new process on some cores."""
    answer = Path(job.url, "benchmark.json")
    command = [sys.executable, __file__, "coordinate", "--job", job.url, "--cluster", cluster, "--answer", str(answer)]
    if arguments.profile:
        command += ["--profile", arguments.profile]
    with pinned(arguments.cores):
        child = subprocess.Popen(command, env=environment())
    run = watch(job, {"coordinator": psutil.Process(child.pid), **others}, child, arguments.interval)
    if child.returncode:
        raise SystemExit(f"the coordinator failed with exit code {child.returncode}")
    run.answer = orjson.loads(answer.read_bytes())
    return run


@contextlib.contextmanager
def pinned(cores: int) -> Iterator[None]:
    """Have what is started here on some cores only, where the system can do that."""
    if not hasattr(os, "sched_setaffinity") or cores <= 0:
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, set(sorted(before)[:cores]))
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def environment() -> dict[str, str]:
    """Return what the processes of the benchmark are started with: they import from here."""
    paths = [str(HERE), str(HERE.parent), os.environ.get("PYTHONPATH", "")]
    logs = {"DASK_DISTRIBUTED__ADMIN__LOW_LEVEL_LOG_LENGTH": "20"}  # as the backends have it that start a scheduler
    return {**os.environ, **logs, "PYTHONPATH": os.pathsep.join(filter(None, paths))}


@contextlib.contextmanager
def cluster_of(kind: str, folder: Path, workers: int, cores: int) -> Iterator[tuple[str, dict[str, psutil.Process]]]:
    """Start what a cluster needs beside the coordinator: for ``processes``, a scheduler and a worker."""
    if kind != "processes":
        yield kind, {}
        return
    place = folder / "scheduler.json"
    common = f"--no-dashboard --scheduler-file {place}"
    scheduler = f"scheduler --host 127.0.0.1 --port 0 {common}"
    worker = f"worker --nthreads {workers} --no-nanny --preload idle_split {common}"
    started: list[subprocess.Popen[bytes]] = []
    with (folder / "cluster.log").open("wb") as log:
        try:
            for command in (scheduler, worker):
                with pinned(cores):
                    whole = [sys.executable, "-m", "dask", *command.split()]
                    started.append(subprocess.Popen(whole, env=environment(), stdout=log, stderr=log))
            deadline = time.monotonic() + 60
            while not place.exists() and time.monotonic() < deadline:
                time.sleep(0.05)
            address = orjson.loads(place.read_bytes())["address"]
            yield address, {"scheduler": psutil.Process(started[0].pid), "worker": psutil.Process(started[1].pid)}
        finally:
            for process in reversed(started):
                process.terminate()
                process.wait()


def measure(arguments: argparse.Namespace) -> int:
    """Run the benchmark and print what was seen."""
    folder = Path(tempfile.mkdtemp(prefix="cortex-dask-scale-", dir=arguments.folder))
    cluster = arguments.cluster
    print(f"{arguments.count:,} splits, {arguments.workers} slots, cluster: {cluster}, in {folder}", flush=True)
    try:
        began = time.monotonic()
        directory = make_job(str(folder / "job"), arguments.count, arguments.workers)
        print(f"plan written in {time.monotonic() - began:.1f} s", flush=True)
        job = Job(directory.url)
        with cluster_of(arguments.cluster, folder, arguments.workers, arguments.cores) as (cluster, others):
            run = run_job(job, cluster, others, arguments)
        report(run, arguments.count, directory)
        if arguments.resume and run.answer["status"] == "succeeded":
            cut(directory, arguments.resume)
            with cluster_of(arguments.cluster, folder, arguments.workers, arguments.cores) as (cluster, others):
                again = run_job(job, cluster, others, arguments)
            report_resume(again)
    finally:
        if not arguments.keep:
            shutil.rmtree(folder, ignore_errors=True)
    return 0


def report(run: Run, count: int, directory: JobDirectory) -> None:
    """Print the figures of a whole run."""
    print(f"status: {run.answer['status']} {run.answer['reason']}")
    print(f"whole: {run.answer['seconds']:.1f} s, {count / run.answer['seconds']:,.0f} splits/s")
    quarters = ", ".join(f"{run.rate(share / 4, (share + 1) / 4):,.0f}" for share in range(4))
    print(f"splits/s by quarter of the run: {quarters}")
    for name in run.samples[-1].memory if run.samples else ():
        shares = ", ".join(f"{run.memory(name, share):.0f}" for share in (0.0, 0.1, 0.25, 0.5, 0.75, 1.0))
        print(f"{name}: MiB at 0, 10, 25, 50, 75, 100 %: {shares}; CPU {run.cpu.get(name, 0):.1f} s")
    peak, messages = run.answer["peak"] / MIB, run.answer["messages"]
    print(f"CPU of all of them: {sum(run.cpu.values()) / count * 1000:.2f} ms a split")
    print(f"coordinator's peak: {peak:.0f} MiB; splits were sent {messages:,} times, so {count / messages:.0f} at once")
    reads = [sample.read for sample in run.samples]
    if reads:
        print(f"status read: median {statistics.median(reads) * 1000:.1f} ms, longest {max(reads) * 1000:.1f} ms")
    segments = [directory.store.size(name) or 0 for name in directory.store.names("ledger/")]
    print(f"ledger: {len(segments):,} segments, {sum(segments) / MIB:.0f} MiB", flush=True)


def report_resume(run: Run) -> None:
    """Print the figures of a resumed run."""
    answer = run.answer
    first, whole = answer["until_first_split"], answer["seconds"]
    peak = answer["peak"] / MIB
    print(f"resume: {first:.1f} s from exec to the first split, {whole:.1f} s in all, peak {peak:.0f} MiB")
    print(f"status: {answer['status']} {answer['reason']}")


def cut(job: JobDirectory, records: int) -> None:
    """Take the last records from a ledger, and say that the job was stopped there."""
    for name in reversed(job.store.names("ledger/")):
        if records <= 0:
            break
        lines = job.store.read(name).splitlines()
        job.store.delete(name)
        if len(lines) > records:
            job.store.write(name, b"\n".join(lines[:-records]))
        records -= len(lines)
    job.store.delete("completed.json")
    document = job.read_json("status.json")
    job.write_json("status.json", {**document, "status": "stopped", "status_reason": "stopped by the benchmark"})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    splits = commands.add_parser("splits", help="run a job of many splits, then resume it")
    splits.add_argument("--count", type=int, default=1_000_000, metavar="N", help="splits")
    splits.add_argument("--workers", type=int, default=64, metavar="N", help="slots of the cluster")
    splits.add_argument("--cluster", choices=["local", "processes", "null"], default="local")
    splits.add_argument("--cores", type=int, default=2, metavar="N", help="cores for all of it; 0: do not pin")
    splits.add_argument("--resume", type=int, default=1000, metavar="N", help="splits left to a resumed job; 0: none")
    splits.add_argument("--interval", type=float, default=1.0, metavar="SECONDS", help="between two looks")
    splits.add_argument("--profile", metavar="FILE", help="profile the coordinator's main thread with cProfile")
    splits.add_argument("--folder", metavar="PATH", help="where to put the job; by default a temporary folder")
    splits.add_argument("--keep", action="store_true", help="leave the job there")
    splits.set_defaults(run=measure)
    child = commands.add_parser("coordinate")
    for name in ("--job", "--cluster", "--answer"):
        child.add_argument(name, required=True)
    child.add_argument("--profile")
    child.set_defaults(run=coordinate)
    arguments = parser.parse_args()
    return arguments.run(arguments) or 0


if __name__ == "__main__":
    sys.exit(main())
