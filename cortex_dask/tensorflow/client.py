"""``tensorflow_client``: runs SavedModels in the handler process itself.

::

    class Handler:
        def __init__(self, config, tensorflow_client):
            self.client = tensorflow_client

        def handle_batch(self, payload):
            scores = self.client.predict({"pixels": np.stack(payload["pixels"])})["scores"]

TensorFlow is imported when the first model is loaded, and never anywhere but in a handler process.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from cortex_dask.errors import HandlerError, InputError
from cortex_dask.formatting import one_line
from cortex_dask.io.job.settings import JobSettings
from cortex_dask.tensorflow.models import LATEST, Model, Models
from cortex_dask.tensorflow.signature import ModelSignature, Tensor, choose_signature

if TYPE_CHECKING:
    from collections.abc import Callable

#: The environment variable that names a running TensorFlow Serving.
SERVING_VARIABLE = "TF_SERVING_URL"

# A child of the handlers' logger, so that its lines come out in the same way.
_log = logging.getLogger("cortex.tensorflow")


class PredictClient(Protocol):
    """What a handler gets as ``tensorflow_client``."""

    def predict(
        self, model_input: Any, model_name: str | None = None, model_version: str | int = LATEST
    ) -> dict[str, np.ndarray[Any, Any]]:
        """Run a model's signature."""
        ...

    def prepare(self) -> None:
        """Do what can be done before the first batch."""
        ...


def connect(settings: JobSettings, directory: str | None = None) -> PredictClient:
    """Return a job's client: of TensorFlow Serving where ``TF_SERVING_URL`` is set, else of this process.

    Raises HandlerError if TensorFlow is needed and not installed, InputError if a model is missing.
    """
    models = Models.from_settings(settings.handler.models or {}, directory)
    if url := os.environ.get(SERVING_VARIABLE):
        from cortex_dask.tensorflow.serving import ServingClient  # imports http.client, which takes a moment

        return ServingClient(url, models)
    if importlib.util.find_spec("tensorflow") is None:
        raise HandlerError(
            "type: tensorflow needs TensorFlow, which is not installed for the handler's Python; install it with pip "
            f"install 'cortex-dask[tensorflow]', or set {SERVING_VARIABLE} to the URL of a running TensorFlow Serving"
        )
    models.check()
    os.environ.setdefault("TF_FORCE_GPU_ALLOW_GROWTH", "true")  # slots may share a device
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "1")  # warnings and errors, not the features of the CPU
    return TensorFlowClient(models)


@dataclass(frozen=True, slots=True)
class _LoadedModel:
    """A version of a model in memory."""

    function: Callable[..., dict[str, Any]]
    signature: ModelSignature
    model: Any  # kept because its variables live only as long as it does


class TensorFlowClient:
    """Runs the models of an API in this process; each version is loaded once, on its first use."""

    def __init__(self, models: Models) -> None:
        self._models = models
        self._loaded: dict[tuple[str, str], _LoadedModel] = {}
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return f"TensorFlowClient({', '.join(map(str, self._models.models.values())) or self._models.folder})"

    def predict(
        self, model_input: Any, model_name: str | None = None, model_version: str | int = LATEST
    ) -> dict[str, np.ndarray[Any, Any]]:
        """Run a model's signature.

        Parameters
        ----------
        model_input : dict
            For each input of the signature its name and an array, or what NumPy can make one: lists, a column of a
            dataframe (also of arrays), a tensor.
        model_name : str, optional
            Which model; needed with ``models.paths`` and ``models.dir``, without meaning with ``models.path``.
        model_version : str or int
            A number, or ``"latest"``: the highest number that was there when the process first looked.

        Returns
        -------
        dict of ndarray
            The outputs of the signature. Text is an array of ``bytes`` objects.

        Raises
        ------
        InputError
            If there is no such model, version, signature or input, or an input has another shape or type; the message
            lists what there is.
        """
        model = self._models.get(model_name)
        version = model.version(model_version)
        loaded = self._load(model, version)
        arrays = loaded.signature.convert(model_input, str(model))
        outputs = loaded.function(**{name: _tensor(array) for name, array in arrays.items()})
        return {name: _array(value) for name, value in outputs.items()}

    def prepare(self) -> None:
        """Load a single model, so that a broken one fails the job before its first batch."""
        if self._models.only is not None:
            self._load(self._models.only, self._models.only.version())

    def _load(self, model: Model, version: str) -> _LoadedModel:
        key = (model.url, version)
        with self._lock:
            if key not in self._loaded:
                started = time.monotonic()
                self._loaded[key] = _load_model(model, version)
                _log.debug("loaded version %s of %s in %.1f s", version, model, time.monotonic() - started)
            return self._loaded[key]


def _load_model(model: Model, version: str) -> _LoadedModel:
    """Load a version of a model from its copy on this host."""
    import tensorflow as tf

    folder = model.local_folder(version)
    try:
        loaded = tf.saved_model.load(folder)
    except Exception as error:
        raise InputError(f"{model}, version {version}, cannot be loaded: {one_line(error)}") from error
    name = choose_signature(loaded.signatures, model.signature_key, str(model))
    function = loaded.signatures[name]
    signature = ModelSignature(
        name,
        tuple(_describe(key, spec) for key, spec in function.structured_input_signature[1].items()),
        tuple(_describe(key, spec) for key, spec in function.structured_outputs.items()),
    )
    return _LoadedModel(function, signature, loaded)


def _describe(name: str, spec: Any) -> Tensor:
    shape = spec.shape
    return Tensor(name, np.dtype(spec.dtype.as_numpy_dtype), None if shape.rank is None else tuple(shape.as_list()))


def _tensor(array: np.ndarray[Any, Any]) -> Any:
    import tensorflow as tf

    return tf.constant(array, dtype=tf.string if array.dtype.kind == "O" else None)


def _array(value: Any) -> np.ndarray[Any, Any]:
    return np.asarray(value.numpy() if hasattr(value, "numpy") else value)
