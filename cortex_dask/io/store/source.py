"""Open an input file for reading, locally by the operating system and elsewhere through fsspec.

A file that was planned is checked when it is opened: one that changed since is an error, never a mix of old and new
rows.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import datetime
from typing import TYPE_CHECKING, Any, BinaryIO, cast

from cortex_dask.errors import CortexDaskError
from cortex_dask.io.store.errors import explain, is_transient
from cortex_dask.io.store.remote import connect
from cortex_dask.io.store.retry import persist

if TYPE_CHECKING:
    pass

REMOTE_THREADS = 32  # requests in flight: waiting costs nothing


def in_parallel(function: Any, items: Sequence[Any], *, local: bool, threads: int = REMOTE_THREADS) -> Iterator[Any]:
    """Yield the function's results in order, from threads; what is still waiting is dropped when one fails."""
    threads = min(len(items), min(8, os.cpu_count() or 1) if local else threads)
    if threads <= 1:
        yield from map(function, items)
        return
    pool = ThreadPoolExecutor(threads, thread_name_prefix="cortex-dask-plan")
    try:
        yield from pool.map(function, items)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


class UnreadableInput(Exception):  # noqa: N818 - named like the cause that it is reported as
    """A file cannot be read, or is not the file that was planned.

    Attributes
    ----------
    path : str
        The file.
    """

    def __init__(self, path: str, problem: str) -> None:
        super().__init__(path, problem)  # both, so that it can be pickled
        self.path = path
        self.problem = problem

    def __str__(self) -> str:
        return f"{self.path} {self.problem}"


#: What file systems call the things that change when a file does, best first.
_TAGS = (
    "ETag",
    "etag",
    "md5Hash",
    "content_md5",
    "mtime",
    "LastModified",
    "last_modified",
    "updated",
    "modified",
    "created",
)


def local_path(path: str) -> str | None:
    """Return the path for the operating system, or None for a file elsewhere."""
    if path.startswith("file://"):
        return path.removeprefix("file://")
    return None if "://" in path or "::" in path else path


def tag_of(info: Mapping[str, Any]) -> str:
    """Return what identifies the content of a file: ``<kind>:<value>``, empty if the file system tells nothing."""
    for name in _TAGS:
        if value := info.get(name):
            if isinstance(value, datetime):  # some file systems list a number where they tell a time of one file
                value = value.timestamp()
            return (
                f"{name.lower()}:{value:.6f}"
                if isinstance(value, float)
                else f"{name.lower()}:{value}".replace('"', "")
            )
    return ""


def verify_local(path: str, size: int, tag: str) -> None:
    """Check that a local file is the one that was planned."""
    stat = os.stat(path)  # noqa: PTH116 - a str, in hot code
    if stat.st_size != size or tag != f"mtime:{stat.st_mtime_ns}":
        raise _changed(path)


def open_source(path: str, size: int, tag: str) -> BinaryIO:
    """Open a file that was planned, unbuffered and seekable; an empty ``tag`` is not checked.

    Raises
    ------
    UnreadableInput
        If its size or its tag is not the planned one.
    """
    if (local := local_path(path)) is not None:
        if tag:
            verify_local(local, size, tag)
        return cast(BinaryIO, open(local, "rb", buffering=0))
    return cast(BinaryIO, _RemoteFile(path, size, tag))


class _RemoteFile(io.RawIOBase):
    """A file on an fsspec file system: one request per read, tried again when the store stumbles."""

    def __init__(self, path: str, size: int, tag: str) -> None:
        fs, name = connect(path)
        fs.invalidate_cache(name)
        # An open s3fs file asks for the version that it found when it was opened (If-Match).
        self._file: Any = io.BytesIO()  # what is closed if the next line fails
        self._file = persist(lambda: fs.open(name, "rb", cache_type="none"), path)
        info = getattr(self._file, "details", None) or persist(lambda: fs.info(name), path)
        self._path, self._size, self._at = path, size, 0
        found = tag_of(info)
        same_kind = found.partition(":")[0] == tag.partition(":")[0]
        if (tag and same_kind and found != tag) or info.get("size", size) not in (size, None):
            self.close()
            raise _changed(path)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        self._at = max(0, base + offset)
        return self._at

    def read(self, size: int = -1) -> bytes:
        stop = self._size if size is None or size < 0 else min(self._size, self._at + size)
        if stop <= self._at:
            return b""

        def fetch() -> bytes | None:
            self._file.seek(self._at)
            try:
                data: bytes = self._file.read(stop - self._at)
            except OSError as error:
                if type(error).__name__ == "FileExpired":  # s3fs: the object is not the one that was opened
                    return None
                raise
            return data

        data = persist(fetch, self._path)
        if data is None:
            raise _changed(self._path)
        self._at += len(data)
        return data

    def readinto(self, buffer: Any) -> int:
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()


def read_range(path: str, start: int, stop: int) -> bytes:
    """Read bytes ``start`` to ``stop`` of a file, in one request."""
    if (local := local_path(path)) is not None:
        with open(local, "rb", buffering=0) as file:
            file.seek(start)
            return file.read(stop - start)
    fs, name = connect(path)
    return cast(bytes, persist(lambda: fs.cat_file(name, start=start, end=stop), path))


@contextmanager
def translated(path: str) -> Iterator[None]:
    """Turn what goes wrong while a file is read into :class:`UnreadableInput`, or into what the store's trouble is."""
    import zlib

    try:
        yield
    except CortexDaskError:
        raise
    except FileNotFoundError:
        raise UnreadableInput(path, "is gone since the job was planned") from None
    except (EOFError, zlib.error) as error:
        raise UnreadableInput(path, f"is truncated or damaged: {_one_line(error)}") from error
    except (OSError, ValueError) as error:  # Arrow's own errors derive from these
        if isinstance(error, OSError) and (error.errno is not None or is_transient(error)):
            raise explain(error, path) from error
        raise UnreadableInput(path, f"is damaged: {_one_line(error)}") from error


def _changed(path: str) -> UnreadableInput:
    return UnreadableInput(path, "has changed since the job was planned: submit the job again to read the new content")


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
