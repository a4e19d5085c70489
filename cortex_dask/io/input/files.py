"""Input paths -> input files: single files, lists, directories, globs and Hive partitions, on any file system.

Order: as given; sorted by path within a directory or a glob. Names that start with ``.`` or ``_`` (``_SUCCESS``,
``_temporary``, ``.crc`` files) are left out of directories and globs. Folders named ``key=value`` below a given
directory, or matched by a glob, are Hive partition keys.

A file that the paths name twice is an error: handled silently once it would surprise one half of those who write that,
handled silently twice the other half.
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote

from cortex_dask.errors import CortexDaskError, DatasetError
from cortex_dask.io.input.glob import PathFilter
from cortex_dask.io.job.splits import FileFormat
from cortex_dask.io.store.errors import explain, shown_url
from cortex_dask.io.store.listing import is_s3, s3_glob, s3_keys
from cortex_dask.io.store.remote import connect
from cortex_dask.io.store.retry import persist
from cortex_dask.io.store.source import local_path, read_range, tag_of

#: How Hive, Spark and Arrow write a null partition value.
HIVE_NULL = "__HIVE_DEFAULT_PARTITION__"

_MAGIC = re.compile(r"[*?\[]")
_INTEGER = re.compile(r"-?[1-9][0-9]{0,18}|0")
_ENDINGS: dict[str, FileFormat] = {
    ".parquet": "parquet",
    ".pq": "parquet",
    ".json": "json",
    ".jsonl": "json",
    ".ndjson": "json",
}
_COMPRESSIONS = (".gz", ".bz2", ".zst", ".zstd")
_ALLOWED = ".parquet or .pq, .json, .jsonl or .ndjson (also followed by .gz, .bz2, .zst)"


@dataclass(frozen=True, slots=True)
class InputFile:
    """A file to read."""

    path: str  # absolute local path, or URL
    size: int
    tag: str  # see :func:`~cortex_dask.io.store.source.tag_of`
    keys: tuple[tuple[str, str], ...] = ()  # Hive partition keys and their decoded values


def list_files(paths: Sequence[str]) -> list[InputFile]:
    """Return the files that the paths name, in input order.

    Raises
    ------
    DatasetError
        If a path does not exist, matches nothing or cannot be reached, or if a file is named twice.
    """
    files: list[InputFile] = []
    origins: dict[str, str] = {}
    for path in paths:
        found = _expand(path)
        if not found:
            raise DatasetError(_nothing_there(path))
        for file in found:
            if file.path in origins:
                first = origins[file.path]
                twice = f"by {first} twice" if first == path else f"by {first} and by {path}"
                raise DatasetError(f"{file.path} is named {twice}, so its rows would be handled twice: name it once")
        origins.update((file.path, path) for file in found)
        files.extend(found)
    if not files:
        raise DatasetError("the input names no path: give at least one file, directory or glob")
    return files


def _expand(path: str) -> list[InputFile]:
    if not path.strip():
        raise DatasetError("an input path is empty: give a file, a directory or a glob")
    if re.search(r"://[^/@]*:[^/]*@", path):
        raise DatasetError(
            f"the input path {shown_url(path)} holds a password: leave it out and set the credentials "
            "in the environment or in fsspec's configuration"
        )
    try:
        if (local := local_path(path)) is not None:
            local = os.path.abspath(os.path.expanduser(local))  # noqa: PTH100, PTH111 - no symbolic link is resolved
            return _expand_local(local, is_folder=path.endswith("/"))
        return _expand_remote(path)
    except FileNotFoundError:
        raise DatasetError(_nothing_there(path)) from None
    except DatasetError:
        raise
    except (CortexDaskError, OSError, ImportError, ValueError) as error:
        raise DatasetError(f"the input cannot be listed: {explain(error, path)}") from error


def _nothing_there(path: str) -> str:
    if _MAGIC.search(path):
        return f"the input pattern {shown_url(path)} matches no file: check it, and quote it on the command line"
    local = local_path(path)
    if local is None:
        return f"there is no input at {shown_url(path)}: check the bucket and the path"
    if os.path.isdir(local):  # noqa: PTH112
        return f"the input directory {path} holds no file: names that start with '.' or '_' are left out"
    return f"the input {path} does not exist: check the path (it is relative to {os.getcwd()})"  # noqa: PTH109


# local ----------------------------------------------------------------------------------------------------------------


def _expand_local(path: str, *, is_folder: bool) -> list[InputFile]:
    if os.path.isfile(path) and not is_folder:  # noqa: PTH113
        return [_local_file(path, os.stat(path), ())]  # noqa: PTH116
    if os.path.isdir(path):  # noqa: PTH112
        base, found = path, list(_walk(path, ()))
    elif _MAGIC.search(path):
        base, matched = _fixed_folder(path), set[str]()
        for match in glob.iglob(path, recursive=True):  # noqa: PTH207 - Path.glob drops a final slash and is slower
            name = os.path.normpath(match)
            if not _hidden(name, base):
                matched.update(_walk(name, ()) if os.path.isdir(name) else [name])  # noqa: PTH112
        found = list(matched)
    else:
        raise FileNotFoundError(path)
    return [_local_file(name, os.stat(name), _hive_keys(name, base)) for name in sorted(found)]  # noqa: PTH116


def _walk(folder: str, parents: tuple[str, ...]) -> Iterator[str]:
    """Yield the files below a folder, following links but not in circles."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if _is_hidden(entry.name):
                continue
            if entry.is_dir():
                real = os.path.realpath(entry.path) if entry.is_symlink() else ""
                if real and (real in parents or f"{os.path.realpath(folder)}/".startswith(f"{real}/")):
                    continue
                yield from _walk(entry.path, (*parents, real) if real else parents)
            elif entry.is_file():
                yield entry.path
            else:
                raise DatasetError(
                    f"{entry.path} is a broken link or not a regular file: remove it, or give a glob without it"
                )


