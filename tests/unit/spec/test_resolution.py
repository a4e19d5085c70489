"""cortex.yaml and submissions: what is understood, and the sentences for what is not."""

from __future__ import annotations

import datetime
import importlib
import json
import os
import re
import subprocess
import sys
import textwrap
from decimal import Decimal
from pathlib import Path
from typing import Any

import cloudpickle
import numpy as np
import orjson
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cortex_dask.errors import HandlerError, InputError, ProjectError, SpecError
from cortex_dask.io.arrow.schema import decode_schema
from cortex_dask.io.job.settings import DeadLetterSettings, JobSettings, OutputSettings
from cortex_dask.spec.api import load_apis
from cortex_dask.spec.quantity import parse_bytes, parse_quantity
from cortex_dask.spec.resolution import deep_merge, resolve

HANDLER = "class Handler:\n    def __init__(self, config): ...\n    def handle_batch(self, payload): ...\n"
API = "- name: my-api\n  kind: BatchAPI\n  handler:\n    type: python\n    path: handler.py\n"


class MyHandler:
    def __init__(self, config: dict[str, Any]) -> None: ...

    def handle_batch(self, payload: Any) -> Any:
        return payload


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "project").mkdir()
    (tmp_path / "project" / "handler.py").write_text(HANDLER)
    return tmp_path / "project"


def configure(folder: Path, text: str = API) -> Path:
    (folder / "cortex.yaml").write_text(text)
    return folder


def complaint(folder: Path, text: str = API, **keys: Any) -> list[str]:
    """Return the lines of the error, without the file's name."""
    with pytest.raises(InputError) as caught:
        resolve(configure(folder, text), **{"input": "in", **keys})
    message = str(caught.value)
    assert "pydantic" not in message.lower()
    return [line.removeprefix(f"{folder / 'cortex.yaml'}: ") for line in message.splitlines()]


# quantities ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("200m", "0.2"), ("1", "1"), ("1.5", "1.5"), (".5", "0.5"), ("2.", "2"), (2, "2"), (0.1, "0.1"), ("+1", "1"),
        ("1k", "1e3"), ("1K", "1e3"), ("1M", "1e6"), ("1G", "1e9"), ("1T", "1e12"), ("1P", "1e15"), ("1E", "1e18"),
        ("1Ki", "1024"), ("1.5Mi", "1572864"), ("1Gi", "1073741824"), ("1Ti", "1099511627776"),
        ("1Pi", "1125899906842624"), ("1Ei", "1152921504606846976"), ("100n", "1e-7"), ("3u", "3e-6"),
        ("1e3", "1000"), ("1E3", "1000"), ("12e-1", "1.2"), ("1e+2", "100"), (" 1Gi ", "1073741824"), (1e22, "1e22"),
    ],
)  # fmt: skip
def test_quantities(text: str | float, value: str) -> None:
    assert parse_quantity(text) == Decimal(value)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "x",
        "1x",
        "1 Gi",
        "Gi",
        "1ki",
        "1kI",
        "1e",
        "1e3Ki",
        "--1",
        ".",
        True,
        None,
        [1],
        "1e999",
        "٣",
        "nan",
        float("inf"),
    ],
)
def test_no_quantities(text: object) -> None:
    with pytest.raises(ValueError, match=r"found .*; allowed is a quantity as Kubernetes writes it"):
        parse_quantity(text)


@given(st.integers(0, 10**30), st.sampled_from(["n", "u", "m", "", "k", "M", "G", "T", "P", "E"]))
def test_decimal_quantities_are_exact(number: int, suffix: str) -> None:
    power = {"n": -9, "u": -6, "m": -3, "": 0, "k": 3, "M": 6, "G": 9, "T": 12, "P": 15, "E": 18}[suffix]
    assert parse_quantity(f"{number}{suffix}") == Decimal(f"{number}e{power}")


def test_bytes_round_up() -> None:
    assert parse_bytes("1.5Gi") == 3 * 2**29
    assert parse_bytes("100m") == 1
    for nothing in ("0", "-1Gi", 0):
        with pytest.raises(ValueError, match="at least one byte"):
            parse_bytes(nothing)


