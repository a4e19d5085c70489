"""The Kubernetes API server, as far as a job needs it: objects as plain dictionaries, and refusals as sentences.

It rests on kr8s, which handles kubeconfigs, credential plug-ins and service accounts. Its calls run on an event loop in
a thread of their own, so that every one has a deadline, and none depends on the caller's loop.

Ports are forwarded here and not by kr8s' ``PortForward``: that one retries a refused connection for ever, so that a
client of a lost scheduler waits instead of seeing its connection close; and it guesses a free local port.
"""

from __future__ import annotations

import asyncio
import builtins
import concurrent.futures
import contextlib
import json
import os
import re
import tempfile
import threading
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from pathlib import Path
from typing import Any, TypeVar

from cortex_dask.errors import ClusterError

_T = TypeVar("_T")

_CALL_SECONDS = 20.0
_MAX_ATTEMPTS = 3
_RETRY_SECONDS = 0.5  # seconds before the second try
_TRANSIENT = (429, 500, 502, 503, 504)
_NAMESPACE_FILE = "/var/run/secrets/kubernetes.io/serviceaccount/namespace"

#: Kind -> API version and plural name.
_RESOURCES = {
    "DaskCluster": ("kubernetes.dask.org/v1", "daskclusters"),
    "DaskWorkerGroup": ("kubernetes.dask.org/v1", "daskworkergroups"),
    "Deployment": ("apps/v1", "deployments"),
    "Event": ("v1", "events"),
    "Job": ("batch/v1", "jobs"),
    "Pod": ("v1", "pods"),
}
# daskclusters.kubernetes.dask.org "x" is forbidden: User "y" cannot create resource "daskclusters" in API group …
_FORBIDDEN = re.compile(r'User "(?P<user>[^"]*)" cannot (?P<verb>\S+) resource "(?P<resource>[^"]*)"')


class RefusedError(ClusterError):
    """The API server refused a request."""

    def __init__(self, message: str, code: int, *, lacks_permission: bool = False) -> None:
        super().__init__(message)
        self.code = code  # the HTTP status: 403 forbidden, 404 not found, 409 exists already, 422 not valid
        self.lacks_permission = lacks_permission  # of this user; a quota, for instance, is a 403 for all users


