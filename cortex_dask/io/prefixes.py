"""Paths and prefixes -> the files whose full paths begin with them, on any file system.

This is how object stores list: ``s3://bucket/images/img`` names ``s3://bucket/images/img_1.png`` and
``s3://bucket/images/img/2.png`` alike, on a local disk too; a ``/`` at the end keeps to one folder. Order: prefixes as
given, and below each the files by path. A file below two of them comes once. Keys of no bytes that stand for folders
are left out.

Files are yielded while they are listed, so a hundred million of them need no more memory than one.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from typing import Any

from cortex_dask.errors import CortexDaskError, DatasetError
from cortex_dask.io.faults import explain, shown_url
from cortex_dask.io.file_systems import connect
from cortex_dask.io.globs import PathFilter
from cortex_dask.io.listing import InputFile
from cortex_dask.io.s3_keys import is_s3, s3_keys
from cortex_dask.io.sources import local_path, tag_of
from cortex_dask.io.store import persist

__all__ = ["list_prefixes"]

_HADOOP_FOLDER = "_$folder$"  # the end of the empty keys that Hadoop writes for folders


def list_prefixes(prefixes: Sequence[str], includes: Sequence[str], excludes: Sequence[str]) -> Iterator[InputFile]:
    """Yield the wanted files below some prefixes.

    Parameters
    ----------
    prefixes : sequence of str
        Full paths or prefixes of them: absolute local ones, or URLs.
    includes, excludes : sequence of str
        Globs over the full path (:mod:`cortex_dask.io.globs`).

    Raises
    ------
    DatasetError
        If nothing is found, or something cannot be listed.
    """
    wanted = PathFilter(includes, excludes)
    seen = kept = 0
    example = ""
    done: list[str] = []
    for given in prefixes:
        prefix = _full(given)
        for file in _listed(prefix):
            if any(file.path.startswith(earlier) for earlier in done):
                continue
            seen, example = seen + 1, example or file.path
            if wanted(file.path):
                kept += 1
                yield file
        done.append(prefix)
    if not kept:
        raise DatasetError(_nothing(prefixes, seen, example))


def _nothing(prefixes: Sequence[str], seen: int, example: str) -> str:
    names = ", ".join(shown_url(prefix) for prefix in prefixes[:3])
    names += f" and {len(prefixes) - 3} more" if len(prefixes) > 3 else ""
    if seen:
        return (
            f"includes and excludes leave none of the {seen} files below {names}: they are matched against the full "
            f"path, such as {shown_url(example)}, and * stops at a slash (**.jpg is every path that ends in .jpg)"
        )
    hint = "; wildcards go into includes" if re.search(r"[*?{]", "".join(prefixes)) else ""
    return f"no file's path begins with {names}: check the bucket and the path{hint}"


def _full(prefix: str) -> str:
    """Return a prefix as the paths below it begin."""
    local = local_path(prefix)
    if local is None:
        return prefix
    local = os.path.expanduser(local)  # noqa: PTH111 - a Path would drop the slash at the end
    return os.path.abspath(local) + ("/" if local.endswith("/") and local.strip("/") else "")  # noqa: PTH100


def _listed(prefix: str) -> Iterator[InputFile]:
    if re.search(r"://[^/@]*:[^/]*@", prefix):
        raise DatasetError(
            f"the path {shown_url(prefix)} holds a password: leave it out and set the credentials in the environment "
            "or in fsspec's configuration"
        )
    try:
        yield from _local(prefix) if local_path(prefix) is not None else _remote(prefix)
    except DatasetError:
        raise
    except (CortexDaskError, OSError, ImportError, ValueError) as error:
        raise DatasetError(f"the input cannot be listed: {explain(error, prefix)}") from error


# local ----------------------------------------------------------------------------------------------------------------


def _local(prefix: str) -> Iterator[InputFile]:
    folder, name = os.path.split(prefix)
    return _walk(folder, name, ()) if os.path.isdir(folder) else iter(())  # noqa: PTH112


def _walk(folder: str, start: str, parents: tuple[str, ...]) -> Iterator[InputFile]:
    """Yield the files below a folder by path, following links but not in circles."""
    with os.scandir(folder) as scanned:
        entries = [
            (entry.name + ("/" if entry.is_dir() else ""), entry) for entry in scanned if entry.name.startswith(start)
        ]
    # The slash makes a folder stand where its files do among the others: "a-b" is before "a/b".
    for name, entry in sorted(entries, key=lambda item: os.fsencode(item[0])):
        if name.endswith("/"):
            real = os.path.realpath(entry.path) if entry.is_symlink() else ""
            if real and (real in parents or f"{os.path.realpath(folder)}/".startswith(f"{real}/")):
                continue
            yield from _walk(entry.path, "", (*parents, real) if real else parents)
        elif entry.is_file():
            stat = entry.stat()
            try:
                entry.path.encode()
            except UnicodeEncodeError:
                raise DatasetError(
                    f"the name of the file {os.fsencode(entry.path)!r} is not UTF-8, so it cannot be written as JSON: "
                    "rename it or exclude it"
                ) from None
            yield InputFile(entry.path, stat.st_size, f"mtime:{stat.st_mtime_ns}")


# elsewhere ------------------------------------------------------------------------------------------------------------


def _remote(prefix: str) -> Iterator[InputFile]:
    fs, path = connect(prefix)
    if prefix.endswith("/") and not path.endswith("/"):
        path += "/"
    persist(lambda: fs.invalidate_cache(), prefix)
    head, chained, rest = prefix.partition("::")
    start = head[: len(head) - len(path)] if not chained and head.endswith(path) else None
    for info in s3_keys(fs, path, prefix) if is_s3(fs, prefix) else _entries(fs, path, prefix):
        name, size = info["name"], info.get("size")
        if name.endswith("/") or info.get("type") == "directory" or (name.endswith(_HADOOP_FOLDER) and not size):
            continue
        full = f"{start}{name}" if start is not None else f"{fs.unstrip_protocol(name)}{chained}{rest}"
        if size is None:
            raise DatasetError(
                f"{shown_url(full)} cannot be read: its server does not tell its size, so download it first"
            )
        yield InputFile(full, int(size), tag_of(info))


def _entries(fs: Any, path: str, url: str) -> Iterator[dict[str, Any]]:
    """Yield what begins as ``path`` does: from the listing of the folder that it lies in, and from those below."""
    folder = path.rpartition("/")[0]
    try:
        entries = {info["name"].rstrip("/"): info for info in persist(lambda: fs.ls(folder, detail=True), url)}
    except FileNotFoundError:
        return
    found: dict[str, dict[str, Any]] = {}
    for name, info in entries.items():
        if info["type"] == "directory" and f"{name}/".startswith(path):
            found |= persist(lambda name=name: fs.find(name, detail=True), url)  # type: ignore[misc]
        elif name.startswith(path):
            found[name] = info
    for name in sorted(found):
        yield {**found[name], "name": name}
