"""An HTTP proxy on loopback that makes a storage server fail on demand.

::

    with FaultyS3("http://127.0.0.1:5000") as proxy:          # or the fixture faulty_s3
        proxy.fail(2, when="after", how="drop", match="PUT")  # the second PUT takes effect, its answer is lost
        ...
        assert proxy.failed == 1
"""

from __future__ import annotations

import http.client
import re
import socket
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal
from urllib.parse import urlsplit

__all__ = ["FaultyS3", "Request"]

_HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding", "proxy-connection", "te", "trailer", "upgrade"}


@dataclass(frozen=True, slots=True)
class Request:
    """A request that came through the proxy."""

    method: str
    path: str  # with the query
    failed: str = ""  # "", "before drop", "after 503" …

    def __str__(self) -> str:
        return f"{self.method} {self.path}" + (f" [{self.failed}]" if self.failed else "")


@dataclass(slots=True)
class _Rule:
    first: int  # the first matching request that fails, from 1
    count: int | None  # how many fail; None: all from then on
    when: Literal["before", "after"]
    how: str
    match: re.Pattern[str]
    seen: int = field(default=0)

    def hits(self, request: str) -> bool:
        if not self.match.search(request):
            return False
        self.seen += 1
        return self.seen >= self.first and (self.count is None or self.seen < self.first + self.count)


class FaultyS3:
    """A proxy that forwards every request to a server, except where it was told to fail; a context manager.

    Parameters
    ----------
    target : str
        The URL of the server behind it.

    Attributes
    ----------
    url : str
        The proxy's endpoint, for ``AWS_ENDPOINT_URL``.
    bucket : str
        The URL of a bucket that is the test's own; set by the fixture, not used by the proxy.
    requests : list of Request
        Every request so far, failed ones included, in the order in which they came.
    """

    def __init__(self, target: str) -> None:
        self.bucket = ""
        self.requests: list[Request] = []
        self._target = urlsplit(target)
        self._rules: list[_Rule] = []
        self._lock = threading.Lock()
        self._server = _Server(("127.0.0.1", 0), type("Handler", (_Handler,), {"proxy": self}))
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), name="faulty-s3", daemon=True)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> FaultyS3:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def fail(
        self,
        k: int = 1,
        when: Literal["before", "after"] = "before",
        how: str = "drop",
        match: str = "",
        count: int | None = 1,
    ) -> None:
        """Make requests fail, from now on.

        Parameters
        ----------
        k : int
            Which matching request fails, counted from 1 and from this call.
        when : {"before", "after"}
            ``before``: the server never sees the request. ``after``: it has taken effect, and the answer is lost.
        how : str
            ``drop`` closes the connection without an answer. ``503`` is the status of the answer, ``403 AccessDenied``
            its status and S3's error code.
        match : str
            A regular expression that is searched in ``<METHOD> <path?query>``; empty: every request.
        count : int, optional
            How many matching requests fail, beginning with the k-th; None: all of them.
        """
        with self._lock:
            self._rules.append(_Rule(k, count, when, how, re.compile(match)))

    def heal(self) -> None:
        """Fail no more; forget the counts and the log."""
        with self._lock:
            self._rules.clear()
            self.requests.clear()

    @property
    def failed(self) -> int:
        """How many requests were made to fail."""
        with self._lock:
            return sum(1 for request in self.requests if request.failed)

    def _decide(self, method: str, path: str) -> _Rule | None:
        """Log a request and return the rule that it falls under."""
        with self._lock:
            hits = [rule for rule in self._rules if rule.hits(f"{method} {path}")]
            failed = f"{hits[0].when} {hits[0].how}" if hits else ""
            self.requests.append(Request(method, path, failed))
            return hits[0] if hits else None

    def _connect(self) -> http.client.HTTPConnection:
        assert self._target.hostname is not None
        return http.client.HTTPConnection(self._target.hostname, self._target.port, timeout=60)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, request: object, client_address: object) -> None:
        """Say nothing: clients that are killed in the middle of a request are what the tests are about."""


class _Handler(BaseHTTPRequestHandler):
    proxy: FaultyS3
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # a header and a body are two packets: 40 ms

    def _serve(self) -> None:
        rule = self.proxy._decide(self.command, self.path)
        body = self._body()
        if rule is None or rule.when == "after":
            forwarded = self._forward(body)
        if rule is None:
            self._answer(*forwarded)
        elif rule.how == "drop":
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
        else:
            status, _, code = rule.how.partition(" ")
            code = code or ("SlowDown" if status == "503" else "InternalError")
            text = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>made to fail</Message></Error>"
            self._answer(int(status), [("Content-Type", "application/xml")], text.encode())

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _serve  # noqa: N815  # names that http.server looks for

    def _body(self) -> bytes:
        """Read the request's body, which may come in chunks."""
        if "chunked" in self.headers.get("Transfer-Encoding", "").lower():
            body = b""
            while size := int(self.rfile.readline().split(b";")[0], 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            while self.rfile.readline().strip():
                pass
            return body
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _forward(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        headers = {name: value for name, value in self.headers.items() if name.lower() not in _HOP_BY_HOP}
        headers.pop("Expect", None)
        headers["Content-Length"] = str(len(body))
        connection = self.proxy._connect()
        try:
            connection.request(self.command, self.path, body=body, headers=headers)
            response = connection.getresponse()
            kept = [(name, value) for name, value in response.getheaders() if name.lower() not in _HOP_BY_HOP]
            return response.status, kept, response.read()
        finally:
            connection.close()

    def _answer(self, status: int, headers: list[tuple[str, str]], body: bytes) -> None:
        self.send_response_only(status)
        lengths = [value for name, value in headers if name.lower() == "content-length"]
        for name, value in headers:
            if name.lower() != "content-length":
                self.send_header(name, value)
        # the answer to HEAD tells the length of a body that does not come
        self.send_header("Content-Length", lengths[0] if self.command == "HEAD" and lengths else str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Print nothing."""
