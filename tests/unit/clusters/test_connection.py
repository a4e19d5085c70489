"""Who answers at a scheduler's address, in words: real schedulers, servers and closed ports."""

from __future__ import annotations

import asyncio
import http.server
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import dask.config
import pytest
from distributed import Scheduler, Security

from cortex_dask.clusters.connection import check_scheduler
from cortex_dask.errors import ClusterError, SpecError


@dataclass
class Servers:
    """What listens on loopback."""

    plain: str
    tls: str
    web: int
    silent: int
    security: Security
    stranger: Security  # of another authority


@pytest.fixture(scope="module")
def servers() -> Iterator[Servers]:
    security, stranger = Security.temporary(), Security.temporary()
    loop = asyncio.new_event_loop()
    running = threading.Thread(target=loop.run_forever, daemon=True)
    running.start()

    async def scheduler(protocol: str, credentials: Security | None) -> Scheduler:
        return await Scheduler(
            host="127.0.0.1", port=0, protocol=protocol, security=credentials, dashboard_address="127.0.0.1:0"
        )

    plain = asyncio.run_coroutine_threadsafe(scheduler("tcp://", None), loop).result(30)
    tls = asyncio.run_coroutine_threadsafe(scheduler("tls://", security), loop).result(30)
    web = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Quiet)
    threading.Thread(target=web.serve_forever, daemon=True).start()
    with socket.create_server(("127.0.0.1", 0)) as silent:
        yield Servers(plain.address, tls.address, web.server_port, silent.getsockname()[1], security, stranger)
    web.shutdown()
    web.server_close()
    for server in (plain, tls):
        asyncio.run_coroutine_threadsafe(server.close(), loop).result(30)
    loop.call_soon_threadsafe(loop.stop)
    running.join()
    loop.close()


class Quiet(http.server.SimpleHTTPRequestHandler):
    """A web server that keeps what it sees to itself."""

    def log_message(self, format: str, *arguments: object) -> None:
        pass


def refusal(address: str, security: Security | None = None, seconds: float = 1.0) -> str:
    with pytest.raises((ClusterError, SpecError)) as raised:
        check_scheduler(address, security or Security(), seconds)
    message = str(raised.value)
    assert message.startswith("cluster: ")
    assert "\n" not in message
    return message


def port(address: str) -> str:
    return address.rpartition(":")[2]


def test_a_scheduler_answers(servers: Servers) -> None:
    check_scheduler(servers.plain, Security(), 5)
    check_scheduler(servers.tls, servers.security, 5)


def test_other_protocols_are_left_to_dask() -> None:
    check_scheduler("ucx://127.0.0.1:1", Security(), 1)


def test_nobody_answers() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        closed = server.getsockname()[1]
    assert refusal(f"tcp://127.0.0.1:{closed}", seconds=0.5) == (
        f"cluster: no Dask scheduler answers at tcp://127.0.0.1:{closed} within 0.5 s (connection refused): start it, "
        "or correct the address"
    )


def test_a_scheduler_that_is_being_started_is_waited_for() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        free = server.getsockname()[1]

    def greet() -> None:
        with socket.create_server(("127.0.0.1", free)) as late, late.accept()[0] as connection:
            connection.sendall((100).to_bytes(8, "little"))
            connection.recv(1)

    starting = threading.Timer(0.5, greet)
    starting.start()
    check_scheduler(f"tcp://127.0.0.1:{free}", Security(), 10)
    starting.join()


def test_an_unknown_name() -> None:
    assert "the name no-such-host.invalid is not known" in refusal("tcp://no-such-host.invalid:8786")


@pytest.mark.parametrize("address", ["tcp://127.0.0.1", "tcp://:8786", "tls://host:http", "tcp://host:99999"])
def test_what_is_no_address(address: str) -> None:
    assert "give host and port" in refusal(address)


def test_tcp_where_tls_is_spoken(servers: Servers) -> None:
    said = refusal(f"tcp://127.0.0.1:{port(servers.tls)}")
    assert f"wants TLS: say tls://127.0.0.1:{port(servers.tls)}" in said
    assert "distributed.comm.tls.ca-file" in said


@pytest.mark.filterwarnings("ignore")  # the scheduler's own, of a greeting that it cannot read
def test_tls_where_it_is_not_spoken(servers: Servers) -> None:
    assert "does not speak TLS: say tcp://" in refusal(f"tls://127.0.0.1:{servers.web}", servers.security)


def test_a_web_server(servers: Servers) -> None:
    assert "may be that of its dashboard" in refusal(f"tcp://127.0.0.1:{servers.web}")


def test_a_server_that_says_nothing(servers: Servers) -> None:
    assert "is no Dask scheduler" in refusal(f"tcp://127.0.0.1:{servers.silent}")
    assert "does not answer in TLS" in refusal(f"tls://127.0.0.1:{servers.silent}", servers.security)


def test_no_credentials(servers: Servers) -> None:
    assert "needs credentials, and there are none: set distributed.comm.tls.ca-file" in refusal(servers.tls)


def test_credentials_that_are_not_there(servers: Servers, tmp_path: Path) -> None:
    missing = str(tmp_path / "ca.pem")
    with dask.config.set({"distributed.comm.tls.ca-file": missing, "distributed.comm.tls.client.cert": missing}):
        assert "cannot be used ([Errno 2] No such file or directory)" in refusal(servers.tls)


def test_a_scheduler_of_another_authority(servers: Servers) -> None:
    assert "is not one of this authority" in refusal(servers.tls, servers.stranger)


def test_a_client_of_another_authority(servers: Servers) -> None:
    mixed = Security(
        require_encryption=True,
        tls_ca_file=servers.security.tls_ca_file,
        tls_client_cert=servers.stranger.tls_client_cert,
        tls_client_key=servers.stranger.tls_client_key,
    )
    said = refusal(servers.tls, mixed)
    assert "refuses the credentials of this client" in said
    assert "PRIVATE" not in said
