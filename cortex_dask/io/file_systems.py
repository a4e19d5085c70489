"""The fsspec file system of a URL, connected for as many requests at a time as are made here."""

from __future__ import annotations

from typing import Any

__all__ = ["connect"]

_S3 = frozenset({"s3", "s3a"})
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
    if protocol in _S3 and "::" not in url:
        from fsspec.config import conf

        configured = conf.get(protocol, {}).get("config_kwargs", {})
        ours = {"max_pool_connections": _CONNECTIONS, **options.pop("config_kwargs", {})}
        options["config_kwargs"] = {**ours, **configured}
    fs, name = url_to_fs(url, **options)
    return fs, str(name)
