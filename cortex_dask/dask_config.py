"""Dask's configuration files, found without importing Dask, which takes longer than many a job."""

from __future__ import annotations

import contextlib
import os
import site
import sys
from pathlib import Path


def configuration_places() -> list[Path]:
    """Return the folders and files of Dask's configuration, in its order: what a later one says counts.

    They are those of ``dask.config``: https://docs.dask.org/en/stable/configuration.html.
    """
    places = [os.environ.get("DASK_ROOT_CONFIG", "/etc/dask")]
    places += [str(Path(prefix, "etc", "dask")) for prefix in (sys.prefix, *site.PREFIXES)]
    places += ["~/.config/dask", os.environ.get("DASK_CONFIG", "")]
    paths: list[Path] = []
    for place in reversed(dict.fromkeys(filter(None, reversed(places)))):
        path = Path(place)
        with contextlib.suppress(RuntimeError):  # there is no home
            path = path.expanduser()
        paths.append(path)
    return paths


def configuration_files(place: Path) -> list[Path]:
    """Return the files of one place, in the order in which Dask reads them.

    Raises
    ------
    OSError
        If it cannot be looked at.
    """
    if place.is_file():
        return [place]
    if not place.is_dir():
        return []
    return sorted(file for file in place.iterdir() if file.suffix.lower() in (".json", ".yaml", ".yml"))
