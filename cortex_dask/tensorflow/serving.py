"""``tensorflow_client`` as a client of a running TensorFlow Serving, over its REST interface.

It is used where ``TF_SERVING_URL`` is set, for instance to ``http://localhost:8501``. The interface is that of
https://www.tensorflow.org/tfx/serving/api_rest: the columnar form of ``:predict``, and ``metadata`` to learn the names,
types and shapes of a signature, by which inputs are checked before anything is sent.
"""

from __future__ import annotations

import base64
import http.client
import json
import os
import time
from collections.abc import Sequence
from typing import Any
from urllib.parse import quote, urlsplit

import numpy as np

from cortex_dask.errors import CortexDaskError, InputError
from cortex_dask.tensorflow.models import LATEST, Model, Models
from cortex_dask.tensorflow.signature import ModelSignature, Tensor, choose_signature, name_list

#: The environment variable for the seconds that an answer to a request may take.
_TIMEOUT_VARIABLE = "TF_SERVING_TIMEOUT"
_DEFAULT_TIMEOUT = 60.0
#: Seconds before each retry: a server that starts, or is overloaded, gets about a minute.
RETRY_DELAYS = (0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0)
_BUSY_STATUSES = (429, 503)
_MAX_RETRY_AFTER = 60.0  # seconds; a server may ask for more

#: TensorFlow's types as ``metadata`` names them, where NumPy's name is another.
_TYPES = {"DT_FLOAT": "float32", "DT_DOUBLE": "float64", "DT_HALF": "float16", "DT_STRING": "object"}
_INTERNAL_SIGNATURES = ("__saved_model_init_op", "__saved_model_train_op")


class ServingError(CortexDaskError, ConnectionError):
    """TensorFlow Serving cannot be reached, or answers with an error."""