def _local_file(path: str, stat: os.stat_result, keys: tuple[tuple[str, str], ...]) -> InputFile:
    return InputFile(path, stat.st_size, f"mtime:{stat.st_mtime_ns}", keys)


# elsewhere ------------------------------------------------------------------------------------------------------------


def _expand_remote(url: str) -> list[InputFile]:
    fs, path = connect(url)
    persist(lambda: fs.invalidate_cache(), url)
    base = path.rstrip("/")
    entry = _entry(fs, path, url)
    if entry is not None and entry["type"] != "directory" and not url.endswith("/"):
        return [_remote_file(fs, entry, url, path, "")]
    if is_s3(fs, url) and (entry is not None or _has_pages(path)):
        keys = s3_keys(fs, f"{base}/", url) if entry is not None else s3_glob(fs, path, url)
        base = base if entry is not None else _fixed_folder(path)
        found = (info for info in keys if info["name"][-1] != "/" and not _hidden(info["name"], base))
        return sorted((_remote_file(fs, info, url, path, base) for info in found), key=lambda file: file.path)
    if entry is not None:
        entries = persist(lambda: fs.find(path, detail=True), url)
    elif _MAGIC.search(path):
        base, matched = _fixed_folder(path), persist(lambda: fs.glob(path, detail=True), url)
        entries = {name: info for name, info in matched.items() if info["type"] != "directory"}
        for name, info in matched.items():
            if info["type"] == "directory" and not _hidden(name, base):
                entries.update(persist(lambda name=name: fs.find(name, detail=True), url))  # type: ignore[misc]
    else:
        raise FileNotFoundError(path)
    visible = (name for name in sorted(entries) if not name.endswith("/") and not _hidden(name, base))
    return [_remote_file(fs, {**entries[name], "name": name}, url, path, base) for name in visible]


def _has_pages(pattern: str) -> bool:
    """Whether a pattern of keys can be followed folder by folder."""
    return _MAGIC.search(pattern) is not None and "**" not in pattern and not _MAGIC.search(pattern.partition("/")[0])


def _entry(fs: Any, path: str, url: str) -> dict[str, Any] | None:
    try:
        entry: dict[str, Any] = persist(lambda: fs.info(path), url)
    except FileNotFoundError:
        return None
    return entry


def _remote_file(fs: Any, info: dict[str, Any], url: str, path: str, base: str) -> InputFile:
    name = info["name"]
    given = url.rstrip("/")
    full = given[: len(given) - len(path)] + name if given.endswith(path) else _unstripped(fs, name, url)
    size = info.get("size")
    if size is None:
        raise DatasetError(f"{shown_url(full)} cannot be read: its server does not tell its size, so download it first")
    return InputFile(full, int(size), tag_of(info), _hive_keys(name, base) if base else ())


def _unstripped(fs: Any, name: str, url: str) -> str:
    _, chained, rest = url.partition("::")
    return f"{fs.unstrip_protocol(name)}{chained}{rest}"


# names ----------------------------------------------------------------------------------------------------------------


def _fixed_folder(pattern: str) -> str:
    """Return the folders of a pattern before the first that holds a wildcard."""
    parts = pattern.split("/")
    first = next(n for n, part in enumerate(parts) if _MAGIC.search(part))
    return "/".join(parts[:first])


