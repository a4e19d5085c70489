"""A handler's file, run as a module."""

from __future__ import annotations

import hashlib
import importlib.machinery
import importlib.util
import sys
from pathlib import Path

from cortex_dask.errors import HandlerError
from cortex_dask.project.contract import CLASS_NAME, find_definition, kind_of, parse_source

# file ---------------------------------------------------------------------------------------------------------------


def load_file(path: str) -> type:
    """Run the handler's file as a module and return its one class ``Handler``.

    The module stays in :data:`sys.modules`, so its classes can be pickled and their annotations resolved. It has the
    file's own name where ``import`` would find this very file under it and nobody else has taken it, so that a helper
    module which imports it back gets the same one; otherwise a name that clashes with nothing.

    Parameters
    ----------
    path : str
        The file.

    Raises
    ------
    HandlerError
        If the file is missing, has a syntax error, raises while it runs (the exception is the cause), or does not
        hold exactly one class ``Handler``.
    """
    file = Path(path).resolve()
    try:
        source = file.read_bytes()
    except OSError as error:
        raise HandlerError(f"{path}: cannot be read: {error.strerror or error}") from None
    tree = parse_source(source, str(file))
    find_definition(tree, str(file))
    name = _module_name(file)
    spec = importlib.util.spec_from_file_location(
        name, file, loader=importlib.machinery.SourceFileLoader(name, str(file))
    )
    if spec is None:  # never for an explicit loader; the type checker cannot know
        raise HandlerError(f"{path}: cannot be loaded as a Python module")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        # Compiled here and not by the loader: the unpacked project is shared, so no bytecode is left in it.
        exec(compile(tree, str(file), "exec"), module.__dict__)  # noqa: S102 - running the user's file is the purpose
    except (Exception, SystemExit) as error:
        sys.modules.pop(name, None)
        line = _last_line(error, str(file))
        where = f"{file}:{line}" if line else str(file)
        raise HandlerError(f"{where}: the file cannot be loaded: {type(error).__name__}: {error}") from error
    except BaseException:
        sys.modules.pop(name, None)
        raise
    cls = getattr(module, CLASS_NAME, None)
    if not isinstance(cls, type):
        sys.modules.pop(name, None)
        found = "it has none" if cls is None else f"its {CLASS_NAME} is {kind_of(cls)}"
        raise HandlerError(f"{file}: exactly one class named {CLASS_NAME} is needed; {found}")
    return cls


def _module_name(file: Path) -> str:
    if file.stem.isidentifier() and file.suffix == ".py":
        taken = sys.modules.get(file.stem)
        if taken is None:
            spec = importlib.machinery.PathFinder.find_spec(file.stem)
            origin = None if spec is None else spec.origin
        else:
            origin = getattr(taken, "__file__", None)
        if origin is not None and Path(origin).resolve() == file and file.stem != "__main__":
            return file.stem
    return f"cortex_handler_{hashlib.sha256(str(file).encode()).hexdigest()[:12]}"


def _last_line(error: BaseException, filename: str) -> int | None:
    """Return the line of the handler's file where the error came from."""
    line, trace = None, error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == filename:
            line = trace.tb_lineno
        trace = trace.tb_next
    return line
