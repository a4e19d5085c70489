"""Projects as people wrote them for Cortex: nobody touches a byte, and they run here.

Each kind of project is run from the command line and from Python, as a directory and deployed and by its name, with
its input and the environment's store on the local file system and on S3.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import dask.config
import fsspec
import pytest
from click.testing import CliRunner

import cortex_dask as cx
from cortex_dask.cli import main
from tests.contract.test_5_failures import check_document
from tests.examples.libraries import interpreter
from tests.support.tf_serving import Served, ServingServer, tensor

HANDLER = """\
import json
import os

import cortex
import fsspec
from cortex_internal.lib.log import logger as cortex_logger

from labels import label_of


class Handler:
    def __init__(self, config, job_spec):
        if len(config.get("dest_dir", "")) == 0:
            raise Exception("'dest_dir' field was not provided in job submission")
        self.fs, folder = fsspec.url_to_fs(config["dest_dir"])
        self.job_spec = job_spec
        self.dest = f"{folder}/{job_spec['job_id']}"
        self.fs.makedirs(self.dest, exist_ok=True)
        self.config = config
        with open("values.json") as file:
            self.values = json.load(file)
        self.handled = 0

    def handle_batch(self, payload, batch_id):
        results = [{"sample": sample, "label": label_of(self.describe(sample), self.values)} for sample in payload]
        name = f"{self.dest}/{batch_id}.json"
        assert not self.fs.exists(name), "a batch is handled once"
        with self.fs.open(name, "w") as file:
            json.dump(results, file)
        self.handled += 1
        cortex_logger.info("completed processing batch", extra={"batch_id": batch_id, "samples": len(payload)})

    def describe(self, sample):
        DESCRIBE

    def on_job_complete(self):
        self.fs.invalidate_cache()
        names = [name for name in self.fs.ls(self.dest, detail=False) if name.endswith(".json")]
        results = []
        for name in names:
            with self.fs.open(name) as file:
                results += json.load(file)
        mine = cortex.client().get_job(self.job_spec["api_name"], self.job_spec["job_id"])
        report = {
            "results": results,
            "batches": [os.path.basename(name)[:-5] for name in names],
            "handled": self.handled,
            "config": self.config,
            "job_spec": self.job_spec,
            "status": mine["job_status"]["status"],
            "region": os.environ["REGION_OF_THE_MODEL"],
            "files": sorted(name for name in os.listdir(".") if name != "__pycache__"),
        }
        with self.fs.open(f"{self.dest}/aggregated_results", "w") as file:
            json.dump(report, file)
        print("aggregated", len(results), "results")
"""

CORTEX_YAML = """\
- name: NAME
  kind: BatchAPI
  handler:
    type: python
    path: handler.py
    config:
      model: {name: resnet, version: 1}
      dest_dir: ""
  compute:
    cpu: 200m
    mem: 1Gi
"""

FILES = {
    "labels.py": "def label_of(number, values):\n    return values['labels'][number % 3]\n",
    "values.json": '{"labels": ["cat", "dog", "fish"]}',
    ".env": "# where the model is\nREGION_OF_THE_MODEL=us-west-2\n",
    ".cortexignore": "*.ipynb\nsample-*.json\n",
    "explore.ipynb": "{}",
    "sample-1.json": "{}",
    "README.md": "# A classifier\n",
}

#: What a project of each kind does with a sample.
DESCRIBE = {
    "item_list": "return sample['id']",
    "file_path_lister": "return len(fsspec.open(sample, 'rb').open().read())",
    "delimited_files": "return len(sample['text'])",
}

JOB_SPEC = {"job_id", "api_name", "config", "workers", "total_batch_count", "start_time"}


class Place:
    """An environment, a project directory and its input, on one kind of storage."""

    def __init__(self, folder: Path, root: str) -> None:
        self.folder = folder
        self.root = root
        self.store = f"{root}/store"
        self.dest = f"{root}/results"

    def write(self, files: dict[str, str]) -> None:
        """Write the input."""
        fs, path = fsspec.url_to_fs(self.root)
        for name, text in files.items():
            fs.makedirs(f"{path}/{name}".rpartition("/")[0], exist_ok=True)
            fs.pipe(f"{path}/{name}", text.encode())

    def read(self, name: str) -> Any:
        fs, path = fsspec.url_to_fs(self.root)
        fs.invalidate_cache()
        return json.loads(fs.cat(f"{path}/{name}"))

    def cli(self, *arguments: object, python: str = sys.executable) -> str:
        """Run the command line as a user does, from another folder than the project's."""
        command = [python, "-m", "cortex_dask", *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=240, cwd=self.folder)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout


