"""The client of TensorFlow Serving, against a server that answers as its REST interface does; and whole jobs."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from textwrap import dedent
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cortex_dask.errors import InputError
from cortex_dask.tensorflow.models import Models
from cortex_dask.tensorflow.serving import RETRY_DELAYS, ServingClient, ServingError
from tests.support.tf_serving import Fault, Served, ServingServer, tensor


def scale(factor: float) -> Served:
    """A model with one output, whose name the server therefore leaves out."""
    signature = {"inputs": {"x": tensor("DT_FLOAT", -1, 2)}, "outputs": {"y": tensor("DT_FLOAT", -1, 2)}}
    return Served(
        {"serving_default": signature, "__saved_model_init_op": {"inputs": {}, "outputs": {}}},
        {"serving_default": lambda given: {"y": [[factor * item for item in row] for row in given["x"]]}},
    )


TEXTS = Served(
    {
        "join": {
            "inputs": {"left": tensor("DT_STRING", -1), "right": tensor("DT_STRING", -1)},
            "outputs": {
                "text": tensor("DT_STRING", -1),
                "raw_bytes": tensor("DT_STRING", -1),
                "length": tensor("DT_INT64", -1),
            },
        },
        "other": {
            "inputs": {"any": tensor("DT_DOUBLE", unknown_rank=True)},
            "outputs": {"any": tensor("DT_DOUBLE", unknown_rank=True)},
        },
    },
    {
        "join": lambda given: {
            "text": [
                b"+".join(pair).decode("latin-1").encode() for pair in zip(given["left"], given["right"], strict=True)
            ],
            "raw_bytes": [b"".join(pair) for pair in zip(given["left"], given["right"], strict=True)],
            "length": [len(left) + len(right) for left, right in zip(given["left"], given["right"], strict=True)],
        },
        "other": lambda given: {"any": given["any"]},
    },
)


@pytest.fixture
def server() -> Iterator[ServingServer]:
    with ServingServer({"scale": {1: scale(10), 2: scale(2)}, "texts": {7: TEXTS}}) as running:
        yield running


def connect(url: str, models: Models) -> ServingClient:
    """Make a client that soon tries again."""
    return ServingClient(url, models, retry_delays=(0.01,) * len(RETRY_DELAYS))


ONE = Models.from_settings({"path": "s3://bucket/models/scale/2"})
LISTED = {
    "paths": [{"name": "scale", "path": "s3://b/x"}, {"name": "texts", "path": "s3://b/y", "signature_key": "join"}]
}


# predictions ----------------------------------------------------------------------------------------------------------


def test_one_output(server: ServingServer) -> None:
    found = connect(server.url, ONE).predict({"x": np.array([[1, 2], [3, 4]], "float64")})
    assert list(found) == ["y"]
    assert found["y"].dtype == np.float32
    assert found["y"].tolist() == [[2, 4], [6, 8]]
    assert server.requests == [
        ("GET", "/v1/models/scale/metadata", None),
        (
            "POST",
            "/v1/models/scale:predict",
            {"signature_name": "serving_default", "inputs": {"x": [[1.0, 2.0], [3.0, 4.0]]}},
        ),
    ]


def test_versions(server: ServingServer) -> None:
    client = connect(server.url, ONE)
    results = [client.predict({"x": [[1, 1]]}, None, version)["y"][0, 0] for version in ("latest", 1, "2", "1")]
    assert results == [2, 10, 2, 10]
    assert server.requests[2][1] == "/v1/models/scale/versions/1/metadata"
    assert len(server.requests) == 4 + 3  # the metadata of a version is asked for once
    for version in ("newest", "-1", "1/x", "²"):
        with pytest.raises(InputError, match=re.escape(f"no version {version!r}; a version is a number, or latest")):
            client.predict({"x": [[1, 1]]}, None, version)


def test_bytes_text_and_several_outputs(server: ServingServer) -> None:
    client = connect(server.url, Models.from_settings(LISTED))
    found = client.predict({"left": [b"\x00\xff", "ä"], "right": np.array(["b", "c"])}, "texts")
    assert found["raw_bytes"].tolist() == [b"\x00\xffb", "äc".encode()]
    assert found["text"].tolist() == ["\x00ÿ+b".encode(), "Ã¤+c".encode()]
    assert found["length"].tolist() == [3, 3]
    assert [found[name].dtype for name in ("raw_bytes", "text", "length")] == [object, object, np.int64]
    assert server.requests[-1][2]["inputs"]["left"] == [{"b64": "AP8="}, {"b64": "w6Q="}]


def test_numbers_that_json_does_not_know(server: ServingServer) -> None:
    found = connect(server.url, ONE).predict({"x": [[np.nan, np.inf], [-np.inf, 1e-30]]})["y"]
    np.testing.assert_array_equal(found, np.array([[np.nan, np.inf], [-np.inf, 2e-30]], "float32"))


def test_any_rank_and_no_rows(server: ServingServer) -> None:
    client = connect(server.url, Models.from_settings({"dir": "s3://b", "signature_key": "other"}))
    assert client.predict({"any": np.ones((1, 2, 3))}, "texts")["any"].shape == (1, 2, 3)
    assert client.predict({"any": 5}, "texts", 7)["any"].tolist() == 5
    assert connect(server.url, ONE).predict({"x": np.empty((0, 2))})["y"].shape == (0, 2)


def test_a_connection_is_kept_and_threads_have_their_own(server: ServingServer) -> None:
    client = connect(server.url + "/", ONE)
    for _ in range(5):
        client.predict({"x": [[1, 1]]})
    assert server.connections == 1
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda number: client.predict({"x": [[number, 0]]})["y"][0, 0], range(50)))
    assert found == [2 * number for number in range(50)]
    assert server.connections <= 5


# what is wrong --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "arguments", "message"),
    [
        (
            {"path": "/m/scale"},
            ({"z": 1},),
            "the model scale has no input z; its signature serving_default takes x: fl",
        ),
        ({"path": "/m/scale"}, ({"x": [[1]]},), "found the shape (1, 1); it takes x: float32 (?, 2)"),
        ({"path": "/m/scale"}, ({"x": [["a", "b"]]},), "found text; it takes x: float32 (?, 2)"),
        ({"path": "/m/scale"}, ({"x": [[1, 1]]}, None, 3), "Servable not found for request: Specific(scale, 3)"),
        ({"path": "/m/none"}, ({"x": [[1, 1]]},), "Latest(none); the models of the API are none"),
        ({"path": "/m/texts"}, ({},), "the model texts has the signatures join, other; choose one with models.sig"),
        (
            {"path": "/m/texts", "signature_key": "k"},
            ({},),
            "has no signature 'k', which models.signature_key asks for",
        ),
        (LISTED, ({},), "model_name is missing: the models are scale, texts"),
        (LISTED, ({}, "else"), "there is no model 'else'; the models are scale, texts"),
        ({"dir": "/m"}, ({},), "model_name is missing: with models.dir it is needed"),
        ({"dir": "/m"}, ({}, "a/b"), "Latest(a%2Fb)"),
    ],
)
def test_mistakes_are_named(
    server: ServingServer, settings: dict[str, Any], arguments: tuple[Any, ...], message: str
) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        connect(server.url, Models.from_settings(settings)).predict(*arguments)


def test_a_refused_input(server: ServingServer) -> None:
    def refuse(_: dict[str, Any]) -> dict[str, Any]:
        raise ValueError("indices[0] = 99 is not in [0, 10)")

    server.models["scale"][2].functions["serving_default"] = refuse
    with pytest.raises(
        InputError, match=re.escape("refuses the input for the model scale: ValueError: indices[0] = 99")
    ):
        connect(server.url, ONE).predict({"x": [[1, 1]]})


def test_a_single_model_is_checked_before_any_batch(server: ServingServer) -> None:
    connect(server.url, ONE).prepare()
    assert [path for _, path, _ in server.requests] == ["/v1/models/scale/metadata"]
    with pytest.raises(InputError, match="has the signatures join, other"):
        connect(server.url, Models.from_settings({"path": "texts"})).prepare()


@pytest.mark.parametrize(
    "url", ["localhost:8501", "ftp://host", "http://", "http://host:port", "http://[::1", "http://user:secret@host"]
)
def test_a_value_that_is_not_a_url(url: str) -> None:
    with pytest.raises(InputError, match=r"^TF_SERVING_URL (is no URL|holds a user name)") as caught:
        connect(url, ONE)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("text", ["soon", "0", "-1", "inf", "nan", ""])
def test_a_value_that_is_not_a_timeout(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("TF_SERVING_TIMEOUT", text)
    with pytest.raises(InputError, match=f"^TF_SERVING_TIMEOUT is '{text}'; allowed is a number of seconds"):
        connect("http://host", ONE)


# faults ---------------------------------------------------------------------------------------------------------------


def test_a_request_to_a_busy_server_is_repeated(server: ServingServer) -> None:
    server.faults = [Fault(503), Fault(429), Fault(503, {"Retry-After": "0"}), Fault(503, {"Retry-After": "tomorrow"})]
    assert connect(server.url, ONE).predict({"x": [[1, 1]]})["y"].tolist() == [[2, 2]]
    assert len(server.requests) == 6


def test_retry_after_is_respected(server: ServingServer) -> None:
    server.faults = [Fault(503, {"Retry-After": "1"})]
    started = time.monotonic()
    connect(server.url, ONE).predict({"x": [[1, 1]]})
    assert time.monotonic() - started >= 1


def test_a_request_is_repeated_after_a_lost_connection(server: ServingServer) -> None:
    client = connect(server.url, ONE)
    client.predict({"x": [[1, 1]]})
    server.faults = [Fault(), Fault()]
    assert client.predict({"x": [[1, 1]]})["y"].tolist() == [[2, 2]]


def test_a_server_that_stays_busy(server: ServingServer) -> None:
    server.faults = [Fault(503)] * 50
    with pytest.raises(
        ServingError, match=re.escape(f"{server.url} has answered with HTTP 503 for the model scale: busy")
    ):
        connect(server.url, ONE).predict({"x": [[1, 1]]})
    assert len(server.requests) == 1 + len(RETRY_DELAYS)


def test_an_error_of_the_server_is_not_repeated(server: ServingServer) -> None:
    server.faults = [Fault(500, body=b"<html>oops</html>")]
    with pytest.raises(ServingError, match="has answered with HTTP 500 for the model scale: <html>oops</html>"):
        connect(server.url, ONE).predict({"x": [[1, 1]]})
    assert len(server.requests) == 1


def test_a_server_that_does_not_answer(server: ServingServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TF_SERVING_TIMEOUT", "0.2")
    server.faults = [Fault(200, seconds=60)]
    with pytest.raises(ServingError, match=r"has not answered for 0\.2 seconds; TF_SERVING_TIMEOUT sets another time"):
        connect(server.url, ONE).predict({"x": [[1, 1]]})


def test_a_server_that_is_not_there(server: ServingServer) -> None:
    server.__exit__()
    with pytest.raises(ServingError, match=f"at {server.url} cannot be reached: Connection refused"):
        connect(server.url, ONE).predict({"x": [[1, 1]]})


@pytest.mark.parametrize("body", [b"{}", b"[]", b"nonsense", b'{"metadata": {"signature_def": 5}}'])
def test_an_answer_that_is_not_understood(server: ServingServer, body: bytes) -> None:
    server.faults = [Fault(200, body=body)]
    with pytest.raises(ServingError, match=re.escape(f"TensorFlow Serving at {server.url} ")):
        connect(server.url, ONE).predict({"x": [[1, 1]]})


# whole jobs -----------------------------------------------------------------------------------------------------------

HANDLER = """
    import numpy as np

    class Handler:
        def __init__(self, config, tensorflow_client):
            self.client = tensorflow_client

        def handle_batch(self, payload):
            found = self.client.predict({"x": np.stack([payload["a"], payload["a"]], axis=1)}, "scale")
            return {"a": payload["a"].to_numpy(), "y": found["y"][:, 1]}
