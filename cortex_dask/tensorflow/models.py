"""The models of ``type: tensorflow``: where they lie, which versions there are, and their copy on this host.

A model is a folder that holds ``saved_model.pb`` (and ``variables/``), or folders named by integers, its versions, that
do. It may lie on any file system that fsspec knows. One on the local file system is used in its place; any other is
fetched once per host, into the cache folder, under a name made of its files' names, sizes and ETags (or time stamps):
a model that is replaced is fetched again, and no process ever sees half of one.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cortex_dask.errors import InputError, StorageError
from cortex_dask.io.cache import hold
from cortex_dask.io.store.errors import shown_url
from cortex_dask.io.store.retry import persist
from cortex_dask.io.store.store import Store
from cortex_dask.runtime.handler_process.log import logger
from cortex_dask.tensorflow.signature import shown_names

#: The version that means the highest number.
LATEST = "latest"

_SAVED_MODEL = ("saved_model.pb", "saved_model.pbtxt")
_ONLY_VERSION = "1"  # of a model whose folder has no versions
#: What file systems call that which changes with a file's content, the best first.
_MARKS = (
    "ETag",
    "etag",
    "md5Hash",
    "content_md5",
    "generation",
    "mtime",
    "LastModified",
    "last_modified",
    "updated",
    "created",
)
_BLOCK = 16 << 20  # bytes of one request
_REQUESTS = 8  # at a time
_TRIES = 3  # for a model that is replaced while it is fetched


@dataclass(frozen=True, slots=True)
class _File:
    name: str  # relative to the model
    size: int
    mark: str  # changes with its content


@dataclass(slots=True)
class Model:
    """A model of the configuration.

    Parameters
    ----------
    name : str or None
        What the handler calls it by; None for the only one.
    url : str
        Its folder.
    signature_key : str or None
        The signature to run.
    """

    name: str | None
    url: str
    signature_key: str | None = None
    _versions: dict[str, str] | None = field(default=None, init=False, repr=False)  # version -> folder in the model

    def __str__(self) -> str:
        where = shown_url(self.url)
        return f"the model {where}" if self.name is None else f"the model {self.name} ({where})"

    def version(self, wanted: str | int = LATEST) -> str:
        """Return the version that is meant; looks at what is there once, so a process keeps to one latest version.

        Raises
        ------
        InputError
            If there is no such version, or no model.
        """
        versions = self._known()
        text = str(wanted)
        if text == LATEST:
            return max(versions, key=int)
        for version in versions:
            if version == text or (text.isdecimal() and int(version) == int(text)):
                return version
        raise InputError(
            f"{self} has no version {text!r}; it has {shown_names(sorted(versions, key=int))}, and {LATEST} is the "
            "highest"
        )

    def local(self, wanted: str | int = LATEST) -> str:
        """Return the folder of a version on this host; fetched if no process of this host has done so.

        Raises
        ------
        InputError
            If there is no such version, or no model.
        StorageError
            If it cannot be fetched.
        """
        version = self.version(wanted)
        store = Store(self.url)
        folder = self._known()[version]
        place = store.child(folder) if folder else store
        if place.is_local:
            return place.url
        for _ in range(_TRIES):
            files = _listing(place)
            key = hashlib.sha256(
                json.dumps([place.url, [[file.name, file.size, file.mark] for file in files]]).encode()
            ).hexdigest()
            with contextlib.suppress(_ReplacedError):
                return hold("models", key, lambda target, files=files: _fetch(place, files, target))  # type: ignore[misc]  # the default binds the loop's value
        raise StorageError(
            f"{self} was replaced {_TRIES} times while it was fetched: run the job when it stays as it is"
        )

    def _known(self) -> dict[str, str]:
        if self._versions is None:
            self._versions = self._find_versions()
        return self._versions

    def _find_versions(self) -> dict[str, str]:
        store = Store(self.url)
        entries = store.children()
        numbers = [name for name in entries if name.isdecimal() and name.isascii()]
        whole = {number for number in numbers if _is_saved_model(store.child(number).children())}
        if _is_saved_model(entries):
            if whole:
                raise InputError(
                    f"{self} holds a saved_model.pb and the versions {shown_names(sorted(whole, key=int))}; move the "
                    "first into a folder that is named by its version"
                )
            return {_ONLY_VERSION: ""}
        if left := sorted(set(numbers) - whole, key=int):
            logger.warning("%s: no saved_model.pb in %s, so not used as a version", self, shown_names(left))
        if not whole:
            if not entries:
                raise InputError(
                    f"{self} is not there, or empty; it should hold saved_model.pb, or folders 1, 2, … that do"
                )
            raise InputError(
                f"{self} holds neither saved_model.pb nor folders 1, 2, … that do; it holds {shown_names(entries)}"
            )
        return {number: number for number in sorted(whole, key=int)}


@dataclass(slots=True)
class Models:
    """The models of an API: ``handler.models`` of its configuration.

    Parameters
    ----------
    models : list of Model
        Those that are listed.
    only : bool
        Whether there is just one, which needs no name.
    folder : str or None
        The URL of the folder whose subfolders are models.
    signature_key : str or None
        For models that name none.
    """

    models: dict[str | None, Model]
    folder: str | None = None
    signature_key: str | None = None

    @classmethod
    def configured(cls, settings: Mapping[str, Any], directory: str | None = None) -> Models:
        """Take ``handler.models`` of a checked configuration.

        Parameters
        ----------
        settings : mapping
            With one of the keys ``path``, ``paths`` and ``dir``, and perhaps ``signature_key``.
        directory : str, optional
            What relative paths are relative to: the project directory. Default: the working directory.

        Raises
        ------
        InputError
            If there is none of the keys.
        """
        key = settings.get("signature_key")
        if path := settings.get("path"):
            return cls({None: Model(None, _absolute(path, directory), key)}, signature_key=key)
        if entries := settings.get("paths"):
            models = {
                entry["name"]: Model(
                    entry["name"], _absolute(entry["path"], directory), entry.get("signature_key") or key
                )
                for entry in entries
            }
            return cls({**models}, signature_key=key)
        if folder := settings.get("dir"):
            return cls({}, _absolute(folder, directory), key)
        raise InputError(
            "type: tensorflow needs models with one of the keys path, paths and dir in the handler's settings"
        )

    @property
    def only(self) -> Model | None:
        """The model, where there is just one and it needs no name."""
        return self.models.get(None)

    def named(self, name: str | None) -> Model:
        """Return a model.

        Parameters
        ----------
        name : str or None
            Its name; a single model has none, and is meant whatever the name.

        Raises
        ------
        InputError
            If there is no such model, or the name is missing.
        """
        if self.only is not None:
            return self.only
        if name is None:
            raise InputError(f"model_name is missing: the models are {shown_names(self.names())}")
        if name not in self.models:
            if self.folder is None or name not in self.names():
                raise InputError(f"there is no model {name!r}; the models are {shown_names(self.names())}")
            self.models[name] = Model(name, Store(self.folder).child(name).url, self.signature_key)
        return self.models[name]

    def names(self) -> list[str]:
        """Return the names that can be given."""
        if self.folder is not None:
            return [name for name in Store(self.folder).children() if not name.startswith(".")]
        return [name for name in self.models if name is not None]

    def check(self) -> None:
        """Look whether they are there, so that a job with a wrong path ends before it begins.

        Raises
        ------
        InputError
            If one is missing.
        """
        for model in self.models.values():
            model.version()
        if self.folder is not None and not self.names():
            raise InputError(
                f"models.dir: {shown_url(self.folder)} is not there, or empty; it should hold a folder for each model"
            )


class _ReplacedError(Exception):
    """A model was replaced while it was fetched."""


def _absolute(path: str, directory: str | None) -> str:
    """Return a path or URL, a relative path below the directory."""
    if "://" in path or directory is None:
        return path
    return str(Path(directory, Path(path).expanduser()))


def _is_saved_model(entries: list[str]) -> bool:
    return any(name in entries for name in _SAVED_MODEL)


def _listing(store: Store) -> list[_File]:
    """Return all files of a folder that is not local."""

    def find() -> dict[str, dict[str, Any]]:
        store.fs.invalidate_cache()
        found: dict[str, dict[str, Any]] = store.fs.find(store.path(), detail=True)
        return found

    start = store.path().rstrip("/") + "/"
    files = [
        _File(path.removeprefix(start), int(info["size"] or 0), _mark(info))
        for path, info in sorted(persist(find, store.url).items())
        if path.startswith(start) and info["type"] != "directory" and not path.endswith("/")
    ]
    for file in files:
        if ".." in file.name.split("/") or file.name.startswith("/"):
            raise StorageError(
                f"{shown_url(store.url)} holds a file named {file.name!r}, which is no name on this host"
            )
    return files


def _mark(info: Mapping[str, Any]) -> str:
    return next((f"{key}={info[key]}" for key in _MARKS if info.get(key)), "")


def _fetch(store: Store, files: list[_File], target: Path) -> None:
    """Copy files into an empty folder, several requests at a time."""
    for file in files:
        path = target / file.name
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as made:
            made.truncate(file.size)
    with ThreadPoolExecutor(_REQUESTS) as pool:
        for copied in [pool.submit(_copy, store, file, start, target) for file, start in _blocks(files)]:
            copied.result()
    if _listing(store) != files:
        raise _ReplacedError


def _blocks(files: list[_File]) -> Iterator[tuple[_File, int]]:
    for file in files:
        for start in range(0, file.size, _BLOCK):
            yield file, start


def _copy(store: Store, file: _File, start: int, target: Path) -> None:
    stop = min(start + _BLOCK, file.size)
    try:
        data = store.read_range(file.name, start, stop)
    except FileNotFoundError:
        raise _ReplacedError from None
    if len(data) != stop - start:
        raise _ReplacedError
    try:
        with (target / file.name).open("r+b") as part:
            part.seek(start)
            part.write(data)
    except OSError as error:
        raise StorageError(
            f"the model's file {file.name} cannot be kept in {target.parent}: {error.strerror}"
        ) from error
