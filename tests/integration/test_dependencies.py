"""A handler's own interpreter: what names it, how it is made, shared, repaired and given up."""

from __future__ import annotations

import importlib.metadata
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from textwrap import dedent
from typing import Any

import iniconfig
import psutil
import pytest

from cortex_dask.io.cache import prune
from cortex_dask.io.job.records import SlotState
from cortex_dask.runtime.worker import slots
from cortex_dask.runtime.worker.dependencies import Dependencies, DependencyError, mask
from cortex_dask.runtime.worker.installation import InstallationCancelledError, Installer
from cortex_dask.runtime.worker.virtual_environment import Interpreter, ensure_interpreter, find_uv
from tests.support.jobs import TestJob, make_job
from tests.support.packages import write_wheel
from tests.support.waiting import handler_processes, lives, until

NAMES = {"pip": "requirements.txt", "conda": "conda-packages.txt", "shell": "dependencies.sh"}
MINOR = f"{sys.version_info.major}.{sys.version_info.minor}"


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of wheels: two versions of one package, and another version of one that the worker has."""
    folder = tmp_path_factory.mktemp("wheels")
    write_wheel(folder, "tinypkg", "1.0")
    write_wheel(folder, "tinypkg", "2.0")
    write_wheel(folder, "iniconfig", "99.0")
    return folder


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DASK_CORTEX_DASK__CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def without_uv(monkeypatch: pytest.MonkeyPatch) -> None:
    """A host where pip is configured, and so used instead of uv."""
    monkeypatch.setenv("PIP_PREFER_BINARY", "1")


@pytest.fixture
def unconfigured_pip(monkeypatch: pytest.MonkeyPatch) -> None:
    """A host where pip is not configured."""
    for name in [name for name in os.environ if name.startswith(("PIP_", "UV_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)


@dataclass
class Project:
    """An unpacked project, and what is logged while its dependencies are installed."""

    folder: Path
    digest: str = "0" * 64
    logged: list[str] = field(default_factory=list)

    def write(self, **files: str) -> Project:
        """Write ``requirements_txt="…"`` and so on."""
        for name, text in files.items():
            path = self.folder / name.replace("__", "/").replace("_txt", ".txt").replace("_sh", ".sh")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(dedent(text))
        return self

    @property
    def dependencies(self) -> Dependencies:
        names = {kind: name for kind, name in NAMES.items() if (self.folder / name).exists()}
        return Dependencies(str(self.folder), self.digest, **names)

    def key(self, **environment: str) -> str:
        return self.dependencies.key(environment)

    def log(self, level: str, message: str, **extra: Any) -> None:
        self.logged.append(message)

    def obtain(self, abandoned: Callable[[], bool] = lambda: False) -> Interpreter:
        interpreter = ensure_interpreter(self.dependencies, os.environ, self.log, abandoned)
        assert interpreter is not None
        return interpreter


@pytest.fixture
def project(tmp_path: Path) -> Project:
    (tmp_path / "project").mkdir()
    return Project(tmp_path / "project")


def run(interpreter: Interpreter, code: str) -> str:
    done = subprocess.run([interpreter.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.strip()


# what names it ------------------------------------------------------------------------------------------------------


def test_the_key_is_that_of_what_is_installed(project: Project) -> None:
    first = project.write(requirements_txt="a==1\n").key()
    assert project.write(requirements_txt="# why\n\na==1  # because\n").key() == first
    project.digest = "1" * 64
    assert project.key() == first, "another project with the same requirements shares the interpreter"
    assert project.write(requirements_txt="a==2\n").key() != first


def test_the_key_minds_included_files(project: Project) -> None:
    project.write(requirements_txt="-r more/base.txt\n--constraint=limits.txt\n", more__base_txt="-r deep.txt\n")
    keys = {project.key()}
    keys.add(project.write(more__deep_txt="a\n").key())
    keys.add(project.write(more__deep_txt="a==1\n").key())
    keys.add(project.write(limits_txt="b<2\n").key())
    assert len(keys) == 4
    project.write(more__deep_txt="-r base.txt\n").key()  # a circle comes to an end


def test_the_key_minds_variables_in_the_requirements(project: Project) -> None:
    project.write(requirements_txt="--index-url https://${TOKEN}@host/simple\na\n")
    assert project.key(TOKEN="one") != project.key(TOKEN="two")
    assert project.key(OTHER="one") == project.key(OTHER="two")


@pytest.mark.parametrize(
    ("line", "minds"),
    [
        (".", True),
        (".[extra]", True),
        ("-e .", True),
        ("./wheels/a.whl", True),
        ("name @ file:///somewhere/a.whl", True),
        ("local_package", True),
        ("--find-links wheels", True),
        ("a", False),
        ("a>=1 ; python_version > '3'", False),
        ("-e git+https://host/a.git", False),
        ("a @ https://host/a.whl", False),
        ("--find-links https://host/files", False),
    ],
)
def test_the_key_minds_the_project_where_a_line_names_something_in_it(project: Project, line: str, minds: bool) -> None:
    (project.folder / "local_package").mkdir()
    first = project.write(requirements_txt=f"{line}\n").key()
    project.digest = "1" * 64
    assert (project.key() != first) == minds


def test_a_script_belongs_to_its_project_and_conda_packages_do_not(project: Project) -> None:
    first = project.write(dependencies_sh="true\n").key()
    project.digest = "1" * 64
    assert project.key() != first
    (project.folder / "dependencies.sh").unlink()
    first = project.write(**{"conda-packages_txt": "a=1\n"}).key()
    project.digest = "2" * 64
    assert project.key() == first
    assert project.write(**{"conda-packages_txt": "a=2\n"}).key() != first


def test_lists_with_nothing_in_them_need_no_interpreter(project: Project) -> None:
    assert project.dependencies.needed() is None
    project.write(requirements_txt="# nothing\n\n", **{"conda-packages_txt": "# nothing\n"})
    assert project.dependencies.needed() is None
    assert ensure_interpreter(project.dependencies, {}, project.log, lambda: False) is None
    assert project.logged == []


def test_conda_lines(project: Project) -> None:
    project.write(**{"conda-packages_txt": f"a\nb=1.2 # why\n\nconda-forge::c=1=py_0\npython={MINOR}\n"})
    assert project.dependencies.conda_packages() == ["a", "b=1.2", "conda-forge::c=1=py_0", f"python={MINOR}"]
    for line in ("a==1", "a b", "a=", "https://user:secret@host::a b", "--file x"):
        project.write(**{"conda-packages_txt": f"# one\n{line}\n"})
        with pytest.raises(DependencyError, match=r"conda-packages.txt:2: .*expected \[channel::\]package") as caught:
            project.dependencies.conda_packages()
        assert "secret" not in str(caught.value)
    project.write(**{"conda-packages_txt": "python=3.6\n"})
    with pytest.raises(DependencyError, match=f"the worker has Python {MINOR}, which the handler has to share"):
        project.dependencies.conda_packages()


def test_credentials_are_masked() -> None:
    assert mask("Looking in https://me:pa55@host/simple, git+ssh://tok3n@host/x") == (
        "Looking in https://***@host/simple, git+ssh://***@host/x"
    )
    assert mask("'https://me:p@ss@host/a@b'") == "'https://***@host/a@b'"
    assert mask("a hunter2", ("hunter2",)) == "a ***"


# steps --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def installer(project: Project) -> Installer:
    return Installer(str(project.folder), project.log, lambda: False, ("hunter2",))


def test_a_step_logs_what_it_writes(project: Project, installer: Installer) -> None:
    installer.run_program(
        "a step", ["bash", "-c", "pwd; echo err >&2; printf '1%%\\r2%%\\n'; printf 'hunter2 \\xff'"], os.environ
    )
    *lines, last = project.logged
    assert lines == [str(project.folder), "err", "2%", "*** \\xff"]
    assert last.startswith("a step took 0.")


def test_a_step_that_fails_says_how(installer: Installer) -> None:
    with pytest.raises(DependencyError) as caught:
        installer.run_program(
            "a step", ["bash", "-c", "for n in {1..40}; do echo line $n hunter2; done; exit 7"], os.environ
        )
    message = str(caught.value)
    assert message.startswith("a step exited with code 7 after 0.")
    assert message.endswith("it wrote last:\n" + "\n".join(f"  line {n} ***" for n in range(29, 41)))
    with pytest.raises(DependencyError, match=r"a step was killed by SIGKILL .*; it wrote nothing"):
        installer.run_program("a step", ["bash", "-c", "kill -9 $$"], os.environ)
    with pytest.raises(DependencyError, match="a step: no-such-program is not installed"):
        installer.run_program("a step", ["no-such-program"], os.environ)


def test_a_step_ends_although_what_it_started_goes_on(project: Project, installer: Installer) -> None:
    installer.run_program("a step", ["bash", "-c", "sleep 60 & echo $!"], os.environ)
    sleeper = psutil.Process(int(project.logged[0]))
    sleeper.kill()
    assert installer.durations["a step"] < 10


def test_an_abandoned_step_ends_with_all_that_it_started(project: Project) -> None:
    over = threading.Event()
    installer = Installer(str(project.folder), project.log, over.is_set)
    stubborn = "trap '' TERM; sleep 60 & echo $!; wait; wait; sleep 60"

    def abandon() -> None:
        until(lambda: project.logged, "the first line of the step")
        over.set()

    threading.Thread(target=abandon).start()
    began = time.monotonic()
    with pytest.raises(InstallationCancelledError):
        installer.run_program("a step", ["bash", "-c", stubborn], os.environ)
    assert time.monotonic() - began < 5
    sleeper = int(project.logged[0])
    until(lambda: not lives(sleeper), "what the step started to end")
    with pytest.raises(InstallationCancelledError):
        installer.run_program("another", ["touch", "never"], os.environ)
    assert not (project.folder / "never").exists()


# making it ----------------------------------------------------------------------------------------------------------

_WHERE = "import iniconfig, tinypkg, pandas, cortex_dask; print(iniconfig.__file__, tinypkg.__file__, pandas.__file__)"


@pytest.mark.parametrize("tool", ["pip", "uv"])
@pytest.mark.usefixtures("cache")
def test_its_packages_lie_on_top_of_the_workers(
    tool: str, project: Project, wheels: Path, request: pytest.FixtureRequest
) -> None:
    if tool == "pip":
        request.getfixturevalue("without_uv")
    else:
        request.getfixturevalue("unconfigured_pip")
        if find_uv(os.environ) is None:
            pytest.skip("uv is not installed")
    project.write(requirements_txt=f"--no-index\n--find-links {wheels}\ntinypkg==1.0\niniconfig==99.0\npandas\n")
    interpreter = project.obtain()
    inside, own, worker = run(interpreter, _WHERE).split()
    assert inside == f"{interpreter.folder}/lib/python{MINOR}/site-packages/iniconfig.py"
    assert own.startswith(interpreter.folder)
    assert not worker.startswith(interpreter.folder), "what the worker has is not installed again"
    assert list(Path(own).parent.glob("__pycache__/tinypkg.*.pyc")), "bytecode is compiled"
    found = sorted(path.name for path in Path(own).parent.glob("*.dist-info"))
    assert found == ["iniconfig-99.0.dist-info", "tinypkg-1.0.dist-info"]
    names = "import importlib.metadata as m; print(m.version('iniconfig'), m.version('pandas'))"
    assert run(interpreter, names) == f"99.0 {importlib.metadata.version('pandas')}"
    assert Path(iniconfig.__file__).is_file()
    assert importlib.metadata.version("iniconfig") != "99.0", "the worker keeps its own"
    assert any(line.startswith(f"{tool} ") and line.endswith(" s") for line in project.logged)
    made = len(project.logged)
    assert project.obtain() == interpreter
    (line,) = project.logged[made:]
    assert "was there already" in line


@pytest.mark.usefixtures("cache", "without_uv")
def test_a_module_of_the_project_does_not_break_pip(project: Project, wheels: Path) -> None:
    (project.folder / "logging.py").write_text("raise SystemExit('not that one')")
    project.write(requirements_txt=f"--no-index\n--find-links {wheels}\ntinypkg==2.0\n")
    assert run(project.obtain(), "import tinypkg; print(tinypkg.VERSION)") == "2.0"


@pytest.fixture
def failing_uv(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unconfigured_pip: None) -> None:
    """A program called uv that shows that it was used."""
    program = tmp_path / "uv-programs" / "uv"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\necho this is uv\nexit 9\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent), prepend=os.pathsep)


@pytest.mark.usefixtures("cache", "failing_uv")
@pytest.mark.parametrize("place", ["PIP_CONFIG_FILE", "XDG_CONFIG_HOME", "HOME"])
def test_a_configuration_file_of_pip_says_where_packages_come_from(
    place: str, project: Project, wheels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = {"PIP_CONFIG_FILE": "", "XDG_CONFIG_HOME": "pip", "HOME": ".pip"}
    file = tmp_path / "configuration" / folders[place] / "pip.conf"
    file.parent.mkdir(parents=True)
    file.write_text(f"[global]\nno-index = true\nfind-links = {wheels}\n")
    monkeypatch.delenv("PIP_CONFIG_FILE")
    monkeypatch.setenv(place, str(file if place == "PIP_CONFIG_FILE" else tmp_path / "configuration"))
    project.write(requirements_txt="tinypkg\n")
    assert run(project.obtain(), "import tinypkg; print(tinypkg.VERSION)") == "2.0"


@pytest.mark.usefixtures("cache", "failing_uv")
def test_a_variable_of_pip_says_where_packages_come_from(
    project: Project, wheels: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    project.write(requirements_txt="tinypkg\n")
    assert run(project.obtain(), "import tinypkg; print(tinypkg.VERSION)") == "2.0"


@pytest.mark.usefixtures("cache", "failing_uv")
@pytest.mark.parametrize(
    "variables",
    [{}, {"PIP_NO_CACHE_DIR": "1"}, {"PIP_INDEX_URL": "https://pip/", "UV_DEFAULT_INDEX": "https://uv/"}],
    ids=["nothing", "a harmless setting of pip", "both are configured"],
)
def test_uv_installs_where_it_is_configured_or_pip_is_not(
    variables: dict[str, str], project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    project.write(requirements_txt="tinypkg\n")
    with pytest.raises(DependencyError, match=r"uv pip install -r requirements\.txt exited with code 9"):
        project.obtain()
    assert "this is uv" in project.logged


@pytest.mark.usefixtures("cache")
def test_the_script_runs_first_in_the_project_with_the_handlers_python(project: Project, wheels: Path) -> None:
    project.write(
        dependencies_sh="""
            echo "$TOKEN" > token.txt
            python -c 'import sys; print(sys.prefix)' > prefix.txt
            python -c 'import tinypkg' 2> /dev/null || echo "not yet" > order.txt
        """,
        requirements_txt=f"--no-index\n--find-links {wheels}\ntinypkg==1.0\n",
    )
    (project.folder / ".env").write_text("TOKEN=hunter2hunter2\n")
    interpreter = project.obtain()
    texts = [(project.folder / f"{name}.txt").read_text().strip() for name in ("token", "prefix", "order")]
    assert texts == ["hunter2hunter2", interpreter.folder, "not yet"]
    assert run(interpreter, "import tinypkg; print(tinypkg.VERSION)") == "1.0"


@pytest.mark.usefixtures("cache")
def test_a_failing_command_ends_the_script_and_nothing_is_kept(project: Project, cache: Path) -> None:
    (project.folder / ".env").write_text("TOKEN=hunter2hunter2\n")
    project.write(dependencies_sh="set -x\necho before $TOKEN https://me:pa55@host\nfalse\necho after\n")
    with pytest.raises(DependencyError) as caught:
        project.obtain()
    message = str(caught.value)
    assert message.startswith("dependencies.sh exited with code 1 after ")
    assert message.endswith("  + false")
    assert "before ***" in message
    assert "after\n" not in message
    for secret in ("hunter2", "pa55"):
        assert secret not in message + "\n".join(project.logged)
    assert not list(cache.glob("interpreters/*/cortex-dask.json"))
    project.write(dependencies_sh="true\n")
    assert project.obtain().folder


# conda --------------------------------------------------------------------------------------------------------------

#: Stands in for the program, which is no Python package: it makes the environment, and a module for each package.
MICROMAMBA = f"""#!{sys.executable}
import pathlib, sys, venv
verb, yes, quiet, option, prefix, *packages = sys.argv[1:]
assert (verb in ("create", "install"), yes, quiet, option) == (True, "--yes", "--quiet", "--prefix")
prefix = pathlib.Path(prefix)
if verb == "create":
    assert not prefix.exists()
    venv.create(prefix, symlinks=True)
    (prefix / "conda-meta").mkdir()
