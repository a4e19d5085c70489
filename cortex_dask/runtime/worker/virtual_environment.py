"""A project's own Python environment, made once per host and shared by all jobs with the same dependencies.

It lies on top of the worker's packages: the packages of the project are found first, and those of the worker,
cortex_dask among them, behind them.
"""

from __future__ import annotations

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

_COMPLETE_FILE = "cortex-dask.json"  # written last
_WORKER_PACKAGES_FILE = "zz-worker-packages.pth"  # read last, so that the folders that it adds come last
_PLACEHOLDER_INSTALLER = "cortex-dask"  # marks metadata of packages that lie in the worker's environment
_CONDA_PROGRAMS = ("micromamba", "mamba", "conda")  # the quickest first
_SECRET_LENGTH = 6  # shorter values of .env are words such as "true", and hide nothing

#: These would make pip install to another place.
_PIP_PLACES = ("PIP_TARGET", "PIP_PREFIX", "PIP_ROOT", "PIP_PYTHON", "PIP_DRY_RUN")
_OUR_PIP_SETTINGS = {
    "PIP_USER": "0",
    "PIP_NO_INPUT": "1",
    "PIP_DISABLE_PIP_VERSION_CHECK": "1",
    "PIP_PROGRESS_BAR": "off",
}
#: Settings of pip that do not change which packages it installs.
_HARMLESS_PIP_SETTINGS = {
    *_OUR_PIP_SETTINGS,
    *_PIP_PLACES,
    "PIP_BREAK_SYSTEM_PACKAGES",
    "PIP_CACHE_DIR",
    "PIP_CONFIG_FILE",  # the file itself counts
    "PIP_NO_CACHE_DIR",
    "PIP_NO_COLOR",
    "PIP_QUIET",
    "PIP_REQUIRE_VIRTUALENV",
    "PIP_ROOT_USER_ACTION",
    "PIP_VERBOSE",
}
_UV_INDEX_SETTINGS = ("UV_DEFAULT_INDEX", "UV_INDEX", "UV_INDEX_URL", "UV_CONFIG_FILE")


@dataclass(frozen=True, slots=True)
class Interpreter:
    """The interpreter of a Python environment."""

    folder: str  # of the environment

    @property
    def executable(self) -> str:
        """The path of its Python."""
        return f"{self.folder}/bin/python"

    def environment(self, inherited: Mapping[str, str]) -> dict[str, str]:
        """Return environment variables with which programs of the environment are found first."""
        path = os.pathsep.join(filter(None, [f"{self.folder}/bin", inherited.get("PATH", os.defpath)]))
        kind = "CONDA_PREFIX" if Path(self.folder, "conda-meta").is_dir() else "VIRTUAL_ENV"
        changed = {**inherited, "PATH": path, kind: self.folder}
        changed.pop("PYTHONHOME", None)  # it would be that of the worker's
        return changed


def ensure_interpreter(
    dependencies: Dependencies,
    environment: Mapping[str, str],
    log: Callable[..., None],
    is_cancelled: Callable[[], bool],
) -> Interpreter | None:
    """Return the interpreter with a project's dependencies, made unless this host has it; None if there are none.

    Several threads and processes may call it at once: one makes the environment, the others wait. ``log`` takes a
    level, a message and further fields. Raises :class:`DependencyError` if something cannot be installed,
    :class:`ProjectError` if ``.env`` has a malformed line, and :class:`InstallationCancelledError`.
    """
    needed = dependencies.needed()
    if needed is None:
        return None
    dotenv = read_dotenv(needed.directory)  # it may hold the token of a private index
    variables = {**environment, **dotenv}
    secrets = tuple(sorted((value for value in dotenv.values() if len(value) >= _SECRET_LENGTH), key=len, reverse=True))
    installer = Installer(needed.directory, log, is_cancelled, secrets)
    start = time.monotonic()

    def fill(folder: Path, lock: int) -> None:
        log("INFO", f"making an interpreter with {_file_names(needed)}; other jobs will share it")
        _Builder(folder, needed, variables, installer, lock).build()

    key = needed.key(variables)
    folder = hold_in_place("interpreters", key, fill, _is_complete, installer.raise_if_cancelled)
    seconds = time.monotonic() - start
    outcome = f"was made in {seconds:.1f} s" if installer.durations else f"was there already, after {seconds:.1f} s"
    log("INFO", f"the interpreter with {_file_names(needed)} {outcome}", seconds=round(seconds, 3))
    return Interpreter(folder)


