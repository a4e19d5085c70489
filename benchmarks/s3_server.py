"""A small S3 server for benchmarks: objects in memory, as fast as Python can be, every request counted by its kind.

    python benchmarks/s3_server.py --latency 0.02

It understands what a client needs to list, read and write small objects (ListObjectsV2 with pages, delimiters and
prefixes; HEAD, GET with ranges and conditions, PUT with ``If-None-Match``, DELETE, DeleteObjects), checks no signature,
and knows no multipart upload. A hundred thousand copies of one object cost their names::

    with S3Process(latency=0.02) as server:
        server.copy("s3://bucket/in/part-{:06d}.parquet", 100_000, data)
        server.counts()                # {"list": 100, "get": 100000}; and begins to count anew

The server is a process of its own, so that what is measured does not share its interpreter with it.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import re
import subprocess
import sys
import urllib.request
from bisect import bisect_left, bisect_right
from collections import Counter
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

#: What every process that uses the server has in its environment, beside AWS_ENDPOINT_URL.
ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "benchmark",
    "AWS_SECRET_ACCESS_KEY": "benchmark",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
    "AWS_CONFIG_FILE": "/nonexistent/config",
    "AWS_SHARED_CREDENTIALS_FILE": "/nonexistent/credentials",
}

_PAGE = 1000
_XML = b"<?xml version='1.0' encoding='UTF-8'?>"
_MODIFIED = "2026-01-01T00:00:00.000Z", "Thu, 01 Jan 2026 00:00:00 GMT"


class _Object(NamedTuple):
    data: bytes
    etag: str


class _Answer(NamedTuple):
    status: str
    body: bytes = b""
    headers: tuple[tuple[str, str], ...] = ()


class _Objects:
    """Keys and objects of one bucket."""

    def __init__(self) -> None:
        self.of: dict[str, _Object] = {}
        self._sorted: list[str] | None = None

    def put(self, key: str, value: _Object) -> None:
        if key not in self.of:
            self._sorted = None
        self.of[key] = value

    def delete(self, key: str) -> None:
        if self.of.pop(key, None) is not None:
            self._sorted = None

    @property
    def keys(self) -> list[str]:
        if self._sorted is None:
            self._sorted = sorted(self.of)
        return self._sorted


class _S3:
    """Answers requests."""

    def __init__(self) -> None:
        self._buckets: dict[str, _Objects] = {}
        self._counts: Counter[str] = Counter()

    def answer(self, method: str, target: str, headers: dict[str, str], body: bytes) -> _Answer:
        url = urlsplit(target)
        if url.path.startswith("/-/"):
            return self._control(url.path, parse_qs(url.query), body)
        bucket, _, key = unquote(url.path).lstrip("/").partition("/")
        query = parse_qs(url.query, keep_blank_values=True)
        if key:
            self._counts[method.lower()] += 1
            return self._object(method, self._buckets.setdefault(bucket, _Objects()), key, headers, body)
        objects = self._buckets.setdefault(bucket, _Objects())
        if method == "GET" and "list-type" in query:
            self._counts["list"] += 1
            return self._list(bucket, objects, {name: values[0] for name, values in query.items()})
        if method == "POST" and "delete" in query:
            self._counts["delete many"] += 1
            for name in re.findall(rb"<Key>(.*?)</Key>", body):
                objects.delete(name.decode())
            return _Answer("200 OK", _XML + b"<DeleteResult/>")
        self._counts[f"{method.lower()} bucket"] += 1
        return _Answer("200 OK", b"")

    def _control(self, path: str, query: dict[str, list[str]], body: bytes) -> _Answer:
        if path == "/-/copies":
            objects = self._buckets.setdefault(query["bucket"][0], _Objects())
            made = _made(body)
            for number in range(int(query["first"][0]), int(query["last"][0])):
                objects.put(query["key"][0].format(number), made)
            return _Answer("200 OK")
        counts, self._counts = self._counts, Counter()
        return _Answer("200 OK", json.dumps(counts).encode())

    def _object(self, method: str, objects: _Objects, key: str, headers: dict[str, str], body: bytes) -> _Answer:
        found = objects.of.get(key)
        if method == "PUT":
            if found is not None and headers.get("if-none-match") == "*":
                return _error("412 Precondition Failed", "PreconditionFailed")
            made = _made(body)
            objects.put(key, made)
            return _Answer("200 OK", headers=(("ETag", made.etag),))
        if method == "DELETE":
            objects.delete(key)
            return _Answer("204 No Content")
        if found is None:
            return _error("404 Not Found", "NoSuchKey")
        if headers.get("if-match", found.etag) != found.etag:
            return _error("412 Precondition Failed", "PreconditionFailed")
        known = (("ETag", found.etag), ("Last-Modified", _MODIFIED[1]), ("Accept-Ranges", "bytes"))
        if "range" not in headers:
            return _Answer("200 OK", found.data, known)
        size = len(found.data)
        first, _, last = headers["range"].removeprefix("bytes=").partition("-")
        start = int(first) if first else max(0, size - int(last))
        stop = min(size, int(last) + 1) if first and last else size
        if start >= size:
            return _error("416 Range Not Satisfiable", "InvalidRange")
        span = f"bytes {start}-{stop - 1}/{size}"
        return _Answer("206 Partial Content", found.data[start:stop], (*known, ("Content-Range", span)))

    def _list(self, bucket: str, objects: _Objects, query: dict[str, str]) -> _Answer:
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        after = query.get("continuation-token") or query.get("start-after") or ""
        most = min(_PAGE, int(query.get("max-keys") or _PAGE))
        keys = objects.keys
        at = max(bisect_left(keys, prefix), bisect_right(keys, after) if after else 0)
        found: list[str] = []
        last, count = "", 0
        while at < len(keys) and keys[at].startswith(prefix) and count < most:
            key = keys[at]
            cut = key.find(delimiter, len(prefix)) if delimiter else -1
            if cut < 0:
                one = objects.of[key]
                found.append(
                    f"<Contents><Key>{escape(key)}</Key><LastModified>{_MODIFIED[0]}</LastModified>"
                    f"<ETag>{escape(one.etag)}</ETag><Size>{len(one.data)}</Size><StorageClass>STANDARD</StorageClass></Contents>"
                )
                last, at = key, at + 1
            else:
                folder = key[: cut + len(delimiter)]
                found.append(f"<CommonPrefixes><Prefix>{escape(folder)}</Prefix></CommonPrefixes>")
                last = folder + "\U0010ffff"
                at = bisect_right(keys, last)
            count += 1
        truncated = at < len(keys) and keys[at].startswith(prefix)
        token = f"<NextContinuationToken>{escape(last)}</NextContinuationToken>" if truncated else ""
        body = (
            f"<ListBucketResult xmlns='http://s3.amazonaws.com/doc/2006-03-01/'><Name>{bucket}</Name>"
            f"<Prefix>{escape(prefix)}</Prefix><KeyCount>{count}</KeyCount><MaxKeys>{most}</MaxKeys><IsTruncated>{str(truncated).lower()}"
            f"</IsTruncated>{token}{''.join(found)}</ListBucketResult>"
        )
        return _Answer("200 OK", _XML + body.encode(), (("Content-Type", "application/xml"),))


def _made(data: bytes) -> _Object:
    return _Object(data, f'"{hashlib.md5(data, usedforsecurity=False).hexdigest()}"')


def _error(status: str, code: str) -> _Answer:
    body = _XML + f"<Error><Code>{code}</Code><Message>{code}</Message></Error>".encode()
    return _Answer(status, body, (("Content-Type", "application/xml"),))


class _Connection(asyncio.Protocol):
    """One connection: requests one after the other, each answered after the latency."""

    def __init__(self, s3: _S3, latency: float) -> None:
        self._s3, self._latency = s3, latency
        self._data = bytearray()
        self._loop = asyncio.get_running_loop()

    def connection_made(self, transport: Any) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._data += data
        while (end := self._data.find(b"\r\n\r\n")) >= 0:
            first, *lines = self._data[:end].decode("latin-1").split("\r\n")
            headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
            length = int(headers.get("content-length", 0))
            if headers.pop("expect", ""):
                self._transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
                self._data[:end] = "\r\n".join(
                    [first, *(f"{name}: {value}" for name, value in headers.items())]
                ).encode()
                continue
            if len(self._data) < end + 4 + length:
                return
            body = bytes(self._data[end + 4 : end + 4 + length])
            del self._data[: end + 4 + length]
            method, target, _ = first.split(" ")
            answer = self._s3.answer(method, target, headers, body)
            if self._latency and not target.startswith("/-/"):
                self._loop.call_later(self._latency, self._send, method, answer)
            else:
                self._send(method, answer)

    def _send(self, method: str, answer: _Answer) -> None:
        lines = [f"HTTP/1.1 {answer.status}", f"Content-Length: {len(answer.body)}"]
        lines += [f"{name}: {value}" for name, value in answer.headers]
        head = "\r\n".join(lines).encode() + b"\r\n\r\n"
        self._transport.write(head if method == "HEAD" else head + answer.body)


async def serve(latency: float) -> None:
    """Serve until standard input ends, after one line with the URL on standard output."""
    s3 = _S3()
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: _Connection(s3, latency), "127.0.0.1", 0, backlog=1024)
    print(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", flush=True)
    await loop.run_in_executor(None, sys.stdin.read)
    server.close()


class S3Process:
    """The server in a process of its own; a context manager.

    Attributes
    ----------
    url : str
        The endpoint, for ``AWS_ENDPOINT_URL``.
    """

    def __init__(self, latency: float = 0.0) -> None:
        command = [sys.executable, str(Path(__file__).resolve()), "--latency", str(latency)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self._process.stdout is not None
        self.url = self._process.stdout.readline().decode().strip()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait(timeout=30)

    @property
    def environment(self) -> dict[str, str]:
        """What processes that use the server need in their environment."""
        return {**ENVIRONMENT, "AWS_ENDPOINT_URL": self.url}

    def copy(self, pattern: str, count: int, data: bytes, *, first: int = 0) -> None:
        """Put the same object under many keys.

        Parameters
        ----------
        pattern : str
            ``s3://bucket/key`` with a place for the number, as ``str.format`` takes it.
        """
        bucket, _, key = pattern.removeprefix("s3://").partition("/")
        query = urllib.parse.urlencode({"bucket": bucket, "key": key, "first": first, "last": first + count})
        request = urllib.request.Request(f"{self.url}/-/copies?{query}", data=data, method="POST")
        urllib.request.urlopen(request, timeout=60).close()

    def put(self, url: str, data: bytes) -> None:
        """Put one object."""
        name = urllib.request.pathname2url(url.removeprefix("s3://"))
        urllib.request.urlopen(
            urllib.request.Request(f"{self.url}/{name}", data=data, method="PUT"), timeout=60
        ).close()

    def counts(self) -> dict[str, int]:
        """Return how many requests of each kind there were since the last look, and begin anew."""
        with urllib.request.urlopen(f"{self.url}/-/counts", timeout=60) as answer:
            counts: dict[str, int] = json.load(answer)
        return counts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--latency", type=float, default=0.0, metavar="SECONDS", help="until a request is answered")
    asyncio.run(serve(parser.parse_args().latency))
    return 0


if __name__ == "__main__":
    sys.exit(main())
