"""Starting a coordinator in a background process that outlives this one.

The process that is started here forks and exits; what it has forked, in :mod:`cortex_dask.clusters.detached.main`, is a
:class:`~cortex_dask.clusters.detached.watchdog.Watchdog` that is no descendant of this process. A handler that submits
a job, in ``on_job_complete`` for instance, is itself about to end, and all its descendants are killed with it.
"""

from __future__ import annotations

import subprocess
import sys

from cortex_dask.errors import CortexDaskError
from cortex_dask.runtime import job_context
from cortex_dask.runtime.worker.launch import python_command

#: Runs before anything is imported, so that start_coordinator() returns soon.
_FORK = """\
import os
if os.fork():
    os._exit(0)
"""
_START_SECONDS = 60.0


def start_coordinator(job_url: str, *, retry: bool = False) -> None:
    """Start a local coordinator for a job in the background, and return at once.

    From a handler process it is started with the interpreter and the variables of the handler's worker.
    """
    context = job_context.current()
    command = python_command("cortex_dask.clusters.detached.main", "main", first=_FORK)
    try:
        process = subprocess.Popen(
            [sys.executable if context is None else context.python, *command, job_url, "retry" if retry else "run"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=None if context is None else dict(context.variables),
            cwd="/",  # the folder of this process may be removed while the job runs
            start_new_session=True,
        )
        code = process.wait(_START_SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise CortexDaskError(f"no process can be started for the job at {job_url}: {error}") from error
    if code:
        raise CortexDaskError(f"no process can be started for the job at {job_url}: the interpreter ended with {code}")
