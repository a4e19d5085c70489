"""How a Python process of ours begins: it finds the package as this process has it, and hides nobody's modules."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from cortex_dask.runtime.handler_process.connection import EARLY
from cortex_dask.runtime.progress_cell import ProgressCell

#: The package may be importable here and not there (a notebook's own path); its folder must not hide anybody's
#: modules, so it comes last once the package itself is found.
_FIND = """\
import sys
root = sys.argv.pop(1)
sys.path[0] = root
import cortex_dask
del sys.path[0]
root in sys.path or sys.path.append(root)
"""
_ROOT = str(Path(__file__).parents[1])


def python_command(module: str, function: str, *, first: str = "") -> list[str]:
    """Return what follows the interpreter on a command line, before the process's own arguments.

    Parameters
    ----------
    module, function : str
        What it calls, without arguments.
    first : str
        Code that runs before anything is imported.

    Examples
    --------
    >>> command = [sys.executable, *beginning("cortex_dask.runtime.handler_process.main", "main"), "an argument"]
    """
    return ["-c", f"{first}{_FIND}from {module} import {function}\n{function}()\n", _ROOT]


_KILL_SECONDS = 5.0  # for a killed process to end
#: What BLAS, OpenMP and the libraries that bring their own threads look at when they are loaded.
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


@dataclass(slots=True, eq=False)
class Launched:
    """A process that waits for its first command, and this side's ends of its pipes.

    Attributes
    ----------
    popen : subprocess.Popen
        The process; commands go to its standard input.
    events : int
        The descriptor from which its events come.
    lifeline : int
        The descriptor whose end is the process' end.
    cell : ProgressCell
        Where it notes what it does.
    """

    popen: subprocess.Popen[bytes]
    events: int
    lifeline: int
    cell: ProgressCell

    def discard(self) -> None:
        """Kill it, as nobody has told it anything yet."""
        self.popen.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):  # as on a file system that does not answer
            self.popen.wait(_KILL_SECONDS)
        for descriptor in (self.events, self.lifeline):
            os.close(descriptor)
        for pipe in (self.popen.stdin, self.popen.stdout, self.popen.stderr):
            if pipe is not None:
                pipe.close()
        self.cell.close()


def launch(
    environment: Mapping[str, str], executable: str | None = None, keep: tuple[int, ...] = (), *, early: bool = False
) -> Launched:
    """Launch a process.

    Parameters
    ----------
    environment : mapping
        Its environment variables.
    executable : str, optional
        The Python that it runs in; default: this process' own.
    keep : tuple of int
        Descriptors that it inherits, and so holds open until it has ended.
    early : bool
        Whether its job is not known yet.
    """
    cell, cell_there = ProgressCell.create()
    events, events_there = os.pipe()
    lifeline_there, lifeline = os.pipe()
    arguments = [str(events_there), str(cell_there), str(lifeline_there), *map(str, keep), *([EARLY] if early else [])]
    try:
        popen = subprocess.Popen(
            [
                executable or sys.executable,
                *python_command("cortex_dask.runtime.handler_process.main", "main"),
                *arguments,
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            pass_fds=(events_there, cell_there, lifeline_there, *keep),
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
        for descriptor in (events_there, cell_there, lifeline_there):
            os.close(descriptor)
    return Launched(popen, events, lifeline, cell)


def slot_environment(
    inherited: Mapping[str, str], wanted: Mapping[str, str], *, cpu: float, devices: Mapping[str, str] | None = None
) -> dict[str, str]:
    """Return the environment variables of a slot's process.

    Parameters
    ----------
    inherited : mapping
        Those of the worker.
    wanted : mapping
        ``handler.env``, which always counts.
    cpu : float
        Threads for numeric libraries: set unless the user has set them. A worker's nanny sets them to 1, so a slot
        with more than one core does not take the inherited number.
    devices : mapping, optional
        The variables that show the slot's own devices to it; None: it sees what the worker sees.
    """
    environment = {**inherited}
    threads = max(int(cpu), 1)
    for name in _THREAD_VARIABLES:
        if name not in inherited or threads > 1:
            environment[name] = str(threads)
    environment.update(devices or {})
    environment.pop("PYTHONSTARTUP", None)
    return {**environment, **wanted}
