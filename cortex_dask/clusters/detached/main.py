"""The entry points of the two processes that outlive the submitter: the watchdog, and the coordinator it starts."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from types import FrameType

import orjson

from cortex_dask.clusters import make_cluster
from cortex_dask.clusters.detached.watchdog import ELSEWHERE, CoordinatorOrder, Watchdog
from cortex_dask.errors import CortexDaskError, JobRunningError
from cortex_dask.io.job.directory import JobDirectory
from cortex_dask.runtime.coordinator.heartbeat import write_failure


def main() -> None:
    """Keep a coordinator alive until its job has ended; failures are written to the job's status."""
    job_url, action = sys.argv[1:3]
    watchdog = Watchdog(CoordinatorOrder(job_url, "local", retry=action == "retry"))
    signal.signal(signal.SIGTERM, lambda number, frame: watchdog.interrupt())
    try:
        watchdog.start_coordinator()
    except OSError as error:
        write_failure(JobDirectory(job_url), _reason(error))
        raise
    watchdog.watch()


def coordinate() -> None:
    """Run a job as the first line of the standard input says (the process that the watchdog starts)."""
    line = b""
    while not line.endswith(b"\n"):
        line += os.read(0, 1) or b"\n"  # byte by byte: what follows is the end of input, which another thread reads
    if not line.strip():
        return  # the watchdog has ended
    order = CoordinatorOrder.from_json(orjson.loads(line))
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        _run_order(order)
    except JobRunningError:
        sys.exit(ELSEWHERE)
    except BaseException as error:
        with contextlib.suppress(CortexDaskError, OSError):
            write_failure(JobDirectory(order.job_url), _reason(error))
        raise


def _run_order(order: CoordinatorOrder) -> None:
    from cortex_dask.runtime.coordinator import coordinator  # which the watchdog's process does without

    if order.backend is None:
        cluster = make_cluster(order.cluster)
    else:
        from cortex_dask.clusters.detached import scheduler  # distributed, for coordinators on a scheduler only

        cluster = scheduler.make_parent_scheduler(order)
    (coordinator.retry_failed if order.retry else coordinator.run_job)(order.job_url, cluster)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _reason(error: BaseException) -> str:
    return f"the coordinator cannot run (process {os.getpid()}): {type(error).__name__}: {error}"
