"""What the in-process client does with real models; ``test_tensorflow.py`` runs this where TensorFlow is installed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pandas as pd
import pytest
import tensorflow as tf

from cortex_dask.errors import InputError
from cortex_dask.io.job.settings import HandlerSettings, JobSettings
from cortex_dask.io.job.splits import DatasetInput
from cortex_dask.runtime.worker.launch import slot_environment
from cortex_dask.tensorflow.client import TensorFlowClient, connect
from cortex_dask.tensorflow.models import Models


class Scale(tf.Module):
    """Two signatures of numbers, one of texts."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = tf.Variable(factor)

    @tf.function(input_signature=[tf.TensorSpec([None, 2], tf.float32, name="x")])
    def scale(self, x: Any) -> dict[str, Any]:
        return {"y": x * self.factor, "sum": tf.reduce_sum(x, axis=1)}

    @tf.function(
        input_signature=[tf.TensorSpec([None], tf.string, name="s"), tf.TensorSpec([], tf.int32, name="times")]
    )
    def text(self, s: Any, times: Any) -> dict[str, Any]:
        return {"length": tf.strings.length(s) * times, "s": s + "!", "words": tf.strings.split(s)}

    @tf.function(input_signature=[tf.TensorSpec(None, tf.bfloat16, name="x")])
    def half(self, x: Any) -> dict[str, Any]:
        return {"y": x / 2}


def save(folder: Path, factor: float, *signatures: str) -> None:
    module = Scale(factor)
    tf.saved_model.save(module, str(folder), signatures={name: getattr(module, name) for name in signatures})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    save(root / "scale" / "1", 10.0, "scale")
    save(root / "scale" / "12", 2.0, "scale")
    save(root / "many", 3.0, "scale", "text", "half")
    return root


def client(**settings: Any) -> TensorFlowClient:
    return TensorFlowClient(Models.from_settings(settings))


def test_versions(folder: Path) -> None:
    found = client(path=str(folder / "scale"))
    results = [found.predict({"x": [[1, 1]]}, None, version)["y"].tolist() for version in ("latest", "12", 1, "1")]
    assert results == [[[2, 2]], [[2, 2]], [[10, 10]], [[10, 10]]]
    with pytest.raises(InputError, match="has no version '2'; it has 1, 12, and latest is the highest"):
        found.predict({"x": [[1, 1]]}, model_version="2")


def test_outputs_are_arrays(folder: Path) -> None:
    found = client(path=str(folder / "scale")).predict({"x": pd.DataFrame({"a": [1, 2], "b": [3, 4]})})
    assert {name: (type(value), value.dtype, value.tolist()) for name, value in found.items()} == {
        "y": (np.ndarray, np.float32, [[2, 6], [4, 8]]),
        "sum": (np.ndarray, np.float32, [4, 6]),
    }


def test_a_tensor_and_a_column_of_arrays_are_inputs(folder: Path) -> None:
    found = client(path=str(folder / "scale"))
    column = pd.Series([np.array([1.0, 2.0]), np.array([3.0, 4.0])])
    assert found.predict({"x": column})["y"].tolist() == [[2, 4], [6, 8]]
    assert found.predict({"x": tf.constant([[1.0, 2.0]])})["y"].tolist() == [[2, 4]]
    assert found.predict({"x": np.empty((0, 2))})["y"].shape == (0, 2)


def test_text_scalars_and_ragged_outputs(folder: Path) -> None:
    found = client(path=str(folder / "many"), signature_key="text").predict({"s": ["a ä", b"\xff\x00"], "times": 2})
    assert found["length"].tolist() == [8, 4]
    assert found["s"].tolist() == ["a ä!".encode(), b"\xff\x00!"]
    assert [part.tolist() for part in found["words"]] == [[b"a", "ä".encode()], [b"\xff\x00"]]


def test_any_rank_and_small_floats(folder: Path) -> None:
    found = client(path=str(folder / "many"), signature_key="half").predict({"x": np.full((1, 2, 1), 3)})["y"]
    assert found.dtype == ml_dtypes.bfloat16
    assert found.tolist() == [[[1.5], [1.5]]]