# cortex.yaml --------------------------------------------------------------------------------------------------------


def test_every_key_of_the_contract(folder: Path) -> None:
    (folder / "requirements.txt").touch()
    (folder / "lib").mkdir()
    text = """
    - name: my-api
      kind: BatchAPI
      handler:
        type: tensorflow
        path: handler.py
        config: {threshold: 0.5, labels: {a: 1}}
        python_path: lib
        image: example.org/image:1
        env: {A: "1", B: text}
        log_level: debug
        shm_size: 1Gi
        dependencies: {pip: requirements.txt, conda: null}
        models:
          paths: [{name: a, path: "s3://bucket/a"}, {name: b, path: b, signature_key: c}]
          signature_key: serving_default
        server_side_batching: {max_batch_size: 32, batch_interval: 0.5s}
        tensorflow_serving_image: example.org/serving:2
      compute: {cpu: 500m, gpu: 1, inf: 2, mem: 1.5Gi, node_groups: [a, b]}
      networking: {endpoint: my-endpoint}
    """
    (folder / "handler.py").write_text(HANDLER.replace("config", "config, tensorflow_client"))
    resolved = resolve(configure(folder, textwrap.dedent(text)), input="in")
    settings = resolved.settings
    assert settings.api_name == "my-api"
    assert (settings.handler.type, settings.handler.python_path) == ("tensorflow", "lib")
    assert settings.handler.log_level == "debug"
    assert settings.handler.env == {"A": "1", "B": "text"}
    assert settings.config == {"threshold": 0.5, "labels": {"a": 1}}
    assert (settings.compute.cpu, settings.compute.gpu, settings.compute.memory) == (0.5, 1.0, 3 * 2**29)
    assert (settings.compute.inf, settings.compute.node_groups, settings.compute.shm) == (2, ("a", "b"), 2**30)
    assert settings.handler.image == "example.org/image:1"
    assert settings.handler.dependencies == {"pip": "requirements.txt"}
    assert settings.handler.models == {
        "paths": [{"name": "a", "path": "s3://bucket/a"}, {"name": "b", "path": "b", "signature_key": "c"}],
        "signature_key": "serving_default",
    }
    assert settings.handler.server_side_batching == {"max_batch_size": 32, "batch_interval": "0.5s"}
    assert settings.handler.tensorflow_serving_image == "example.org/serving:2"
    assert [warning for warning in resolved.warnings if "networking" in warning]
    assert JobSettings.from_json(orjson.loads(orjson.dumps(settings.to_json()))) == settings