def _is_hidden(name: str) -> bool:
    """Tell whether a name is bookkeeping rather than data; ``_key=value`` is a partition, as Spark has it."""
    return name.startswith(".") or (name.startswith("_") and "=" not in name)


def _hidden(path: str, base: str) -> bool:
    return any(_is_hidden(part) for part in _parts_below(path, base))


def _parts_below(path: str, base: str) -> list[str]:
    return path[len(base) :].strip("/").split("/")


def _hive_keys(path: str, base: str) -> tuple[tuple[str, str], ...]:
    keys: dict[str, str] = {}
    for part in _parts_below(path, base)[:-1]:
        key, equals, value = part.partition("=")
        if equals and key:
            keys[unquote(key)] = unquote(value)
    return tuple(keys.items())


def infer_keys(files: Sequence[InputFile]) -> dict[str, str]:
    """Return the Hive partition keys in the order first seen, each with its type for the whole dataset.

    ``int64`` if every value is written as an integer is (no leading zeros, no plus sign), else ``string``.

    Examples
    --------
    >>> infer_keys([InputFile("a", 1, "", (("year", "2024"), ("shop", "007")))])
    {'year': 'int64', 'shop': 'string'}
    """
    values: dict[str, set[str]] = {}
    for keys in {file.keys for file in files}:
        for key, value in keys:
            values.setdefault(key, set()).add(value)
    order = dict.fromkeys(key for file in files for key, _ in file.keys)
    return {key: _key_type(values[key] - {HIVE_NULL}) for key in order}


def _key_type(values: set[str]) -> str:
    whole = bool(values) and all(_INTEGER.fullmatch(value) and -(2**63) <= int(value) < 2**63 for value in values)
    return "int64" if whole else "string"


# formats --------------------------------------------------------------------------------------------------------------


def detect_format(files: Sequence[InputFile]) -> FileFormat:
    """Tell the format of the files from their endings, or from their first bytes where the ending says nothing.

    Raises
    ------
    DatasetError
        If the files have different formats, or one that is not known.
    """
    found: dict[FileFormat, str] = {}
    endings: dict[str, FileFormat] = {}
    for file in files:
        ending = _ending(file.path)
        if ending not in endings:
            endings[ending] = _ENDINGS.get(ending.removesuffix(_compression(ending))) or _sniff(file)
        found.setdefault(endings[ending], file.path)
    if len(found) > 1:
        raise DatasetError(
            f"the input mixes formats: {found['parquet']} is Parquet and {found['json']} is JSON; name one kind, "
            "for example with a glob that ends in *.parquet or in *.jsonl"
        )
    return next(iter(found))


def _ending(path: str) -> str:
    name = path.rpartition("/")[2].lower()
    compression = _compression(name)
    return os.path.splitext(name.removesuffix(compression))[1] + compression  # noqa: PTH122


def _compression(name: str) -> str:
    return next((ending for ending in _COMPRESSIONS if name.endswith(ending)), "")


def _sniff(file: InputFile) -> FileFormat:
    """Tell the format of one file whose ending says nothing; others with that ending are taken to be alike."""
    try:
        head = read_range(file.path, 0, min(file.size, 4096)).removeprefix(b"\xef\xbb\xbf").lstrip()
    except (CortexDaskError, OSError) as error:
        raise DatasetError(f"the input cannot be read: {explain(error, file.path)}") from error
    if head.startswith(b"PAR1"):
        return "parquet"
    if head.startswith((b"{", b"[")):
        return "json"
    raise DatasetError(
        f"the format of {shown_url(file.path)} cannot be told from its name or its first bytes: known endings are "
        f"{_ALLOWED}; leave the file out with a glob such as *.parquet, or say which format it has"
    )


_HADOOP_FOLDER = "_$folder$"  # the end of the empty keys that Hadoop writes for folders


def list_prefixes(prefixes: Sequence[str], includes: Sequence[str], excludes: Sequence[str]) -> Iterator[InputFile]:
    """Yield the wanted files below some prefixes.

    Parameters
    ----------
    prefixes : sequence of str
        Full paths or prefixes of them: absolute local ones, or URLs.
    includes, excludes : sequence of str
        Globs over the full path (:mod:`cortex_dask.io.input.glob`).

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
    return _walk_prefix(folder, name, ()) if os.path.isdir(folder) else iter(())  # noqa: PTH112


def _walk_prefix(folder: str, start: str, parents: tuple[str, ...]) -> Iterator[InputFile]:
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
            yield from _walk_prefix(entry.path, "", (*parents, real) if real else parents)
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
