"""A coordinator in a process of its own, which outlives the process that starts it.

A handler that submits a job, in ``on_job_complete`` for instance, is itself about to end, and all that it has started
is killed with it. So its coordinator is no descendant: the process that is started here forks and leaves, and what it
has forked, a :class:`~cortex_dask.clusters.detached.watchdog.Watchdog`, belongs to nobody. That one starts the
coordinator, and starts it again when it dies. Both run with the interpreter and the variables of the worker, not with
the handler's own.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from types import FrameType
from typing import TYPE_CHECKING

from cortex_dask.clusters import make_cluster
from cortex_dask.errors import CortexDaskError

if TYPE_CHECKING:
    from cortex_dask.clusters.detached.watchdog import CoordinatorOrder


def main() -> None:
    """Keep a coordinator alive until its job has ended; what cannot be helped is told by the job's status."""
    from cortex_dask.clusters.detached.watchdog import CoordinatorOrder, Watchdog

    job_url, how = sys.argv[1:3]
    keeper = Watchdog(CoordinatorOrder(job_url, "local", retry=how == "retry"))
    signal.signal(signal.SIGTERM, lambda number, frame: keeper.interrupt())
    try:
        keeper.begin()
    except OSError as error:
        _note(job_url, error)
        raise
    keeper.watch()


def coordinate() -> None:
    """Run a job as the first line of the standard input says (the process that a keeper starts)."""
    import orjson

    from cortex_dask.clusters.detached.watchdog import ELSEWHERE, CoordinatorOrder
    from cortex_dask.errors import JobRunningError

    line = b""
    while not line.endswith(b"\n"):
        line += os.read(0, 1) or b"\n"  # not one byte more: what comes later is the end, which another one waits for
    if not line.strip():
        return  # whoever wanted it is gone
    order = CoordinatorOrder.from_json(orjson.loads(line))
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        _run(order)
    except JobRunningError:
        sys.exit(ELSEWHERE)
    except BaseException as error:
        with contextlib.suppress(CortexDaskError, OSError):
            _note(order.job_url, error)
        raise


def _run(order: CoordinatorOrder) -> None:
    from cortex_dask.runtime.coordinator import coordinator

    if order.backend is None:
        cluster = make_cluster(order.cluster)
    else:
        # Imports distributed, which a coordinator on one machine does without.
        from cortex_dask.clusters.detached import scheduler

        cluster = scheduler.make(order)
    (coordinator.retry_failed if order.retry else coordinator.run_job)(order.job_url, cluster)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _note(job_url: str, error: BaseException) -> None:
    """Write the status of a job that its coordinator could not even begin to run."""
    from cortex_dask.clusters.detached.watchdog import note_end
    from cortex_dask.io.job.directory import JobDirectory

    reason = f"the coordinator cannot run (process {os.getpid()}): {type(error).__name__}: {error}"
    note_end(JobDirectory(job_url), reason)
