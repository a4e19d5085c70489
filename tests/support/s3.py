"""A real S3 API on loopback for the tests: moto's server in a thread of the test process."""

from __future__ import annotations

import logging
import threading
import urllib.request
import uuid
from collections.abc import Callable, Iterable
from typing import Any

from moto.moto_server.werkzeug_app import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
from werkzeug.serving import BaseWSGIServer, make_server

__all__ = ["ENVIRONMENT", "SIGNED", "S3Server"]

#: What every process that uses the test server has in its environment, beside AWS_ENDPOINT_URL.
ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "testing",
    "AWS_SECRET_ACCESS_KEY": "testing",
    "AWS_DEFAULT_REGION": "us-east-1",
    # never look for the credentials of the machine or of the person who runs the tests
    "AWS_EC2_METADATA_DISABLED": "true",
    "AWS_CONFIG_FILE": "/nonexistent/config",
    "AWS_SHARED_CREDENTIALS_FILE": "/nonexistent/credentials",
}

#: An Authorization header: moto finds a request's account and region in it, and checks no signature.
SIGNED = "AWS4-HMAC-SHA256 Credential=testing/20200101/us-east-1/s3/aws4_request, SignedHeaders=host, Signature=0"

WSGIApplication = Callable[[dict[str, Any], Any], Iterable[bytes]]


class _LikeS3:
    """Answer as S3 does where moto does not.

    Conditional requests go through one by one: S3 decides them atomically, moto checks first and writes later.
    Completing an upload that was aborted is a 404; moto fails with a KeyError.
    """

    def __init__(self, application: WSGIApplication) -> None:
        self._application = application
        self._lock = threading.Lock()

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        if environ["REQUEST_METHOD"] in ("PUT", "POST") and "HTTP_IF_NONE_MATCH" in environ:
            with self._lock:
                return list(self._application(environ, start_response))
        if environ["REQUEST_METHOD"] == "POST" and "uploadId=" in environ["QUERY_STRING"]:
            try:
                return list(self._application(environ, start_response))
            except KeyError:
                start_response("404 Not Found", [("Content-Type", "application/xml")])
                return [
                    b"<?xml version='1.0'?><Error><Code>NoSuchUpload</Code><Message>it was aborted</Message></Error>"
                ]
        return self._application(environ, start_response)


class S3Server:
    """An S3 server on a free port of 127.0.0.1; a context manager.

    Attributes
    ----------
    url : str
        The endpoint, for ``AWS_ENDPOINT_URL``.
    """

    def __init__(self) -> None:
        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        application = _LikeS3(DomainDispatcherApplication(create_backend_app))
        self._server: BaseWSGIServer = make_server(
            "127.0.0.1", 0, application, threaded=True, request_handler=MotoRequestHandler
        )
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), name="s3-server", daemon=True)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> S3Server:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def make_bucket(self) -> str:
        """Make an empty bucket with a name that nobody else has, and return the name."""
        name = f"bucket-{uuid.uuid4().hex[:16]}"
        request = urllib.request.Request(f"{self.url}/{name}", method="PUT")
        request.add_header("Authorization", SIGNED)
        with urllib.request.urlopen(request, timeout=30):
            return name
