"""Stores: one folder of a file system, local or any that fsspec knows, with operations that are safe to repeat.

::

    store = Store("s3://bucket/jobs")
    store.create("job.json", b"{}")            # exactly one caller succeeds
    with store.stage("part.parquet") as file:  # whole or not at all
        file.write(b"...")
        file.commit()
    store.names()                              # ["job.json", "part.parquet"]

Every operation tries again when the storage service throttles, fails or drops the connection, and ends in the same
state whether the failed request had taken effect or not. What cannot be helped is raised as one sentence
(:func:`~cortex_dask.io.store.errors.explain`).

Local folders are served by :mod:`cortex_dask.io.store.local` with nothing but the standard library; all others by
:mod:`cortex_dask.io.store.remote`, which is imported, as fsspec is, when the first request is made.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from typing import Any, Protocol

from cortex_dask.errors import InputError, StorageError
from cortex_dask.io.store.errors import error_code, shown_url
from cortex_dask.io.store.retry import _T, persist
from cortex_dask.io.store.staged_file import StagedFile


class FileRequests(Protocol):
    """The requests of one kind of file system, each tried once; names are relative to the store's folder."""

    def path(self, name: str) -> str: ...  # noqa: D102
    def file_system(self) -> Any: ...  # noqa: D102
    def read(self, name: str) -> bytes: ...  # noqa: D102
    def read_range(self, name: str, start: int, stop: int) -> bytes: ...  # noqa: D102
    def write(self, name: str, data: bytes | bytearray) -> None: ...  # noqa: D102
    def create(self, name: str, data: bytes) -> None: ...  # noqa: D102
    def exists(self, name: str) -> bool: ...  # noqa: D102
    def size(self, name: str) -> int | None: ...  # noqa: D102
    def sizes(self, prefix: str) -> dict[str, int]: ...  # noqa: D102
    def children(self, prefix: str) -> list[str]: ...  # noqa: D102
    def delete(self, names: tuple[str, ...]) -> None: ...  # noqa: D102
    def delete_tree(self, prefix: str) -> None: ...  # noqa: D102
    def publish(self, staged: str, final: str, size: int, *, keep: bool) -> None: ...  # noqa: D102
    def stage(self, name: str) -> StagedFile: ...  # noqa: D102


