"""Files of the local file system, with nothing but the operating system's calls: no fsspec, which costs import time.

A file that is being written has a hidden name (``.cx-….tmp``) in the folder where it will appear; it never shows up in
a listing.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, TypeVar

from cortex_dask.errors import InputError, StorageError
from cortex_dask.io.store.staged_file import StagedFile

_T = TypeVar("_T")

_TEMPORARY = (".cx-", ".tmp")  # how the name of an unfinished file starts and ends
_BUFFER = 1 << 20

#: What link(2) answers where a file system has no hard links (FAT, some network and user-space file systems).
_NO_LINKS = frozenset({errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EMLINK, errno.EACCES})


class LocalFiles:
    """The files below one local folder (see :class:`cortex_dask.io.store.store.FileRequests`)."""

    def __init__(self, root: str) -> None:
        self._root = root

    def path(self, name: str) -> str:
        """Return a file's absolute path."""
        return _below(self._root, name)

    def file_system(self) -> Any:
        """Return fsspec's local file system."""
        import fsspec

        return fsspec.filesystem("file")

    def read(self, name: str) -> bytes:
        """Return a file's content."""
        with open(self.path(name), "rb") as file:
            return file.read()

    def read_range(self, name: str, start: int, stop: int) -> bytes:
        """Return a stretch of a file."""
        with open(self.path(name), "rb") as file:
            file.seek(start)
            return file.read(stop - start)

    def write(self, name: str, data: bytes | bytearray) -> None:
        """Write a temporary file and rename it."""
        path = self.path(name)
        temporary = _write_temporary(path, data, durable=False)
        try:
            os.replace(temporary, path)  # noqa: PTH105
        except BaseException:
            _remove(temporary)
            raise

    def create(self, name: str, data: bytes) -> None:
        """Write a temporary file and link it to its name, which fails where the name is taken."""
        path = self.path(name)
        if os.path.lexists(path):  # spares the work; the link below decides
            raise FileExistsError(errno.EEXIST, "exists already", path)
        temporary = _write_temporary(path, data, durable=True)
        try:
            try:
                os.link(temporary, path)
            except OSError as error:
                if error.errno not in _NO_LINKS:
                    raise
                _claim(temporary, path)
        finally:
            _remove(temporary)
        _sync_folder(os.path.dirname(path))  # noqa: PTH120

    def exists(self, name: str) -> bool:
        """Return whether a file or folder is there."""
        return self._status(name) is not None

    def size(self, name: str) -> int | None:
        """Return a file's size, None where there is no such file."""
        status = self._status(name)
        return status.st_size if status is not None and not stat.S_ISDIR(status.st_mode) else None

    def sizes(self, prefix: str) -> dict[str, int]:
        """List all files whose names start with ``prefix``, with their sizes."""
        folder, slash, start = prefix.rpartition("/")
        found = {}
        for name, entry in _walk(self.path(folder), folder + slash, start):
            with contextlib.suppress(FileNotFoundError):  # deleted meanwhile
                found[name] = entry.stat().st_size
        return found

    def children(self, prefix: str) -> list[str]:
        """List the direct entries of a folder."""
        try:
            return [name for name in os.listdir(self.path(prefix)) if not _is_temporary(name)]  # noqa: PTH208
        except (FileNotFoundError, NotADirectoryError):
            return []

    def delete(self, names: tuple[str, ...]) -> None:
        """Delete files."""
        for name in names:
            _remove(self.path(name))

    def delete_tree(self, prefix: str) -> None:
        """Delete a folder with all that is in it; others may be doing the same."""
        path = self.path(prefix)
        for _ in range(3):  # a file that appears meanwhile makes one round fail
            try:
                shutil.rmtree(path)
            except FileNotFoundError:
                if not os.path.lexists(path):
                    return
            except NotADirectoryError:
                _remove(path)
                return
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
            else:
                return
        shutil.rmtree(path)

    def publish(self, staged: str, final: str, size: int, *, keep: bool) -> None:
        """Rename a staged file."""
        source, target = self.path(staged), self.path(final)
        found = os.stat(source).st_size  # noqa: PTH116
        if found != size:
            raise StorageError(f"{source} has {found} bytes, but {size} were written: it was changed by somebody else")
        _with_parents(lambda: os.replace(source, target), target, exists=source)  # noqa: PTH105

    def stage(self, name: str) -> StagedFile:
        """Open a temporary file beside the place where it will appear."""
        return _LocalStagedFile(self.path(name))

    def _status(self, name: str) -> os.stat_result | None:
        try:
            return os.stat(self.path(name))  # noqa: PTH116
        except (FileNotFoundError, NotADirectoryError):
            return None


