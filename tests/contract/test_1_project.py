"""CONTRACT 1, the project directory: each sentence through a job of a project that Cortex would run unchanged."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dask.config
import pytest

import cortex_dask as cx
from cortex_dask.errors import InputError, JobFailedError
from cortex_dask.job import Job
from cortex_dask.runtime.worker.virtual_environment import find_uv
from tests.support.packages import write_wheel

SECRET = "s3cr3t-of-the-dotenv-file"

#: Every batch returns one row: what the handler found, as JSON.
HANDLER = """\
import hashlib
import json
import os
import sys

import my_module
from package.inner import INNER


class Handler:
    def __init__(self, config):
        with open("values.json") as file:
            self.values = json.load(file)

    def handle_batch(self, payload):
        found = {
            "values in __init__": self.values,
            "values in handle_batch": json.load(open("values.json")),
            "module": my_module.NAME,
            "inner": INNER,
            "cwd": os.getcwd(),
            "files": sorted(
                os.path.relpath(os.path.join(folder, name))
                for folder, _, names in os.walk(".") if "__pycache__" not in folder for name in names
            ),
            "linked": open("linked.txt").read(),
            "is link": os.path.islink("linked.txt"),
            "variables": {name: os.environ.get(name) for name in ("PLAIN", "QUOTED", "FROM_YAML", "BOTH")},
            "secret": hashlib.sha256(os.environ["TOKEN"].encode()).hexdigest(),
            "python": sys.executable,
        }
        if "fail" in payload:
            raise ValueError("a batch that fails")
        return [{"found": json.dumps(found)}]
"""

CORTEX_YAML = """\
- name: contract
  kind: BatchAPI
  handler:
    type: python
    path: handler.py
    env: {FROM_YAML: "1", BOTH: yaml}
"""

FILES = {
    "cortex.yaml": CORTEX_YAML,
    "handler.py": HANDLER,
    "values.json": '{"a": [1, 2]}',
    "my_module.py": "NAME = 'mine'\n",
    "package/__init__.py": "",
    "package/inner.py": "INNER = 'inside'\n",
    "package/cortex.yaml": "another one\n",
    "data/kept.csv": "",
    "data/keep.log": "",
    ".env": f"# settings\nPLAIN=1\nQUOTED='two words'\nBOTH=dotenv\nTOKEN={SECRET}\n",
    ".hidden": "",
    ".git/config": "",
    "package/.hidden/file": "",
    "stale.pyc": "",
    "package/old.pyo": "",
    "package/native.pyd": "",
    "data/__pycache__/x.txt": "",
    "data/dropped.log": "",
    "notes/a/b/draft.md": "",
    "back#slash": "",
    ".cortexignore": "*.log\n!data/keep.log\nnotes/**/draft.md\nbuild/\n/top.txt\n\\#literal\n",
    "build/out.o": "",
    "top.txt": "",
    "package/top.txt": "",
    "#literal": "",
}

PACKED = [
    ".env",
    "back#slash",
    "data/keep.log",
    "data/kept.csv",
    "handler.py",
    "linked.txt",
    "my_module.py",
    "package/__init__.py",
    "package/cortex.yaml",
    "package/inner.py",
    "package/top.txt",
    "values.json",
]


def write(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with an environment: a store and a cache."""
    folder = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DASK_CORTEX_DASK__STORE", str(folder / "store"))
        patch.setenv("DASK_CORTEX_DASK__CACHE", str(folder / "cache"))
        patch.setenv("PYTHONPATH", str(Path(cx.__file__).parents[1]), prepend=os.pathsep)
        with dask.config.set({"cortex-dask.store": str(folder / "store")}):
            yield folder


@pytest.fixture(scope="module")
def project(home: Path) -> Path:
    folder = write(home / "project", FILES)
    (folder / "linked.txt").symlink_to("data/kept.csv")
    (folder / "data" / "kept.csv").write_text("a,b\n")
    return folder


