"""What a Dask Gateway refuses, and what is wrong with it: one sentence each, soon."""

from __future__ import annotations

import asyncio
import json
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import dask
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import cortex_dask as cx
from cortex_dask.clusters.gateway import cluster
from cortex_dask.clusters.gateway.server import GatewayApi
from cortex_dask.errors import ClusterError, JobTimedOutError, SpecError
from tests.support.gateway_server import GatewayServer
from tests.support.waiting import until

Submit = Callable[..., Any]

#: dask_gateway does not close the first answer, the one that asks for authentication.
pytestmark = pytest.mark.filterwarnings("ignore:Unclosed connection:ResourceWarning")


class Handler:
    def __init__(self, config: dict[str, Any]) -> None:
        pass

    def handle_batch(self, payload: Any) -> Any:
        return payload


@pytest.fixture
def submit(gateway_server: GatewayServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Submit]:
    """Run a small job on the gateway; when the test is over, nothing may be left there."""
    monkeypatch.setenv("DASK_CORTEX_DASK__CACHE", str(tmp_path / "cache"))
    (tmp_path / "in").mkdir()
    pq.write_table(pa.table({"n": range(10)}), tmp_path / "in" / "data.parquet")
    settings = {**gateway_server.configuration(), "cortex-dask.store": str(tmp_path / "store")}

    def run(compute: dict[str, Any] | None = None, timeout: float | None = None, **options: Any) -> Any:
        return cx.run(
            Handler,
            tmp_path / "in",
            tmp_path / "out",
            cluster="gateway",
            workers=1,
            progress=False,
            compute=compute,
            timeout=timeout,
            cluster_options={"idle_timeout": 30, **options},
        )

    with dask.config.set(settings):
        yield run
    until(lambda: not gateway_server.clusters() and not gateway_server.processes(), "the clusters to end", 30)


# reaching it --------------------------------------------------------------------------------------------------------


def test_a_wrong_password(submit: Submit, gateway_server: GatewayServer) -> None:
    with (
        dask.config.set(gateway_server.configuration(password="guessed")),
        pytest.raises(ClusterError, match="does not know this user, or the password or token is wrong") as caught,
    ):
        submit()

    assert "guessed" not in str(caught.value)


def test_an_address_where_no_server_listens(submit: Submit) -> None:
    began = time.monotonic()
    with (
        dask.config.set({"gateway.address": "http://127.0.0.1:9"}),
        pytest.raises(ClusterError, match=r"http://127\.0\.0\.1:9 cannot be reached \(.*\): check gateway.address"),
    ):
        submit()
    assert time.monotonic() - began < 10


def test_an_address_with_a_password_is_not_shown(submit: Submit) -> None:
    with (
        dask.config.set({"gateway.address": "http://alice:hush@127.0.0.1:9"}),
        pytest.raises(ClusterError, match="cannot be reached") as caught,
    ):
        submit()
    assert "hush" not in str(caught.value)


def test_no_address(submit: Submit) -> None:
    with (
        dask.config.set({"gateway.address": None}),
        pytest.raises(SpecError, match=r"needs an address: set gateway\.address in Dask's configuration"),
    ):
        submit()


def test_an_address_with_a_variable_that_is_not_set(submit: Submit) -> None:
    with (
        dask.config.set({"gateway.address": "http://{GATEWAY_OF_NOBODY}:8000"}),
        pytest.raises(SpecError, match="names the variable 'GATEWAY_OF_NOBODY', which is not set"),
    ):
        submit()


def test_an_address_that_is_not_a_url(submit: Submit) -> None:
    with (
        dask.config.set({"gateway.address": "gateway.example.com"}),
        pytest.raises((ClusterError, SpecError), match=r"gateway\.example\.com"),
    ):
        submit()


def test_a_missing_package(submit: Submit, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "dask_gateway", None)
    with pytest.raises(SpecError, match=r"pip install 'cortex-dask\[gateway\]'"):
        submit()


def test_the_proxy_is_elsewhere(submit: Submit, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "PROXY_SECONDS", 1.0)
    with (
        dask.config.set({"gateway.proxy-address": "gateway://127.0.0.1:9"}),
        pytest.raises(ClusterError, match=r"proxy at gateway://127\.0\.0\.1:9 does not lead .* gateway.proxy-addr"),
    ):
        submit()


# other servers ------------------------------------------------------------------------------------------------------


class _Server(ThreadingHTTPServer):
    """Wants authorization, notes it, and then says always the same."""

    def __init__(self, answer: bytes) -> None:
        super().__init__(("127.0.0.1", 0), _Requests)
        self.answer = answer
        self.seen: list[str] = []
        self.address = f"http://127.0.0.1:{self.server_port}"


