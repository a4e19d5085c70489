"""A handler's own interpreter: an environment with what its project wants installed, made once per host.

It lies on top of the worker's packages: what the project asks for is found first, everything else, cortex_dask among
it, is the worker's. Jobs with the same dependencies share it; jobs with others run beside it, on the same worker.
"""

from __future__ import annotations

import configparser
import contextlib
import importlib.metadata
import importlib.util
import json
import os
import shutil
import sys
import time
import venv
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from cortex_dask.io.cache import hold_in_place
from cortex_dask.project.dotenv import read_dotenv
from cortex_dask.runtime.worker.dependencies import Dependencies, DependencyError, worker_libraries
from cortex_dask.runtime.worker.installation import Installer

_WHOLE = "cortex-dask.json"  # written last
_BELOW = "zz-worker-packages.pth"  # read last, so that what it adds comes last
_STAND_IN = "cortex-dask"  # the installer of packages that are not really there
_CONDA_PROGRAMS = ("micromamba", "mamba", "conda")  # the quickest first
_SECRET_LENGTH = 6  # shorter values of .env are words such as "true", and hide nothing

#: Where pip would put packages, were it not told otherwise.
_PIP_PLACES = ("PIP_TARGET", "PIP_PREFIX", "PIP_ROOT", "PIP_PYTHON", "PIP_DRY_RUN")
#: What uv calls the settings of pip that say where packages come from.
_UV_NAMES = {
    "index-url": "UV_DEFAULT_INDEX",
    "extra-index-url": "UV_INDEX",
    "find-links": "UV_FIND_LINKS",
    "no-index": "UV_NO_INDEX",
    "trusted-host": "UV_INSECURE_HOST",
    "cert": "SSL_CERT_FILE",
}


@dataclass(frozen=True, slots=True)
class Interpreter:
    """A Python environment.

    Attributes
    ----------
    folder : str
        Where it lies.
    """

    folder: str

    @property
    def executable(self) -> str:
        """Its Python."""
        return f"{self.folder}/bin/python"

    def environment(self, inherited: Mapping[str, str]) -> dict[str, str]:
        """Return environment variables with which the programs in it are found first."""
        path = os.pathsep.join(filter(None, [f"{self.folder}/bin", inherited.get("PATH", os.defpath)]))
        kind = "CONDA_PREFIX" if Path(self.folder, "conda-meta").is_dir() else "VIRTUAL_ENV"
        changed = {**inherited, "PATH": path, kind: self.folder}
        changed.pop("PYTHONHOME", None)  # it would be that of the worker's
        return changed


def obtain(
    dependencies: Dependencies,
    environment: Mapping[str, str],
    log: Callable[..., None],
    abandoned: Callable[[], bool],
) -> Interpreter | None:
    """Return the interpreter with a project's dependencies, made unless this host has it already.

    Several threads and processes may ask for it at once: one makes it, the others wait.

    Parameters
    ----------
    dependencies : Dependencies
        What to install; None is returned where that is nothing.
    environment : mapping
        Environment variables for the programs that install.
    log : callable
        Takes a level, a message and further fields.
    abandoned : callable
        Whether nobody wants it any more.

    Raises
    ------
    DependencyError
        If something cannot be installed: the step, its exit code and its last lines.
    ProjectError
        If ``.env`` has a malformed line.
    AbandonedError
        If nobody wants it any more.
    """
    needed = dependencies.needed()
    if needed is None:
        return None
    dotenv = read_dotenv(needed.directory)  # a private index's token may stand there
    variables = {**environment, **dotenv}
    secrets = tuple(sorted((value for value in dotenv.values() if len(value) >= _SECRET_LENGTH), key=len, reverse=True))
    steps = Installer(needed.directory, log, abandoned, secrets)
    began = time.monotonic()

    def fill(folder: Path, lock: int) -> None:
        log("INFO", f"making an interpreter with {_names(needed)}; other jobs will share it")
        _Making(folder, needed, variables, steps, lock).run()

    folder = hold_in_place("interpreters", needed.key(variables), fill, _is_whole, steps.check)
    seconds = time.monotonic() - began
    what = f"was made in {seconds:.1f} s" if steps.taken else f"was there already, after {seconds:.1f} s"
    log("INFO", f"the interpreter with {_names(needed)} {what}", seconds=round(seconds, 3))
    return Interpreter(folder)


def _names(dependencies: Dependencies) -> str:
    return ", ".join(filter(None, (dependencies.shell, dependencies.conda, dependencies.pip)))


def _is_whole(folder: Path) -> bool:
    # Its Python is a link to the one that it was made with, which may have been removed meanwhile.
    return (folder / _WHOLE).exists() and os.access(folder / "bin" / "python", os.X_OK)


