"""How a Python process of ours begins: it finds the package as this process has it, and hides nobody's modules."""

from __future__ import annotations

from pathlib import Path

__all__ = ["beginning"]

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


def beginning(module: str, function: str, *, first: str = "") -> list[str]:
    """Return what follows the interpreter on a command line, before the process's own arguments.

    Parameters
    ----------
    module, function : str
        What it calls, without arguments.
    first : str
        Code that runs before anything is imported.

    Examples
    --------
    >>> command = [sys.executable, *beginning("cortex_dask.runtime.process", "main"), "an argument"]
    """
    return ["-c", f"{first}{_FIND}from {module} import {function}\n{function}()\n", _ROOT]
