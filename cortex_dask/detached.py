"""A coordinator in a process of its own, which outlives the process that starts it.

A handler that submits a job, in ``on_job_complete`` for instance, is itself about to end, and all that it has started
is killed with it. So its coordinator is no descendant: the process that is started here forks and leaves, and what it
has forked belongs to nobody. It runs with the interpreter and the variables of the worker, not with the handler's own.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import FrameType

from cortex_dask.errors import CortexDaskError, SpecError

__all__ = ["start"]

#: Forks before anything is imported, and finds the package as handler processes do: without hiding anybody's modules.
_BOOTSTRAP = """\
import os, sys
if os.fork():
    os._exit(0)
root = sys.argv.pop(1)
sys.path[0] = root
import cortex_dask
del sys.path[0]
root in sys.path or sys.path.append(root)
from cortex_dask.detached import main
main()
"""
_ROOT = str(Path(__file__).parents[1])
_START_SECONDS = 60.0


def start(
    job_url: str, *, cluster: str = "local", python: str | None = None, variables: Mapping[str, str] | None = None
) -> None:
    """Start a coordinator for a job, and return at once.

    Parameters
    ----------
    job_url : str
        The job directory.
    cluster : str
        Where the splits run.
    python : str, optional
        The interpreter; None: this process' own.
    variables : mapping, optional
        The environment variables; None: those of this process.

    Raises
    ------
    SpecError
        If the cluster is the calling thread.
    CortexDaskError
        If no process can be started.
    """
    if cluster == "inline":
        raise SpecError("cluster: inline is the calling thread; a job that runs on its own needs local or an address")
    try:
        process = subprocess.Popen(
            [python or sys.executable, "-c", _BOOTSTRAP, _ROOT, job_url, cluster],
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
    """Run the job; what keeps it from starting is told by its status, for nobody else listens."""
    job_url, cluster = sys.argv[1:3]
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        from cortex_dask.runtime import coordinator

        coordinator.run_job(job_url, cluster=cluster)
    except BaseException as error:
        with contextlib.suppress(CortexDaskError, OSError):
            _note(job_url, error)
        raise


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _note(job_url: str, error: BaseException) -> None:
    """Write the status of a job that its coordinator could not even begin to run."""
    from cortex_dask.errors import JobRunningError
    from cortex_dask.io.job_directory import JobDirectory
    from cortex_dask.runtime.status import FINAL_STATUSES, StatusBoard

    job = JobDirectory(job_url)
    status = (job.read_json("status.json") or {}).get("status")
    if status in FINAL_STATUSES or isinstance(error, JobRunningError):
        return
    board = StatusBoard(job.settings())
    board.end("worker error", f"the coordinator cannot run (process {os.getpid()}): {type(error).__name__}: {error}")
    job.write_json("status.json", board.document())
