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
(:func:`~cortex_dask.io.faults.explain`).

Local folders are served by :mod:`cortex_dask.io.local_files` with nothing but the standard library; all others by
:mod:`cortex_dask.io.remote_files`, which is imported, as fsspec is, when the first request is made.
"""

from __future__ import annotations

import errno
import io
import os
import re
import time
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Protocol, Self, TypeVar

from cortex_dask.errors import CortexDaskError, InputError, StorageError
from cortex_dask.io.faults import error_code, explain, is_transient, shown_url

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

__all__ = ["StagedFile", "Store", "explain", "is_transient"]

_T = TypeVar("_T")

#: Seconds before each further try of a failed request; with what botocore itself retries, that outlasts a throttled
#: prefix and a server's restart of some seconds. What takes longer is for the coordinator, which sends the split again.
_DELAYS = (0.1, 0.3, 0.9, 2.7)

#: Errors of a program, not of a store: they keep their class.
_BUGS = (TypeError, AttributeError, LookupError, NameError, AssertionError, NotImplementedError)


#: Service codes that come as FileNotFoundError and mean something else than a missing file.
_NOT_ABOUT_A_FILE = ("NoSuchBucket", "ContainerNotFound", "NoSuchUpload")


class Files(Protocol):
    """The requests of one kind of file system, each tried once; names are relative to the store's folder."""

    def path(self, name: str) -> str: ...
    def file_system(self) -> Any: ...
    def read(self, name: str) -> bytes: ...
    def read_range(self, name: str, start: int, stop: int) -> bytes: ...
    def write(self, name: str, data: bytes | bytearray) -> None: ...
    def create(self, name: str, data: bytes) -> None: ...
    def exists(self, name: str) -> bool: ...
    def size(self, name: str) -> int | None: ...
    def sizes(self, prefix: str) -> dict[str, int]: ...
    def children(self, prefix: str) -> list[str]: ...
    def delete(self, names: tuple[str, ...]) -> None: ...
    def delete_tree(self, prefix: str) -> None: ...
    def publish(self, staged: str, final: str, size: int, *, keep: bool) -> None: ...
    def stage(self, name: str) -> StagedFile: ...


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
        self._files: Files | None = None

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

        def attempt(files: Files) -> None:
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

        def attempt(files: Files) -> None:
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

    def _try(self, call: Callable[[Files], _T], name: str, *, writes: bool = False) -> _T:
        """Make a request until it succeeds or fails for good."""
        return persist(lambda: call(self._connected()), _join(self.url, name), writes=writes)

    def _connected(self) -> Files:
        if self._files is None:
            # both modules need StagedFile from here
            if self.is_local:
                from cortex_dask.io.local_files import LocalFiles

                self._files = LocalFiles(self.url)
            else:
                from cortex_dask.io.remote_files import RemoteFiles

                self._files = RemoteFiles(self.url)
        return self._files


class StagedFile(io.BufferedIOBase):
    """A binary file that is being written and that nobody sees before :meth:`commit`.

    Leaving its ``with`` block without a commit, by an exception or not, discards it; so does the death of the process.
    """

    #: Where the bytes lie meanwhile, for writers that want to open the file themselves; None for remote stores.
    local_path: str | None = None

    def __init__(self, url: str) -> None:
        self.url = url
        self._state: Literal["open", "committed", "discarded"] = "open"

    def __repr__(self) -> str:
        return f"<{self._state} staged file {shown_url(self.url)!r}>"

    def writable(self) -> bool:
        """Return True: this is a file to write."""
        return True

    def write(self, data: ReadableBuffer, /) -> int:
        """Append bytes."""
        if self._state != "open" or self.closed:
            raise ValueError(f"write to a {'closed' if self._state == 'open' else self._state} staged file")
        return persist(lambda: self._write(memoryview(data).cast("B")), self.url, writes=True, once=True)

    def commit(self) -> int:
        """Make the file appear under its name, whole; return its size in bytes."""
        if self._state == "discarded":
            raise ValueError("commit of a discarded staged file")
        if self._state == "open":
            self._size = persist(self._commit, self.url, writes=True)
            self._state = "committed"
            super().close()
        return self._size

    def discard(self) -> None:
        """Forget what was written; after a commit, do nothing."""
        if self._state == "open":
            self._state = "discarded"
            try:
                self._discard()
            finally:
                super().close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.discard()

    def _write(self, data: memoryview) -> int:
        raise NotImplementedError

    def _commit(self) -> int:
        raise NotImplementedError

    def _discard(self) -> None:
        raise NotImplementedError


def persist(request: Callable[[], _T], url: str, *, writes: bool = False, once: bool = False) -> _T:
    """Make a request again while it fails in a way that may pass, then raise the error that a user can act on.

    Parameters
    ----------
    request : callable
        The request; it must be safe to repeat, unless ``once`` is set.
    url : str
        What it is about, for the message.
    writes : bool
        Whether it makes a file: then a missing file can only mean a missing bucket.
    once : bool
        Whether the request must not be repeated as it is.
    """
    delays = iter(() if once else _DELAYS)
    while True:
        try:
            return request()
        except Exception as error:
            again = is_transient(error) and not isinstance(error, CortexDaskError)  # those have been through here
            delay = next(delays, None) if again else None
            if delay is None:
                surfaced = _surfaced(error, url, writes=writes)
                if surfaced is error:
                    raise
                raise surfaced from error
            import random  # only here: it takes longer to import than this module

            time.sleep(delay * random.uniform(0.5, 1.5))  # noqa: S311  # jitter is no secret


def _surfaced(error: Exception, url: str, *, writes: bool) -> Exception:
    """Return the error to raise: builtin where callers handle it, else one that explains itself."""
    if isinstance(error, (CortexDaskError, *_BUGS)):
        return error
    if isinstance(error, FileExistsError):
        return FileExistsError(errno.EEXIST, "there is such a file already", shown_url(url))
    if isinstance(error, FileNotFoundError) and error_code(error) not in _NOT_ABOUT_A_FILE:
        if writes:
            missing = "its bucket or container does not exist" if "://" in url else "its folder cannot be made"
            return StorageError(f"{shown_url(url)} cannot be written: {missing}")
        return FileNotFoundError(errno.ENOENT, "there is no such file", shown_url(url))
    return explain(error, url)


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