@pytest.fixture(params=["local", pytest.param("s3", marks=pytest.mark.s3)])
def place(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Place]:
    root = str(tmp_path / "bucket") if request.param == "local" else request.getfixturevalue("s3")
    cache = str(tmp_path_factory.getbasetemp() / "cache")
    made = Place(tmp_path, root)
    monkeypatch.setenv("DASK_CORTEX_DASK__STORE", made.store)
    monkeypatch.setenv("DASK_CORTEX_DASK__CACHE", cache)
    monkeypatch.setenv("PYTHONPATH", str(Path(cx.__file__).parents[1]), prepend=os.pathsep)
    with dask.config.set({"cortex-dask.store": made.store, "cortex-dask.cache": cache}):
        yield made


def write_project(folder: Path, files: dict[str, str]) -> Path:
    folder.mkdir()
    for name, text in files.items():
        (folder / name).write_text(text)
    return folder


def fingerprint(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def submission(kind: str, place: Place) -> tuple[dict[str, Any], list[Any]]:
    """Return the submission that was posted to Cortex, and its samples; the input is written."""
    if kind == "item_list":
        samples: list[Any] = [{"id": number, "url": f"https://example.org/{number}.jpg"} for number in range(11)]
        given: dict[str, Any] = {"items": samples}
    elif kind == "file_path_lister":
        names = [f"images/img_{number:02}.jpg" for number in range(11)]
        place.write({name: "x" * number for number, name in enumerate(names)})
        place.write({"images/readme.txt": "", "images/img_99.png": "", "images/small/img_1.jpg": ""})
        samples = [f"{place.root}/{name}" for name in names]
        given = {"s3_paths": [f"{place.root}/images/img"], "includes": ["**.jpg"], "excludes": ["**/small/*"]}
    else:
        samples = [{"text": "y" * number} for number in range(11)]
        lines = [json.dumps(sample) for sample in samples]
        place.write({"lines/a.json": "\n".join(lines[:6]) + "\n", "lines/b.json": "\n".join(lines[6:])})
        given = {"s3_paths": [f"{place.root}/lines/"]}
    config = {"dest_dir": place.dest, "model": {"version": 2}}
    return {"workers": 2, "timeout": 600, kind: {**given, "batch_size": 3}, "config": config}, samples


Way = Callable[[Place, Path, dict[str, Any]], dict[str, Any]]


def here(*arguments: str) -> str:
    """Run the command line in this process: what only looks is quicker so."""
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 0, done.output
    return done.stdout


def by_command(place: Place, project: Path, asked: dict[str, Any]) -> dict[str, Any]:
    (place.folder / "job.json").write_text(json.dumps(asked))
    return dict(json.loads(place.cli("submit", project, "--job", "job.json", "-o", "json")))


def deployed_by_command(place: Place, project: Path, asked: dict[str, Any]) -> dict[str, Any]:
    (place.folder / "job.json").write_text(json.dumps(asked))
    name = f"old-{next(kind for kind in DESCRIBE if kind in asked).replace('_', '-')}"
    assert f"created {name} (BatchAPI)" in place.cli("deploy", project / "cortex.yaml")
    project.rename(place.folder / "away")  # the environment has it
    try:
        submitted = json.loads(place.cli("submit", name, "--job", "job.json", "-o", "json"))
    finally:
        (place.folder / "away").rename(project)
    (listed,) = json.loads(here("get", name, "-o", "json"))
    assert listed == json.loads(here("get", name, submitted["job_id"], "-o", "json"))
    assert {**listed, "coordinator": None} == {**submitted, "coordinator": None}  # its heart beats once more
    assert "completed processing batch" in here("logs", name, submitted["job_id"])
    assert f"deleted {name}" in here("delete", name)
    return dict(submitted)


def from_python(place: Place, project: Path, asked: dict[str, Any]) -> dict[str, Any]:
    return cx.run(project, progress=False, **asked).describe()


def deployed_from_python(place: Place, project: Path, asked: dict[str, Any]) -> dict[str, Any]:
    client = cx.Client()
    name = client.deploy(project)["api"]["spec"]["name"]
    job = client.submit(name, job=asked).wait(120)
    assert client.get_api(name)["batch_job_statuses"] == [job.describe()]
    return job.describe()


LOCAL, S3 = "local", pytest.param("s3", marks=pytest.mark.s3)


@pytest.mark.parametrize("place", [LOCAL, S3], indirect=True)
@pytest.mark.parametrize("way", [deployed_by_command, from_python])
@pytest.mark.parametrize("kind", DESCRIBE)
def test_a_python_project(kind: str, way: Way, place: Place) -> None:
    check_python(kind, way, place)


@pytest.mark.parametrize(
    ("kind", "way", "place"),
    [
        ("item_list", by_command, "local"),
        ("file_path_lister", deployed_from_python, "local"),
        pytest.param("delimited_files", by_command, "s3", marks=pytest.mark.s3),
        pytest.param("item_list", deployed_from_python, "s3", marks=pytest.mark.s3),
    ],
    indirect=["place"],
)
def test_a_python_project_the_other_ways(kind: str, way: Way, place: Place) -> None:
    check_python(kind, way, place)


def check_python(kind: str, way: Way, place: Place) -> None:
    name = f"old-{kind.replace('_', '-')}"
    files = {
        **FILES,
        "cortex.yaml": CORTEX_YAML.replace("NAME", name),
        "handler.py": HANDLER.replace("DESCRIBE", DESCRIBE[kind]),
    }
    project = write_project(place.folder / "classifier", files)
    before = fingerprint(project)
    asked, samples = submission(kind, place)

    document = way(place, project, asked)

    assert fingerprint(project) == before
    check_document(document)
    assert (document["status"], document["api_name"], document["timeout"]) == ("succeeded", name, 600)
    assert (document["total_batch_count"], document["batches_in_queue"]) == (4, 0)
    assert (document["batch_metrics"]["succeeded"], document["batch_metrics"]["failed"]) == (4, 0)

    report = place.read(f"results/{document['job_id']}/aggregated_results")
    labels = ["cat", "dog", "fish"]
    expected = [{"sample": sample, "label": labels[number % 3]} for number, sample in enumerate(samples)]
    assert sorted(report["results"], key=json.dumps) == sorted(expected, key=json.dumps)
    assert len(set(report["batches"])) == len(report["batches"]) == 4
    assert report["config"] == {"model": {"name": "resnet", "version": 2}, "dest_dir": place.dest}
    assert set(report["job_spec"]) >= JOB_SPEC
    for key in ("job_id", "api_name", "workers", "config", "total_batch_count"):
        assert report["job_spec"][key] == document[key], key
    assert report["job_spec"]["config"] == asked["config"]
    assert report["status"] == "running"
    assert report["region"] == "us-west-2"
    assert report["files"] == sorted([".env", "README.md", "handler.py", "labels.py", "values.json"])

    lines = list(cx.Client().get_job(name, document["job_id"]).log_lines())
    completed = [line for line in lines if line["message"] == "completed processing batch"]
    assert sorted(line["batch_id"] for line in completed) == sorted(report["batches"])
    assert sorted(line["samples"] for line in completed) == [2, 3, 3, 3]
    assert {"asctime", "levelname", "message", "process", "labels"} <= set(completed[0])
    assert {line["labels"]["jobID"] for line in completed} == {document["job_id"]}
    assert [line["message"] for line in lines if "aggregated" in line["message"]] == ["aggregated 11 results"]


# type: tensorflow -----------------------------------------------------------------------------------------------------

TENSORFLOW_HANDLER = """\
import json

import cortex
import fsspec
from cortex_internal.lib.log import logger as cortex_logger


class Handler:
    def __init__(self, tensorflow_client, config, job_spec):
        self.client = tensorflow_client
        with open("labels.json") as file:
            self.labels = json.load(file)
        self.fs, folder = fsspec.url_to_fs(config["dest_dir"])
        self.dest = f"{folder}/{job_spec['job_id']}"
        self.fs.makedirs(self.dest, exist_ok=True)

    def handle_batch(self, payload, batch_id):
        prediction = self.client.predict({"x": payload})
        labels = [self.labels[int(row[0] > row[1])] for row in prediction["y"]]
        with self.fs.open(f"{self.dest}/{batch_id}.json", "w") as file:
            json.dump([prediction["y"].tolist(), labels], file)
        cortex_logger.info("completed processing batch", extra={"labels_found": labels})
"""

TENSORFLOW_YAML = """\
- name: old-tensorflow
  kind: BatchAPI
  handler:
    type: tensorflow
    path: handler.py
    models:
      path: MODEL
      signature_key: serving_default
    tensorflow_serving_image: quay.io/cortexlabs/tensorflow-serving-cpu:0.35.0
    server_side_batching: {max_batch_size: 8, batch_interval: 0.1s}
  compute: {cpu: 1}
"""

SAVE_MODEL = """\
import sys
import tensorflow as tf


class Triple(tf.Module):
    @tf.function(input_signature=[tf.TensorSpec([None, 2], tf.float32, name="x")])
    def __call__(self, x):
        return {"y": 3 * x}


module = Triple()
tf.saved_model.save(module, sys.argv[1], signatures={"serving_default": module.__call__})
"""


def check_tensorflow(place: Place, model: str, way: str, python: str = sys.executable) -> None:
    files = {
        "cortex.yaml": TENSORFLOW_YAML.replace("MODEL", model),
        "handler.py": TENSORFLOW_HANDLER,
        "labels.json": '["down", "up"]',
    }
    project = write_project(place.folder / "tensorflow-project", files)
    before = fingerprint(project)
    items = [[number, 2] for number in range(5)]
    asked: dict[str, Any] = {
        "workers": 1,
        "item_list": {"items": items, "batch_size": 2},
        "config": {"dest_dir": place.dest},
    }
    if way == "python":
        document = cx.run(project, progress=False, **asked).describe()
    else:
        (place.folder / "job.json").write_text(json.dumps(asked))
        document = json.loads(place.cli("submit", project, "--job", "job.json", "-o", "json", python=python))
    assert (document["status"], document["total_batch_count"]) == ("succeeded", 3)
    assert fingerprint(project) == before
    fs, path = fsspec.url_to_fs(f"{place.dest}/{document['job_id']}")
    fs.invalidate_cache()
    results = sorted(json.loads(fs.cat(name)) for name in fs.ls(path, detail=False))
    assert results == [
        [[[0, 6], [3, 6]], ["down", "down"]],
        [[[6, 6], [9, 6]], ["down", "up"]],
        [[[12, 6]], ["up"]],
    ]
    lines = list(cx.Client().get_job("old-tensorflow", document["job_id"]).log_lines())
    assert len([line for line in lines if line["message"] == "completed processing batch"]) == 3


@pytest.mark.parametrize("way", ["command", "python"])
def test_a_tensorflow_project_with_a_server(place: Place, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    signature = {"inputs": {"x": tensor("DT_FLOAT", -1, 2)}, "outputs": {"y": tensor("DT_FLOAT", -1, 2)}}
    triple = Served(
        {"serving_default": signature},
        {"serving_default": lambda given: {"y": [[3 * item for item in row] for row in given["x"]]}},
    )
    with ServingServer({"triple": {1: triple}}) as server:
        monkeypatch.setenv("TF_SERVING_URL", server.url)
        check_tensorflow(place, f"{place.root}/models/triple", way)


@pytest.mark.examples
@pytest.mark.timeout(900)
def test_a_tensorflow_project(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """With TensorFlow itself; skipped, with the reason, where it is not installed."""
    python = interpreter("tensorflow")
    monkeypatch.delenv("TF_SERVING_URL", raising=False)
    model = place.folder / "model"
    subprocess.run([python, "-c", SAVE_MODEL, str(model)], check=True, capture_output=True, timeout=300)
    fs, path = fsspec.url_to_fs(place.root)
    fs.makedirs(f"{path}/models/triple", exist_ok=True)
    fs.put(str(model), f"{path}/models/triple/1", recursive=True)
    shutil.rmtree(model)
    check_tensorflow(place, f"{place.root}/models/triple", "command", python)


# the guide ------------------------------------------------------------------------------------------------------------

GUIDE = Path(__file__).parents[2] / "docs" / "migrating-from-cortex.md"


def test_the_commands_of_the_guide_run_as_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = GUIDE.read_text()
    files = {
        **FILES,
        "cortex.yaml": CORTEX_YAML.replace("NAME", "image-classifier"),
        "handler.py": HANDLER.replace("DESCRIBE", "return len(sample)"),
    }
    write_project(tmp_path / "classifier", files)
    (job,) = re.findall(r"```json\n(.*?)```", text, re.DOTALL)
    job = job.replace('"s3://my-bucket/results"', json.dumps(str(tmp_path / "results")))
    (tmp_path / "job.json").write_text(job)
    (python,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    monkeypatch.setenv("DASK_CONFIG", str(tmp_path / "dask"))
    monkeypatch.setenv("DASK_CORTEX_DASK__CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("DASK_CORTEX_DASK__STORE", str(tmp_path / "store"))
    monkeypatch.setenv("PYTHONPATH", str(Path(cx.__file__).parents[1]), prepend=os.pathsep)
    (tmp_path / "bin").mkdir()
    script = tmp_path / "bin" / "cortex-dask"
    script.write_text(f'#!/bin/sh\nexec {sys.executable} -m cortex_dask "$@"\n')
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=os.pathsep)

    commands = re.findall(r"^    \$ (.*)", text, re.MULTILINE)
    assert len(commands) > 15
    (tmp_path / "guide.py").write_text(python)
    commands.insert(-1, f"{sys.executable} guide.py")
    for command in commands:
        done = subprocess.run(command, shell=True, cwd=tmp_path, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, (command, done.stdout, done.stderr)
    assert len(list((tmp_path / "results").iterdir())) == 4