def cli(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run the command line as a user does."""
    command = [sys.executable, "-m", "cortex_dask", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def items(*values: object) -> dict[str, Any]:
    return {"item_list": {"items": list(values), "batch_size": 1}, "workers": 1}


def run(project: Path, output: Path, *values: object) -> dict[str, Any]:
    """Run a job with one batch, and return what its handler found."""
    job = cx.run(project, output=str(output), progress=False, **items(*(values or ("x",))))
    return dict(json.loads(job.to_arrow()["found"][0].as_py()))


@pytest.fixture(scope="module")
def found(home: Path, project: Path) -> dict[str, Any]:
    """What the handler of an ordinary project finds around it."""
    return run(project, home / "out")


# files --------------------------------------------------------------------------------------------------------------


def test_open_works_in_init_and_in_handle_batch(found: dict[str, Any]) -> None:
    assert found["values in __init__"] == found["values in handle_batch"] == {"a": [1, 2]}


def test_the_working_directory_is_the_project_directory(found: dict[str, Any], home: Path) -> None:
    assert Path(found["cwd"]).parent == home / "cache" / "projects"


def test_modules_beside_the_handler_can_be_imported(found: dict[str, Any]) -> None:
    assert (found["module"], found["inner"]) == ("mine", "inside")


def test_every_file_is_there_but_those_left_out(found: dict[str, Any]) -> None:
    assert found["files"] == PACKED


def test_links_inside_the_project_work(found: dict[str, Any]) -> None:
    assert (found["linked"], found["is link"]) == ("a,b\n", True)


def test_a_dry_run_shows_what_is_packed_and_what_is_left_out_and_why(project: Path, home: Path) -> None:
    (home / "job.json").write_text(json.dumps(items("x")))
    done = cli("submit", project, "--job", home / "job.json", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert f"project  {len(PACKED)} files" in done.stdout
    lines = [" ".join(line.split()) for line in done.stdout.splitlines()]
    for line in (
        "package/inner.py 17 B",
        ".git/ hidden",
        "stale.pyc Python bytecode",
        "cortex.yaml the API configuration",
        "data/dropped.log .cortexignore:1: *.log",
        "notes/a/b/draft.md .cortexignore:3: notes/**/draft.md",
        "build/ .cortexignore:4: build/",
        "top.txt .cortexignore:5: /top.txt",
        "#literal .cortexignore:6: \\#literal",
    ):
        assert line in lines
    assert SECRET not in done.stdout + done.stderr


def test_a_link_that_leaves_the_project_is_refused(home: Path) -> None:
    folder = write(home / "leaving", {"cortex.yaml": CORTEX_YAML, "handler.py": HANDLER})
    (folder / "models").symlink_to(home)
    with pytest.raises(InputError, match=r"the link models in the project .* leaves the project: it points to"):
        cx.run(folder, progress=False, **items("x"))


def test_a_project_over_the_size_limit_is_refused(home: Path) -> None:
    folder = write(home / "large", {"cortex.yaml": CORTEX_YAML, "handler.py": HANDLER})
    for number in range(11):
        with (folder / f"model-{number:02}.bin").open("wb") as file:
            file.truncate(3 * 2**20 + number)  # sparse
    (home / "job.json").write_text(json.dumps(items("x")))
    done = cli("submit", folder, "--job", home / "job.json")
    assert done.returncode == 2
    assert "has 33.0 MiB in 12 files, and at most 32.0 MiB are allowed" in done.stderr
    assert ".cortexignore" in done.stderr
    assert [f"model-{number:02}.bin" in done.stderr for number in range(11)] == [False, *[True] * 10]
    (folder / ".cortexignore").write_text("model-0[1-9].bin\n")
    done = cli("submit", folder, "--job", home / "job.json", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stdout
    (folder / ".cortexignore").write_text("model-0[1-7].bin\n")
    done = cli("submit", folder, "--job", home / "job.json", "--dry-run")
    assert "warning: the project has 12.0 MiB (at most 32.0 MiB are allowed)" in done.stdout


# .env ---------------------------------------------------------------------------------------------------------------


def test_dotenv_is_exported_to_the_handler(found: dict[str, Any]) -> None:
    assert found["variables"] == {"PLAIN": "1", "QUOTED": "two words", "FROM_YAML": "1", "BOTH": "dotenv"}
    assert found["secret"] == hashlib.sha256(SECRET.encode()).hexdigest()


def test_the_values_of_dotenv_appear_nowhere(home: Path, project: Path) -> None:
    """A job that fails, to have errors, tracebacks and dead letters too; logged at the finest level."""
    folder = home / "telling"
    shutil.copytree(project, folder, symlinks=True)
    write(folder, {"cortex.yaml": CORTEX_YAML.replace("path:", "log_level: debug\n    path:")})
    write(folder, {"dependencies.sh": "set -x\necho $TOKEN\n"})
    (home / "job.json").write_text(json.dumps(items("x", "fail")))
    store = home / "secretive"
    environment = {**os.environ, "DASK_CORTEX_DASK__STORE": str(store)}
    command = [sys.executable, "-m", "cortex_dask", "submit", str(folder), "--job", str(home / "job.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert "completed with failures" in done.stdout
    (directory,) = store.glob("jobs/contract/*")
    written = [path for path in store.rglob("*") if path.is_file()]
    archives = [path for path in written if path.name.endswith(".tar.gz")]
    assert len(archives) == 1
    assert {"job.json", "status.json"} <= {path.name for path in written}
    assert any(b"+ echo ***" in path.read_bytes() for path in directory.glob("logs/*"))
    assert list(directory.glob("failures/*"))
    job = Job(str(directory))
    shown = [repr(job), repr(job.settings), str(job.status), repr(job.failures().to_dict()), job.logs().to_string()]
    for text in [done.stdout, done.stderr, *shown]:
        assert SECRET not in text
    for path in written:
        if path not in archives:
            assert SECRET.encode() not in path.read_bytes(), path
    for private in home.glob("cache/projects/*/.env"):
        assert private.stat().st_mode & 0o077 == 0


def test_a_malformed_line_of_dotenv_is_an_error_without_the_value(home: Path) -> None:
    folder = write(
        home / "malformed",
        {"cortex.yaml": CORTEX_YAML, "handler.py": HANDLER, ".env": f"A=1\n\n# ok\nTOKEN: {SECRET}\n"},
    )
    (home / "job.json").write_text(json.dumps(items("x")))
    done = cli("submit", folder, "--job", home / "job.json")
    assert done.returncode == 2
    assert f"{folder}/.env:4: the line cannot be read; expected VARIABLE=value" in done.stderr.replace("\n", " ")
    assert SECRET not in done.stdout + done.stderr


# dependencies -------------------------------------------------------------------------------------------------------

DEPENDENT = """\
import json
import os
import sys

import tinypkg
import my_module


class Handler:
    def __init__(self, config):
        assert os.path.exists("values.json")

    def handle_batch(self, payload):
        try:
            import my_package
            package = my_package.WHO
        except ImportError:
            package = None
        made = open("made.txt").read() if os.path.exists("made.txt") else None
        found = {
            "version": tinypkg.VERSION, "python": sys.executable, "package": package, "made": made,
            "module": my_module.NAME, "variable": os.environ.get("PLAIN"), "yaml": os.environ.get("FROM_YAML"),
            "cwd": os.getcwd(),
        }
        return [{"found": json.dumps(found)}]
"""


@pytest.fixture(scope="module")
def wheels(home: Path) -> Path:
    folder = home / "wheels"
    write_wheel(folder, "tinypkg", "1.0")
    write_wheel(folder, "tinypkg", "2.0")
    return folder


def dependent(folder: Path, files: dict[str, str], configuration: str = "") -> Path:
    files = {
        "cortex.yaml": CORTEX_YAML + configuration,
        "handler.py": DEPENDENT,
        "values.json": "{}",
        "my_module.py": "NAME = 'mine'\n",
        ".env": "PLAIN=1\n",
        **files,
    }
    return write(folder, files)


@pytest.mark.parametrize("tool", ["pip", "uv"])
def test_script_then_requirements_which_may_name_the_project(
    home: Path, wheels: Path, tool: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in os.environ if name.startswith(("PIP_", "UV_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    if tool == "pip":
        monkeypatch.setenv("PIP_PREFER_BINARY", "1")  # pip is used where it is configured
    elif find_uv(os.environ) is None:
        pytest.skip("uv is not installed")
    setup = f"name='my-package', description='for {tool}', version='1', py_modules=['my_package']"
    folder = dependent(
        home / f"dependent-{tool}",
        {
            "dependencies.sh": 'python -c "import tinypkg" 2> /dev/null || echo "before pip in $PWD" > made.txt\n',
            "requirements.txt": f"--no-index\n--find-links {wheels}\ntinypkg==1.0\n.\n",
            "setup.py": f"from setuptools import setup\nsetup({setup}, package_dir={{'': 'src'}})\n",
            "src/my_package.py": "WHO = 'my package'\n",
        },
    )
    # pip and uv build with the setuptools that is there: nothing is fetched
    yaml = folder / "cortex.yaml"
    setting = 'PIP_NO_BUILD_ISOLATION: "0"' if tool == "pip" else 'UV_NO_BUILD_ISOLATION: "1"'
    yaml.write_text(yaml.read_text().replace("env: {", f"env: {{{setting}, "))
    found = run(folder, home / f"out-dependent-{tool}")
    assert (found["version"], found["package"]) == ("1.0", "my package")
    assert found["made"] == f"before pip in {found['cwd']}\n"
    assert (found["module"], found["variable"], found["yaml"]) == ("mine", "1", "1")
    assert Path(found["python"]).parents[2] == home / "cache" / "interpreters"


def test_other_paths_of_dependencies(home: Path, wheels: Path) -> None:
    folder = dependent(
        home / "elsewhere",
        {
            "install/prepare.sh": "cp install/text made.txt\n",
            "install/text": "from the script",
            "install/production.txt": f"-r base.txt\n--no-index\n--find-links {wheels}\n",
            "install/base.txt": "tinypkg==2.0\n",
            "requirements.txt": "not-this-one==1\n",
            "dependencies.sh": "exit 1\n",
        },
        "    dependencies: {pip: install/production.txt, shell: install/prepare.sh}\n",
    )
    found = run(folder, home / "out-elsewhere")
    assert (found["version"], found["made"]) == ("2.0", "from the script")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            {"dependencies.sh": "echo some; echo words >&2; exit 3\n"},
            r"dependencies.sh exited with code 3 (?s:.*)  some\n  words",
        ),
        ({"requirements.txt": "--no-index\nno-such-package\n"}, r"pip install -r requirements.txt exited with code 1 "),
        ({"conda-packages.txt": "a b c\n"}, r"conda-packages.txt:1: found 'a b c'; expected \[channel::\]package"),
        ({"conda-packages.txt": "a=1\n"}, r"conda-packages.txt needs conda, mamba or micromamba"),
    ],
    ids=["script", "pip", "conda line", "no conda"],
)
def test_a_failing_step_ends_the_job_as_worker_error(
    home: Path, files: dict[str, str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("CONDA_EXE", "MAMBA_EXE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    folder = dependent(tmp_path, files)
    with pytest.raises(JobFailedError, match=message) as caught:
        cx.run(folder, progress=False, **items("x"))
    assert caught.value.status == "worker error"


def test_a_dependency_file_that_is_not_there(home: Path) -> None:
    folder = dependent(home / "missing", {"requirements.txt": ""}, "    dependencies: {pip: requirments.txt}\n")
    with pytest.raises(InputError, match=r"handler.dependencies.pip: there is no file requirments.txt .*did you mean"):
        cx.run(folder, progress=False, **items("x"))


def test_python_path(home: Path) -> None:
    folder = write(
        home / "python-path",
        {
            "cortex.yaml": CORTEX_YAML.replace("path: handler.py", "path: code/handler.py\n    python_path: library"),
            "code/handler.py": "import json\nfrom helper import WHO\n\n\nclass Handler:\n"
            "    def __init__(self, config): ...\n"
            "    def handle_batch(self): return [{'found': json.dumps({'who': WHO})}]\n",
            "library/helper.py": "WHO = 'from python_path'\n",
        },
    )
    assert run(folder, home / "out-python-path") == {"who": "from python_path"}


def test_a_timeout_while_dependencies_are_installed(home: Path, tmp_path: Path) -> None:
    folder = dependent(tmp_path, {"dependencies.sh": "sleep 300\n"})
    with pytest.raises(JobFailedError) as caught:
        cx.run(folder, progress=False, timeout=1, **items("x"))
    assert caught.value.status == "timed out"