assert packages[0] == "python={MINOR}", packages
for package in packages[1:]:
    name, version = package.split("::")[-1].split("=")[:2]
    (prefix / "lib/python{MINOR}/site-packages" / (name + ".py")).write_text(f"VERSION = {{version!r}}")
with (prefix / "conda-meta" / "history").open("a") as file:
    print(verb, *packages, file=file)
"""


@pytest.fixture
def micromamba(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "programs" / "micromamba"
    program.parent.mkdir()
    program.write_text(MICROMAMBA)
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent), prepend=os.pathsep)


@pytest.mark.usefixtures("cache", "micromamba")
def test_conda_packages_come_before_pip_and_after_the_script(project: Project, wheels: Path) -> None:
    project.write(
        dependencies_sh="""
            python -c 'import sys; print(sys.prefix)' > prefix.txt
            ! python -c 'import condapkg' 2> /dev/null
        """,
        requirements_txt=f"--no-index\n--find-links {wheels}\ntinypkg==2.0\npandas\n",
        **{"conda-packages_txt": "conda-forge::condapkg=3.0=py_0\n"},
    )
    interpreter = project.obtain()
    history = Path(interpreter.folder, "conda-meta", "history").read_text().splitlines()
    python = f"python={MINOR}"
    assert history == [f"create {python}", f"install {python} conda-forge::condapkg=3.0=py_0"]
    assert (project.folder / "prefix.txt").read_text().strip() == interpreter.folder
    code = "import condapkg, tinypkg, pandas; print(condapkg.VERSION, tinypkg.VERSION, tinypkg.__file__)"
    conda, pip, place = run(interpreter, code).split()
    assert (conda, pip) == ("3.0", "2.0")
    assert place.startswith(interpreter.folder)
    environment = interpreter.environment({"PATH": "/bin", "PYTHONHOME": "/x"})
    assert environment == {"PATH": f"{interpreter.folder}/bin:/bin", "CONDA_PREFIX": interpreter.folder}


@pytest.mark.usefixtures("cache", "micromamba")
def test_without_a_script_conda_is_asked_once(project: Project) -> None:
    interpreter = project.write(**{"conda-packages_txt": "condapkg=3.0\n"}).obtain()
    history = Path(interpreter.folder, "conda-meta", "history").read_text().splitlines()
    assert history == [f"create python={MINOR} condapkg=3.0"]


@pytest.mark.usefixtures("cache")
def test_conda_packages_without_conda(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CONDA_EXE", "MAMBA_EXE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", "/nowhere")
    project.write(**{"conda-packages_txt": "a\n"})
    with pytest.raises(DependencyError, match=r"needs conda, mamba or micromamba, and none of them is on the PATH"):
        project.obtain()


# once per host ------------------------------------------------------------------------------------------------------

_MAKER = """
import os, sys
from cortex_dask.runtime.worker.dependencies import Dependencies
from cortex_dask.runtime.worker.virtual_environment import ensure_interpreter
say = lambda level, message, **extra: print(message, flush=True)
dependencies = Dependencies(sys.argv[1], "0" * 64, shell="dependencies.sh")
print(ensure_interpreter(dependencies, os.environ, say, lambda: False).folder)
"""


def maker(project: Project) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", _MAKER, str(project.folder)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


@pytest.mark.usefixtures("cache")
def test_several_processes_make_it_once(project: Project) -> None:
    project.write(dependencies_sh="echo x >> runs; until [ -e go ]; do sleep 0.02; done\n")
    makers = [maker(project) for _ in range(3)]
    until((project.folder / "runs").exists, "the script to run")
    (project.folder / "go").touch()
    outputs = [process.communicate(timeout=30)[0].splitlines() for process in makers]
    assert len({output[-1] for output in outputs}) == 1
    assert (project.folder / "runs").read_text() == "x\n"
    assert sorted("was made" in output[-2] for output in outputs) == [False, False, True]


@pytest.mark.usefixtures("cache")
def test_what_a_killed_process_left_is_made_anew_once_its_programs_have_ended(project: Project, cache: Path) -> None:
    project.write(
        dependencies_sh="echo x >> runs; [ -e left ] || { touch left; until [ -e go ]; do sleep 0.02; done; }\n"
    )
    first = maker(project)
    until((project.folder / "left").exists, "the script to run")
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert first.stdout is not None
    first.stdout.close()
    (half,) = [path for path in cache.glob("interpreters/*") if path.is_dir()]
    (half / "junk").touch()
    second = maker(project)
    assert second.stdout is not None
    with pytest.raises(subprocess.TimeoutExpired):
        second.wait(1.0)  # the script of the first still runs
    assert (project.folder / "runs").read_text() == "x\n"
    (project.folder / "go").touch()
    assert second.communicate(timeout=30)[0].splitlines()[-1] == str(half)
    assert (project.folder / "runs").read_text() == "x\nx\n"
    assert not (half / "junk").exists()


@pytest.mark.usefixtures("cache")
def test_one_whose_python_is_gone_is_made_anew(project: Project) -> None:
    project.write(dependencies_sh="true\n")
    interpreter = project.obtain()
    Path(interpreter.executable).unlink()
    Path(interpreter.executable).symlink_to("/nowhere/python")
    assert project.obtain() == interpreter
    assert run(interpreter, "print(1)") == "1"


@pytest.mark.usefixtures("cache")
def test_a_process_that_waits_can_give_up(project: Project) -> None:
    project.write(dependencies_sh="touch here; until [ -e go ]; do sleep 0.02; done\n")
    first = maker(project)
    until((project.folder / "here").exists, "the script to run")
    began = time.monotonic()
    with pytest.raises(InstallationCancelledError):
        project.obtain(lambda: time.monotonic() > began + 0.3)
    (project.folder / "go").touch()
    first.communicate(timeout=30)


def test_unused_ones_are_removed(project: Project, cache: Path) -> None:
    project.write(dependencies_sh="true\n")
    process = maker(project)
    folder = Path(process.communicate(timeout=30)[0].splitlines()[-1])
    assert folder.is_dir()
    assert prune(unused_days=0) == [folder.name]
    assert not folder.exists()


# in jobs ------------------------------------------------------------------------------------------------------------

Make = Callable[..., TestJob]

VERSION = """
class Handler:
    def __init__(self, config):
        import tinypkg
        self.tinypkg = tinypkg
    def handle_batch(self, payload):
        return [{"version": self.tinypkg.VERSION, "python": sys.executable, "prefix": sys.prefix}] * len(payload)