class _Making:
    """The making of one environment."""

    def __init__(
        self, folder: Path, dependencies: Dependencies, variables: Mapping[str, str], steps: Installer, lock: int
    ) -> None:
        self._folder = folder
        self._dependencies = dependencies
        self._steps = steps
        self._lock = lock
        self._interpreter = Interpreter(str(folder))
        variables = {name: value for name, value in variables.items() if name not in _PIP_PLACES}
        variables.pop("PYTHONDONTWRITEBYTECODE", None)  # it is compiled once, for every slot that starts later
        variables |= {
            "PIP_USER": "0",
            "PIP_NO_INPUT": "1",
            "PIP_DISABLE_PIP_VERSION_CHECK": "1",
            "PIP_PROGRESS_BAR": "off",
            "NO_COLOR": "1",
            "PYTHONUNBUFFERED": "1",
        }
        self._variables = variables
        self._inside = self._interpreter.environment(variables)

    def run(self) -> None:
        """Make it, from the script to the requirements."""
        if self._dependencies.conda is None:
            self._make_venv()
            self._run_script()
        else:
            self._make_conda()
            self._put_on_top()
        self._inside = self._interpreter.environment(self._variables)  # of the kind that it turned out to be
        if self._dependencies.pip is not None:
            self._install_requirements(self._dependencies.pip)
        made = {"made": time.time(), "seconds": self._steps.taken}
        (self._folder / f".{_WHOLE}").write_text(json.dumps(made))
        (self._folder / f".{_WHOLE}").rename(self._folder / _WHOLE)

    def _run(self, step: str, command: list[str], environment: Mapping[str, str] | None = None) -> None:
        self._steps.run(step, command, self._inside if environment is None else environment, (self._lock,))

    def _make_venv(self) -> None:
        venv.create(self._folder, symlinks=True, with_pip=False)
        self._put_on_top()

    def _put_on_top(self) -> None:
        """Have the worker's packages found after its own."""
        lines = [f"import site; site.addsitedir({library!r})\n" for library in worker_libraries()]
        (self._library() / _BELOW).write_text("".join(lines))

    def _library(self) -> Path:
        return self._folder / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"

    def _run_script(self) -> None:
        if self._dependencies.shell is not None:
            name = self._dependencies.shell
            self._run(name, ["bash", "-e", name])

    # conda ------------------------------------------------------------------------------------------------------------

    def _make_conda(self) -> None:
        """Make a conda environment with the worker's Python version."""
        assert self._dependencies.conda is not None
        program = _conda(self._variables, self._dependencies.conda)
        step = f"{self._dependencies.conda}: {Path(program).name}"
        python = f"python={sys.version_info.major}.{sys.version_info.minor}"
        packages = self._dependencies.conda_packages()
        options = ["--yes", "--quiet", "--prefix", str(self._folder)]
        if self._dependencies.shell is None:
            self._run(f"{step} create", [program, "create", *options, python, *packages], self._variables)
        else:  # the script runs first, and pip in it means the handler's
            self._run(f"{step} create", [program, "create", *options, python], self._variables)
            self._put_on_top()
            self._run_script()
            self._run(f"{step} install", [program, "install", *options, python, *packages], self._variables)
        if not self._library().is_dir():
            raise DependencyError(f"{step} has made no environment with {python}")

    # pip --------------------------------------------------------------------------------------------------------------

    def _install_requirements(self, name: str) -> None:
        uv = _uv(self._variables)
        if uv is not None:
            self._install_with_uv(uv, name)
            return
        if importlib.util.find_spec("pip") is None and not self._has_pip():
            # -P: nothing in the project directory may stand in for a module of theirs.
            self._run("ensurepip", [self._interpreter.executable, "-P", "-m", "ensurepip", "--default-pip"])
        pip = [self._interpreter.executable, "-P", "-m", "pip", "install"]
        self._run(f"pip install -r {name}", [*pip, "--requirement", name])

    def _has_pip(self) -> bool:
        return (self._library() / "pip").is_dir()

    def _install_with_uv(self, uv: str, name: str) -> None:
        """Install with uv, which minds only what lies in the environment itself and in its own settings."""
        stands_in = _stand_in_for_worker(self._library())
        try:
            command = [uv, "pip", "install", "--python", self._interpreter.executable, "--compile-bytecode"]
            self._run(f"uv pip install -r {name}", [*command, "--requirement", name], self._uv_variables())
        finally:
            for folder in stands_in:
                with contextlib.suppress(FileNotFoundError):
                    if (folder / "INSTALLER").read_text() == _STAND_IN:
                        shutil.rmtree(folder)

    def _uv_variables(self) -> dict[str, str]:
        """Return environment variables that make uv take packages from where pip takes them."""
        variables = {**self._inside, "UV_NO_PROGRESS": "1", "UV_PYTHON_DOWNLOADS": "never"}
        if any(name in variables for name in ("UV_DEFAULT_INDEX", "UV_INDEX", "UV_INDEX_URL", "UV_CONFIG_FILE")):
            return variables
        for key, value in _pip_settings(variables).items():
            separator = "," if key == "find-links" else " "
            variables.setdefault(_UV_NAMES[key], separator.join(value.split()))
        variables.setdefault("UV_INDEX_STRATEGY", "unsafe-best-match")  # pip looks at all indexes alike
        return variables


