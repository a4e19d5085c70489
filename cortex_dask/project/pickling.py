"""A handler class by value: what a notebook, or a module of the user's own, needs to travel to the workers."""

from __future__ import annotations

import contextlib
import functools
import sys
import sysconfig
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cortex_dask.errors import HandlerError


def pickle_class(cls: type) -> bytes:
    """Pickle a class by value, together with what it uses from modules that are not installed.

    A class of ``__main__`` travels by value anyway; one of a module beside the user's script would travel by name, and
    the workers have no such module. So the user's own modules travel by value as well, as far as the class refers to
    them.

    Parameters
    ----------
    cls : type
        The handler class.

    Raises
    ------
    HandlerError
        If something that it refers to cannot be pickled.
    """
    import cloudpickle

    own = _own_modules(cls)
    bases = [module for module in own if any(base.__module__ == module.__name__ for base in cls.__mro__)]
    problem: Exception | None = None
    for modules in (own, bases):  # a helper module as a whole may hold what cannot be pickled
        with _by_value(modules):
            try:
                return bytes(cloudpickle.dumps(cls))
            except Exception as error:  # noqa: BLE001 - __reduce__ of anything that the class refers to may raise anything
                problem = problem or error
    raise HandlerError(
        f"the class {cls.__qualname__} cannot be sent to the workers: {type(problem).__name__}: {problem}; "
        "make what cannot be pickled (locks, connections, open files) in __init__, or submit a project directory"
    ) from problem


@contextlib.contextmanager
def _by_value(modules: list[types.ModuleType]) -> Iterator[None]:
    import cloudpickle

    already = cloudpickle.list_registry_pickle_by_value()
    ours = [module for module in modules if module.__name__ not in already and module.__name__ in sys.modules]
    for module in ours:
        cloudpickle.register_pickle_by_value(module)
    try:
        yield
    finally:
        for module in ours:
            cloudpickle.unregister_pickle_by_value(module)


def _own_modules(cls: type) -> list[types.ModuleType]:
    """Return the modules of the user's own that the class, or another one of them, refers to."""
    pending = [sys.modules.get(base.__module__) for base in cls.__mro__]
    found: dict[str, types.ModuleType] = {}
    while pending:
        module = pending.pop()
        if module is None or module.__name__ in found or not (_is_own(module) or module.__name__ == "__main__"):
            continue
        found[module.__name__] = module
        for value in list(vars(module).values()):
            if isinstance(value, types.ModuleType):
                pending.append(value)
            elif isinstance(value, type | types.FunctionType):
                pending.append(sys.modules.get(value.__module__ or ""))
    found.pop("__main__", None)
    return list(found.values())


def _is_own(module: Any) -> bool:
    """Tell whether a module is the user's: neither Python's, nor installed, nor of this package."""
    file = getattr(module, "__file__", None)
    if not isinstance(file, str) or module.__name__.partition(".")[0] == __name__.partition(".")[0]:
        return False
    path = Path(file).resolve()
    return not any(path.is_relative_to(folder) for folder in _installed())


@functools.cache
def _installed() -> tuple[Path, ...]:
    """Return the folders of Python's own modules and of installed ones."""
    import site

    folders = {sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")}
    folders |= {*site.getsitepackages(), site.getusersitepackages()}
    return tuple(Path(folder).resolve() for folder in folders if folder)