@pytest.mark.parametrize(
    ("key", "line"),
    [
        (
            "    log_level: warn",
            "handler.log_level: found 'warn'; allowed is debug, info, warning or error; did you mean warning?",
        ),
        (
            "    dependencis: {}",
            "handler.dependencis: unknown key; did you mean dependencies? known keys are type, path, config,",
        ),
        (
            "    dependencies: {pip: 3}",
            "handler.dependencies.pip: found 3; allowed is a path inside the project directory, relative to it",
        ),
        (
            "    dependencies: {pipp: x}",
            "handler.dependencies.pipp: unknown key; did you mean pip? known keys are pip, conda, shell",
        ),
        (
            "    dependencies: {pip: ../x}",
            "handler.dependencies.pip: found '../x'; allowed is a path inside the project directory",
        ),
        ("    dependencies: {pip: reqs.txt}", "handler.dependencies.pip: there is no file reqs.txt in"),
        ("    python_path: nowhere", "handler.python_path: there is no folder nowhere in"),
        (
            "    env: {TOKEN: 12345}",
            "handler.env.TOKEN: found a value of type int; allowed is text; put numbers, true and false in quotes",
        ),
        ("    env: {A=B: x}", "handler.env: found the name 'A=B'"),
        ("    config: [1]", "handler.config: found a value of type list; allowed is a mapping"),
        ("    config: {a: {2: x}}", "handler.config.a: found the key 2; keys must be text, put it in quotes"),
        ("    config: {a: .nan}", "handler.config.a: found the number nan; allowed are text, finite numbers"),
        ("    models: {path: x}", "handler: the key models is for type: tensorflow only"),
        ("    shm_size: much", "handler.shm_size: found 'much'; allowed is a quantity as Kubernetes writes it"),
        ("  compute: {cpu: 2x}", "compute.cpu: found '2x'; allowed is a quantity as Kubernetes writes it"),
        ("  compute: {cpu: 0}", "compute.cpu: found 0; allowed is a quantity as Kubernetes writes it"),
        ("  compute: {mem: -1Gi}", "compute.mem: found '-1Gi'; at least one byte is needed"),
        *(
            (f"  compute: {{gpu: {found}}}", f"compute.gpu: found {found}; allowed is a whole number from 0 on, or the")
            for found in ("1.5", "-1", "0.3", "0.34", "true")
        ),
        ("  compute: {node_groups: [1]}", "compute.node_groups[0]: found 1; allowed is a list of names"),
        ("  compute: 3", "compute: found 3; allowed is a mapping"),
        ("  networking: {endpint: x}", "networking.endpint: unknown key; did you mean endpoint?"),
        ("  job: {batch_sise: 3}", "job.batch_sise: unknown key; did you mean batch_size? known keys are"),
        ("  job: {batch_size: 0}", "job.batch_size: found 0; allowed is a whole number from 1 on"),
        ("  job: {dataset: {batch_size: 0}}", "job.dataset.batch_size: found 0; allowed is a whole number from 1 on"),
        (
            "  job: {output: 3}",
            "job.output: found 3; allowed is a path or URL, or a mapping with at least the key path",
        ),
        (
            "  job: {output: {mode: apend}}",
            "job.output.mode: found 'apend'; allowed is error, append or overwrite; did you mean append?",
        ),
    ],
)
def test_mistakes_name_key_value_and_what_is_allowed(folder: Path, key: str, line: str) -> None:
    (found,) = complaint(folder, f"{API}{key}\n")
    assert line in found
    assert "12345" not in found


@pytest.mark.parametrize(
    ("said", "meant"), [("0.5", 0.5), ("0.25", 0.25), ("0.33", 1 / 3), ("0.1", 0.1), ("2", 2.0), ("1.0", 1.0)]
)
def test_a_worker_may_have_a_part_of_a_gpu(folder: Path, said: str, meant: float) -> None:
    settings = resolve(configure(folder, f"{API}  compute: {{gpu: {said}}}\n"), input="in").settings
    assert settings.compute.gpu == meant


def test_several_mistakes_are_listed_together(folder: Path) -> None:
    lines = complaint(folder, API + "    log_level: loud\n  compute: {gpu: -1, cpus: 2}\n  kindd: x\n")
    assert [line.split(":")[0] for line in lines] == ["handler.log_level", "compute.gpu", "compute.cpus", "kindd"]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("", "found nothing; a list of APIs is needed"),
        ("[]", "found nothing; a list of APIs is needed"),
        ("name: my-api\n", "found a mapping; a list of APIs is needed, put a dash before the first key"),
        ("hello\n", "found a value of type str; a list of APIs is needed"),
        ("- hello\n", "found 'hello'; allowed is a mapping"),
        ("- name: a\n", "handler: is missing; it must be a mapping with at least the key path"),
        ("- {name: a, handler: {}}\n", "handler.path: is missing; it must be a path inside the project directory"),
        ("- handler: {path: handler.py}\n", "name: is missing; it must be lower-case letters, digits and dashes"),
        ("- {name: My API, handler: {path: handler.py}}\n", "name: found 'My API'; allowed are at most 63 lower-case"),
        ("- {name: a-, handler: {path: handler.py}}\n", "with no dash at either end; a would do"),
        (API.replace("BatchAPI", "RealtimeAPI"), "it holds no API of the kind BatchAPI, the only one that runs here"),
        (API.replace("BatchAPI", "batchapi"), "kind: found 'batchapi'; allowed is BatchAPI; did you mean BatchAPI?"),
        (API.replace("BatchAPI", "Job"), "kind: found 'Job'; allowed is BatchAPI"),
        (API + API, "two APIs have the name 'my-api'; each needs its own"),
        (API.replace("python", "tensorflow"), "handler: type: tensorflow needs the key models"),
        (API.replace("handler.py", "handlr.py"), "handler.path: there is no file handlr.py in"),
        (
            API.replace("handler.py", "/etc/passwd"),
            "handler.path: found '/etc/passwd'; allowed is a path inside the project",
        ),
    ],
)
def test_mistakes_in_the_whole(folder: Path, text: str, line: str) -> None:
    assert line in complaint(folder, text)[0]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("- name: a\n  name: b\n", ":2: the key 'name' stands twice, already in line 1"),
        ("- name: a\n  handler:\n    env:\n      A: x\n      A: y\n", ":5: the key 'A' stands twice"),
        ("- name: a\n\tb: c\n", ":2: this is no YAML: "),
        ("- name: [a\n", "this is no YAML: "),
        ("- !!python/object/apply:os.system [exit]\n", "this is no YAML: could not determine a constructor"),
        ("- a: 1\n---\n- b: 1\n", "this is no YAML: "),
        ("- name: 2001-99-99\n", "this is no YAML: "),
    ],
)
def test_what_is_no_yaml(folder: Path, text: str, words: str) -> None:
    (folder / "cortex.yaml").write_text(text)
    with pytest.raises(SpecError, match=re.escape(words)):
        load_apis(folder / "cortex.yaml")


