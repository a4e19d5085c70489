"""The requests of a store on any fsspec file system."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import threading
from collections.abc import Iterable, Iterator
from typing import Any

from cortex_dask.errors import InputError, StorageError
from cortex_dask.io.store.errors import error_code, is_transient, transient_code
from cortex_dask.io.store.retry import persist
from cortex_dask.io.store.staged_file import StagedFile

_S3_OPTIONS = frozenset({"s3", "s3a"})
#: Opened as they are needed. botocore's default is 10, whatever the number of threads that ask: with an answer after
#: 30 ms that is 300 requests a second at best.
_CONNECTIONS = 64


def connect(url: str, **options: Any) -> tuple[Any, str]:
    """Return the file system of a URL, and what it calls the file.

    ::

        fs, name = connect("s3://bucket/in/a.parquet")

    Parameters
    ----------
    url : str
        Any that fsspec takes.
    **options
        For the file system, over the user's configuration; of ``config_kwargs`` each key under the user's.
    """
    from fsspec.core import url_to_fs

    protocol = url.partition("://")[0]
    if protocol in _S3_OPTIONS and "::" not in url:
        from fsspec.config import conf

        configured = conf.get(protocol, {}).get("config_kwargs", {})
        ours = {"max_pool_connections": _CONNECTIONS, **options.pop("config_kwargs", {})}
        options["config_kwargs"] = {**ours, **configured}
    fs, name = url_to_fs(url, **options)
    return fs, str(name)


_S3 = frozenset({"s3", "s3a"})
#: File systems whose ``pipe_file(mode="create")`` is a conditional request that the server decides.
_ATOMIC_CREATE = frozenset({"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az"})
#: File systems that know files only: their folders are what names have in common.
_FOLDERLESS = _ATOMIC_CREATE | {"memory"}
#: File systems with a rename that is one request; object stores copy and delete.
_ATOMIC_RENAME = frozenset({"sftp", "ssh", "smb", "hdfs", "viewfs", "webhdfs"})
#: File systems that take ``use_listings_cache``; others hand what they do not know to their server's client.
_LISTINGS_CACHE = frozenset({"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "http", "https"})

#: File systems that keep an upload unseen until it is committed; for others it waits in memory as a whole.
_UNSEEN_UPLOADS = frozenset({*_ATOMIC_CREATE, "sftp", "ssh", "smb", "ftp", "webhdfs"})
#: File systems whose ``find`` takes the beginning of the names.
_PREFIXES = frozenset({"s3", "s3a", "gs", "gcs"})

#: Content up to this size is one request; more is a multipart upload in blocks of this size. S3 allows 10,000 blocks,
#: so parts of up to 160 GB; fewer bytes are held in memory than with s3fs' own 50 MiB.
_BLOCK = 16 << 20
_S3_COPY = 5 << 30  # the limit of S3's CopyObject
_KEYS_PER_DELETE = 1000  # the limit of S3's DeleteObjects

#: What botocore tries by itself; a setting of the user's stands. Its default may sleep for many seconds.
_S3_RETRIES = {"mode": "standard", "total_max_attempts": 3}
#: How often s3fs tries a request whose connection was dropped: for readers that use it directly.
_S3FS_TRIES = 2

_create_lock = threading.Lock()


class RemoteFiles:
    """The files below one folder of an fsspec file system (see :class:`cortex_dask.io.store.store.FileRequests`)."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._protocol = url.partition("://")[0]
        self._s3 = self._protocol in _S3
        self.uploads_unseen = self._protocol in _UNSEEN_UPLOADS
        self._process = os.getpid()
        self._fs, self._root = connect(url, **_options(self._protocol))
        if self._s3:
            self._fs.retries = _S3FS_TRIES

    def path(self, name: str) -> str:
        """Return a file's path as the file system takes it."""
        if not name:
            return str(self._root)
        if name.startswith("/") or ".." in name.split("/"):
            raise InputError(f"{name!r} is not a name below a store")
        return f"{self._root.rstrip('/')}/{name}"

    def file_system(self) -> Any:
        """Return the file system; a new one after a fork, because its event loop stayed with the parent."""
        if self._process != os.getpid():
            self.__init__(self._url)  # type: ignore[misc]  # the same object for everybody who holds it
        return self._fs

    def read(self, name: str) -> bytes:
        """Return a file's content, from S3 with one request."""
        fs = self.file_system()
        if self._s3:
            return bytes(fs.cat_file(self.path(name), max_concurrency=1))
        return bytes(fs.cat_file(self.path(name)))

    def read_range(self, name: str, start: int, stop: int) -> bytes:
        """Return a stretch of a file."""
        try:
            return bytes(self.file_system().cat_file(self.path(name), start=start, end=stop))
        except OSError as error:
            if error_code(error) in ("InvalidRange", "416"):  # it starts behind the end
                return b""
            raise

    def write(self, name: str, data: bytes | bytearray) -> None:
        """Put a file."""
        fs, path = self.file_system(), self.path(name)
        self._make_parent(fs, path)
        fs.pipe_file(path, bytes(data))

    def create(self, name: str, data: bytes) -> None:
        """Put a file on the condition that it is not there."""
        fs, path = self.file_system(), self.path(name)
        try:
            if self._s3:  # never as a multipart upload, on whose completion some servers ignore the condition
                fs.pipe_file(path, bytes(data), mode="create", chunksize=len(data) + 1)
            elif self._protocol in _ATOMIC_CREATE:
                fs.pipe_file(path, bytes(data), mode="create")
            else:
                self._make_parent(fs, path)
                with _create_lock:
                    fs.invalidate_cache()
                    if self.size(name) is not None:
                        raise FileExistsError(errno.EEXIST, "exists already", path)
                    fs.pipe_file(path, bytes(data))
        except OSError as error:
            if error_code(error) in ("PreconditionFailed", "412") or error.errno == errno.EEXIST:
                raise FileExistsError(errno.EEXIST, "exists already", path) from error
            raise

    def exists(self, name: str) -> bool:
        """Return whether a file or a folder is there."""
        return self._info(name) is not None

    def size(self, name: str) -> int | None:
        """Return a file's size, None where there is no such file."""
        info = self._info(name)
        return int(info["size"]) if info is not None and info["type"] != "directory" else None

    def sizes(self, prefix: str) -> dict[str, int]:
        """List all files whose names start with ``prefix``, with their sizes."""
        fs = self.file_system()
        fs.invalidate_cache()
        folder, slash, start = prefix.rpartition("/")
        try:
            # S3 and Google Cloud Storage find by the beginning of a name
            found = fs.find(
                self.path(folder), detail=True, **({"prefix": start} if self._protocol in _PREFIXES else {})
            )
        except FileNotFoundError as error:
            if error_code(error) == "NoSuchBucket":
                raise
            return {}
        sizes = {
            folder + slash + name: int(found[path]["size"] or 0) for path, name in _below(found, self.path(folder))
        }
        return {name: size for name, size in sizes.items() if name.startswith(prefix)}

    def children(self, prefix: str) -> list[str]:
        """List the direct entries of a folder."""
        fs = self.file_system()
        fs.invalidate_cache()
        try:
            found = fs.ls(self.path(prefix), detail=False)
        except (FileNotFoundError, NotADirectoryError) as error:
            if error_code(error) == "NoSuchBucket":
                raise
            return []
        return [name for _, name in _below((path.rstrip("/") for path in found), self.path(prefix))]

    def delete(self, names: tuple[str, ...]) -> None:
        """Delete files, on S3 a thousand with one request."""
        fs = self.file_system()
        if self._s3 and len(names) > 1:
            for start in range(0, len(names), _KEYS_PER_DELETE):
                self._delete_keys(fs, names[start : start + _KEYS_PER_DELETE])
            return
        for name in names:
            try:
                fs.rm_file(self.path(name))
            except FileNotFoundError as error:
                if error_code(error) == "NoSuchBucket":
                    raise

    def delete_tree(self, prefix: str) -> None:
        """Delete a folder with all that is in it, and on S3 what unfinished uploads left there unseen."""
        fs = self.file_system()
        if not self._s3:
            fs.invalidate_cache()
            with contextlib.suppress(FileNotFoundError):
                fs.rm(self.path(prefix), recursive=True)
            return
        self.delete(tuple(self.sizes(f"{prefix}/" if prefix else "")))
        self._abort_uploads(fs, self.path(prefix))

    def publish(self, staged: str, final: str, size: int, *, keep: bool) -> None:
        """Rename a staged file, or copy it inside the store and, unless it is kept, delete it."""
        fs, source, target = self.file_system(), self.path(staged), self.path(final)
        self._make_parent(fs, target)
        if self._protocol in _ATOMIC_RENAME:
            fs.mv(source, target)
            return
        if self._s3 and size <= _S3_COPY:  # s3fs would ask for the size
            (bucket, key, _), (from_bucket, from_key, _) = fs.split_path(target), fs.split_path(source)
            fs.call_s3("copy_object", Bucket=bucket, Key=key, CopySource={"Bucket": from_bucket, "Key": from_key})
        else:
            fs.cp_file(source, target)
        if not keep:
            self.delete((staged,))

    def stage(self, name: str) -> StagedFile:
        """Open a file that is uploaded unseen."""
        fs, path = self.file_system(), self.path(name)
        self._make_parent(fs, path)
        return _RemoteStagedFile(self, name, f"{self._url}/{name}")

    def _info(self, name: str) -> dict[str, Any] | None:
        fs = self.file_system()
        try:
            # `exists` of fsspec takes any error for an absence
            info: dict[str, Any] = fs.info(self.path(name), refresh=True) if self._s3 else fs.info(self.path(name))
        except FileNotFoundError as error:
            if error_code(error) == "NoSuchBucket":
                raise
            return None
        return info

    def _make_parent(self, fs: Any, path: str) -> None:
        """Make the folders of a path where the file system has folders."""
        if self._protocol not in _FOLDERLESS:
            fs.makedirs(path.rpartition("/")[0], exist_ok=True)

    def _delete_keys(self, fs: Any, names: tuple[str, ...]) -> None:
        paths = [fs.split_path(self.path(name)) for name in names]
        answer = fs.call_s3(
            "delete_objects",
            Bucket=paths[0][0],
            Delete={"Objects": [{"Key": key} for _, key, _ in paths], "Quiet": True},
        )
        for failure in answer.get("Errors", ()):
            code = failure.get("Code", "")
            if code == "NoSuchKey":
                continue
            text = f"{failure.get('Key')}: {code} {failure.get('Message', '')}"
            if code == "AccessDenied":
                raise PermissionError(errno.EACCES, text)
            raise OSError(errno.EBUSY if transient_code(code) else errno.EIO, text)

    def _abort_uploads(self, fs: Any, path: str) -> None:
        bucket, key, _ = fs.split_path(path)
        try:
            answer = fs.call_s3("list_multipart_uploads", Bucket=bucket, Prefix=f"{key}/" if key else "")
            for upload in answer.get("Uploads", ()):
                fs.call_s3("abort_multipart_upload", Bucket=bucket, Key=upload["Key"], UploadId=upload["UploadId"])
        except (OSError, NotImplementedError) as error:
            # they are invisible and only cost space; not everybody may list them
            if is_transient(error) and error_code(error) != "NoSuchUpload":
                raise


