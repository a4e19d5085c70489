"""A project's dependency files: its requirements, conda packages and script, read but not yet run."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import socket
import sys
import sysconfig
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from cortex_dask.errors import CortexDaskError

_FORMAT = 1  # of the environments: a new number makes them all anew
_INCLUDE = re.compile(r"(?:-r|-c|--requirement|--constraint)(?:\s+|=)?(\S.*)")
_PLACE = re.compile(r"(?:-e|--editable|-f|--find-links|-i|--index-url|--extra-index-url)(?:\s+|=)(\S+)")
_VARIABLE = re.compile(r"\$\{([A-Z0-9_]+)\}")  # as pip has it
_CONDA_LINE = re.compile(r"(?:[^\s:=]+::)?[A-Za-z0-9_.-]+(?:=[^\s=]+(?:=[^\s=]+)?)?")
_CREDENTIALS = re.compile(r"//[^/\s]+@")


class DependencyError(CortexDaskError):
    """A project's dependencies are malformed, or cannot be installed here."""


def mask(text: str, secrets: tuple[str, ...] = ()) -> str:
    """Return text without the credentials of URLs, and without some secrets."""
    for secret in secrets:
        text = text.replace(secret, "***")
    return _CREDENTIALS.sub("//***@", text)


def worker_libraries() -> list[str]:
    """Return the folders of this interpreter's installed packages, in the order of its import path."""
    names = ("site-packages", "dist-packages")
    return [entry for entry in dict.fromkeys(sys.path) if Path(entry).name in names and Path(entry).is_dir()]


@dataclass(frozen=True, slots=True)
class Dependencies:
    """The dependency files of an unpacked project, as paths relative to it."""

    directory: str
    project: str  # the archive's hash
    shell: str | None = None  # run with bash, first
    conda: str | None = None  # then these
    pip: str | None = None  # last

    def needed(self) -> Dependencies | None:
        """Return the dependencies without empty files; None if nothing is left."""
        pip = self.pip if self.pip is not None and any(self._requirements(self.pip)) else None
        conda = self.conda if self.conda is not None and self.conda_packages() else None
        if self.shell is None and conda is None and pip is None:
            return None
        return Dependencies(self.directory, self.project, self.shell, conda, pip)

    def key(self, environment: Mapping[str, str]) -> str:
        """Return the name of the environment: a hash of what is installed, and on top of what.

        Lines of the requirements may refer to variables of ``environment``.
        """
        facts: list[object] = [_FORMAT, sys.version, platform.machine(), sysconfig.get_platform()]
        facts += [sys.prefix, sys.base_prefix, _installed()]
        local = False
        if self.pip is not None:
            lines = list(self._requirements(self.pip))
            local = any(self._is_local(line) for line in lines)
            facts.append(["pip", [_VARIABLE.sub(lambda match: environment.get(match[1], ""), line) for line in lines]])
            if local:
                facts.append(self.pip)
        if self.conda is not None:
            facts.append(["conda", self.conda_packages()])
        if self.shell is not None:
            # It may use any file of the project and change the host, so it runs once for each project and host.
            facts.append(["shell", self._read(self.shell), socket.gethostname(), Path(self.directory).stat().st_ino])
        if local or self.shell is not None:
            facts.append(self.project)
        return hashlib.sha256(json.dumps(facts).encode(errors="surrogatepass")).hexdigest()

    def conda_packages(self) -> list[str]:
        """Return the conda packages, as conda takes them on its command line.

        Raises :class:`DependencyError` for a malformed line, and for another Python version than the worker's.
        """
        assert self.conda is not None
        packages = []
        for number, line in enumerate(self._read(self.conda).splitlines(), 1):
            package = line.partition("#")[0].strip()
            if not package:
                continue
            where = f"{self.conda}:{number}: found {mask(package)!r}"
            if not _CONDA_LINE.fullmatch(package):
                raise DependencyError(f"{where}; expected [channel::]package[=version[=build]]")
            name, _, version = package.rpartition("::")[2].partition("=")
            minor = f"{sys.version_info.major}.{sys.version_info.minor}"
            if name == "python" and version and not f"{version}.".startswith(f"{minor}."):
                raise DependencyError(f"{where}, but the worker has Python {minor}, which the handler has to share")
            packages.append(package)
        return packages

    def _read(self, name: str) -> str:
        try:
            return Path(self.directory, name).read_text(encoding="utf-8-sig", errors="surrogateescape")
        except OSError as error:
            raise DependencyError(f"{name} of the project cannot be read: {error.strerror}") from None

    def _requirements(self, name: str, seen: frozenset[str] = frozenset()) -> Iterator[str]:
        """Return the lines of a requirements file, and of files that it includes, without comments and blank lines."""
        text = re.sub(r"\\\r?\n", "", self._read(name))
        for line in text.splitlines():
            content = re.sub(r"(^|\s)#.*", "", line).strip()
            if not content:
                continue
            yield content
            included = _INCLUDE.match(content)
            if included is not None and "://" not in included[1]:
                path = os.path.normpath(Path(name).parent / included[1].strip())
                if path not in seen and Path(self.directory, path).is_file():  # pip says what is missing
                    yield from self._requirements(path, seen | {name, path})

    def _is_local(self, line: str) -> bool:
        """Return whether a line may name something in the project."""
        if "file:" in line:
            return True
        place = _PLACE.match(line)
        if place is not None or "://" in line:
            return "://" not in line
        name = re.split(r"[\s;\[@]", line, maxsplit=1)[0]
        return name.startswith(".") or "/" in name or (not line.startswith("-") and Path(self.directory, name).exists())


def _installed() -> list[str]:
    """Return names and versions of the worker's packages, which are not installed again."""
    endings = (".dist-info", ".egg-info")
    found = (name for library in worker_libraries() for name in os.listdir(library))  # noqa: PTH208 - names only
    return sorted(name for name in found if name.endswith(endings))