class ServingClient:
    """Runs the models of an API on a TensorFlow Serving.

    The server has its own configuration of models. A model of ``models.paths`` or ``models.dir`` has the same name
    there; that of ``models.path`` has the name of its folder, or the one that ``predict`` is given.
    """

    def __init__(self, url: str, models: Models, *, retry_delays: Sequence[float] = RETRY_DELAYS) -> None:
        self._server = _Server(url, _configured_timeout(), retry_delays)
        self._models = models  # only their names and signature keys matter
        self._signatures: dict[tuple[str, str], ModelSignature] = {}

    def __repr__(self) -> str:
        return f"ServingClient({self._server})"

    def predict(
        self, model_input: Any, model_name: str | None = None, model_version: str | int = LATEST
    ) -> dict[str, np.ndarray[Any, Any]]:
        """Run a model's signature; see :meth:`cortex_dask.tensorflow.client.TensorFlowClient.predict`.

        Raises
        ------
        InputError
            If there is no such model, version, signature or input, or an input has another shape or type.
        ServingError
            If the server cannot be reached, or answers with an error.
        """
        name, key = self._server_name(model_name)
        path = f"/v1/models/{quote(name, safe='')}"
        version = str(model_version)
        if version != LATEST:
            if not (version.isascii() and version.isdecimal()):
                raise InputError(f"the model {name} has no version {version!r}; a version is a number, or {LATEST}")
            path += f"/versions/{version}"
        signature = self._signature(name, version, path, key)
        arrays = signature.convert(model_input, f"the model {name}")
        request = {
            "signature_name": signature.name,
            "inputs": {tensor: _to_json(array) for tensor, array in arrays.items()},
        }
        answer = self._request("POST", f"{path}:predict", name, request)
        if "outputs" not in answer:
            raise ServingError(f"{self._server} has answered without outputs for the model {name}")
        outputs = answer["outputs"]
        if len(signature.outputs) == 1:  # then the server leaves its name out
            outputs = {signature.outputs[0].name: outputs}
        return {tensor.name: _from_json(outputs[tensor.name], tensor) for tensor in signature.outputs}

    def prepare(self) -> None:
        """Read the signature of a single model, so that a wrong one fails the job before its first batch."""
        if self._models.only is not None:
            name, key = self._server_name(None)
            self._signature(name, LATEST, f"/v1/models/{quote(name, safe='')}", key)

    def _server_name(self, model_name: str | None) -> tuple[str, str | None]:
        """Return a model's name on the server, and the configured signature."""
        model = self._models.only
        if model is not None:
            return model_name or _folder_name(model), model.signature_key
        if self._models.folder is not None:
            if model_name is None:
                raise InputError("model_name is missing: with models.dir it is needed")
            return model_name, self._models.signature_key
        found = self._models.get(model_name)
        assert found.name is not None
        return found.name, found.signature_key

    def _signature(self, name: str, version: str, path: str, key: str | None) -> ModelSignature:
        if (name, version) not in self._signatures:
            answer = self._request("GET", f"{path}/metadata", name)
            try:
                known = {
                    found: value
                    for found, value in answer["metadata"]["signature_def"]["signature_def"].items()
                    if found not in _INTERNAL_SIGNATURES
                }
                chosen = choose_signature(known, key, f"the model {name}")
                self._signatures[name, version] = ModelSignature(
                    chosen, _tensors(known[chosen].get("inputs")), _tensors(known[chosen].get("outputs"))
                )
            except (KeyError, TypeError, AttributeError) as error:
                raise ServingError(
                    f"{self._server} describes the model {name} in a way that is not understood"
                ) from error
        return self._signatures[name, version]

    def _request(self, method: str, path: str, name: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        status, answer = self._server.request(method, path, None if body is None else json.dumps(body).encode())
        if status == 200 and isinstance(answer, dict):
            return answer
        reason = str(answer.get("error") if isinstance(answer, dict) else answer)[:1000]
        if status == 404:
            hint = "" if self._models.folder else f"; the models of the API are {name_list(self._names())}"
            raise InputError(f"{self._server} has no such model or version: {reason}{hint}")
        if status == 400:
            raise InputError(f"{self._server} refuses the input for the model {name}: {reason}")
        raise ServingError(f"{self._server} has answered with HTTP {status} for the model {name}: {reason}")

    def _names(self) -> list[str]:
        only = self._models.only
        return [_folder_name(only)] if only is not None else self._models.names()


class _Server:
    """HTTP requests to one server, over kept connections, repeated while it starts or is busy."""

    def __init__(self, url: str, timeout: float, retry_delays: Sequence[float]) -> None:
        not_a_url = InputError("TF_SERVING_URL is no URL of a server; an example is http://localhost:8501")
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError:
            raise not_a_url from None
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise not_a_url
        if parts.username or parts.password:
            raise InputError("TF_SERVING_URL holds a user name or password, which TensorFlow Serving does not take")
        self._scheme = parts.scheme
        self._host, self._port = parts.hostname, port
        self._prefix = parts.path.rstrip("/").removesuffix("/v1")
        self._timeout = timeout
        self._retry_delays = retry_delays
        self._idle: list[http.client.HTTPConnection] = []  # appending and popping are safe among threads

    def __del__(self) -> None:
        for connection in getattr(self, "_idle", ()):
            connection.close()

    def __str__(self) -> str:
        host = f"[{self._host}]" if ":" in self._host else self._host
        port = f":{self._port}" if self._port else ""
        return f"TensorFlow Serving at {self._scheme}://{host}{port}{self._prefix}"

    def request(self, method: str, path: str, body: bytes | None) -> tuple[int, Any]:
        """Return the status and the document of an answer; predictions change nothing, so they may be repeated."""
        delays = iter(self._retry_delays)
        while True:
            wait: float | None = None
            try:
                status, headers, text = self._exchange(method, path, body)
                if status not in _BUSY_STATUSES or (delay := next(delays, None)) is None:
                    return status, _document(text)
                wait = _retry_after(headers)
            except TimeoutError:
                raise ServingError(
                    f"{self} has not answered for {self._timeout:g} seconds; {_TIMEOUT_VARIABLE} sets another time"
                ) from None
            except (OSError, http.client.HTTPException) as error:
                if (delay := next(delays, None)) is None:
                    reason = getattr(error, "strerror", None) or type(error).__name__
                    raise ServingError(f"{self} cannot be reached: {reason}") from error
            time.sleep(delay if wait is None else wait)

    def _exchange(self, method: str, path: str, body: bytes | None) -> tuple[int, http.client.HTTPMessage, bytes]:
        connection = self._idle.pop() if self._idle else self._connect()
        headers = {"Content-Type": "application/json"} if body is not None else {}
        try:
            connection.request(method, self._prefix + path, body, headers)
            response = connection.getresponse()
            text = response.read()
        except BaseException:
            connection.close()
            raise
        self._idle.append(connection)
        return response.status, response.headers, text

    def _connect(self) -> http.client.HTTPConnection:
        connection = http.client.HTTPSConnection if self._scheme == "https" else http.client.HTTPConnection
        return connection(self._host, self._port, timeout=self._timeout)


def _configured_timeout() -> float:
    text = os.environ.get(_TIMEOUT_VARIABLE)
    if text is None:
        return _DEFAULT_TIMEOUT
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 < seconds < float("inf"):
        raise InputError(f"{_TIMEOUT_VARIABLE} is {text!r}; allowed is a number of seconds, more than 0")
    return seconds


def _retry_after(headers: http.client.HTTPMessage) -> float | None:
    text = headers.get("Retry-After", "")
    return min(float(text), _MAX_RETRY_AFTER) if text.isdecimal() else None


def _document(text: bytes) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text.decode(errors="replace")


def _folder_name(model: Model) -> str:
    """Return the last folder of a model's path that is not a version."""
    folders = [part for part in model.url.partition("://")[2 if "://" in model.url else 0].split("/") if part]
    names = [part for part in folders if not part.isdecimal()]
    return names[-1] if names else "model"


def _tensors(described: dict[str, Any] | None) -> tuple[Tensor, ...]:
    return tuple(
        Tensor(name, _type(value["dtype"]), _shape(value)) for name, value in sorted((described or {}).items())
    )


def _type(name: str) -> np.dtype[Any]:
    try:
        return np.dtype(_TYPES.get(name) or name.removeprefix("DT_").lower())
    except TypeError:
        raise ServingError(f"the model has a tensor of the type {name}, which cannot be sent as JSON") from None


def _shape(value: dict[str, Any]) -> tuple[int | None, ...] | None:
    shape = value.get("tensor_shape") or {}
    if shape.get("unknown_rank"):
        return None
    sizes = [int(dimension["size"]) for dimension in shape.get("dim", ())]
    return tuple(None if size < 0 else size for size in sizes)


def _to_json(array: np.ndarray[Any, Any]) -> Any:
    """Return nested lists, with bytes in the form that the server reads."""
    if array.dtype.kind != "O":
        return array.tolist()
    encoded = np.empty(array.shape, dtype=object)
    for index, item in enumerate(array.flat):
        encoded.flat[index] = {"b64": base64.b64encode(item).decode()}
    return encoded.tolist()


def _from_json(value: Any, tensor: Tensor) -> np.ndarray[Any, Any]:
    array = np.array(value, dtype=tensor.dtype)
    if array.size == 0 and tensor.shape:  # empty lists do not tell how long their items would be
        array = array.reshape((0, *(length or 0 for length in tensor.shape[1:])))
    if tensor.dtype.kind != "O":
        return array
    for index, item in enumerate(array.flat):
        array.flat[index] = base64.b64decode(item["b64"]) if isinstance(item, dict) else str(item).encode()
    return array
