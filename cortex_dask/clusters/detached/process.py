"""A coordinator in a process of its own, which outlives the process that starts it.

A handler that submits a job, in ``on_job_complete`` for instance, is itself about to end, and all that it has started
is killed with it. So its coordinator is no descendant: the process that is started here forks and leaves, and what it
has forked, a :class:`~cortex_dask.clusters.detached.watchdog.Watchdog`, belongs to nobody. That one starts the
coordinator, and starts it again when it dies. Both run with the interpreter and the variables of the worker, not with
the handler's own.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING

from cortex_dask.errors import CortexDaskError
from cortex_dask.runtime.worker.launch import python_command

if TYPE_CHECKING:
    pass

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
    begun = python_command("cortex_dask.clusters.detached.main", "main", first=_FORK)
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
