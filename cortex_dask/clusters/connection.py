"""A first contact with a scheduler, and why it fails, in one sentence.

A client that cannot connect tries again until its time is up, and then reports its last attempt only.
"""

from __future__ import annotations

import socket
import ssl
import time
from typing import TYPE_CHECKING

from cortex_dask.errors import ClusterError, SpecError

if TYPE_CHECKING:
    from distributed import Security

_PAUSE = 0.2
_TLS_KEYS = (
    "distributed.comm.tls.ca-file, distributed.comm.tls.client.cert and distributed.comm.tls.client.key of Dask's "
    "configuration (or the variables DASK_DISTRIBUTED__COMM__TLS__CA_FILE …)"
)


def check_scheduler(address: str, security: Security, seconds: float) -> None:
    """Check that a Dask scheduler answers at an address within some seconds; only TCP and TLS are checked.

    Raises :class:`SpecError` if the address is malformed or the credentials are missing, and :class:`ClusterError` if
    nothing answers in time, another server does, or the scheduler refuses the credentials.
    """
    scheme, _, place = address.partition("://")
    if scheme not in ("tcp", "tls"):
        return
    host, port = _host_and_port(address, place)
    context = _tls_context(address, security) if scheme == "tls" else None
    deadline = time.monotonic() + seconds
    with _connect(address, host, port, deadline, seconds) as connection:
        if context is None:
            _await_greeting(address, connection)
        else:
            _shake_hands(address, context, connection)


def _host_and_port(address: str, place: str) -> tuple[str, int]:
    host, _, port = place.rstrip("/").rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise SpecError(
            f"cluster: {address!r} is no address of a Dask scheduler: give host and port, e.g. tcp://127.0.0.1:8786"
        )
    return host.strip("[]"), int(port)


def _tls_context(address: str, security: Security) -> ssl.SSLContext:
    try:
        context: ssl.SSLContext | None = security.get_connection_args("client")["ssl_context"]
    except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
        raise SpecError(
            f"cluster: the credentials for {address} cannot be used ({error}): look at {_TLS_KEYS}"
        ) from error
    if context is None:
        raise SpecError(f"cluster: {address} needs credentials, and there are none: set {_TLS_KEYS}")
    return context


def _connect(address: str, host: str, port: int, deadline: float, seconds: float) -> socket.socket:
    """Connect; a host that refuses is tried again, as its scheduler may be starting."""
    while True:
        try:
            connection = socket.create_connection((host, port), timeout=max(deadline - time.monotonic(), 0.1))
        except socket.gaierror as error:
            reason, may_start = f"the name {host} is not known ({error.strerror})", False
        except TimeoutError:
            reason = f"the host does not answer; is it up, and does a firewall let port {port} through?"
            may_start = False
        except OSError as error:
            reason, may_start = (error.strerror or str(error)).lower(), True
        else:
            connection.settimeout(max(deadline - time.monotonic(), 1.0))
            return connection
        if not may_start or time.monotonic() + _PAUSE > deadline:
            raise ClusterError(
                f"cluster: no Dask scheduler answers at {address} within {seconds:g} s ({reason}): start it, or "
                "correct the address"
            )
        time.sleep(_PAUSE)


def _await_greeting(address: str, connection: socket.socket) -> None:
    """Wait for a scheduler's first frame: it speaks first, while web servers and TLS servers wait."""
    try:
        frame = connection.recv(8)
    except TimeoutError:
        frame = b""
    except OSError as error:
        raise ClusterError(f"cluster: the connection to {address} was broken at once: {error}") from None
    # A frame starts with its size as eight bytes; as such, text and other protocols are absurd numbers.
    if len(frame) < 8 or int.from_bytes(frame, "little") >= 2**32:
        raise ClusterError(
            f"cluster: what answers at {address} is no Dask scheduler, or wants TLS: say "
            f"tls://{address.partition('://')[2]}, with credentials in {_TLS_KEYS}; or the port may be that of its "
            "dashboard (a scheduler prints its own address when it starts; the usual port is 8786)"
        )


def _shake_hands(address: str, context: ssl.SSLContext, connection: socket.socket) -> None:
    try:
        with context.wrap_socket(connection) as secured:
            # With TLS 1.3 a server refuses our certificate after the handshake, in place of its first frame.
            if not secured.recv(8):
                raise ClusterError(f"cluster: the server at {address} has closed the connection without a word")
    except ssl.SSLCertVerificationError as error:
        raise ClusterError(
            f"cluster: the certificate of the scheduler at {address} is not one of this authority "
            f"({error.verify_message}): check distributed.comm.tls.ca-file in Dask's configuration"
        ) from None
    except ssl.SSLError as error:
        if "WRONG_VERSION_NUMBER" in str(error) or "RECORD_LAYER" in str(error):
            reason = f"does not speak TLS: say tcp://{address.partition('://')[2]}, or correct the port"
        else:
            reason = f"refuses the credentials of this client ({error.reason or error}): check {_TLS_KEYS}"
        raise ClusterError(f"cluster: the server at {address} {reason}") from None
    except TimeoutError:
        raise ClusterError(
            f"cluster: the server at {address} does not answer in TLS: is it a Dask scheduler?"
        ) from None
    except OSError as error:
        raise ClusterError(f"cluster: the server at {address} has broken the connection off ({error})") from None