class KubeApi:
    """A connection to one API server, for one namespace.

    ::

        with KubeApi(namespace="ml") as api:
            api.create(manifest, dry_run=True)

    Without arguments, the kubeconfig is that of ``KUBECONFIG`` or ``~/.kube/config`` or, where there is none, the
    service account of this pod; the namespace is that of the kubeconfig's context, or of this pod. Raises ClusterError
    if there is no API server, or it cannot be reached.
    """

    def __init__(
        self, *, namespace: str | None = None, kubeconfig: str | None = None, context: str | None = None
    ) -> None:
        try:
            import kr8s.asyncio  # noqa: F401 - only to see whether it is installed
        except ImportError as error:
            raise ClusterError(
                "kubernetes: a package is missing for it: pip install 'cortex-dask[kubernetes]'"
            ) from error
        if kubeconfig is not None and not Path(kubeconfig).expanduser().is_file():
            raise ClusterError(f"kubernetes: there is no kubeconfig at {kubeconfig}: correct the option kubeconfig")
        self._loop = asyncio.new_event_loop()
        self._loop.set_exception_handler(lambda loop, context: None)  # of forwarded connections that were lost
        self._thread = threading.Thread(target=self._loop.run_forever, name="cortex-dask-kubernetes", daemon=True)
        self._thread.start()
        self._forwards: list[asyncio.Server] = []
        self.server = ""
        try:
            self._api: Any = self._await(self._open(kubeconfig, context, namespace))
            self.server = str(self._api.auth.server)
            self._await(self._with_retries(self._api.async_version, what="its version", repeat=True))
        except BaseException:
            self._stop_loop()
            raise
        finally:
            _delete_key_copies(getattr(getattr(self, "_api", None), "auth", None))
        self.namespace = namespace or self._own_namespace()

    def __enter__(self) -> KubeApi:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def is_in_cluster(self) -> bool:
        """Whether this process is in a pod of the same Kubernetes, so that Services can be reached by their names."""
        host, port = os.environ.get("KUBERNETES_SERVICE_HOST"), os.environ.get("KUBERNETES_SERVICE_PORT")
        return host is not None and self.server in (f"https://{host}:{port}", f"https://[{host}]:{port}")

    # objects --------------------------------------------------------------------------------------------------------

    def get(self, kind: str, name: str) -> dict[str, Any] | None:
        """Return an object, or None."""
        try:
            found: dict[str, Any] = self._json("GET", kind, name)
        except RefusedError as error:
            if error.code == 404:
                return None
            raise
        return found

    def list(self, kind: str, *, labels: Mapping[str, str] | None = None, field: str = "") -> list[dict[str, Any]]:
        """Return the objects with these labels; ``field`` is a field selector."""
        params = {"labelSelector": ",".join(f"{key}={value}" for key, value in (labels or {}).items())}
        if field:
            params["fieldSelector"] = field
        # In a list, the API server leaves out the items' kind.
        return [{"kind": kind, **item} for item in self._json("GET", kind, params=params)["items"]]

    def warnings(self) -> builtins.list[dict[str, Any]]:
        """Return the warnings among the events of the namespace; none if they may not be read."""
        try:
            return self.list("Event", field="type!=Normal")
        except RefusedError:
            return []

    def create(self, manifest: Mapping[str, Any], *, dry_run: bool = False) -> dict[str, Any]:
        """Create an object, or only have the server check it; return it as the server has it."""
        # Servers from 1.25 on refuse unknown fields when asked to; older ones ignore the parameter.
        params = {"fieldValidation": "Strict", **({"dryRun": "All"} if dry_run else {})}
        created: dict[str, Any] = self._json("POST", str(manifest["kind"]), params=params, body=manifest)
        return created

    def patch(self, kind: str, name: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """Merge a mapping into an object."""
        patched: dict[str, Any] = self._json("PATCH", kind, name, body=body)
        return patched

    def delete(self, kind: str, name: str, *, uid: str | None = None) -> bool:
        """Delete an object and what it owns, if it has this uid; return whether it existed."""
        body: dict[str, Any] = {"propagationPolicy": "Background"}
        if uid is not None:
            body["preconditions"] = {"uid": uid}
        try:
            self._json("DELETE", kind, name, body=body)
        except RefusedError as error:
            if error.code == 404 or (error.code == 409 and uid is not None):
                return False
            raise
        return True

    def log(self, pod: str, *, container: str, lines: int = 20, previous: bool = False) -> str:
        """Return the end of a container's log, or "" if it cannot be read."""
        params = {"container": container, "tailLines": str(lines), "previous": "true" if previous else "false"}
        try:
            return str(self._request("GET", "Pod", f"{pod}/log", params=params, read=lambda answer: answer.text))
        except ClusterError:
            return ""

    # connections ----------------------------------------------------------------------------------------------------

    def forward_port(self, pod: str, port: int) -> int:
        """Forward a port of this machine's loopback to a port of a pod; return the local port."""
        server = self._await(self._start_forward(pod, port))
        self._forwards.append(server)
        local: int = server.sockets[0].getsockname()[1]
        return local

    def stop_forwarding(self) -> None:
        """Accept no more connections; those that are open stay until their other end closes them."""
        while self._forwards:
            self._loop.call_soon_threadsafe(self._forwards.pop().close)

    def close(self) -> None:
        """Close all connections, and stop the thread."""
        if self._loop.is_closed():
            return
        self.stop_forwarding()
        with contextlib.suppress(Exception):
            self._await(self._close_session())
        self._stop_loop()

    # ----------------------------------------------------------------------------------------------------------------

    @staticmethod
    async def _open(kubeconfig: str | None, context: str | None, namespace: str | None) -> Any:
        """Read the kubeconfig, or the service account, without a request to the server."""
        # Not kr8s.asyncio.api(), which sends a request without a deadline, and warns of servers that are new to it.
        from kr8s.asyncio import Api

        path = None if kubeconfig is None else str(Path(kubeconfig).expanduser())
        api: Any = Api(kubeconfig=path, context=context, namespace=namespace, bypass_factory=True)
        try:
            await asyncio.wait_for(api.auth, _CALL_SECONDS)  # may run a program that fetches a token
        except Exception as error:
            if "valid credentials" in str(error):
                raise ClusterError(
                    "kubernetes: there is no API server to speak to: KUBECONFIG names no kubeconfig, there is none at "
                    "~/.kube/config, and this is no pod"
                ) from error
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ClusterError(f"kubernetes: the kubeconfig cannot be used: {reason}") from error
        api.timeout = _CALL_SECONDS
        kr8s_reauthenticate = api.auth.reauthenticate

        async def reauthenticate() -> None:
            _delete_key_copies(api.auth)
            await kr8s_reauthenticate()

        api.auth.reauthenticate = reauthenticate
        return api

    def _own_namespace(self) -> str:
        if self.is_in_cluster:
            with contextlib.suppress(OSError):
                return Path(_NAMESPACE_FILE).read_text(encoding="utf-8").strip()
        return str(self._api.namespace or "default")

    def _json(
        self,
        method: str,
        kind: str,
        name: str = "",
        *,
        params: Mapping[str, str] | None = None,
        body: Mapping[str, Any] | None = None,
    ) -> Any:
        return self._request(method, kind, name, params=params, body=body, read=lambda answer: answer.json())

    def _request(
        self,
        method: str,
        kind: str,
        name: str,
        *,
        read: Callable[[Any], _T],
        params: Mapping[str, str] | None = None,
        body: Mapping[str, Any] | None = None,
    ) -> _T:
        version, plural = _RESOURCES[kind]
        call: dict[str, Any] = {"url": f"{plural}/{name}" if name else plural, "params": dict(params or {})}
        if body is not None:
            call["content"] = json.dumps(body)
            if method == "PATCH":
                call["headers"] = {"content-type": "application/merge-patch+json"}

        async def send() -> _T:
            async with self._api.call_api(method, version=version, namespace=self.namespace, **call) as answer:
                return read(answer)

        return self._await(self._with_retries(send, what=f"{kind} {name}".strip(), repeat=method != "POST"))

    async def _with_retries(self, send: Callable[[], Awaitable[_T]], *, what: str, repeat: bool) -> _T:
        """Send a request, again after a transient error if it may be repeated."""
        import kr8s

        for number in range(1, _MAX_ATTEMPTS + 1):
            try:
                return await asyncio.wait_for(send(), _CALL_SECONDS * 2)
            except kr8s.ServerError as error:
                code = 0 if error.response is None else int(error.response.status_code)
                if not (repeat and code in _TRANSIENT and number < _MAX_ATTEMPTS):
                    raise _refusal(error, code, what, self.namespace) from error
            except Exception as error:  # any of httpx
                if not (repeat and number < _MAX_ATTEMPTS):
                    raise _unreachable_error(error, self.server) from error
            await asyncio.sleep(_RETRY_SECONDS * number)
        raise AssertionError

    async def _start_forward(self, pod: str, port: int) -> asyncio.Server:
        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            try:
                async with self._api.open_websocket(
                    version="v1", namespace=self.namespace, url=f"pods/{pod}/portforward", params={"ports": str(port)}
                ) as socket:
                    await _copy(reader, writer, socket)
            except Exception:  # noqa: BLE001, S110 - the other end sees that its connection is closed
                pass
            finally:
                writer.close()

        return await asyncio.start_server(serve, "127.0.0.1", 0)

    async def _close_session(self) -> None:
        if self._api._session is not None:
            await self._api._session.aclose()
        _delete_key_copies(self._api.auth)

    def _await(self, work: Coroutine[Any, Any, _T]) -> _T:
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result(_CALL_SECONDS * 2 * _MAX_ATTEMPTS + 10)
        except concurrent.futures.TimeoutError as error:
            future.cancel()
            raise ClusterError(
                f"the Kubernetes API server{_at(getattr(self, 'server', ''))} does not answer"
            ) from error

    def _stop_loop(self) -> None:
        async def cancel_all() -> None:
            tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

        with contextlib.suppress(Exception):
            asyncio.run_coroutine_threadsafe(cancel_all(), self._loop).result(_CALL_SECONDS)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(_CALL_SECONDS)
        if not self._thread.is_alive():
            self._loop.close()


def _delete_key_copies(auth: Any) -> None:
    """Delete kr8s' temporary copies of keys and certificates that the kubeconfig contains; kr8s has read them."""
    folder = Path(tempfile.gettempdir()).resolve()
    for attribute, source in (
        ("client_key_file", "client-key-data"),
        ("client_cert_file", "client-certificate-data"),
        ("server_ca_file", "certificate-authority-data"),
    ):
        file = getattr(auth, attribute, None)
        if file and source in {**auth._user, **auth._cluster} and Path(file).resolve().parent == folder:
            Path(file).unlink(missing_ok=True)


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, socket: Any) -> None:
    """Copy bytes between a TCP connection and a web socket until either ends.

    Every frame begins with the number of its channel: 0 is data, 1 errors. The first frame of each channel is the port.
    """

    async def send() -> None:
        while data := await reader.read(1 << 16):
            await socket.send_bytes(b"\0" + data)

    async def receive() -> None:
        opened = set()
        while True:
            frame = await socket.receive_bytes()
            if frame[0] not in opened:
                opened.add(frame[0])
            elif frame[0] == 1:
                return
            else:
                writer.write(frame[1:])
                await writer.drain()

    tasks = [asyncio.create_task(send()), asyncio.create_task(receive())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


# refusals -------------------------------------------------------------------------------------------------------------


def _refusal(error: Exception, code: int, what: str, namespace: str) -> ClusterError:
    """Return the refusal of a request as an error with a sentence."""
    message = " ".join(str(error).split()).partition(", error found in #")[0]  # and then the bytes around it
    if code == 401:
        return RefusedError("the Kubernetes API server does not know these credentials: log in anew", code)
    if code == 403 and (found := _FORBIDDEN.search(message)):
        return RefusedError(
            f"Kubernetes does not allow {found['user']} to {found['verb']} {found['resource']} in the namespace "
            f"{namespace}: a Role that allows it is needed (docs/kubernetes.md has it)",
            code,
            lacks_permission=True,
        )
    if code == 404 and what.startswith("DaskCluster") and "not found" not in message.removeprefix("404"):
        return _no_operator_error()
    if code == 404 and message.startswith("namespaces "):
        return RefusedError(f"Kubernetes has no namespace {namespace}: create it, or name another one", code)
    return RefusedError(f"Kubernetes refuses {what}: {message}", code)


def _no_operator_error() -> RefusedError:
    return RefusedError(
        "this Kubernetes has no Dask operator: its resource definitions are not installed (docs/kubernetes.md "
        "tells how)",
        501,
    )


def _unreachable_error(error: Exception, server: str) -> ClusterError:
    reason = str(error) or type(error).__name__
    return ClusterError(f"the Kubernetes API server{_at(server)} cannot be reached: {reason}")


def _at(server: str) -> str:
    return f" at {server}" if server else ""