"""


@pytest.fixture
def make(tmp_path: Path, cache: Path) -> Iterator[Make]:
    jobs: list[TestJob] = []

    def make_one(handler: str, files: dict[str, str] | None = None, **options: Any) -> TestJob:
        kinds = {kind: name for kind, name in NAMES.items() if name in (files or {})}
        where = {"dependencies": kinds} if kinds else {}
        jobs.append(make_job(tmp_path, handler, files=files, rows=4, where=where, **options))
        return jobs[-1]

    yield make_one
    for job in jobs:
        job.close()


def requirements(wheels: Path, *lines: str) -> str:
    return "\n".join(["--no-index", f"--find-links {wheels}", *lines, ""])


def test_jobs_with_conflicting_pins_run_side_by_side(make: Make, wheels: Path) -> None:
    jobs = [make(VERSION, {"requirements.txt": requirements(wheels, f"tinypkg=={n}.0")}) for n in (1, 2)]
    rows = [job.rows(job.record())[0] for job in jobs]  # neither process has ended when the other one runs
    assert [row["version"] for row in rows] == ["1.0", "2.0"]
    assert rows[0]["prefix"] != rows[1]["prefix"]
    assert all(row["python"] == f"{row['prefix']}/bin/python" for row in rows)
    for job in jobs:
        states = [event.state for event in job.events if isinstance(event, SlotState)]
        assert states == ["initializing", "running"]
        job.close()
        assert any("the interpreter with requirements.txt was made in" in line["message"] for line in job.logs())
        assert all(line["labels"]["jobID"] == job.settings.job_id for line in job.logs())


def test_prestart_installs_before_there_is_a_split(make: Make, wheels: Path) -> None:
    job = make(VERSION, {"requirements.txt": requirements(wheels, "tinypkg")})
    slots.prestart(job.url, 2)
    until(lambda: len(handler_processes()) == 2, "two processes")
    assert job.rows(job.record())[0]["version"] == "2.0"
    job.close()
    made = [line["message"] for line in job.logs() if "the interpreter with" in line["message"]]
    assert len(made) == 1, "the slots of a job share what the first one has made"


@pytest.mark.usefixtures("without_uv")
def test_a_failing_step_ends_the_job_and_is_not_tried_again(make: Make, wheels: Path) -> None:
    job = make(VERSION, {"requirements.txt": requirements(wheels, "nowhere-to-be-found==1")})
    outcome = job.run()
    assert outcome.kind == "worker error"
    assert outcome.message.startswith("pip install -r requirements.txt exited with code 1 after ")
    assert "No matching distribution found for nowhere-to-be-found==1" in outcome.message
    began = time.monotonic()
    assert job.run().message == outcome.message
    assert time.monotonic() - began < 0.5
    job.close()
    logged = [line["message"] for line in job.logs()]
    assert outcome.message in logged
    assert any("Looking in links" in line for line in logged), "the whole output is in the log"


@pytest.mark.parametrize("how", ["stop", "close"])
def test_a_job_that_is_stopped_while_it_installs_ends_soon(make: Make, how: str, tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    job = make(VERSION, {"dependencies.sh": f"trap '' TERM\necho $$ > {pid}\nwhile true; do sleep 1; done\n"})
    outcomes: list[Any] = []
    thread = threading.Thread(target=lambda: outcomes.append(job.run()))
    thread.start()
    until(lambda: pid.exists() and pid.read_text().strip(), "the script to run")
    began = time.monotonic()
    if how == "stop":
        job.directory.request_stop("stopped", "enough")  # as another machine asks
    else:
        job.close()
    thread.join(10)
    assert time.monotonic() - began < 5
    assert outcomes[0].kind == "stopped"
    until(lambda: not lives(int(pid.read_text())), "the script to end")


def test_an_inline_job_says_that_it_installs_nothing(make: Make) -> None:
    job = make(
        "class Handler:\n    def __init__(self, config): pass\n    def handle_batch(self): pass\n",
        {"requirements.txt": "a"},
    )
    with pytest.warns(UserWarning, match=r"requirements.txt is not installed for a job that runs inline"):
        job.record(in_line=True)


def test_a_project_without_dependencies_costs_nothing(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("virtual_environment", "dependencies", "installation"):
        monkeypatch.setitem(sys.modules, f"cortex_dask.runtime.worker.{module}", None)  # an import would raise
    job = make("class Handler:\n    def __init__(self, config): pass\n    def handle_batch(self): return None\n")
    job.record()
