"""Dask's configuration files, found without importing Dask, which takes longer than many a job."""

from __future__ import annotations

import contextlib
import os
import site
import sys
from pathlib import Path

__all__ = ["configuration_files"]


def configuration_files() -> list[Path]:
    """Return the files of Dask's configuration, in the order in which it reads them: what a later one says counts.

    The places are those of ``dask.config``: https://docs.dask.org/en/stable/configuration.html.

    Raises
    ------
    OSError
        If one of the places cannot be looked at.
    """
    places = [os.environ.get("DASK_ROOT_CONFIG", "/etc/dask")]
    places += [str(Path(prefix, "etc", "dask")) for prefix in (sys.prefix, *site.PREFIXES)]
    places += ["~/.config/dask", os.environ.get("DASK_CONFIG", "")]
    files: list[Path] = []
    for place in reversed(dict.fromkeys(filter(None, reversed(places)))):
        path = Path(place)
        with contextlib.suppress(RuntimeError):  # there is no home
            path = path.expanduser()
        if path.is_file():
            files.append(path)
        elif path.is_dir():
            files += sorted(file for file in path.iterdir() if file.suffix.lower() in (".json", ".yaml", ".yml"))
    return files
