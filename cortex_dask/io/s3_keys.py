"""The keys of an S3 bucket that begin alike, a page at a time: a million of them need no more memory than a thousand.

``find`` of s3fs returns all at once, and looks every folder up in a list of the others, so its time grows with their
square.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from cortex_dask.io.store import persist

__all__ = ["is_s3", "s3_keys"]

_PAGE = 1000  # keys in a page, the most that S3 gives


def is_s3(fs: Any, url: str) -> bool:
    """Tell whether a file system is S3's own, and not a cache in front of it."""
    return "::" not in url and hasattr(fs, "call_s3")


def s3_keys(fs: Any, path: str, url: str) -> Iterator[dict[str, Any]]:
    """Yield the objects whose keys begin as a path does, in S3's order, which is that of the keys.

    Parameters
    ----------
    fs : s3fs.S3FileSystem
        The file system.
    path : str
        Bucket and key, or the beginning of one.
    url : str
        What messages call it.
    """
    bucket, _, key = path.partition("/")
    asked: dict[str, Any] = {"Bucket": bucket, "Prefix": key, "MaxKeys": _PAGE, **fs.req_kw}
    while True:
        page = persist(lambda: fs.call_s3("list_objects_v2", **asked), url)
        for item in page.get("Contents", ()):
            yield {"name": f"{bucket}/{item['Key']}", "size": item["Size"], "ETag": item.get("ETag"), "type": "file"}
        if not page.get("IsTruncated"):
            return
        asked["ContinuationToken"] = page["NextContinuationToken"]
