"""Handler processes that are launched before it is known which job they are for.

To import what every handler process needs takes it a quarter of a second, and as long takes this process to check a
submission and to make its job. So whoever submits a class to this machine begins with the processes. The job's slots
take those that are as they would launch them themselves, and the rest is ended.
"""

from __future__ import annotations

import contextlib
import os
import site
import threading
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

from cortex_dask.runtime.worker.launch import Launched, launch, slot_environment

#: What :func:`cortex_dask.runtime.handler_process.main.main` imports early, and handlers use as well.
_LIBRARIES = ("numpy", "pyarrow", "cloudpickle", "orjson")

_lock = threading.Lock()
_spares: list[tuple[dict[str, str], Launched]] = []
_wanted: object | None = None  # for whom processes are being launched; None: for nobody


def prepare(count: int) -> None:
    """Launch processes in the background; :func:`discard` has to be called in any case."""
    global _wanted
    if not _libraries_are_their_own():
        return
    with _lock:
        _wanted = wanted = object()
    environment = slot_environment(os.environ, {}, cpu=1)
    threading.Thread(target=_launch, args=(count, environment, wanted), name="cortex-dask-spares", daemon=True).start()


def _libraries_are_their_own() -> bool:
    """Return whether a fresh interpreter finds the libraries that it imports early where this process finds them.

    A script may have put folders before the interpreter's own, with other releases in them; a handler process learns
    of these with its job, and has to import nothing before that.
    """
    own = {*site.getsitepackages(), site.getusersitepackages(), *os.environ.get("PYTHONPATH", "").split(os.pathsep)}
    for name in _LIBRARIES:
        try:
            found = find_spec(name)
        except ValueError:  # somebody has put a module of this name together by hand
            return False
        if found is None or found.origin is None:
            return False
        folder = Path(found.origin).parent
        if str(folder.parent if found.submodule_search_locations else folder) not in own:
            return False
    return True


def _launch(count: int, environment: dict[str, str], wanted: object) -> None:
    with contextlib.suppress(OSError):  # no memory, too many processes: the slots meet that too, and can report it
        for _ in range(count):
            with _lock:
                if _wanted is not wanted:
                    return
                _spares.append((environment, launch(environment, early=True)))


def take(environment: Mapping[str, str]) -> Launched | None:
    """Return a process with just these environment variables; None if there is none."""
    with _lock:
        for number, (found, launched) in enumerate(_spares):
            if found == environment and launched.popen.poll() is None:
                del _spares[number]
                return launched
    return None


def discard() -> None:
    """End the processes that nobody has taken."""
    global _wanted
    with _lock:
        _wanted = None
        rest = [launched for _, launched in _spares]
        _spares.clear()
    for launched in rest:
        launched.popen.kill()  # all of them, before one is waited for
    for launched in rest:
        launched.discard()