class Store:
    """One folder of a file system.

    Parameters
    ----------
    url : str
        A local path (``~`` is expanded, a relative path made absolute) or a URL that fsspec takes, such as
        ``s3://bucket/folder``. Credentials and endpoints come from the environment and from fsspec's configuration,
        never from the URL.

    Attributes
    ----------
    url : str
        The folder, normalised and absolute. ``Store(store.url)`` is the same store, in any process.
    is_local : bool
        Whether it is a folder of the local file system.

    Raises
    ------
    InputError
        If the URL is empty, or holds a password.

    Notes
    -----
    A missing file is a ``FileNotFoundError``, one that is there already a ``FileExistsError``, a refused access a
    ``PermissionError`` (and a :class:`~cortex_dask.errors.StorageError`); all else is a ``StorageError`` or, for a URL
    that cannot be used at all, an :class:`~cortex_dask.errors.InputError`. Stores may be shared by threads, pickled,
    and used on both sides of a fork.
    """

    __slots__ = ("_files", "is_local", "url")

    def __init__(self, url: str) -> None:
        self.url = _normalised(url)
        self.is_local = "://" not in self.url
        self._files: FileRequests | None = None

    def __repr__(self) -> str:
        return f"Store({shown_url(self.url)!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Store) and self.url == other.url

    def __hash__(self) -> int:
        return hash(self.url)

    def __reduce__(self) -> tuple[type[Store], tuple[str]]:
        return Store, (self.url,)

    @property
    def fs(self) -> Any:
        """The fsspec file system of this store; imported and connected on first use."""
        return self._try(lambda files: files.file_system(), "")

    def path(self, name: str = "") -> str:
        """Return the path of a file as :attr:`fs` takes it."""
        return self._try(lambda files: files.path(name), name)

    def child(self, name: str) -> Store:
        """Return the store of a folder below this one."""
        return Store(_join(self.url, name))

    def read(self, name: str) -> bytes:
        """Return a file's content."""
        return self._try(lambda files: files.read(name), name)

    def read_range(self, name: str, start: int, stop: int) -> bytes:
        """Return the bytes ``start`` to ``stop`` of a file; fewer where the file ends before."""
        return self._try(lambda files: files.read_range(name, start, stop) if stop > start else b"", name)

    def write(self, name: str, data: bytes | bytearray) -> None:
        """Write a file whole or not at all, in the place of what was there; folders are made as needed."""
        self._try(lambda files: files.write(name, data), name, writes=True)

    def create(self, name: str, data: bytes) -> None:
        """Write a small file that must not be there yet; of many callers at once, exactly one content wins.

        Atomic on local file systems, S3, Google Cloud Storage and Azure; elsewhere a check, then a write.

        Raises
        ------
        FileExistsError
            If the file is there with another content. The same content is a success: it is what an own request whose
            answer was lost leaves behind.
        """

        def attempt(files: FileRequests) -> None:
            try:
                files.create(name, data)
            except FileExistsError:
                if files.read(name) != data:
                    raise

        self._try(attempt, name, writes=True)

    def exists(self, name: str = "") -> bool:
        """Return whether a file, or a folder with something in it, is there."""
        return self._try(lambda files: files.exists(name), name)

    def size(self, name: str) -> int | None:
        """Return a file's size in bytes, None where there is no such file."""
        return self._try(lambda files: files.size(name), name)

    def names(self, prefix: str = "") -> list[str]:
        """Return the names of all files whose names start with ``prefix``, at any depth, sorted.

        They are relative to this store, whatever the prefix: ``names("plan/")`` lists a folder, ``names("part-")``
        files (and folders) that are called so. An empty list where there is nothing; never from a cache.
        """
        return list(self.sizes(prefix))

    def sizes(self, prefix: str = "") -> dict[str, int]:
        """Return what :meth:`names` returns, with the files' sizes in bytes."""
        return self._try(lambda files: dict(sorted(files.sizes(prefix.lstrip("/")).items())), prefix)

    def children(self, prefix: str = "") -> list[str]:
        """Return the sorted names of the files and folders directly in a folder, relative to that folder."""
        return self._try(lambda files: sorted(files.children(prefix.strip("/"))), prefix)

    def delete(self, *names: str) -> None:
        """Delete files; those that are not there are fine."""
        if names:
            self._try(lambda files: files.delete(names), names[0] if len(names) == 1 else "")

    def delete_tree(self, prefix: str = "") -> None:
        """Delete a folder with all that is in it."""
        self._try(lambda files: files.delete_tree(prefix.strip("/")), prefix)

    def publish(self, staged: str, final: str, size: int, *, keep: bool = False) -> None:
        """Give a staged file its final name; may be repeated by anyone, at any time.

        Parameters
        ----------
        staged, final : str
            The name it has and the name it gets, both relative to this store.
        size : int
            Its size in bytes, as :meth:`StagedFile.commit` returned it.
        keep : bool, default False
            Whether the staged file may stay where it has to be copied: the caller deletes many with one request.

        Raises
        ------
        StorageError
            If neither name holds a file of that size.
        """

        def attempt(files: FileRequests) -> None:
            try:
                files.publish(staged, final, size, keep=keep)
            except FileNotFoundError as error:
                if error_code(error) == "NoSuchBucket":
                    raise
                if files.size(final) != size:
                    raise StorageError(
                        f"{_join(shown_url(self.url), staged)} ({size} bytes) has vanished, and {final} is not there "
                        "in its place: somebody deleted it, run the job again"
                    ) from error

        self._try(attempt, staged, writes=True)

    def stage(self, name: str) -> StagedFile:
        """Open a file for writing that appears whole with :meth:`StagedFile.commit`, or not at all."""
        return self._try(lambda files: files.stage(name), name, writes=True)

    def _try(self, call: Callable[[FileRequests], _T], name: str, *, writes: bool = False) -> _T:
        """Make a request until it succeeds or fails for good."""
        return persist(lambda: call(self._connected()), _join(self.url, name), writes=writes)

    def _connected(self) -> FileRequests:
        if self._files is None:
            # both modules need StagedFile from here
            if self.is_local:
                from cortex_dask.io.store.local import LocalFiles

                self._files = LocalFiles(self.url)
            else:
                from cortex_dask.io.store.remote import RemoteFiles

                self._files = RemoteFiles(self.url)
        return self._files


def _normalised(url: str) -> str:
    url = os.fspath(url)
    if not url.strip():
        raise InputError("the location of a store is empty: give a local path or a URL such as s3://bucket/folder")
    for scheme in ("file://", "local://"):
        if url.startswith(scheme):
            url = url[len(scheme) :] or "/"
    if "://" not in url:
        return os.path.abspath(os.path.expanduser(url))  # noqa: PTH100, PTH111  # no symbolic link is resolved
    if re.search(r"://[^/@]*:[^/]*@", url):
        raise InputError(
            f"the URL {shown_url(url)} was given with a password: leave it out, and set the credentials in the "
            "environment or in fsspec's configuration"
        )
    protocol, _, rest = url.partition("://")
    lead = "/" if rest.startswith("/") else ""
    return f"{protocol.lower()}://{lead}{rest.strip('/')}"


def _join(url: str, name: str) -> str:
    return f"{url.rstrip('/')}/{name.strip('/')}" if name.strip("/") else url
