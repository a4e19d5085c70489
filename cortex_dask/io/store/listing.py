"""The keys of an S3 bucket, a page at a time: a million of them need no more memory than a thousand.

``find`` of s3fs returns all at once, and looks every folder up in a list of the others, so its time grows with their
square; ``glob`` lists folders one after the other, those that cannot match among them, and keeps all in a cache.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

from cortex_dask.io.store.retry import persist

_PAGE = 1000  # keys in a page, the most that S3 gives
_THREADS = 16  # folders that are listed at a time
_MAGIC = re.compile(r"[*?\[]")


def is_s3(fs: Any, url: str) -> bool:
    """Tell whether a file system is S3's own, and not a cache in front of it."""
    return "::" not in url and hasattr(fs, "call_s3")


def s3_keys(fs: Any, path: str, url: str, *, delimiter: str = "") -> Iterator[dict[str, Any]]:
    """Yield the objects whose keys begin as a path does, in S3's order, which is that of the keys.

    Parameters
    ----------
    fs : s3fs.S3FileSystem
        The file system.
    path : str
        Bucket and key, or the beginning of one.
    url : str
        What messages call it.
    delimiter : str
        ``"/"``: keys below a folder are left out, and the folder is there, without a slash, after the keys of its page.
    """
    bucket, _, key = path.partition("/")
    asked: dict[str, Any] = {"Bucket": bucket, "Prefix": key, "Delimiter": delimiter, "MaxKeys": _PAGE, **fs.req_kw}
    while True:
        page = persist(lambda: fs.call_s3("list_objects_v2", **asked), url)
        for item in page.get("Contents", ()):
            yield {"name": f"{bucket}/{item['Key']}", "size": item["Size"], "ETag": item.get("ETag"), "type": "file"}
        for folder in page.get("CommonPrefixes", ()):
            yield {"name": f"{bucket}/{folder['Prefix'].rstrip('/')}", "size": 0, "type": "directory"}
        if not page.get("IsTruncated"):
            return
        asked["ContinuationToken"] = page["NextContinuationToken"]


def s3_glob(fs: Any, pattern: str, url: str) -> Iterator[dict[str, Any]]:
    """Yield the objects that match a pattern, and those below folders that match it.

    Only folders that may match are listed, several at a time.

    Parameters
    ----------
    fs : s3fs.S3FileSystem
        The file system.
    pattern : str
        Bucket and pattern, without ``**``.
    url : str
        What messages call it.
    """
    from fsspec.utils import glob_translate

    bucket, *parts = pattern.split("/")
    folders = [f"{bucket}/"]
    for number, part in enumerate(parts):
        is_last = number == len(parts) - 1
        if not is_last and not _MAGIC.search(part):
            folders = [f"{folder}{part}/" for folder in folders]
            continue
        start = _MAGIC.split(part)[0]
        matches = re.compile(glob_translate(part)).match
        found = _each(lambda folder, start=start: s3_keys(fs, folder + start, url, delimiter="/"), folders)
        named = (info for info in found if matches(info["name"].rpartition("/")[2]))
        if is_last:
            below = []
            for info in named:
                if info["type"] == "directory":
                    below.append(f"{info['name']}/")
                else:
                    yield info
            yield from _each(lambda folder: s3_keys(fs, folder, url), below)
        folders = [f"{info['name']}/" for info in named if info["type"] == "directory"]


def _each(listing: Any, folders: list[str]) -> Iterator[dict[str, Any]]:
    """Yield what lies in each of some folders."""
    if len(folders) == 1:
        yield from listing(folders[0])
    elif folders:
        from concurrent.futures import ThreadPoolExecutor

        with ThreadPoolExecutor(min(_THREADS, len(folders)), thread_name_prefix="cortex-dask-list") as pool:
            found: Iterable[list[dict[str, Any]]] = pool.map(lambda folder: list(listing(folder)), folders)
            for entries in found:
                yield from entries