class _Requests(BaseHTTPRequestHandler):
    server: _Server

    def do_GET(self) -> None:
        said = self.headers.get("Authorization", "")
        if said:
            self.server.seen.append(said)
        self.send_response(200 if said else 401)
        self.send_header("Content-Length", str(len(self.server.answer)))
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(self.server.answer)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def serve() -> Iterator[Callable[[bytes], _Server]]:
    servers: list[_Server] = []

    def start(answer: bytes) -> _Server:
        server = _Server(answer)
        servers.append(server)
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        return server

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def test_the_token_of_jupyterhub(serve: Callable[[bytes], _Server], monkeypatch: pytest.MonkeyPatch) -> None:
    server = serve(json.dumps({"cluster_options": []}).encode())
    monkeypatch.setenv("JUPYTERHUB_API_TOKEN", "token-of-alice")
    with dask.config.set({"gateway.address": server.address, "gateway.auth.type": "jupyterhub"}):
        assert GatewayApi().options() == {}
    assert server.seen == ["jupyterhub token-of-alice"]


def test_from_a_notebook_whose_event_loop_runs(
    serve: Callable[[bytes], _Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def cell() -> Any:
        return GatewayApi().options()

    with dask.config.set({"gateway.address": serve(b'{"cluster_options": []}').address, "gateway.auth.type": "basic"}):
        assert asyncio.run(cell()) == {}


def test_no_token_of_jupyterhub(serve: Callable[[bytes], _Server], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("JUPYTERHUB_API_TOKEN", raising=False)
    with (
        dask.config.set({"gateway.address": serve(b"{}").address, "gateway.auth.type": "jupyterhub"}),
        pytest.raises(SpecError, match="the variable JUPYTERHUB_API_TOKEN is not set"),
    ):
        GatewayApi().options()


@pytest.mark.skipif(find_spec("kerberos") is not None, reason="the package kerberos is installed")
def test_kerberos_without_its_package(serve: Callable[[bytes], _Server]) -> None:
    with (
        dask.config.set({"gateway.address": serve(b"{}").address, "gateway.auth.type": "kerberos"}),
        pytest.raises(SpecError, match="needs the Python package kerberos"),
    ):
        GatewayApi().options()


def test_an_authentication_that_does_not_exist(serve: Callable[[bytes], _Server]) -> None:
    with (
        dask.config.set({"gateway.address": serve(b"{}").address, "gateway.auth.type": "no_such_module.Auth"}),
        pytest.raises(SpecError, match="needs the Python package no_such_module"),
    ):
        GatewayApi().options()


@pytest.mark.parametrize("answer", [b"<html>Welcome!</html>", b'{"message": "welcome"}'])
def test_no_gateway_at_all(answer: bytes, serve: Callable[[bytes], _Server]) -> None:
    with (
        dask.config.set({"gateway.address": serve(answer).address, "gateway.auth.type": "basic"}),
        pytest.raises(ClusterError, match="does not answer as a Dask Gateway does"),
    ):
        GatewayApi().options()


def test_a_gateway_that_hangs() -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with dask.config.set({"gateway.address": address}), pytest.raises(ClusterError, match="not answer within 1 s"):
            GatewayApi(seconds=1).options()


# options ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"worker_core": 2},
            r"no option worker_core; did you mean worker_cores\? It has worker_cores \(a whole number",
        ),
        ({"worker_cores": 9}, "found 9, but the gateway's option worker_cores allows a whole number from 1 to 4"),
        ({"image": "mine"}, "the gateway's option image allows one of site/plain:1, site/torch:1"),
        ({"start_timeout": 0}, "start_timeout: found 0; allowed is a number of seconds above 0"),
    ],
)
def test_options_that_the_site_refuses(submit: Submit, options: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        submit(**options)


def test_a_need_that_the_site_refuses(submit: Submit) -> None:
    with pytest.raises(SpecError, match=r"compute\.mem: .*worker_memory allows a number from 0\.25 to 8"):
        submit({"mem": "100Gi"})


def test_options_in_the_configuration_that_the_site_lacks(submit: Submit) -> None:
    with (
        dask.config.set({"gateway.cluster.options": {"queue": "fast"}}),
        pytest.raises(SpecError, match=r"gateway\.cluster\.options in Dask's configuration does not fit .* it has wor"),
    ):
        submit()


# clusters that do not come up ---------------------------------------------------------------------------------------


def test_a_scheduler_that_ends_at_once(submit: Submit) -> None:
    with pytest.raises(ClusterError, match="could not be started: its scheduler ended before it could be reached"):
        submit(fault="scheduler")


def test_a_scheduler_that_never_starts(submit: Submit) -> None:
    with pytest.raises(ClusterError, match="has not come up within 2 s: it is pending"):
        submit(fault="slow", start_timeout=2)


def test_a_job_ends_also_while_its_cluster_comes_up(submit: Submit) -> None:
    began = time.monotonic()
    with pytest.raises(JobTimedOutError):
        submit(timeout=2, fault="slow")
    assert time.monotonic() - began < 20


def test_workers_that_never_start(submit: Submit) -> None:
    message = "has had no worker for 15 s: its gateway was asked for workers, and none has come"
    with pytest.raises(ClusterError, match=message):
        submit(fault="workers", start_timeout=15)  # the scheduler has to come up within it
