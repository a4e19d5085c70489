"""CONTRACT 3, the configuration: what each key of ``cortex.yaml`` does, through real jobs and the command line."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dask.config
import pytest
import yaml
from click.testing import CliRunner, Result

import cortex_dask as cx
from cortex_dask.cli import main

HANDLER = """\
import json
import logging
import os
import resource


class Handler:
    def __init__(self, config):
        self.config = config

    def handle_batch(self, payload):
        import helper

        if "hog" in self.config:
            bytearray(b"x") * (self.config["hog"] << 20)
        for level in ("debug", "info", "warning", "error"):
            getattr(logging.getLogger("mine"), level)("said at " + level)
        found = {
            "config": self.config,
            "helper": helper.WHO,
            "variables": {name: os.environ.get(name) for name in ("ONE", "TWO", "EMPTY")},
            "threads": os.environ["OMP_NUM_THREADS"],
            "devices": os.environ.get("CUDA_VISIBLE_DEVICES"),
        }
        return [{"found": json.dumps(found)}]
"""

#: Every key that a python handler may have.
EVERYTHING: dict[str, Any] = {
    "name": "every-key",
    "kind": "BatchAPI",
    "handler": {
        "type": "python",
        "path": "code/handler.py",
        "config": {"threshold": 0.5, "nested": {"a": [1, None]}},
        "python_path": "library",
        "image": "quay.io/cortexlabs/python-handler-cpu:0.35.0",
        "env": {"ONE": "1", "TWO": "two words", "EMPTY": ""},
        "log_level": "warning",
        "shm_size": "1Gi",
    },
    "compute": {"cpu": "1500m", "gpu": 0, "inf": 0, "mem": "1Gi", "node_groups": ["spot", "on-demand"]},
    "networking": {"endpoint": "/every-key"},
}

ITEMS = {"item_list": {"items": ["x"], "batch_size": 1}, "workers": 1}


class Project:
    """A project directory whose configuration is made from mappings."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / "project"
        for name, text in {"code/handler.py": HANDLER, "library/helper.py": "WHO = 'from the library'\n"}.items():
            (self.path / name).parent.mkdir(parents=True)
            (self.path / name).write_text(text)
        self.write(EVERYTHING)

    def write(self, *apis: dict[str, Any]) -> None:
        (self.path / "cortex.yaml").write_text(yaml.safe_dump(list(apis), sort_keys=False))

    def change(self, section: str, **keys: Any) -> None:
        """Write the configuration with other keys in a section; None removes a key."""
        merged = {**EVERYTHING[section], **keys}
        self.write({**EVERYTHING, section: {key: value for key, value in merged.items() if value is not None}})

    def command(self, command: str, *arguments: str, **asked: Any) -> Result:
        given = [str(self.path), *arguments]
        if command == "submit":
            given += ["--job", "-"]
        return CliRunner().invoke(main, [command, *given], input=json.dumps({**ITEMS, **asked}))

    def found(self, **options: Any) -> dict[str, Any]:
        """Run a job, and return what its handler found."""
        job = cx.run(self.path, progress=False, output=str(self.folder / "out"), **{**ITEMS, **options})
        return {**json.loads(job.to_arrow()["found"][0].as_py()), "job": job}


@pytest.fixture
def project(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Project]:
    cache = str(tmp_path_factory.getbasetemp() / "cache")
    monkeypatch.setenv("DASK_CORTEX_DASK__STORE", str(tmp_path / "store"))
    monkeypatch.setenv("DASK_CORTEX_DASK__CACHE", cache)
    with dask.config.set({"cortex-dask.store": str(tmp_path / "store"), "cortex-dask.cache": cache}):
        yield Project(tmp_path)


@pytest.mark.filterwarnings("ignore:.*networking")
def test_every_key_of_a_python_handler(project: Project) -> None:
    found = project.found()
    assert found["config"] == EVERYTHING["handler"]["config"]
    assert found["helper"] == "from the library"
    assert found["variables"] == {"ONE": "1", "TWO": "two words", "EMPTY": ""}
    assert (found["threads"], found["job"].api_name) == ("1", "every-key")
    said = [line["message"] for line in found["job"].log_lines() if "said at" in line["message"]]
    assert said == ["said at warning", "said at error"]


def test_the_smallest_configuration(project: Project) -> None:
    os.rename(project.path / "library/helper.py", project.path / "helper.py")  # the import path's default
    project.write({"name": "small", "handler": {"path": "code/handler.py"}, "kind": "BatchAPI"})
    found = project.found()
    assert found["config"] == {}
    assert found["devices"] is None
    said = [line["message"] for line in found["job"].log_lines() if "said at" in line["message"]]
    assert said == ["said at info", "said at warning", "said at error"]


def test_mem_is_the_handlers_limit(project: Project) -> None:
    project.change("compute", mem="300M")
    done = project.command("submit", config={"hog": 700}, max_attempts=1)
    assert done.exit_code == 3, done.output
    (failure,) = cx.Client().get_job("every-key", "latest").failures().to_dict("records")
    assert "memory" in failure["error"].lower()
    assert failure["payload"] == ["x"]