def test_files_that_cannot_be_read(folder: Path) -> None:
    with pytest.raises(SpecError, match=r"cannot be read: No such file"):
        load_apis(folder / "cortex.yaml")
    (folder / "cortex.yaml").write_bytes(b"- name: a\n  x: \xff\n")
    with pytest.raises(SpecError, match=r"cortex\.yaml:2: the file is not UTF-8 text"):
        load_apis(folder / "cortex.yaml")


def test_merge_keys_and_nulls(folder: Path) -> None:
    text = "- &one {name: one, handler: {path: handler.py}, compute: {cpu: null, mem: null}, networking: null}\n"
    text += "- <<: *one\n  name: two\n"
    one, two = load_apis(configure(folder, text) / "cortex.yaml")
    assert (one.name, two.name) == ("one", "two")
    assert one.compute.memory() is None


def test_several_apis(folder: Path) -> None:
    other = API.replace("my-api", "other")
    realtime = API.replace("my-api", "web").replace("BatchAPI", "RealtimeAPI") + "  autoscaling: {min_replicas: 1}\n"
    configure(folder, API + other + realtime)
    assert [api.name for api in load_apis(folder / "cortex.yaml")] == ["my-api", "other"]
    assert resolve(folder, input="in", api="other").settings.api_name == "other"
    with pytest.raises(SpecError, match=r"has 2 APIs; say which one with api: my-api, other"):
        resolve(folder, input="in")
    with pytest.raises(SpecError, match=r"has no API 'othr'; did you mean other\? it has my-api, other"):
        resolve(folder, input="in", api="othr")


# the target ---------------------------------------------------------------------------------------------------------


def test_targets(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    configure(folder)
    monkeypatch.chdir(tmp_path)
    for target in (folder, str(folder), folder / "cortex.yaml", "project", "project/cortex.yaml"):
        resolved = resolve(target, input="in")
        assert resolved.archive is not None
        assert resolved.settings.handler.project == resolved.archive.hash
        assert [file.name for file in resolved.archive.files] == ["handler.py"]
    assert resolve(folder, input="in").settings.api_id == resolve(folder, input="other", workers=7).settings.api_id


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("projet", "the target projet does not exist; did you mean project?"),
        (
            ".",
            "the directory . holds no cortex.yaml; name the configuration file, or make a project with",
        ),
        ("project/handler.py", "is Python code; give the project directory, or its cortex.yaml"),
        ("s3://bucket/project", "is a URL; a project directory on this machine is needed"),
        (
            3,
            "the target is a value of type int; allowed are a handler class (not an instance of it)",
        ),
    ],
)
def test_targets_that_are_none(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: Any, words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SpecError, match=re.escape(words)):
        resolve(target, input="in")