class _LocalStagedFile(StagedFile):
    """A temporary file that gets its name with the commit."""

    local_path: str

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self._path = path
        self.local_path = _temporary_name(path)
        self._file: BinaryIO = io.BytesIO()  # what is closed if the next line fails
        descriptor = _with_parents(lambda: _open_new(self.local_path), path)
        self._file = os.fdopen(descriptor, "wb", buffering=_BUFFER)

    def _write(self, data: memoryview) -> int:
        return self._file.write(data)

    def tell(self) -> int:
        """Return how many bytes were written."""
        return self._file.tell()

    def flush(self) -> None:
        """Hand what is buffered to the operating system."""
        if not self._file.closed:
            self._file.flush()

    def _commit(self) -> int:
        self._file.close()
        size = os.stat(self.local_path).st_size  # noqa: PTH116  # also right if a writer opened local_path itself
        os.replace(self.local_path, self._path)  # noqa: PTH105
        return size

    def _discard(self) -> None:
        try:
            self._file.close()
        except OSError:
            pass  # a full disk refuses the last buffer, which is not wanted any more
        finally:
            _remove(self.local_path)


def _below(root: str, name: str) -> str:
    if not name:
        return root
    if name.startswith("/") or ".." in name.split("/"):
        raise InputError(f"{name!r} is not a name below a store")
    return f"{root.rstrip('/')}/{name}"


def _is_temporary(name: str) -> bool:
    return name.startswith(_TEMPORARY[0]) and name.endswith(_TEMPORARY[1])


def _temporary_name(path: str) -> str:
    return os.path.join(os.path.dirname(path), f"{_TEMPORARY[0]}{os.urandom(8).hex()}{_TEMPORARY[1]}")  # noqa: PTH118, PTH120


def _open_new(path: str) -> int:
    # not tempfile, whose files only their owner may read
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0), 0o666)


def _with_parents(call: Callable[[], _T], path: str, exists: str | None = None) -> _T:
    """Make a call that puts a file at ``path``; make its folders if they are missing (a cleaner may remove them)."""
    for _ in range(3):
        try:
            return call()
        except FileNotFoundError:
            if exists is not None and not os.path.lexists(exists):
                raise
            os.makedirs(os.path.dirname(path), exist_ok=True)  # noqa: PTH103, PTH120
    return call()


def _write_temporary(path: str, data: bytes | bytearray, *, durable: bool) -> str:
    """Write a hidden file beside ``path``; leave nothing behind if that fails."""
    temporary = _temporary_name(path)
    descriptor = _with_parents(lambda: _open_new(temporary), path)
    try:
        with os.fdopen(descriptor, "wb", buffering=0) as file:
            view = memoryview(data)
            while view:
                view = view[file.write(view) :]
            if durable:
                os.fsync(file.fileno())
    except BaseException:
        _remove(temporary)
        raise
    return temporary


def _claim(temporary: str, path: str) -> None:
    """Take a name without hard links: an exclusive empty file, then the content in its place.

    A reader may find the file empty for an instant, and a crash in that instant leaves it so; there is no better call
    that every system has.
    """
    os.close(_open_new(path))
    try:
        os.replace(temporary, path)  # noqa: PTH105
    except BaseException:
        _remove(path)
        raise


def _sync_folder(path: str) -> None:
    """Make a new name durable; some file systems cannot and need not."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    except OSError:
        pass
    finally:
        os.close(descriptor)


def _remove(path: str) -> None:
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        os.unlink(path)  # noqa: PTH108


def _walk(folder: str, prefix: str, start: str) -> Iterator[tuple[str, os.DirEntry[str]]]:
    """Yield the files below a folder; folders that vanish meanwhile are passed over, links to folders not followed.

    ``prefix`` goes before their names; entries of the folder itself count only if their names begin with ``start``.
    """
    try:
        with os.scandir(folder) as entries:
            found = [entry for entry in entries if entry.name.startswith(start)]
    except (FileNotFoundError, NotADirectoryError):
        return
    for entry in found:
        if entry.is_dir(follow_symlinks=False):
            yield from _walk(entry.path, f"{prefix}{entry.name}/", "")
        elif not _is_temporary(entry.name):
            yield prefix + entry.name, entry