def test_networking_is_accepted_and_said_once(project: Project) -> None:
    for command in ("deploy", "submit"):
        done = project.command(command)
        assert done.exit_code == 0, done.output
        assert done.output.count("networking: nothing listens here") == 1
    done = CliRunner().invoke(main, ["submit", "every-key", "--job", "-"], input=json.dumps(ITEMS))
    assert done.exit_code == 0, done.output
    assert "networking" not in done.output


def test_what_belongs_to_tensorflow_serving_is_accepted_for_tensorflow(project: Project) -> None:
    handler = (project.path / "code/handler.py").read_text()
    (project.path / "code/handler.py").write_text(handler.replace("self, config", "self, tensorflow_client, config"))
    extra = {
        "server_side_batching": {"max_batch_size": 8, "batch_interval": "250ms"},
        "tensorflow_serving_image": "quay.io/cortexlabs/tensorflow-serving-gpu:0.35.0",
    }
    for models in (
        {"path": "s3://bucket/model", "signature_key": "predict"},
        {"paths": [{"name": "a", "path": "a"}, {"name": "b", "path": "b", "signature_key": "s"}]},
        {"dir": "s3://bucket/models/"},
    ):
        project.change("handler", type="tensorflow", models=models, **extra)
        done = project.command("submit", "--dry-run")
        assert done.exit_code == 0, done.output
    for key, value in {**extra, "models": {"path": "x"}}.items():
        project.change("handler", **{key: value})
        done = project.command("submit", "--dry-run")
        assert done.exit_code == 2
        assert f"the key {key} is for type: tensorflow only" in done.output


@pytest.mark.parametrize("mem", ["300K", "1M", "2.5G", "1T", "512Ki", "1Mi", "1.5Gi", "1Ti", 1073741824, "1e9"])
def test_quantities_of_memory(project: Project, mem: object) -> None:
    """Cortex writes K where Kubernetes writes k."""
    project.change("compute", mem=mem)
    done = project.command("submit", "--dry-run")
    assert done.exit_code == 0, done.output


@pytest.mark.parametrize("cpu", ["200m", "1", 1, 0.5, "1.5"])
def test_quantities_of_cpu(project: Project, cpu: object) -> None:
    project.change("compute", cpu=cpu)
    done = project.command("submit", "--dry-run")
    assert done.exit_code == 0, done.output


@pytest.mark.parametrize("command", ["deploy", "submit"])
@pytest.mark.parametrize(
    ("section", "keys", "line"),
    [
        ("handler", {"pyton_path": "x"}, "handler.pyton_path: unknown key; did you mean python_path?"),
        ("handler", {"dependencies": {"pip": 1}}, "handler.dependencies.pip: found 1; allowed is a path inside"),
        ("handler", {"log_level": "warn"}, "handler.log_level: found 'warn'; allowed is debug, info, warning or error"),
        ("handler", {"env": {"A": 1}}, "handler.env.A: found a value of type int; allowed is text"),
        ("handler", {"shm_size": "1 GB"}, "handler.shm_size: found '1 GB'; allowed is a quantity"),
        ("handler", {"type": "onnx"}, "handler.type: found 'onnx'; allowed is python or tensorflow"),
        ("compute", {"memory": "1Gi"}, "compute.memory: unknown key; did you mean mem?"),
        ("compute", {"gpu": -1}, "compute.gpu: found -1; allowed is a whole number from 0 on"),
        ("networking", {"end_point": "x"}, "networking.end_point: unknown key; did you mean endpoint?"),
    ],
)
def test_a_mistake_is_told_with_its_key_its_value_and_what_is_allowed(
    project: Project, command: str, section: str, keys: dict[str, Any], line: str
) -> None:
    project.change(section, **keys)
    done = project.command(command)
    assert done.exit_code == 2
    assert f"{project.path / 'cortex.yaml'}: {line}" in done.output
    assert not (project.folder / "store").exists()


@pytest.mark.parametrize("name", ["Every_Key", "-a", "a" * 64])
def test_a_name_is_a_dns_label(project: Project, name: str) -> None:
    project.write({**EVERYTHING, "name": name})
    done = project.command("deploy")
    assert done.exit_code == 2
    assert "letters, digits and dashes" in done.output


def test_a_file_may_hold_several_apis(project: Project) -> None:
    project.write(EVERYTHING, {**EVERYTHING, "name": "other", "networking": None})
    done = project.command("deploy")
    assert done.exit_code == 0, done.output
    assert [api["spec"]["name"] for api in cx.Client().list_apis()] == ["every-key", "other"]
    done = project.command("submit")
    assert done.exit_code == 2
    assert "every-key, other" in done.output
    done = project.command("submit", "--api", "other", "-o", "json")
    assert json.loads(done.stdout)["api_name"] == "other"