def test_the_handlers_source_is_checked_but_not_run(folder: Path) -> None:
    (folder / "handler.py").write_text("import no_such_module\n" + HANDLER)
    resolve(configure(folder), input="in")
    (folder / "handler.py").write_text(HANDLER.replace("payload", "batch"))
    with pytest.raises(HandlerError, match=r"handler\.py:3: handle_batch has the unknown argument batch"):
        resolve(folder, input="in")
    (folder / "handler.py").write_bytes(b"# coding: latin-1\nx = '\xe9'\n" + HANDLER.encode())
    resolve(folder, input="in")
    (folder / "handler.py").write_bytes(b"x = '\xe9'\n" + HANDLER.encode())
    with pytest.raises(HandlerError, match=r"handler\.py: cannot be read as Python"):
        resolve(folder, input="in")


def test_a_handler_that_is_ignored(folder: Path) -> None:
    (folder / ".cortexignore").write_text("*.py\n")
    with pytest.raises(ProjectError, match=r"handler\.path: handler\.py is left out .*\.cortexignore:1: \*\.py"):
        resolve(configure(folder), input="in")


def test_a_class(tmp_path: Path) -> None:
    resolved = resolve(MyHandler, input="in", output="out", batch_size=7)
    handler = resolved.settings.handler
    assert resolved.settings.api_name == "my-handler"
    assert (handler.kind, handler.cwd, handler.project) == ("class", str(Path.cwd()), None)
    assert set(sys.path) - {""} <= set(handler.sys_path)
    assert resolved.archive is None
    assert resolved.pickled
    assert resolve(MyHandler, input="in", name="other").settings.api_name == "other"
    with pytest.raises(SpecError, match=r"name: found 'No Label'; allowed are .* no-label would do"):
        resolve(MyHandler, input="in", name="No Label")
    assert repr(resolved.pickled) not in repr(resolved)


def test_a_class_with_a_wrong_signature() -> None:
    class Wrong:
        def __init__(self) -> None: ...

    with pytest.raises(HandlerError, match="__init__ lacks the argument config"):
        resolve(Wrong, input="in")


def test_a_class_that_cannot_be_pickled() -> None:
    import threading

    lock = threading.Lock()

    class Locked:
        def __init__(self, config: object) -> None:
            self.lock = lock

        def handle_batch(self, payload: object) -> None: ...

    with pytest.raises(HandlerError, match=r"Locked cannot be sent to the workers: TypeError: .*lock.* in __init__"):
        resolve(Locked, input="in")