def test_names_of_models(folder: Path) -> None:
    entries = [
        {"name": "a", "path": str(folder / "scale")},
        {"name": "b", "path": str(folder / "many"), "signature_key": "half"},
    ]
    listed = client(paths=entries)
    assert listed.predict({"x": [[1, 1]]}, "a")["y"].tolist() == [[2, 2]]
    assert listed.predict({"x": [4]}, "b")["y"].tolist() == [2]
    for found, names in ((listed, "a, b"), (client(dir=str(folder)), "many, scale")):
        with pytest.raises(InputError, match=f"model_name is missing: the models are {names}"):
            found.predict({"x": [[1, 1]]})
        with pytest.raises(InputError, match=f"there is no model 'c'; the models are {names}"):
            found.predict({"x": [[1, 1]]}, "c")
    assert client(dir=str(folder)).predict({"x": [[1, 1]]}, "scale", 1)["y"].tolist() == [[10, 10]]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"z": [1]}, "has no input z; its signature scale takes x: float32 (?, 2)"),
        ({}, "lacks the input x; its signature scale takes x: float32 (?, 2)"),
        ({"x": [[1, 2, 3]]}, "its input x: found the shape (1, 3); it takes x: float32 (?, 2)"),
        ({"x": [["a", "b"]]}, "its input x: found text; it takes x: float32 (?, 2)"),
        ({"x": [[1, 2], [3]]}, "its input x: its parts differ in shape; it takes x: float32 (?, 2)"),
    ],
)
def test_what_does_not_fit(folder: Path, given: Any, message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        client(path=str(folder / "scale")).predict(given)


def test_signatures(folder: Path) -> None:
    with pytest.raises(
        InputError, match=r"has the signatures half, scale, text; choose one with models\.signature_key"
    ):
        client(path=str(folder / "many")).prepare()
    with pytest.raises(
        InputError, match=r"has no signature 'none', which models\.signature_key asks for; it has half, s"
    ):
        client(path=str(folder / "many"), signature_key="none").predict({})


def test_a_model_without_signatures_and_a_damaged_one(tmp_path: Path) -> None:
    tf.saved_model.save(tf.Module(), str(tmp_path / "bare"))
    with pytest.raises(InputError, match="has no signature; save it with one"):
        client(path=str(tmp_path / "bare")).prepare()
    (tmp_path / "bare" / "saved_model.pb").write_bytes(b"\xff" * 100)
    with pytest.raises(InputError, match="version 1, cannot be loaded: "):
        client(path=str(tmp_path / "bare")).prepare()


def test_keras_and_tensorflow_1(tmp_path: Path) -> None:
    model = tf.keras.Sequential([tf.keras.Input((2,), name="x"), tf.keras.layers.Dense(1, kernel_initializer="ones")])
    model.export(str(tmp_path / "keras"), verbose=False)
    found = client(path=str(tmp_path / "keras"), signature_key="serving_default")
    assert found.predict({"x": [[1, 2]]})["output_0"].tolist() == [[3]]
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        x = tf.compat.v1.placeholder(tf.float32, [None, 2])
        y = tf.matmul(x, tf.compat.v1.get_variable("w", initializer=[[1.0], [2.0]]))
        session.run(tf.compat.v1.global_variables_initializer())
        tf.compat.v1.saved_model.simple_save(session, str(tmp_path / "old"), {"x": x}, {"y": y})
    assert client(path=str(tmp_path / "old")).predict({"x": [[1, 2]]})["y"].tolist() == [[5]]


def test_a_version_is_loaded_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = []
    load = tf.saved_model.load
    monkeypatch.setattr(tf.saved_model, "load", lambda path: loaded.append(path) or load(path))
    found = client(path=str(folder / "scale"))
    assert loaded == []
    for version in ("latest", "12", 12, "1", "latest"):
        found.predict({"x": [[1, 1]]}, None, version)
    assert loaded == [str(folder / "scale" / "12"), str(folder / "scale" / "1")]


def test_connection(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TF_SERVING_URL", raising=False)

    def settings(path: str) -> JobSettings:
        handler = HandlerSettings("project", type="tensorflow", models={"path": path})
        return JobSettings("j", "a", "a-1", "2026-01-01T00:00:00Z", handler, DatasetInput(("x",), batch_size=1))

    found = connect(settings("scale"), str(folder))
    assert found.predict({"x": [[1, 1]]})["y"].tolist() == [[2, 2]]
    with pytest.raises(InputError, match="is not there, or empty"):
        connect(settings("none"), str(folder))


COUNT_THREADS = """
import pathlib, tensorflow as tf
for _ in range(3):
    tf.function(lambda x: tf.matmul(x, x))(tf.ones((500, 500)))
names = [path.joinpath("comm").read_text().strip() for path in pathlib.Path("/proc/self/task").iterdir()]
print(names.count("tf_Compute"))
"""


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs /proc")
def test_a_slot_has_threads_for_its_cores() -> None:
    """Also when the handler imports TensorFlow before its client does."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("TF_")}
    environment = slot_environment(inherited, {}, cpu=1.5)
    done = subprocess.run([sys.executable, "-c", COUNT_THREADS], env=environment, capture_output=True, check=True)
    assert done.stdout.strip() == b"1"  # as many as the machine has cores, otherwise
