"""The models of ``type: tensorflow``: their folders, their versions, and their copies on this host.

A model is a folder that holds ``saved_model.pb`` (and ``variables/``), or one folder for each version, named by an
integer. It may lie on any file system that fsspec knows. A local model is used in place; any other is fetched once per
host into the cache folder, under a key made of its files' names, sizes and ETags (or time stamps). So a model that is
replaced is fetched again, and no process ever sees half of one.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
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
from cortex_dask.tensorflow.signature import name_list

#: The version that means the highest number.
LATEST = "latest"
#: Bytes of one request for a part of a file.
BLOCK_SIZE = 16 << 20

# A child of the handlers' logger, so that its lines come out in the same way.
_log = logging.getLogger("cortex.tensorflow")

_SAVED_MODEL_FILES = ("saved_model.pb", "saved_model.pbtxt")
_ONLY_VERSION = "1"  # of a model whose folder has no versions
#: Keys under which file systems report what changes with a file's content, the most precise first.
_CONTENT_KEYS = (
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
_CONCURRENT_REQUESTS = 8
_FETCH_ATTEMPTS = 3  # for a model that is replaced while it is fetched


@dataclass(frozen=True, slots=True)
class _ModelFile:
    """One file of a model that is not local."""

    name: str  # relative to the model
    size: int
    content_mark: str  # changes with its content


@dataclass(slots=True)
class Model:
    """A model of the configuration."""

    name: str | None  # as the handler names it; None for the only one
    url: str
    signature_key: str | None = None  # the signature to run
    _folders: dict[str, str] | None = field(default=None, init=False, repr=False)  # version -> folder in the model

    def __str__(self) -> str:
        where = shown_url(self.url)
        return f"the model {where}" if self.name is None else f"the model {self.name} ({where})"

    def version(self, wanted: str | int = LATEST) -> str:
        """Return the version that is meant, or raise InputError; the latest one stays the same within a process."""
        versions = self._version_folders()
        text = str(wanted)
        if text == LATEST:
            return max(versions, key=int)
        for version in versions:
            if version == text or (text.isdecimal() and int(version) == int(text)):
                return version
        raise InputError(
            f"{self} has no version {text!r}; it has {name_list(sorted(versions, key=int))}, and {LATEST} is the "
            "highest"
        )

    def local_folder(self, wanted: str | int = LATEST) -> str:
        """Return the folder of a version on this host, fetched unless another process of this host has done so."""
        folder = self._version_folders()[self.version(wanted)]
        store = Store(self.url)
        source = store.child(folder) if folder else store
        if source.is_local:
            return source.url
        for _ in range(_FETCH_ATTEMPTS):
            files = _list_files(source)
            key = hashlib.sha256(
                json.dumps([source.url, [[file.name, file.size, file.content_mark] for file in files]]).encode()
            ).hexdigest()
            with contextlib.suppress(_ReplacedError):
                return hold("models", key, lambda target, files=files: _fetch(source, files, target))  # type: ignore[misc]  # the default binds the loop's value
        raise StorageError(
            f"{self} was replaced {_FETCH_ATTEMPTS} times while it was fetched: run the job when it stays as it is"
        )

    def _version_folders(self) -> dict[str, str]:
        if self._folders is None:
            self._folders = self._find_versions()
        return self._folders

    def _find_versions(self) -> dict[str, str]:
        store = Store(self.url)
        entries = store.children()
        numbers = [name for name in entries if name.isdecimal() and name.isascii()]
        complete = {number for number in numbers if _is_saved_model(store.child(number).children())}
        if _is_saved_model(entries):
            if complete:
                raise InputError(
                    f"{self} holds a saved_model.pb and the versions {name_list(sorted(complete, key=int))}; move the "
                    "first into a folder that is named by its version"
                )
            return {_ONLY_VERSION: ""}
        if incomplete := sorted(set(numbers) - complete, key=int):
            _log.warning("%s: no saved_model.pb in %s, so not used as a version", self, name_list(incomplete))
        if not complete:
            if not entries:
                raise InputError(
                    f"{self} is not there, or empty; it should hold saved_model.pb, or folders 1, 2, … that do"
                )
            raise InputError(
                f"{self} holds neither saved_model.pb nor folders 1, 2, … that do; it holds {name_list(entries)}"
            )
        return {number: number for number in sorted(complete, key=int)}


@dataclass(slots=True)
class Models:
    """The models of an API: ``handler.models`` of its configuration."""

    models: dict[str | None, Model]  # those that are listed, by name; the key is None for a single one
    folder: str | None = None  # the URL of the folder whose subfolders are models
    signature_key: str | None = None  # for models that have none of their own

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any], directory: str | None = None) -> Models:
        """Return the models of a checked configuration; relative paths are relative to the project directory."""
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
        """The single model, which needs no name."""
        return self.models.get(None)

    def get(self, name: str | None) -> Model:
        """Return a model by its name, or raise InputError; a single model has none, so any name means it."""
        if self.only is not None:
            return self.only
        if name is None:
            raise InputError(f"model_name is missing: the models are {name_list(self.names())}")
        if name not in self.models:
            if self.folder is None or name not in self.names():
                raise InputError(f"there is no model {name!r}; the models are {name_list(self.names())}")
            self.models[name] = Model(name, Store(self.folder).child(name).url, self.signature_key)
        return self.models[name]

    def names(self) -> list[str]:
        """Return the names that can be given."""
        if self.folder is not None:
            return [name for name in Store(self.folder).children() if not name.startswith(".")]
        return [name for name in self.models if name is not None]

    def check(self) -> None:
        """Raise InputError if a model is missing, so that a job with a wrong path fails before its first batch."""
        for model in self.models.values():
            model.version()
        if self.folder is not None and not self.names():
            raise InputError(
                f"models.dir: {shown_url(self.folder)} is not there, or empty; it should hold a folder for each model"
            )


class _ReplacedError(Exception):
    """A model changed while it was fetched."""


def _absolute(path: str, directory: str | None) -> str:
    """Return a path or URL; a relative path is taken as one below the directory."""
    if "://" in path or directory is None:
        return path
    return str(Path(directory, Path(path).expanduser()))


def _is_saved_model(entries: list[str]) -> bool:
    return any(name in entries for name in _SAVED_MODEL_FILES)


def _list_files(store: Store) -> list[_ModelFile]:
    """Return all files below a folder that is not local, without fsspec's cache of listings."""

    def find() -> dict[str, dict[str, Any]]:
        store.fs.invalidate_cache()
        found: dict[str, dict[str, Any]] = store.fs.find(store.path(), detail=True)
        return found

    start = store.path().rstrip("/") + "/"
    files = [
        _ModelFile(path.removeprefix(start), int(info["size"] or 0), _content_mark(info))
        for path, info in sorted(persist(find, store.url).items())
        if path.startswith(start) and info["type"] != "directory" and not path.endswith("/")
    ]
    for file in files:
        if ".." in file.name.split("/") or file.name.startswith("/"):
            raise StorageError(
                f"{shown_url(store.url)} holds a file named {file.name!r}, which is no name on this host"
            )
    return files