def test_a_class_of_a_local_module_travels_by_value(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process that loads it has neither the module nor its helpers."""
    (tmp_path / "local_helper.py").write_text("FACTOR = 2\ndef scale(x):\n    return x * FACTOR\n")
    (tmp_path / "local_base.py").write_text(
        "class Base:\n    def handle_batch(self, payload):\n        return self.scale(payload)\n"
    )
    (tmp_path / "local_handler.py").write_text(
        "import local_helper\nfrom local_base import Base\nclass Handler(Base):\n    def __init__(self, config): ...\n"
        "    def scale(self, x):\n        return local_helper.scale(x)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    module = importlib.import_module("local_handler")
    try:
        pickled = resolve(module.Handler, input="in").pickled
        assert cloudpickle.list_registry_pickle_by_value() == set()
    finally:
        for name in ("local_handler", "local_helper", "local_base"):
            sys.modules.pop(name, None)
    assert pickled is not None
    code = "import sys, cloudpickle\nh = cloudpickle.loads(sys.stdin.buffer.read())({})\nprint(h.handle_batch(21))"
    done = subprocess.run([sys.executable, "-c", code], input=pickled, capture_output=True, check=True, timeout=60)
    assert done.stdout.strip() == b"42"


# the submission -----------------------------------------------------------------------------------------------------


def test_defaults() -> None:
    settings = resolve(MyHandler, input="in").settings
    assert settings.dataset.batch_size == 1024
    assert settings.batch_format == "pandas"
    assert settings.output is None
    assert settings.limits.max_attempts == 3
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    assert settings.workers == cpus
    assert re.fullmatch(r"\d{8}-\d{6}-[0-9a-f]{6}", settings.job_id)
    assert datetime.datetime.fromisoformat(settings.created_time).tzinfo is not None


def test_keywords(tmp_path: Path) -> None:
    settings = resolve(
        MyHandler,
        input=["s3://bucket/in/", tmp_path / "a*.parquet"],
        output=tmp_path / "out",
        format="parquet",
        batch_size=np.int64(10),
        batch_format="numpy",
        columns=("a", "b"),
        filters=[("a", ">", 5), ("b", "in", {1, 2})],
        keep=["a"],
        mode="append",
        workers=3,
        config={"when": datetime.date(2026, 1, 2), "where": Path("x"), "n": np.float64(0.5), "t": (1, 2)},
        timeout=60,
        batch_timeout=0.5,
        stall_timeout=2,
        max_attempts=5,
        max_failed_batches="5%",
        job_id="my-job.1",
    ).settings
    assert settings.dataset.paths == ("s3://bucket/in/", str(tmp_path / "a*.parquet"))
    assert settings.dataset.columns == ("a", "b")
    assert settings.dataset.filters == [[["a", ">", 5], ["b", "in", [1, 2]]]]
    assert settings.dataset.batch_size == 10
    assert type(settings.dataset.batch_size) is int
    assert settings.output == OutputSettings(str(tmp_path / "out"), keep=("a",), mode="append")
    assert settings.config == settings.job_config == {"when": "2026-01-02", "where": "x", "n": 0.5, "t": [1, 2]}
    assert (settings.limits.timeout, settings.limits.batch_timeout, settings.limits.stall_timeout) == (60, 0.5, 2)
    assert (settings.limits.max_attempts, settings.limits.max_failed_batches) == (5, 0.05)
    assert (settings.job_id, settings.workers) == ("my-job.1", 3)
    assert JobSettings.from_json(json.loads(orjson.dumps(settings.to_json()))) == settings


def test_defaults_of_the_api_and_what_overrides_them(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    text = API + textwrap.indent(
        textwrap.dedent(
            """\
            job:
              input: data/
              output: {path: predictions, keep: true, mode: overwrite}
              batch_size: 32
              batch_format: records
              workers: 2
              config: {a: {b: 1, c: 2}, d: [1]}
            """
        ),
        "  ",
    ).replace("  job:", "    config: {a: {b: 0, z: 9}}\n  job:")
    configure(folder, text)
    settings = resolve(folder).settings
    assert settings.dataset.paths == (f"{folder}/data/",)
    assert settings.output == OutputSettings(f"{folder}/predictions", keep=True, mode="overwrite")
    assert (settings.dataset.batch_size, settings.batch_format, settings.workers) == (32, "records", 2)
    assert settings.config == {"a": {"b": 1, "c": 2, "z": 9}, "d": [1]}
    settings = resolve(
        folder, input="in/", output="out", keep=False, batch_size=8, config={"a": {"c": 3}, "d": [2]}
    ).settings
    assert settings.dataset.paths == (f"{tmp_path}/in/",)
    assert settings.output == OutputSettings(f"{tmp_path}/out", keep=False, mode="overwrite")
    assert (settings.dataset.batch_size, settings.batch_format) == (8, "records")
    assert settings.config == {"a": {"b": 1, "c": 3, "z": 9}, "d": [2]}
    assert settings.job_config == {"a": {"b": 1, "c": 3}, "d": [2]}


@pytest.mark.parametrize(
    ("keys", "line"),
    [
        ({"batch_size": 0}, "batch_size: found 0; allowed is a whole number from 1 on"),
        ({"batch_size": -5}, "batch_size: found -5; allowed is a whole number from 1 on"),
        ({"batch_size": True}, "batch_size: found true; allowed is a whole number from 1 on"),
        ({"batch_size": "100"}, "batch_size: found '100'; allowed is a whole number from 1 on"),
        ({"batch_size": 1.5}, "batch_size: found 1.5; allowed is a whole number from 1 on"),
        ({"workers": 0}, "workers: found 0; allowed is a whole number from 1 on"),
        (
            {"batch_format": "panda"},
            "batch_format: found 'panda'; allowed is pandas, pyarrow, polars, numpy or records; did you mean pandas?",
        ),
        ({"batch_siez": 1}, "batch_siez: unknown key; did you mean batch_size? known keys are"),
        ({"columns": "a"}, "columns: found 'a'; allowed is a list of column names"),
        ({"columns": ["a", "a"]}, "columns: found the column 'a' twice"),
        ({"keep": "all"}, "keep: found 'all'; allowed is true, false or a list of column names"),
        ({"filters": [("a", "~", 1)]}, "filters: filter ('a', '~', 1) has the unknown operator '~'"),
        ({"timeout": 0}, "timeout: found 0; allowed is a number of seconds from 1 on"),
        ({"timeout": "1h"}, "timeout: found '1h'; allowed is a number of seconds from 1 on"),
        ({"batch_timeout": 0}, "batch_timeout: found 0; allowed is a number of seconds above 0"),
        ({"stall_timeout": float("nan")}, "stall_timeout: found nan; allowed is a number of seconds above 0"),
        ({"max_attempts": 0}, "max_attempts: found 0; allowed is a whole number from 1 on"),
        (
            {"max_failed_batches": 1.5},
            "max_failed_batches: found 1.5; allowed is a whole number of batches (10) or a share",
        ),
        (
            {"max_failed_batches": "100%"},
            "max_failed_batches: found '100%'; allowed is a whole number of batches (10) or a share",
        ),
        ({"max_failed_batches": -1}, "max_failed_batches: found -1; allowed is"),
        ({"job_id": "../x"}, "job_id: found '../x'; allowed are at most 100 letters, digits"),
        ({"input": 3}, "input: found 3; allowed is a path or URL, or a list of them"),
        ({"input": []}, "input: found []; allowed is a path or URL, or a list of them"),
        ({"input": ["a", ""]}, "input: found ''; allowed is a path or URL"),
        ({"output": {"pth": "x"}}, "output.pth: unknown key; did you mean path?"),
        ({"output": {"format": "json"}}, "output: is missing, but format speak of it; name a directory"),
        ({"output": {"path": "x", "format": "csv"}}, "output.format: found 'csv'; allowed is parquet or json"),
        (
            {"output": {"path": "x", "format": "json", "compression": "zstd"}},
            "output.compression: found 'zstd'; allowed for json is none or gzip",
        ),
        (
            {"output": {"path": "x", "schema": {"a": "int63"}}},
            "output.schema: the type 'int63' of column 'a' is unknown",
        ),
        ({"output": {"path": "x", "schema": {"a": 3}}}, "output.schema: the type of 'a' is 3; a type is text"),
        ({"output": {"path": "x", "keep": True}, "keep": True}, "keep and output.keep mean the same; give one of them"),
        ({"dataset": {"paths": "x"}}, "input and dataset.paths mean the same; give one of them"),
        ({"config": [1]}, "config: found a value of type list; allowed is a mapping"),
        (
            {"config": {"a": {"b": object()}}},
            "config.a.b: found a value of type object; allowed are text, finite numbers",
        ),
        ({"config": {"a": [2**64]}}, "config.a[0]: found the number 18446744073709551616; allowed are"),
        (
            {"dead_letter": {"path": "x"}},
            "dead_letter.max_receive_count: is missing; it must be a whole number from 1 on",
        ),
        (
            {"sqs_dead_letter_queue": {"arn": "x", "max_receive_count": 1}},
            "sqs_dead_letter_queue.arn: found 'x'; allowed is the ARN",
        ),
        (
            {"item_list": {"items": [1], "batch_size": 1}},
            "found the input kinds dataset and item_list; exactly one is allowed",
        ),
    ],
)
def test_mistakes_in_a_submission(keys: dict[str, Any], line: str) -> None:
    with pytest.raises(SpecError) as caught:
        resolve(MyHandler, **{"input": "in", **keys})
    (found,) = str(caught.value).splitlines()
    assert found.startswith(line)


def test_no_input(folder: Path) -> None:
    with pytest.raises(SpecError, match=r"^input: is missing; name the files"):
        resolve(MyHandler)
    with pytest.raises(SpecError, match=r"^input: is missing \(or job: input in cortex\.yaml\)"):
        resolve(configure(folder))


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        (
            {"item_list": {"items": [1, {"a": float("nan")}], "batch_size": 1}},
            "item_list.items[1].a: found the number nan; allowed are JSON values",
        ),
        ({"item_list": {"items": [1]}, "input": "in"}, "found the input kinds dataset and item_list; exactly one"),
        (
            {"item_list": {"items": [1]}, "columns": ["a"]},
            "columns: only a dataset has this key, and the input is item_",
        ),
        ({"item_list": {"items": []}}, "item_list.items: found []; allowed is a list of at least one JSON value"),
        ({"item_list": {"items": [1]}}, "item_list.batch_size: is missing"),
        (
            {"file_path_lister": {"s3_paths": ["s3://b/x"], "includes": ["**.jpg", "[a"], "batch_size": 1}},
            "file_path_lister.includes[1]: the pattern '[a' has a [ at character 1 that no ] closes; write \\[",
        ),
        (
            {"file_path_lister": {"s3_paths": "a", "batch_size": 1}, "output": {"path": "o", "keep": True}},
            "output.keep: the samples are paths, which have no columns to keep",
        ),
        (
            {"item_list": {"items": [{"a": 1}, 2], "batch_size": 1}, "output": {"path": "o", "keep": ["a"]}},
            "output.keep: the items are not all mappings",
        ),
        ({"delimited_files": {"batch_size": 1}}, "delimited_files.s3_paths: is missing"),
        ({"delimited_files": {"s3_paths": "a", "paths": "b"}}, "delimited_files: paths and s3_paths mean the same"),
        (
            {"file_path_lister": {"s3_paths": "a", "include": []}},
            "file_path_lister.include: unknown key; did you mean includes?",
        ),
    ],
)
def test_the_input_kinds_of_cortex_are_checked(keys: dict[str, Any], words: str) -> None:
    with pytest.raises(SpecError, match=re.escape(words)):
        resolve(MyHandler, **keys)


def test_a_declared_schema() -> None:
    for schema in ({"a": "int64", "b": "list<string>"}, pa.schema({"a": pa.int64(), "b": pa.list_(pa.string())})):
        output = resolve(MyHandler, input="in", output={"path": "out", "schema": schema}).settings.output
        assert output is not None
        assert output.schema is not None
        assert decode_schema(output.schema).types == [pa.int64(), pa.list_(pa.string())]


def test_dead_letters_decide_the_attempts() -> None:
    queue = {"arn": "arn:aws:sqs:us-east-1:123456789012:dead.fifo", "max_receive_count": 4}
    settings = resolve(MyHandler, input="in", sqs_dead_letter_queue=queue).settings
    assert settings.limits.max_attempts == 4
    assert settings.dead_letters == DeadLetterSettings(4, queue_arn=queue["arn"])
    with pytest.raises(SpecError, match=r"max_attempts: found 2, but dead_letter\.max_receive_count is 3"):
        resolve(MyHandler, input="in", max_attempts=2, dead_letter={"path": "x", "max_receive_count": 3})


def test_relative_paths_and_homes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/someone")
    paths = ["a/../b/", "./c", "~/d", "/e//f", "s3://bucket/../x", "zip://x::file://y", "."]
    found = resolve(MyHandler, input=paths).settings.dataset.paths
    assert found == (
        f"{tmp_path}/b/", f"{tmp_path}/c", "/home/someone/d", "/e/f", "s3://bucket/../x", "zip://x::file://y",
        str(tmp_path),
    )  # fmt: skip


def test_passwords_in_urls_are_not_shown() -> None:
    with pytest.raises(SpecError) as caught:
        resolve(MyHandler, input="in", output={"path": "out", "mode": "https://me:hunter2@host/x"})
    assert "hunter2" not in str(caught.value)
    assert "https://…@host/x" in str(caught.value)


@given(
    st.recursive(
        st.integers() | st.text(), lambda inner: st.dictionaries(st.text(max_size=2), inner, max_size=3), max_leaves=8
    )
)
def test_deep_merge_with_itself_changes_nothing(value: Any) -> None:
    base = {"key": value}
    assert deep_merge(base, base) == base
    assert deep_merge({}, base) == deep_merge(base, {}) == base