"""


def submit(folder: Path, models: str, variables: dict[str, str], *options: str) -> subprocess.CompletedProcess[str]:
    """Run a project of ``type: tensorflow`` from the command line."""
    project = folder / "project"
    (project / "data").mkdir(parents=True)
    for number in range(4):
        pq.write_table(pa.table({"a": range(number * 100, number * 100 + 100)}), project / "data" / f"{number}.parquet")
    (project / "handler.py").write_text(dedent(HANDLER))
    (project / "cortex.yaml").write_text(
        "- name: served\n  kind: BatchAPI\n  handler: {type: tensorflow, path: handler.py, models: " + models + "}\n"
        "  job: {input: data/, output: {path: out/}, batch_size: 30, workers: 2}\n"
    )
    environment = {
        **os.environ,
        "DASK_CORTEX_DASK__STORE": str(folder / "store"),
        "DASK_CORTEX_DASK__CACHE": str(folder / "cache"),
        **variables,
    }
    environment.pop("TF_SERVING_URL", None) if "TF_SERVING_URL" not in variables else None
    command = [sys.executable, "-m", "cortex_dask", "submit", str(project), "-o", "json", *options]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("cluster", ["local", "inline"])
def test_a_job_with_a_server(server: ServingServer, tmp_path: Path, cluster: str) -> None:
    server.faults = [Fault(503)]
    done = submit(
        tmp_path,
        "{paths: [{name: scale, path: 's3://nowhere/scale'}]}",
        {"TF_SERVING_URL": server.url},
        "--cluster",
        cluster,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = pq.read_table(tmp_path / "project" / "out").sort_by("a").to_pydict()
    assert rows == {"a": list(range(400)), "y": [2.0 * number for number in range(400)]}


@pytest.mark.skipif(importlib.util.find_spec("tensorflow") is not None, reason="TensorFlow is installed here")
def test_a_job_without_tensorflow_says_what_to_install(tmp_path: Path) -> None:
    done = submit(tmp_path, "{path: model}", {})
    assert done.returncode != 0
    said = json.loads(done.stdout)
    assert said["status"] == "worker error"
    assert (
        "type: tensorflow needs TensorFlow, which is not installed for the handler's Python; install it with pip "
        "install 'cortex-dask[tensorflow]', or set TF_SERVING_URL"
    ) in said["status_reason"]
