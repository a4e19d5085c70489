"""Environments, each test in a process of its own: Dask reads its configuration when it is imported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PRELUDE = (
    "import json, dataclasses\nfrom cortex_dask import environments as e\nfrom cortex_dask.errors import SpecError\n"
    "def show(x):\n    print(json.dumps([dataclasses.astuple(i)[:4] for i in (x if isinstance(x, list) else [x])]))\n"
    "def fails(call):\n"
    "    try:\n        call()\n    except SpecError as error:\n        print(json.dumps(str(error)))\n"
    "    else:\n        print('null')\n"
)


@pytest.fixture
def run(tmp_path: Path):
    """Return a function that runs lines of Python with a fresh home, and returns what they print as JSON."""

    def call(code: str, **variables: str) -> list:
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("DASK_", "XDG_"))}
        environment |= {"HOME": str(tmp_path), "DASK_CONFIG": str(tmp_path / "dask"), **variables}
        command = [sys.executable, "-W", "error", "-c", PRELUDE + code]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        return [json.loads(line) for line in done.stdout.splitlines()]

    return call


def data_folder(home: Path) -> str:
    return str(home / ("Library/Application Support" if sys.platform == "darwin" else ".local/share") / "cortex-dask")


def test_local_is_always_there(run, tmp_path: Path) -> None:
    assert (
        run("show(e.current()); show(e.list_all()); show(e.current('local'))")
        == [[["local", data_folder(tmp_path), "local", True]]] * 3
    )
    assert run("show(e.current())", XDG_DATA_HOME=str(tmp_path / "x"))[0][0][1] == str(tmp_path / "x" / "cortex-dask")
    assert not (tmp_path / "dask").exists()


def test_configure_and_all_the_others(run, tmp_path: Path) -> None:
    file = tmp_path / "dask" / "cortex-dask.yaml"
    first = run(
        "show(e.configure('prod', 's3://b/c', cluster='tcp://x:1')); show(e.set_default('prod')); show(e.current())"
    )
    assert first == [
        [["prod", "s3://b/c", "tcp://x:1", False]],
        [["prod", "s3://b/c", "tcp://x:1", True]],
        [["prod", "s3://b/c", "tcp://x:1", True]],
    ]
    assert run("show(e.current())") == [[["prod", "s3://b/c", "tcp://x:1", True]]]  # another process
    assert run("show(e.configure('prod', 's3://d')); show(e.list_all())")[0] == [["prod", "s3://d", "tcp://x:1", True]]
    assert run("show(e.rename('prod', 'main')); show(e.current())") == [[["main", "s3://d", "tcp://x:1", True]]] * 2
    names = run("e.configure('b', 'x'); show(e.list_all())")[0]
    assert [(name, default) for name, _, _, default in names] == [("local", False), ("b", False), ("main", True)]
    assert names[1][1] == str(Path.cwd() / "x")
    assert run("e.delete('main'); show(e.current())") == [[["local", data_folder(tmp_path), "local", True]]]
    assert file.read_text().startswith("cortex-dask:")
    assert [path.name for path in file.parent.iterdir()] == ["cortex-dask.yaml"]


def test_other_keys_of_the_file_stay(run, tmp_path: Path) -> None:
    (tmp_path / "dask").mkdir()
    (tmp_path / "dask" / "cortex-dask.yaml").write_text("cortex_dask: {cache: /c}\nother: {a: 1}\n")
    run("e.configure('prod', 's3://b')")
    text = (tmp_path / "dask" / "cortex-dask.yaml").read_text()
    assert "cache: /c" in text
    assert "a: 1" in text
    assert text.count("cortex") == 1


def test_how_a_cluster_is_made_stays_with_its_environment(run, tmp_path: Path) -> None:
    made = run(
        "e.configure('prod', 's3://b', cluster='kubernetes', cluster_options={'namespace': 'n'})\n"
        "print(json.dumps(e.configure('prod', 's3://c').cluster_options))"
    )
    assert made == [{"namespace": "n"}]
    variables = {"DASK_CORTEX_DASK__ENVIRONMENTS__PROD__CLUSTER_OPTIONS__NAMESPACE": "other"}
    assert run("print(json.dumps(e.current('prod').cluster_options))", **variables) == [{"namespace": "other"}]
    (file,) = (tmp_path / "dask").iterdir()
    file.write_text(file.read_text().replace("namespace: n", "").replace("cluster_options:", "cluster_options: [1]"))
    assert "has the cluster_options" in run("fails(lambda: e.current('prod'))")[0]


def test_variables(run) -> None:
    variables = {
        "DASK_CORTEX_DASK__DEFAULT": "my-env",
        "DASK_CORTEX_DASK__ENVIRONMENTS__MY_ENV__STORE": "s3://a/b",
        "DASK_CORTEX_DASK__ENVIRONMENTS__MY_ENV__CLUSTER": "tcp://y:2",
    }
    (found,) = run("show(e.current())", **variables)
    assert found[0][1:] == ["s3://a/b", "tcp://y:2", True]
    (found,) = run("show(e.current())", DASK_CORTEX_DASK__STORE="/s", DASK_CORTEX_DASK__CLUSTER="inline")
    assert found == [["local", "/s", "inline", True]]
    (found,) = run("fails(lambda: e.delete('my-env'))", **variables)
    assert "does not stand in" in found
    changed = run("e.configure('other', 's3://o'); show(e.current())", **variables)
    assert changed[0][0][1] == "s3://a/b"


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (
            "e.current('prd')",
            "the environment 'prd' does not exist; did you mean prod? known are local, prod; make one with: ",
        ),
        ("e.delete('local')", "the environment local is always there, so it cannot be renamed or deleted"),
        ("e.rename('local', 'x')", "the environment local is always there"),
        ("e.rename('prod', 'local')", "there is an environment local already"),
        ("e.rename('prod', 'a b')", "the environment's name 'a b' cannot be used"),
        ("e.set_default('prd')", "the environment 'prd' does not exist"),
        ("e.configure('a/b', 's3://x')", "the environment's name 'a/b' cannot be used"),
        ("e.configure('a', ' ')", "the environment's store is empty"),
    ],
)
def test_mistakes(run, call: str, words: str) -> None:
    assert words in run(f"e.configure('prod', 's3://b'); fails(lambda: {call})")[0]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "cortex-dask: {default: gone}",
            "the default environment 'gone', as Dask's configuration names it, does not exist",
        ),
        ("cortex-dask: {default: a, environments: {a: 3}}", "environments.a in Dask's configuration is 3; a mapping"),
        (
            "cortex-dask: {default: a, environments: {a: {stroe: x}}}",
            "has the unknown key 'stroe'; did you mean store?",
        ),
        ("cortex-dask: {default: a, environments: {a: {}}}", "has the store nothing; a path or URL is needed"),
        ("cortex-dask: {environments: [a]}", "environments in Dask's configuration is ['a']; a mapping is needed"),
        ("cortex-dask: [a]", "cortex-dask in Dask's configuration is ['a']; a mapping is needed"),
    ],
)
def test_a_configuration_that_cannot_be_used(run, tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "dask").mkdir()
    (tmp_path / "dask" / "x.yaml").write_text(text)
    assert words in run("fails(e.current)")[0]


def test_a_configuration_that_cannot_be_written(run, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (found,) = run("fails(lambda: e.configure('prod', 's3://b'))", DASK_CONFIG=str(tmp_path / "file" / "dask"))
    assert "cortex-dask.yaml cannot be written: Not a directory" in found


def test_dask_is_not_imported_with_the_module() -> None:
    code = (
        "import sys, cortex_dask.environments; heavy = {'dask', 'pydantic'} & set(sys.modules); assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
