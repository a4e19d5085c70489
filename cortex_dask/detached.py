"""A coordinator in a process of its own, which outlives the process that starts it.

A handler that submits a job, in ``on_job_complete`` for instance, is itself about to end, and all that it has started
is killed with it. So its coordinator is no descendant: the process that is started here forks and leaves, and what it
has forked, a :class:`~cortex_dask.clusters.keeper.Keeper`, belongs to nobody. That one starts the coordinator, and
starts it again when it dies. Both run with the interpreter and the variables of the worker, not with the handler's own.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from types import FrameType
from typing import TYPE_CHECKING

from cortex_dask.beginning import beginning
from cortex_dask.errors import CortexDaskError

if TYPE_CHECKING:
    from cortex_dask.clusters.base import Cluster
    from cortex_dask.clusters.keeper import Order

__all__ = ["coordinate", "main", "start"]

#: It is in the background before anything is imported.
_FORK = """\
import os
if os.fork():
    os._exit(0)
"""
_START_SECONDS = 60.0


def start(
    job_url: str,
    *,
    cluster: str = "local",
    retry: bool = False,
    python: str | None = None,
    variables: Mapping[str, str] | None = None,
) -> None:
    """Start a coordinator for a job, and return at once.

    Parameters
    ----------
    job_url : str
        The job directory.
    cluster : str
        Where the splits run.
    retry : bool, default False
        Whether the failed batches are handled again.
    python : str, optional
        The interpreter; None: this process' own.
    variables : mapping, optional
        The environment variables; None: those of this process.

    Raises
    ------
    CortexDaskError
        If no process can be started.
    """
    begun = beginning("cortex_dask.detached", "main", first=_FORK)
    try:
        process = subprocess.Popen(
            [python or sys.executable, *begun, job_url, cluster, "retry" if retry else "run"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=None if variables is None else dict(variables),
            cwd="/",  # the folder of this process may be removed while the job runs
            start_new_session=True,
        )
        code = process.wait(_START_SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise CortexDaskError(f"no process can be started for the job at {job_url}: {error}") from error
    if code:
        raise CortexDaskError(f"no process can be started for the job at {job_url}: the interpreter ended with {code}")


def main() -> None:
    """Keep a coordinator alive until its job has ended; what cannot be helped is told by the job's status."""
    from cortex_dask.clusters.keeper import Keeper, Order

    job_url, cluster, how = sys.argv[1:4]
    keeper = Keeper(Order(job_url, cluster, retry=how == "retry"))
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

    from cortex_dask.clusters.keeper import ELSEWHERE, Order
    from cortex_dask.errors import JobRunningError

    line = b""
    while not line.endswith(b"\n"):
        line += os.read(0, 1) or b"\n"  # not one byte more: what comes later is the end, which another one waits for
    if not line.strip():
        return  # whoever wanted it is gone
    order = Order.from_json(orjson.loads(line))
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        _run(order)
    except JobRunningError:
        sys.exit(ELSEWHERE)
    except BaseException as error:
        with contextlib.suppress(CortexDaskError, OSError):
            _note(order.job_url, error)
        raise


def _run(order: Order) -> None:
    from cortex_dask.runtime import coordinator

    cluster: str | Cluster = order.cluster
    if order.backend is not None:
        from cortex_dask.clusters import beside  # brings distributed, which a coordinator on one machine does without

        cluster = beside.make(order)
    (coordinator.retry_failed if order.retry else coordinator.run_job)(order.job_url, cluster=cluster)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _note(job_url: str, error: BaseException) -> None:
    """Write the status of a job that its coordinator could not even begin to run."""
    from cortex_dask.clusters.keeper import note_end
    from cortex_dask.io.job_directory import JobDirectory

    reason = f"the coordinator cannot run (process {os.getpid()}): {type(error).__name__}: {error}"
    note_end(JobDirectory(job_url), reason)
