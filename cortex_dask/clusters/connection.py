"""Calling a scheduler before a client does: who answers there, and why not, in words.

A client that cannot connect tries again until its time is up, and then tells of its last attempt. Most of what goes
wrong can be seen at once from the first bytes: a Dask scheduler speaks first, a TLS server and a web server wait.
"""

from __future__ import annotations

import contextlib
import socket
import ssl
import time
from typing import TYPE_CHECKING

from cortex_dask.errors import ClusterError, SpecError

if TYPE_CHECKING:
    from distributed import Security

_GREETING_SECONDS = 2.0  # after which it is looked at whether somebody else is there
_PAUSE = 0.2
_TLS_KEYS = (
    "distributed.comm.tls.ca-file, distributed.comm.tls.client.cert and distributed.comm.tls.client.key of Dask's "
    "configuration (or the variables DASK_DISTRIBUTED__COMM__TLS__CA_FILE …)"
)


def dial(address: str, security: Security, seconds: float) -> None:
    """Check that a Dask scheduler answers at an address.

    Parameters
    ----------
    address : str
        ``tcp://host:port`` or ``tls://host:port``; others are not looked at.
    security : Security
        The credentials.
    seconds : float
        How long a scheduler is waited for that is not there yet.

    Raises
    ------
    SpecError
        If the address is none, or its credentials are missing.
    ClusterError
        If nobody answers in time, somebody who is no Dask scheduler, or one that refuses the credentials.
    """
    scheme, _, place = address.partition("://")
    if scheme not in ("tcp", "tls"):
        return
    host, port = _split(address, place)
    context = _context(address, security) if scheme == "tls" else None
    deadline = time.monotonic() + seconds
    with _reach(address, host, port, deadline, seconds) as connection:
        if context is None:
            _hear(address, host, port, connection, deadline)
        else:
            _shake_hands(address, context, connection)


def _split(address: str, place: str) -> tuple[str, int]:
    host, _, port = place.rstrip("/").rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise SpecError(
            f"cluster: {address!r} is no address of a Dask scheduler: give host and port, e.g. tcp://127.0.0.1:8786"
        )
    return host.strip("[]"), int(port)


def _context(address: str, security: Security) -> ssl.SSLContext:
    try:
        context: ssl.SSLContext | None = security.get_connection_args("client")["ssl_context"]
    except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
        raise SpecError(
            f"cluster: the credentials for {address} cannot be used ({error}): look at {_TLS_KEYS}"
        ) from error
    if context is None:
        raise SpecError(f"cluster: {address} needs credentials, and there are none: set {_TLS_KEYS}")
    return context


def _reach(address: str, host: str, port: int, deadline: float, seconds: float) -> socket.socket:
    """Connect; a host that is there and refuses is asked again, for its scheduler may be starting."""
    while True:
        left = max(deadline - time.monotonic(), 0.1)
        try:
            connection = socket.create_connection((host, port), timeout=left)
        except socket.gaierror as error:
            reason, again = f"the name {host} is not known ({error.strerror})", False
        except TimeoutError:
            reason, again = f"the host does not answer; is it up, and does a firewall let port {port} through?", False
        except OSError as error:
            reason, again = f"{(error.strerror or str(error)).lower()}", True
        else:
            connection.settimeout(max(deadline - time.monotonic(), 1.0))
            return connection
        if not again or time.monotonic() + _PAUSE > deadline:
            raise ClusterError(
                f"cluster: no Dask scheduler answers at {address} within {seconds:g} s ({reason}): start it, or "
                "correct the address"
            )
        time.sleep(_PAUSE)


def _hear(address: str, host: str, port: int, connection: socket.socket, deadline: float) -> None:
    """Wait for a scheduler's first word."""
    first = _first_word(address, connection, min(_GREETING_SECONDS, deadline - time.monotonic()))
    if first is None:
        if _speaks_tls(host, port):
            raise ClusterError(
                f"cluster: the server at {address} wants TLS: say tls://{host}:{port}, with credentials in {_TLS_KEYS}"
            )
        if not _speaks_http(host, port):  # a scheduler whose event loop is busy takes a moment
            first = _first_word(address, connection, deadline - time.monotonic())
    # A frame begins with its size as eight bytes; text and other protocols come out as absurd numbers.
    if first is None or len(first) < 8 or int.from_bytes(first, "little") >= 2**32:
        raise ClusterError(
            f"cluster: what answers at {address} is no Dask scheduler: the port may be that of its dashboard (a "
            "scheduler prints its own address when it starts; the usual port is 8786)"
        )


def _first_word(address: str, connection: socket.socket, seconds: float) -> bytes | None:
    """Return the first bytes from the other side; None when it says nothing."""
    connection.settimeout(max(seconds, 0.1))
    try:
        return connection.recv(8)
    except TimeoutError:
        return None
    except OSError as error:
        raise ClusterError(f"cluster: the connection to {address} was broken at once: {error}") from None


def _speaks_http(host: str, port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection((host, port), timeout=_GREETING_SECONDS) as connection:
        connection.sendall(b"GET / HTTP/1.0\r\n\r\n")
        return connection.recv(5) == b"HTTP/"
    return False


def _speaks_tls(host: str, port: int) -> bool:
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    try:
        with socket.create_connection((host, port), timeout=_GREETING_SECONDS) as connection:
            context.wrap_socket(connection).close()
    except ssl.SSLError as error:
        return "WRONG_VERSION" not in str(error) and "UNEXPECTED_EOF" not in str(error)  # it may refuse us, in TLS
    except OSError:
        return False
    return True


def _shake_hands(address: str, context: ssl.SSLContext, connection: socket.socket) -> None:
    try:
        with context.wrap_socket(connection) as secured:
            # With TLS 1.3 the server's opinion of our certificate comes after the handshake, instead of its first word.
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
        with contextlib.suppress(OSError):
            connection.close()
        raise ClusterError(f"cluster: the server at {address} has broken the connection off ({error})") from None