def _content_mark(info: Mapping[str, Any]) -> str:
    return next((f"{key}={info[key]}" for key in _CONTENT_KEYS if info.get(key)), "")


def _fetch(store: Store, files: list[_ModelFile], target: Path) -> None:
    """Copy files into an empty folder, several blocks at a time."""
    for file in files:
        path = target / file.name
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as empty:
            empty.truncate(file.size)
    with ThreadPoolExecutor(_CONCURRENT_REQUESTS) as pool:
        for copied in [pool.submit(_copy_block, store, file, start, target) for file, start in _blocks(files)]:
            copied.result()
    if _list_files(store) != files:
        raise _ReplacedError


def _blocks(files: list[_ModelFile]) -> Iterator[tuple[_ModelFile, int]]:
    for file in files:
        for start in range(0, file.size, BLOCK_SIZE):
            yield file, start


def _copy_block(store: Store, file: _ModelFile, start: int, target: Path) -> None:
    stop = min(start + BLOCK_SIZE, file.size)
    try:
        data = store.read_range(file.name, start, stop)
    except FileNotFoundError:
        raise _ReplacedError from None
    if len(data) != stop - start:
        raise _ReplacedError
    try:
        with (target / file.name).open("r+b") as copy:
            copy.seek(start)
            copy.write(data)
    except OSError as error:
        raise StorageError(
            f"the model's file {file.name} cannot be kept in {target.parent}: {error.strerror}"
        ) from error
