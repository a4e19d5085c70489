"""A small server that answers as the REST interface of TensorFlow Serving does; its models are Python functions."""

from __future__ import annotations

import base64
import json
import re
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

__all__ = ["Fault", "Served", "ServingServer", "tensor"]

_PATH = re.compile(r"/v1/models/(?P<name>[^/:]+)(?:/versions/(?P<version>[0-9]+))?(?P<verb>/metadata|:predict)")


@dataclass
class Served:
    """A version of a model: its signatures as ``metadata`` describes them, and what each computes."""

    signatures: dict[str, dict[str, dict[str, Any]]]
    functions: dict[str, Callable[[dict[str, Any]], dict[str, Any]]]


@dataclass
class Fault:
    """What the server does with one request instead of answering."""

    status: int = 0  # 0: hang up
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b'{ "error": "busy" }'
    seconds: float = 0.0  # hold the answer back until so many have passed, or the server stops


def tensor(dtype: str, *sizes: int, unknown_rank: bool = False) -> dict[str, Any]:
    """Describe a tensor as the server does: sizes are texts."""
    dim = [{"size": str(size), "name": ""} for size in sizes]
    return {"dtype": dtype, "tensor_shape": {"dim": dim, "unknown_rank": unknown_rank}, "name": "internal:0"}


class ServingServer:
    """Serves models on loopback; a context manager."""

    def __init__(self, models: dict[str, dict[int, Served]]) -> None:
        self.models = models
        self.faults: list[Fault] = []
        self.requests: list[tuple[str, str, Any]] = []  # method, path, body
        self.connections = 0
        self._stopped = threading.Event()
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def setup(self) -> None:
                super().setup()
                server.connections += 1

            def do_GET(self) -> None:
                self._answer(None)

            def do_POST(self) -> None:
                self._answer(self.rfile.read(int(self.headers["Content-Length"])))

            def _answer(self, body: bytes | None) -> None:
                server.requests.append((self.command, self.path, None if body is None else json.loads(body)))
                if server.faults:
                    fault = server.faults.pop(0)
                    if fault.seconds:
                        server._stopped.wait(fault.seconds)
                    if fault.status == 0:
                        self.close_connection = True
                        self.connection.shutdown(socket.SHUT_RDWR)
                        return
                    self._send(fault.status, fault.body, fault.headers)
                    return
                status, answer = server.answer(self.command, self.path, body)
                self._send(status, json.dumps(answer).encode(), {})

            def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
                self.send_response(status)
                for name, value in {**headers, "Content-Type": "application/json", "Content-Length": len(body)}.items():
                    self.send_header(name, str(value))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def answer(self, method: str, path: str, body: bytes | None) -> tuple[int, Any]:
        """Return the status and the document."""
        match = _PATH.fullmatch(path)
        if match is None or method != ("GET" if match["verb"] == "/metadata" else "POST"):
            return 404, {"error": f"Malformed request: {method} {path}"}
        versions = self.models.get(match["name"], {})
        version = int(match["version"]) if match["version"] else max(versions, default=None)
        if version not in versions:
            wanted = f"Specific({match['name']}, {version})" if match["version"] else f"Latest({match['name']})"
            return 404, {"error": f"Servable not found for request: {wanted}"}
        served = versions[version]
        if match["verb"] == "/metadata":
            described = {
                "@type": "type.googleapis.com/tensorflow.serving.SignatureDefMap",
                "signature_def": {
                    name: {**value, "method_name": "tensorflow/serving/predict"}
                    for name, value in served.signatures.items()
                },
            }
            spec = {"name": match["name"], "signature_name": "", "version": str(version)}
            return 200, {"model_spec": spec, "metadata": {"signature_def": described}}
        return _predict(served, json.loads(body or b""))


def _predict(served: Served, request: dict[str, Any]) -> tuple[int, Any]:
    name = request.get("signature_name", "serving_default")
    if name not in served.signatures:
        return 400, {"error": f'Serving signature name: "{name}" not found in signature def'}
    signature = served.signatures[name]
    inputs = request.get("inputs")
    if set(request) - {"signature_name", "inputs"} or not isinstance(inputs, dict):
        return 400, {"error": "Missing 'inputs' or 'instances' key"}
    if set(inputs) != set(signature["inputs"]):
        return 400, {"error": f"input names {sorted(inputs)} are not those of the signature"}
    try:
        values = {key: _decode(value, signature["inputs"][key]["dtype"]) for key, value in inputs.items()}
        outputs = {
            key: _encode(value, base64_too=key.endswith("_bytes"))
            for key, value in served.functions[name](values).items()
        }
    except Exception as error:  # noqa: BLE001 - a model may fail in any way, and the server says how
        return 400, {"error": f"{type(error).__name__}: {error}"}
    return 200, {"outputs": outputs if len(outputs) > 1 else next(iter(outputs.values()))}


def _decode(value: Any, dtype: str) -> Any:
    if isinstance(value, list):
        return [_decode(item, dtype) for item in value]
    if isinstance(value, dict):
        if set(value) != {"b64"} or dtype != "DT_STRING":
            raise ValueError(f"JSON Value: {value} is not of type {dtype}")
        return base64.b64decode(value["b64"], validate=True)
    if dtype == "DT_STRING":
        return value.encode()
    if dtype in ("DT_INT32", "DT_INT64", "DT_UINT8") and type(value) is not int:
        raise ValueError(f"JSON Value: {value} is not an integer")
    return value


def _encode(value: Any, *, base64_too: bool) -> Any:
    if isinstance(value, list):
        return [_encode(item, base64_too=base64_too) for item in value]
    if isinstance(value, bytes):
        return {"b64": base64.b64encode(value).decode()} if base64_too else value.decode()
    return value
