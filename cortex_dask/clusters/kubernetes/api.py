"""The Kubernetes API server, as far as a job needs it: objects as plain dictionaries, and refusals as sentences.

It rests on kr8s, which knows kubeconfigs, credential plug-ins and service accounts. Its calls run on an event loop in a
thread of their own, so that every one has a deadline, and none depends on the caller's loop.
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
_TRIES = 3
_PAUSE = 0.5  # seconds before the second try
_TRANSIENT = (429, 500, 502, 503, 504)
_NAMESPACE_FILE = "/var/run/secrets/kubernetes.io/serviceaccount/namespace"

#: Kinds, and where their objects are.
_PLACES = {
    "DaskCluster": ("kubernetes.dask.org/v1", "daskclusters"),
    "DaskWorkerGroup": ("kubernetes.dask.org/v1", "daskworkergroups"),
    "Deployment": ("apps/v1", "deployments"),
    "Event": ("v1", "events"),
    "Job": ("batch/v1", "jobs"),
    "Pod": ("v1", "pods"),
}
# daskclusters.kubernetes.dask.org "x" is forbidden: User "y" cannot create resource "daskclusters" in API group …
_FORBIDDEN = re.compile(r'User "(?P<user>[^"]*)" cannot (?P<verb>\S+) resource "(?P<resource>[^"]*)"')


class Refused(ClusterError):  # noqa: N818 - it reads as what it is: refused by the server
    """The API server answered, and said no.

    Attributes
    ----------
    code : int
        The HTTP status: 403 forbidden, 404 nothing there, 409 there already, 422 not valid.
    is_right : bool
        Whether it is this user's rights that are missing; other things are forbidden to everybody, by a quota say.
    """

    def __init__(self, message: str, code: int, *, is_right: bool = False) -> None:
        super().__init__(message)
        self.code = code
        self.is_right = is_right


class KubeApi:
    """A connection to one API server, for one namespace.

    ::

        with KubeApi(namespace="ml") as api:
            api.create(manifest, dry_run=True)

    Parameters
    ----------
    namespace : str, optional
        None: that of the kubeconfig's context or, inside a pod, the pod's own.
    kubeconfig, context : str, optional
        None: what ``KUBECONFIG`` or ``~/.kube/config`` says and, where there is none, the pod's service account.

    Raises
    ------
    ClusterError
        If there is no API server to speak to, or it cannot be reached.
    """

    def __init__(
        self, *, namespace: str | None = None, kubeconfig: str | None = None, context: str | None = None
    ) -> None:
        try:
            import kr8s.asyncio  # noqa: F401 - only whether it is there
        except ImportError as error:
            raise ClusterError(
                "kubernetes: a package is missing for it: pip install 'cortex-dask[kubernetes]'"
            ) from error
        if kubeconfig is not None and not Path(kubeconfig).expanduser().is_file():
            raise ClusterError(f"kubernetes: there is no kubeconfig at {kubeconfig}: correct the option kubeconfig")
        self._loop = asyncio.new_event_loop()
        self._loop.set_exception_handler(lambda loop, context: None)  # of connections that went away while forwarded
        self._thread = threading.Thread(target=self._loop.run_forever, name="cortex-dask-kubernetes", daemon=True)
        self._thread.start()
        self._forwards: list[asyncio.Server] = []
        self.server = ""
        try:
            self._api: Any = self._await(self._open(kubeconfig, context, namespace))
            self.server = str(self._api.auth.server)
            self._await(self._retried(self._api.async_version, what="its version", repeat=True))
        except BaseException:
            self._end_loop()
            raise
        finally:
            _forget_keys(getattr(getattr(self, "_api", None), "auth", None))
        self.namespace = namespace or self._own_namespace()

    def __enter__(self) -> KubeApi:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def is_inside(self) -> bool:
        """Whether this process is in a pod of the same Kubernetes, so that Services can be reached by their names."""
        host, port = os.environ.get("KUBERNETES_SERVICE_HOST"), os.environ.get("KUBERNETES_SERVICE_PORT")
        return host is not None and self.server in (f"https://{host}:{port}", f"https://[{host}]:{port}")

    # objects --------------------------------------------------------------------------------------------------------

    def get(self, kind: str, name: str) -> dict[str, Any] | None:
        """Return an object; None where there is none."""
        try:
            found: dict[str, Any] = self._json("GET", kind, name)
        except Refused as error:
            if error.code == 404:
                return None
            raise
        return found

    def list(self, kind: str, *, labels: Mapping[str, str] | None = None, field: str = "") -> list[dict[str, Any]]:
        """Return the objects with some labels; ``field`` is a field selector."""
        params = {"labelSelector": ",".join(f"{key}={value}" for key, value in (labels or {}).items())}
        if field:
            params["fieldSelector"] = field
        # In a list, the API server leaves out of what kind the items are.
        return [{"kind": kind, **item} for item in self._json("GET", kind, params=params)["items"]]

    def warnings(self) -> builtins.list[dict[str, Any]]:
        """Return the events of the namespace that tell of trouble; none where they may not be read."""
        try:
            return self.list("Event", field="type!=Normal")
        except Refused:
            return []

    def create(self, manifest: Mapping[str, Any], *, dry_run: bool = False) -> dict[str, Any]:
        """Create an object, or let the server look whether it could; returns it as the server has it."""
        # Servers from 1.25 on refuse unknown fields when asked to; older ones ignore the question.
        params = {"fieldValidation": "Strict", **({"dryRun": "All"} if dry_run else {})}
        made: dict[str, Any] = self._json("POST", str(manifest["kind"]), params=params, body=manifest)
        return made

    def patch(self, kind: str, name: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """Merge a mapping into an object."""
        patched: dict[str, Any] = self._json("PATCH", kind, name, body=body)
        return patched

    def delete(self, kind: str, name: str, *, uid: str | None = None) -> bool:
        """Delete an object, and with it what it owns; returns whether it was there.

        Parameters
        ----------
        kind, name : str
            The object.
        uid : str, optional
            Only if it is the one with this id: another one of the same name stays.
        """
        body: dict[str, Any] = {"propagationPolicy": "Background"}
        if uid is not None:
            body["preconditions"] = {"uid": uid}
        try:
            self._json("DELETE", kind, name, body=body)
        except Refused as error:
            if error.code == 404 or (error.code == 409 and uid is not None):
                return False
            raise
        return True

    def log(self, pod: str, *, container: str, lines: int = 20, previous: bool = False) -> str:
        """Return the end of a container's log; "" where there is none."""
        params = {"container": container, "tailLines": str(lines), "previous": "true" if previous else "false"}
        try:
            return str(self._request("GET", "Pod", f"{pod}/log", params=params, read=lambda answer: answer.text))
        except ClusterError:
            return ""

    # connections ----------------------------------------------------------------------------------------------------

    def forward(self, pod: str, port: int) -> int:
        """Make a port of a pod reachable on this machine's loopback; returns the local port."""
        server = self._await(self._forward(pod, port))
        self._forwards.append(server)
        local: int = server.sockets[0].getsockname()[1]
        return local

    def stop_forwards(self) -> None:
        """End what :meth:`forward` has begun; connections that are open go on until their other end closes them."""
        while self._forwards:
            self._loop.call_soon_threadsafe(self._forwards.pop().close)

    def close(self) -> None:
        """End all connections."""
        if self._loop.is_closed():
            return
        self.stop_forwards()
        with contextlib.suppress(Exception):
            self._await(self._close_session())
        self._end_loop()

    # ----------------------------------------------------------------------------------------------------------------

    @staticmethod
    async def _open(kubeconfig: str | None, context: str | None, namespace: str | None) -> Any:
        """Read the kubeconfig, or the service account; nothing is asked yet."""
        # Not kr8s.asyncio.api(), which asks without a deadline, and warns of servers that it was not tested with.
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
        again = api.auth.reauthenticate

        async def reauthenticate() -> None:
            _forget_keys(api.auth)
            await again()

        api.auth.reauthenticate = reauthenticate
        return api

    def _own_namespace(self) -> str:
        if self.is_inside:
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
        version, plural = _PLACES[kind]
        call: dict[str, Any] = {"url": f"{plural}/{name}" if name else plural, "params": dict(params or {})}
        if body is not None:
            call["content"] = json.dumps(body)
            if method == "PATCH":
                call["headers"] = {"content-type": "application/merge-patch+json"}

        async def ask() -> _T:
            async with self._api.call_api(method, version=version, namespace=self.namespace, **call) as answer:
                return read(answer)

        return self._await(self._retried(ask, what=f"{kind} {name}".strip(), repeat=method != "POST"))

    async def _retried(self, ask: Callable[[], Awaitable[_T]], *, what: str, repeat: bool) -> _T:
        """Call the server; what may pass, and may be done twice, is tried again."""
        import kr8s

        for number in range(1, _TRIES + 1):
            try:
                return await asyncio.wait_for(ask(), _CALL_SECONDS * 2)
            except kr8s.ServerError as error:
                code = 0 if error.response is None else int(error.response.status_code)
                if not (repeat and code in _TRANSIENT and number < _TRIES):
                    raise _refused(error, code, what, self.namespace) from error
            except Exception as error:  # whatever httpx raises
                if not (repeat and number < _TRIES):
                    raise _unreachable(error, self.server) from error
            await asyncio.sleep(_PAUSE * number)
        raise AssertionError

    async def _forward(self, pod: str, port: int) -> asyncio.Server:
        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            try:
                async with self._api.open_websocket(
                    version="v1", namespace=self.namespace, url=f"pods/{pod}/portforward", params={"ports": str(port)}
                ) as socket:
                    await _copy(reader, writer, socket)
            except Exception:  # noqa: BLE001, S110 - whoever has connected sees that the connection ends
                pass
            finally:
                writer.close()

        return await asyncio.start_server(serve, "127.0.0.1", 0)

    async def _close_session(self) -> None:
        if self._api._session is not None:
            await self._api._session.aclose()
        _forget_keys(self._api.auth)

    def _await(self, work: Coroutine[Any, Any, _T]) -> _T:
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result(_CALL_SECONDS * 2 * _TRIES + 10)
        except concurrent.futures.TimeoutError as error:
            future.cancel()
            raise ClusterError(
                f"the Kubernetes API server{_at(getattr(self, 'server', ''))} does not answer"
            ) from error

    def _end_loop(self) -> None:
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


