"""A store that this machine and the pods reach under the same URL.

Either an S3 server of the test's own, on loopback, made reachable by a relay; or a bucket that is there already. Which
of them is said by environment variables, see :func:`endpoint`.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import subprocess
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from tests.support.s3 import ENVIRONMENT, S3Server

__all__ = ["Endpoint", "endpoint"]

_READY_SECONDS = 30.0
_SAYS = """\
The tests on Kubernetes need a store that this machine and the pods reach under the same URL. Give one of:
  CORTEX_DASK_TEST_S3=s3://bucket/folder    a bucket; AWS_... variables say how it is reached, here and in the pods
  CORTEX_DASK_TEST_HOST=ADDRESS             an address of this machine that it and the pods reach, and where a server on
                                            its loopback cannot be reached under that address
  CORTEX_DASK_TEST_RELAY='COMMAND {port}'   a command that carries ADDRESS:{port} to 127.0.0.1:{port} until it is ended
docs/kubernetes.md has both for kind and minikube."""


@dataclass(frozen=True)
class Endpoint:
    """Where jobs have their directories, inputs and outputs."""

    url: str  # of an empty folder
    variables: dict[str, str]  # that a process needs to reach it, on this machine as in a pod


@contextlib.contextmanager
def endpoint() -> Iterator[Endpoint]:
    """Make a store ready, as ``CORTEX_DASK_TEST_S3``, or ``CORTEX_DASK_TEST_HOST`` and ``_RELAY``, tell."""
    given, host = os.environ.get("CORTEX_DASK_TEST_S3"), os.environ.get("CORTEX_DASK_TEST_HOST")
    if given:
        yield Endpoint(
            f"{given.rstrip('/')}/cortex-dask-test-{uuid.uuid4().hex[:12]}",
            {name: value for name, value in os.environ.items() if name.startswith("AWS_")},
        )
    elif host:
        with S3Server() as server:
            port = server.url.rpartition(":")[2]
            url = f"http://{host}:{port}"
            with _relay(os.environ.get("CORTEX_DASK_TEST_RELAY"), port, url):
                bucket = server.make_bucket()
                yield Endpoint(f"s3://{bucket}", {**ENVIRONMENT, "AWS_ENDPOINT_URL": url})
    else:
        pytest.fail(_SAYS, pytrace=False)


@contextlib.contextmanager
def _relay(template: str | None, port: str, url: str) -> Iterator[None]:
    """Run the relay, if there is one, until the server answers under its outer address."""
    if template is None:
        _wait_for(url, None)
        yield
        return
    command = [word.replace("{port}", port) for word in shlex.split(template)]
    relay = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    try:
        _wait_for(url, relay)
        yield
    finally:
        relay.terminate()
        relay.wait()


def _wait_for(url: str, relay: subprocess.Popen[bytes] | None) -> None:
    deadline = time.monotonic() + _READY_SECONDS
    while True:
        try:
            with urllib.request.urlopen(f"{url}/", timeout=5):
                return
        except urllib.error.HTTPError:
            return  # an answer is an answer
        except OSError as error:
            if relay is not None and relay.poll() is not None:
                pytest.fail(f"the relay has ended with status {relay.returncode}", pytrace=False)
            if time.monotonic() > deadline:
                pytest.fail(f"the test's S3 server is not reached under {url}: {error}\n{_SAYS}", pytrace=False)
            time.sleep(0.05)