def _file_names(dependencies: Dependencies) -> str:
    return ", ".join(filter(None, (dependencies.shell, dependencies.conda, dependencies.pip)))


def _is_complete(folder: Path) -> bool:
    # Its Python is a link to the one that it was made with, which may have been removed meanwhile.
    return (folder / _COMPLETE_FILE).exists() and os.access(folder / "bin" / "python", os.X_OK)


class _Builder:
    """Makes one environment."""

    def __init__(
        self, folder: Path, dependencies: Dependencies, variables: Mapping[str, str], installer: Installer, lock: int
    ) -> None:
        self._folder = folder
        self._dependencies = dependencies
        self._installer = installer
        self._lock = lock
        self._interpreter = Interpreter(str(folder))
        variables = {name: value for name, value in variables.items() if name not in _PIP_PLACES}
        variables.pop("PYTHONDONTWRITEBYTECODE", None)  # it is compiled once, for every slot that starts later
        variables |= {**_OUR_PIP_SETTINGS, "NO_COLOR": "1", "PYTHONUNBUFFERED": "1"}
        self._variables = variables
        self._inside = self._interpreter.environment(variables)

    def build(self) -> None:
        """Make the environment, from the script to the requirements."""
        if self._dependencies.conda is None:
            self._make_venv()
            self._run_script()
        else:
            self._make_conda()
            self._add_worker_packages()
        self._inside = self._interpreter.environment(self._variables)  # of the kind that it turned out to be
        if self._dependencies.pip is not None:
            self._install_requirements(self._dependencies.pip)
        made = {"made": time.time(), "seconds": self._installer.durations}
        (self._folder / f".{_COMPLETE_FILE}").write_text(json.dumps(made))
        (self._folder / f".{_COMPLETE_FILE}").rename(self._folder / _COMPLETE_FILE)

    def _run_step(self, step: str, command: list[str], environment: Mapping[str, str] | None = None) -> None:
        self._installer.run_program(step, command, self._inside if environment is None else environment, (self._lock,))

    def _make_venv(self) -> None:
        venv.create(self._folder, symlinks=True, with_pip=False)
        self._add_worker_packages()

    def _add_worker_packages(self) -> None:
        """Have the worker's packages found after those of the environment."""
        lines = [f"import site; site.addsitedir({library!r})\n" for library in worker_libraries()]
        (self._site_packages() / _WORKER_PACKAGES_FILE).write_text("".join(lines))

    def _site_packages(self) -> Path:
        return self._folder / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"

    def _run_script(self) -> None:
        if self._dependencies.shell is not None:
            name = self._dependencies.shell
            self._run_step(name, ["bash", "-e", name])

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
            self._run_step(f"{step} create", [program, "create", *options, python, *packages], self._variables)
        else:  # the script runs first, and pip in it means the handler's
            self._run_step(f"{step} create", [program, "create", *options, python], self._variables)
            self._add_worker_packages()
            self._run_script()
            self._run_step(f"{step} install", [program, "install", *options, python, *packages], self._variables)
        if not self._site_packages().is_dir():
            raise DependencyError(f"{step} has made no environment with {python}")

    # pip --------------------------------------------------------------------------------------------------------------

    def _install_requirements(self, name: str) -> None:
        uv = find_uv(self._variables)
        if uv is not None:
            self._install_with_uv(uv, name)
            return
        if importlib.util.find_spec("pip") is None and not self._has_pip():
            # -P: nothing in the project directory may stand in for a module of theirs.
            self._run_step("ensurepip", [self._interpreter.executable, "-P", "-m", "ensurepip", "--default-pip"])
        pip = [self._interpreter.executable, "-P", "-m", "pip", "install"]
        self._run_step(f"pip install -r {name}", [*pip, "--requirement", name])

    def _has_pip(self) -> bool:
        return (self._site_packages() / "pip").is_dir()

    def _install_with_uv(self, uv: str, name: str) -> None:
        """Install with uv, which sees only packages in the environment itself."""
        variables = {**self._inside, "UV_NO_PROGRESS": "1", "UV_PYTHON_DOWNLOADS": "never"}
        if not any(setting in variables for setting in _UV_INDEX_SETTINGS):
            variables.setdefault("UV_INDEX_STRATEGY", "unsafe-best-match")  # as pip, which looks at all indexes alike
        placeholders = _add_placeholders(self._site_packages())
        try:
            command = [uv, "pip", "install", "--python", self._interpreter.executable, "--compile-bytecode"]
            self._run_step(f"uv pip install -r {name}", [*command, "--requirement", name], variables)
        finally:
            for folder in placeholders:
                with contextlib.suppress(FileNotFoundError):
                    if (folder / "INSTALLER").read_text() == _PLACEHOLDER_INSTALLER:
                        shutil.rmtree(folder)


