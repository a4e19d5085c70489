"""Processes that the fault tests start, stop and kill: coordinators, a Dask scheduler, Dask workers.

They are forked from a server that has imported everything already, as an import of distributed takes a second.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import re
import signal
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import psutil

from tests.faults.jobs import FaultJob
from tests.support.waiting import until

__all__ = ["Child", "Coordinator", "DaskHost", "Moment", "dask_host"]

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["distributed", "cortex_dask.runtime.coordinator.coordinator", "tests.faults.preload"])

#: The requests of a store that change something.
CHANGES = ("write", "create", "publish", "delete", "delete_tree")


@dataclass(frozen=True)
class Moment:
    """A request of a process to a store at which a signal hits that process."""

    request: Literal["write", "create", "publish", "delete", "delete_tree", "any"]
    name: str = ""  # a regular expression that the file's URL matches
    count: int = 1  # the how-manieth such request
    when: Literal["before", "after"] = "before"  # it takes effect
    signal: signal.Signals = signal.SIGKILL

    def __str__(self) -> str:
        times = f" no. {self.count}" if self.count > 1 else ""
        return f"{self.when} {self.request} {self.name}{times}"


class Child:
    """A process that runs a function; a context manager that kills it at the end.

    Parameters
    ----------
    function : callable
        Importable, from a module without tests.
    *arguments
        For it.
    log : Path
        Where its output goes.
    """

    def __init__(self, function: Callable[..., None], *arguments: Any, log: Path) -> None:
        self.log = log
        self._process = _context.Process(
            target=_run, args=(dict(os.environ), str(log), function, arguments), daemon=False
        )
        self._process.start()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    def join(self, seconds: float = 60.0) -> int:
        """Wait for its end; returns the exit code, or minus the number of the signal that killed it."""
        self._process.join(seconds)
        if self._process.exitcode is None:
            raise AssertionError(f"the process has not ended after {seconds:g} s; {self.said()}")
        return self._process.exitcode

    @property
    def alive(self) -> bool:
        return self._process.is_alive()

    def kill(self, number: signal.Signals = signal.SIGKILL) -> None:
        """Send it a signal."""
        os.kill(self.pid, number)

    def is_stopped(self) -> bool:
        """Whether SIGSTOP holds it."""
        assert self.alive, f"the process has ended; {self.said()}"
        return psutil.Process(self.pid).status() == psutil.STATUS_STOPPED

    def said(self) -> str:
        """Return what it has written."""
        return self.log.read_text() if self.log.exists() else ""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.alive:
            with contextlib.suppress(ProcessLookupError):
                self.kill()
        self._process.join()
        self._process.close()


class Coordinator(Child):
    """A coordinator of a job in a process of its own.

    Parameters
    ----------
    job : FaultJob
        The job.
    moment : Moment, optional
        When a signal hits it.
    retry : bool
        Whether it handles the dead letters again.
    patience : float, optional
        Seconds that it tries to reach a scheduler that does not answer; None: as long as it does usually.
    **how
        For :func:`~cortex_dask.runtime.coordinator.coordinator.run_job`.
    """

    _numbers = iter(range(1_000_000))

    def __init__(
        self,
        job: FaultJob,
        moment: Moment | None = None,
        *,
        retry: bool = False,
        patience: float | None = None,
        **how: Any,
    ) -> None:
        log = job.marks / f"coordinator-{next(self._numbers)}.log"
        super().__init__(_coordinate, job.url, moment, retry, patience, {"cluster": job.cluster, **how}, log=log)


def _run(environment: dict[str, str], log: str, function: Callable[..., None], arguments: Sequence[Any]) -> None:
    os.environ.clear()
    os.environ.update(environment)
    descriptor = os.open(log, os.O_CREAT | os.O_APPEND | os.O_WRONLY, 0o600)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    try:
        function(*arguments)
    except BaseException:
        traceback.print_exc()
        raise


def _coordinate(job_url: str, moment: Moment | None, retry: bool, patience: float | None, how: dict[str, Any]) -> None:
    from cortex_dask.clusters import address, dask, make_cluster
    from cortex_dask.runtime.coordinator.coordinator import retry_failed, run_job

    if patience is not None:
        address._CONNECT_SECONDS = address._CLIENT_SECONDS = dask._RECONNECT_SECONDS = patience
    if moment is not None:
        _arm(moment)
    document = (retry_failed if retry else run_job)(job_url, make_cluster(how.pop("cluster")), **how)
    print(document["status"], document["status_reason"])


def _arm(moment: Moment) -> None:
    """Have the signal sent to this process when the moment comes."""
    from cortex_dask.io.store.staged_file import StagedFile
    from cortex_dask.io.store.store import Store

    lock = threading.Lock()
    seen = 0

    def hit(url: str) -> bool:
        nonlocal seen
        if not re.search(moment.name, url):
            return False
        with lock:
            seen += 1
            return seen == moment.count

    def wrap(owner: type, request: str, url_of: Callable[..., str]) -> None:
        original = getattr(owner, request)

        def wrapped(self: Any, *arguments: Any, **keywords: Any) -> Any:
            now = hit(url_of(self, *arguments))
            if now and moment.when == "before":
                os.kill(os.getpid(), moment.signal)
            result = original(self, *arguments, **keywords)
            if now and moment.when == "after":
                os.kill(os.getpid(), moment.signal)
            return result

        setattr(owner, request, wrapped)

    for request in CHANGES if moment.request == "any" else (moment.request,):
        place = 1 if request == "publish" else 0  # of the name of the file that appears
        wrap(Store, request, lambda self, *names, place=place: f"{self.url}/{names[place]}" if names else self.url)
        if request == "write":
            wrap(StagedFile, "commit", lambda self: self.url)


# a Dask cluster -----------------------------------------------------------------------------------------------------


def _scheduler(address_file: str) -> None:
    import asyncio

    from distributed import Scheduler

    async def serve() -> None:
        async with Scheduler(host="127.0.0.1", port=0, dashboard_address="127.0.0.1:0") as scheduler:
            Path(f"{address_file}.new").write_text(scheduler.address)
            Path(f"{address_file}.new").rename(address_file)
            await scheduler.finished()

    asyncio.run(serve())


def _worker(address: str, folder: str, threads: int) -> None:
    import asyncio

    from distributed import Worker

    async def serve() -> None:
        async with Worker(
            address,
            host="127.0.0.1",
            nthreads=threads,
            memory_limit=0,
            local_directory=folder,
            dashboard_address="127.0.0.1:0",
            death_timeout=30,
        ) as worker:
            await worker.finished()

    asyncio.run(serve())


class DaskHost:
    """A scheduler and workers, each a process; workers that die are replaced, as by a nanny."""

    def __init__(self, folder: Path, workers: int, threads: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._threads = threads
        self._over = threading.Event()
        self.scheduler = Child(_scheduler, str(folder / "address"), log=folder / "scheduler.log")
        self.address = until(lambda: _text(folder / "address"), "the scheduler's address")
        self.started = 0
        self.workers = [self._start() for _ in range(workers)]
        self._resizing = threading.Lock()
        self._keeper = threading.Thread(target=self._keep, daemon=True)
        self._keeper.start()

    def _start(self) -> Child:
        self.started += 1
        return Child(_worker, self.address, str(self._folder), self._threads, log=self._folder / "workers.log")

    def _keep(self) -> None:
        while not self._over.wait(0.05):
            with self._resizing:
                for place, worker in enumerate(self.workers):
                    if not worker.alive and self.scheduler.alive:
                        worker.__exit__(None, None, None)
                        self.workers[place] = self._start()

    def resize(self, workers: int) -> None:
        """Start workers, or kill the youngest, until there are so many."""
        with self._resizing:
            while len(self.workers) < workers:
                self.workers.append(self._start())
            while len(self.workers) > workers:
                self.workers.pop().__exit__(None, None, None)

    def kill(self, pid: int) -> None:
        """Kill one of the workers, perhaps dead already."""
        assert pid in {worker.pid for worker in self.workers} or not psutil.pid_exists(pid)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)

    def close(self) -> None:
        self._over.set()
        self._keeper.join()
        for child in (*self.workers, self.scheduler):
            child.__exit__(None, None, None)


@contextlib.contextmanager
def dask_host(folder: Path, *, workers: int = 2, threads: int = 1) -> Iterator[DaskHost]:
    """Run a scheduler and workers on loopback."""
    host = DaskHost(folder, workers, threads)
    try:
        yield host
    finally:
        host.close()


def _text(path: Path) -> str | None:
    return path.read_text() if path.exists() else None
