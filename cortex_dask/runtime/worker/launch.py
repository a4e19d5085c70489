"""Starting a Python process of ours: its command line, its pipes, and its environment variables."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from cortex_dask.runtime.progress_cell import ProgressCell

_PACKAGE_PARENT = str(Path(__file__).parents[3])
#: Child processes import the package from where this process has it, which may be on a notebook's own path only. The
#: folder comes last once the package is found, so that what else lies in it hides no module of the user.
_IMPORT_PACKAGE = """\
import sys
root = sys.argv.pop(1)
sys.path[0] = root
import cortex_dask
del sys.path[0]
root in sys.path or sys.path.append(root)
"""
#: What BLAS, OpenMP and the libraries that bring their own threads read when they are loaded.
_THREAD_VARIABLES = (
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
    "NUMEXPR_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
    "POLARS_MAX_THREADS",
    "TF_NUM_INTRAOP_THREADS",
    "TF_NUM_INTEROP_THREADS",
)


def python_command(module: str, function: str, *, first: str = "") -> list[str]:
    """Return the interpreter's arguments with which a child process calls a function of ours.

    The process's own arguments follow them. ``first`` is code that runs before anything is imported.
    """
    return ["-c", f"{first}{_IMPORT_PACKAGE}from {module} import {function}\n{function}()\n", _PACKAGE_PARENT]


@dataclass(slots=True, eq=False)
class Launched:
    """A handler process that waits for its first command, and this side's ends of its pipes."""

    popen: subprocess.Popen[bytes]  # commands go to its standard input
    events: int  # the descriptor from which its events come
    lifeline: int  # the descriptor whose closing ends the process
    cell: ProgressCell  # what the process is doing


def launch(environment: Mapping[str, str], executable: str | None = None, keep: tuple[int, ...] = ()) -> Launched:
    """Launch a handler process, by default with this process's Python.

    It inherits the descriptors ``keep`` and holds them open until it has ended.
    """
    cell, child_cell = ProgressCell.create()
    events, child_events = os.pipe()
    child_lifeline, lifeline = os.pipe()
    inherited = (child_events, child_cell, child_lifeline, *keep)
    command = [executable or sys.executable, *python_command("cortex_dask.runtime.handler_process.main", "main")]
    try:
        popen = subprocess.Popen(
            [*command, *map(str, inherited)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            pass_fds=inherited,
            env=dict(environment),
            start_new_session=True,  # its own group, so that all that it starts can be killed with it
            bufsize=0,
        )
    except BaseException:
        os.close(events)
        os.close(lifeline)
        cell.close()
        raise
    finally:
        for descriptor in (child_events, child_cell, child_lifeline):
            os.close(descriptor)
    return Launched(popen, events, lifeline, cell)


def slot_environment(
    inherited: Mapping[str, str], wanted: Mapping[str, str], *, cpu: float, devices: Mapping[str, str] | None = None
) -> dict[str, str]:
    """Return the environment variables of a slot's process: the worker's, under those of ``handler.env``.

    ``devices`` are the variables that show the slot's own devices to it; without them it sees what the worker sees.
    """
    environment = {**inherited}
    threads = max(int(cpu), 1)
    for name in _THREAD_VARIABLES:
        # A worker's nanny sets these to 1, so a slot with more than one core does not inherit them.
        if name not in inherited or threads > 1:
            environment[name] = str(threads)
    environment.update(devices or {})
    environment.pop("PYTHONSTARTUP", None)
    return {**environment, **wanted}