def find_uv(variables: Mapping[str, str]) -> str | None:
    """Return the program uv of the worker or its host; None where it is missing or pip is configured and uv is not."""
    configured = any(variables.get(setting) for setting in _UV_INDEX_SETTINGS)
    if not configured and _is_pip_configured(variables):
        return None
    return shutil.which("uv", path=f"{Path(sys.executable).parent}{os.pathsep}{variables.get('PATH', '')}")


def _is_pip_configured(variables: Mapping[str, str]) -> bool:
    """Return whether pip's variables or configuration files may change which packages are installed."""
    settings = {name for name, value in variables.items() if name.startswith("PIP_") and value}
    return bool(settings - _HARMLESS_PIP_SETTINGS) or any(file.is_file() for file in _pip_files(variables))


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


def _pip_files(variables: Mapping[str, str]) -> list[Path]:
    """Return where pip looks for its configuration."""
    if variables.get("PIP_CONFIG_FILE") == os.devnull:  # which tells pip to read none
        return []
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


def _add_placeholders(site_packages: Path) -> list[Path]:
    """Put the metadata of the worker's packages into an environment, so that uv does not install them again.

    uv removes one when it installs another version. The others are removed afterwards, as the packages themselves are
    found behind those of the environment.
    """
    made = []
    own = {_normalized(found.metadata["Name"]) for found in importlib.metadata.distributions(path=[str(site_packages)])}
    for found in importlib.metadata.distributions(path=worker_libraries()):
        metadata = found.read_text("METADATA") or found.read_text("PKG-INFO")
        name = _normalized(found.metadata["Name"] or "")
        if not metadata or not name or name in own:
            continue
        own.add(name)
        folder = site_packages / f"{name}-{found.version}.dist-info"
        with contextlib.suppress(FileExistsError):
            folder.mkdir()
            made.append(folder)
            texts = {"METADATA": metadata, "INSTALLER": _PLACEHOLDER_INSTALLER, "RECORD": ""}
            if entry_points := found.read_text("entry_points.txt"):  # setuptools, for one, builds nothing without its
                texts["entry_points.txt"] = entry_points
            texts["RECORD"] = "".join(f"{folder.name}/{file},,\n" for file in texts)
            for file, text in texts.items():
                (folder / file).write_text(text, encoding="utf-8", errors="surrogateescape")
    return made


def _normalized(name: str) -> str:
    return "_".join(part for part in name.lower().replace("-", "_").replace(".", "_").split("_") if part)