def _forget_keys(auth: Any) -> None:
    """Remove the copies that kr8s makes of keys and certificates that stand in the kubeconfig: it has read them."""
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

    Every frame begins with the number of its channel: 0 is data, 1 errors; the first frame of each says the port.
    """

    async def send() -> None:
        while data := await reader.read(1 << 16):
            await socket.send_bytes(b"\0" + data)

    async def receive() -> None:
        begun = set()
        while True:
            frame = await socket.receive_bytes()
            if frame[0] not in begun:
                begun.add(frame[0])
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


def _refused(error: Exception, code: int, what: str, namespace: str) -> ClusterError:
    """Return what the API server said as a sentence."""
    message = " ".join(str(error).split()).partition(", error found in #")[0]  # and then the bytes around it
    if code == 401:
        return Refused("the Kubernetes API server does not know these credentials: log in anew", code)
    if code == 403 and (found := _FORBIDDEN.search(message)):
        return Refused(
            f"Kubernetes does not allow {found['user']} to {found['verb']} {found['resource']} in the namespace "
            f"{namespace}: a Role that allows it is needed (docs/kubernetes.md has it)",
            code,
            is_right=True,
        )
    if code == 404 and what.startswith("DaskCluster") and "not found" not in message.removeprefix("404"):
        return _no_operator()
    if code == 404 and message.startswith("namespaces "):
        return Refused(f"Kubernetes has no namespace {namespace}: create it, or name another one", code)
    return Refused(f"Kubernetes refuses {what}: {message}", code)


def _no_operator() -> Refused:
    return Refused(
        "this Kubernetes has no Dask operator: its resource definitions are not installed (docs/kubernetes.md "
        "tells how)",
        501,
    )


def _unreachable(error: Exception, server: str) -> ClusterError:
    reason = str(error) or type(error).__name__
    return ClusterError(f"the Kubernetes API server{_at(server)} cannot be reached: {reason}")


def _at(server: str) -> str:
    return f" at {server}" if server else ""