class _RemoteStagedFile(StagedFile):
    """Bytes that are kept in memory up to one block, and then uploaded block by block under a name nobody sees yet."""

    def __init__(self, files: RemoteFiles, name: str, url: str) -> None:
        super().__init__(url)
        self._files = files
        self._name = name
        self._buffer = io.BytesIO()
        self._upload: Any = None
        self._written = 0
        self._failed: BaseException | None = None

    def tell(self) -> int:
        """Return how many bytes were written."""
        return self._written

    def _write(self, data: memoryview) -> int:
        self._check()
        self._buffer.write(data)
        self._written += len(data)
        if self._buffer.tell() >= _BLOCK and self._files.uploads_unseen:
            self._send_block()
        return len(data)

    def _check(self) -> None:
        if self._failed is not None:
            raise StorageError(f"a write of {self.url} has failed: discard it and write it again") from self._failed

    def _send_block(self) -> None:
        """Upload what the buffer holds; after a failure the file can only be discarded."""
        block, self._buffer = self._buffer.getvalue(), io.BytesIO()
        try:
            self._send(block)
        except BaseException as error:
            self._failed = error
            raise

    def _send(self, block: bytes) -> None:
        if self._upload is None:
            self._upload = persist(lambda: self._begin(block), self.url, writes=True)
            return
        upload = self._upload
        try:
            upload.write(block)
        except Exception as error:
            if not (self._files._s3 and is_transient(error)):
                raise
            persist(upload.flush, self.url, writes=True)  # S3File keeps the block until its request has succeeded

    def _begin(self, block: bytes) -> Any:
        upload = self._open()
        try:
            upload.write(block)
        except BaseException:
            _abandon(upload)
            raise
        return upload

    def _open(self) -> Any:
        fs, path = self._files.file_system(), self._files.path(self._name)
        return fs.open(path, "wb", block_size=_BLOCK, autocommit=False)

    def _commit(self) -> int:
        self._check()
        if self._upload is None:
            self._files.write(self._name, self._buffer.getvalue())
            return self._written
        upload = self._upload
        if self._buffer.tell():
            self._send_block()
        try:
            if not upload.closed:
                upload.close()
        except Exception:
            if self._files._s3:  # close() gives up its last block otherwise when it is tried again
                upload.forced = upload.closed = False
            raise
        if upload.tell() != self._written:
            raise StorageError(f"{self.url} is not whole: {upload.tell()} of {self._written} bytes were uploaded")
        try:
            upload.commit()
        except FileNotFoundError:
            # the request to complete took effect and its answer was lost: the upload is gone, the object is there
            if self._files.size(self._name) != self._written:
                raise
        return self._written

    def _discard(self) -> None:
        self._buffer = io.BytesIO()
        if self._upload is not None:
            _abandon(self._upload)


def _abandon(upload: Any) -> None:
    """Discard an upload; a failure to do so leaves it unseen, and must not hide why it was discarded."""
    with contextlib.suppress(Exception):
        upload.discard()
    upload.closed = True  # or it would upload its buffer when it is collected


def _options(protocol: str) -> dict[str, Any]:
    """Return what to make a file system with, beside the user's configuration."""
    options: dict[str, Any] = {"use_listings_cache": False} if protocol in _LISTINGS_CACHE else {}
    if protocol in _S3 and not {"AWS_MAX_ATTEMPTS", "AWS_RETRY_MODE"} & os.environ.keys():
        options["config_kwargs"] = {"retries": _S3_RETRIES}
    return options


def _below(paths: Iterable[str], folder: str) -> Iterator[tuple[str, str]]:
    """Yield paths and their names relative to a folder; neither the folder nor the markers that stand for folders."""
    start = folder.rstrip("/") + "/"
    for path in paths:
        if path.startswith(start) and len(path) > len(start) and path[-1] != "/":
            yield path, path[len(start) :]