def _uv(variables: Mapping[str, str]) -> str | None:
    """Return the program uv: the worker's own, or that of its host."""
    return shutil.which("uv", path=f"{Path(sys.executable).parent}{os.pathsep}{variables.get('PATH', '')}")


def _conda(variables: Mapping[str, str], name: str) -> str:
    """Return the program that makes conda environments."""
    for program in _CONDA_PROGRAMS:
        if found := shutil.which(program, path=variables.get("PATH")):
            return found
    for variable in ("MAMBA_EXE", "CONDA_EXE"):
        if found := shutil.which(variables.get(variable, "")):
            return found
    raise DependencyError(
        f"{name} needs conda, mamba or micromamba, and none of them is on the PATH of the worker; "
        "install one there, or list what pip can install in requirements.txt"
    )


def _pip_settings(variables: Mapping[str, str]) -> dict[str, str]:
    """Return what pip's variables and configuration files say of where packages come from."""
    found: dict[str, str] = {}
    for file in _pip_files(variables):
        parser = configparser.RawConfigParser()
        with contextlib.suppress(configparser.Error, OSError, UnicodeDecodeError):
            parser.read(file, encoding="utf-8")
            for section in ("global", "install"):
                if parser.has_section(section):
                    found |= {key: value for key, value in parser.items(section) if key in _UV_NAMES and value}
    for key in _UV_NAMES:  # these win, and count where there is no pip
        if setting := variables.get(f"PIP_{key.upper().replace('-', '_')}"):
            found[key] = setting
    return found


def _pip_files(variables: Mapping[str, str]) -> list[Path]:
    """Return where pip looks for its configuration, what counts most last."""
    home = Path(variables.get("HOME") or os.devnull)
    if sys.platform == "darwin":
        places = [Path("/Library/Application Support/pip"), home / ".pip", home / "Library/Application Support/pip"]
        user = home / ".config" / "pip"
    else:
        shared = variables.get("XDG_CONFIG_DIRS") or "/etc/xdg"
        places = [*(Path(place) / "pip" for place in shared.split(os.pathsep)), Path("/etc"), home / ".pip"]
        user = Path(variables.get("XDG_CONFIG_HOME") or home / ".config") / "pip"
    files = [place / "pip.conf" for place in (*places, user, Path(sys.prefix))]
    return [*files, *([Path(variables["PIP_CONFIG_FILE"])] if variables.get("PIP_CONFIG_FILE") else [])]


def _stand_in_for_worker(library: Path) -> list[Path]:
    """Put the metadata of the worker's packages into an environment, so that uv knows that they are there.

    It takes one out when it installs another version; the others are removed again, for the packages themselves are
    found behind those of the environment.
    """
    made = []
    own = {_normal(found.metadata["Name"]) for found in importlib.metadata.distributions(path=[str(library)])}
    for found in importlib.metadata.distributions(path=worker_libraries()):
        metadata = found.read_text("METADATA") or found.read_text("PKG-INFO")
        name = _normal(found.metadata["Name"] or "")
        if not metadata or not name or name in own:
            continue
        own.add(name)
        folder = library / f"{name}-{found.version}.dist-info"
        with contextlib.suppress(FileExistsError):
            folder.mkdir()
            made.append(folder)
            texts = {"METADATA": metadata, "INSTALLER": _STAND_IN, "RECORD": ""}
            if entry_points := found.read_text("entry_points.txt"):  # setuptools, for one, builds nothing without its
                texts["entry_points.txt"] = entry_points
            texts["RECORD"] = "".join(f"{folder.name}/{file},,\n" for file in texts)
            for file, text in texts.items():
                (folder / file).write_text(text, encoding="utf-8", errors="surrogateescape")
    return made


def _normal(name: str) -> str:
    return "_".join(part for part in name.lower().replace("-", "_").replace(".", "_").split("_") if part)
