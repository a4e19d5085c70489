"""What a job's target stands for: a handler class, or the API that a project directory configures."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import re
import sys
import tokenize
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson

from cortex_dask.errors import HandlerError, ProjectError, SpecError
from cortex_dask.formatting import nearest, shown
from cortex_dask.io.job.settings import HandlerSettings
from cortex_dask.project import archive as project_archive
from cortex_dask.project.contract import check_class, check_source
from cortex_dask.project.pickling import pickle_class
from cortex_dask.spec.api import ApiSpec, ComputeSpec, check_name, load_apis
from cortex_dask.spec.quantity import parse_bytes
from cortex_dask.spec.submission import Submission

#: What the configuration file of a project directory is called, the usual name first.
CONFIG_FILES = ("cortex.yaml", "cortex.yml")

#: What the lists of dependencies are called where the configuration does not say.
_DEPENDENCIES = {"pip": "requirements.txt", "conda": "conda-packages.txt", "shell": "dependencies.sh"}

_PICKLE_WARNING = 10 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Target:
    """The API that a target stands for."""

    name: str
    api_id: str
    handler: HandlerSettings
    config: dict[str, Any] = field(default_factory=dict)
    compute: ComputeSpec = field(default_factory=ComputeSpec)
    shm: int | None = None  # bytes of /dev/shm
    kubernetes: dict[str, Any] = field(default_factory=dict)  # ``kubernetes:``, checked
    defaults: Submission = field(default_factory=Submission)
    folder: Path | None = None  # what relative paths in the defaults are relative to
    archive: project_archive.Archive | None = None
    pickled: bytes | None = None
    warnings: tuple[str, ...] = ()


def from_class(cls: type, name: str | None, handler_type: str = "python") -> Target:
    """Check and pickle a handler class.

    Parameters
    ----------
    cls : type
        The class.
    name : str or None
        The API's name; None: made from the class' name.
    handler_type : str
        ``handler.type``: it decides which arguments ``__init__`` may declare.

    Raises
    ------
    SpecError
        If the name is no DNS label.
    HandlerError
        If the class has a wrong signature or cannot be pickled.
    """
    check_class(cls, handler_type)
    try:
        api_name = check_name(name if name is not None else _label(cls.__qualname__))
    except ValueError as error:
        raise SpecError(f"name: {error}") from None
    pickled = pickle_class(cls)
    warnings = []
    if len(pickled) >= _PICKLE_WARNING:
        warnings.append(
            f"the class {cls.__qualname__} takes {len(pickled) / 2**20:.0f} MiB along, because it refers to large "
            "values; load them in __init__ instead"
        )
    try:
        cwd: str | None = str(Path.cwd())
    except FileNotFoundError:  # the working directory has been removed
        cwd = None
    handler = HandlerSettings(
        kind="class",
        cwd=cwd,
        sys_path=tuple(entry or cwd or "." for entry in sys.path if isinstance(entry, str)),
        python=".".join(map(str, sys.version_info[:2])),
    )
    return Target(api_name, _api_id(pickled), handler, pickled=pickled, warnings=tuple(warnings))


def _label(text: str) -> str:
    """Return a DNS label for a class' name: ``MyClassifier`` becomes ``my-classifier``."""
    text = text.rpartition("<locals>.")[2]
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "-", text).lower()
    return re.sub(r"[^a-z0-9]+", "-", words).strip("-")[:63].strip("-") or "handler"


def from_class_spec(cls: type, api: ApiSpec, packages: project_archive.Archive | None) -> Target:
    """Check and pickle the handler class of an API whose configuration is at hand.

    Parameters
    ----------
    cls : type
        The class.
    api : ApiSpec
        The configuration; ``handler.path`` does not count.
    packages : Archive, optional
        A project that says what has to be installed for the handler.

    Raises
    ------
    HandlerError
        If the class has a wrong signature or cannot be pickled.
    """
    made = from_class(cls, api.name, api.handler.type)
    assert made.pickled is not None
    digest = None if packages is None else packages.hash
    handler = dataclasses.replace(
        made.handler,
        type=api.handler.type,
        project=digest,
        env=dict(api.handler.env),
        log_level=api.handler.log_level,
        dependencies=_dependencies(api, {entry.name for entry in packages.files} if packages else set()),
        **_accessories(api),
    )
    return dataclasses.replace(
        made,
        api_id=_api_id(_described(api) + made.pickled + (digest or "").encode()),
        handler=handler,
        config=api.handler.config,
        **_needs(api),
        defaults=api.job,
        folder=Path(made.handler.cwd) if made.handler.cwd else None,
        archive=packages,
    )


def from_path(target: object, api_name: str | None, name: str | None) -> Target:
    """Read a project's configuration, pack the project, and check the handler's source without running it.

    Parameters
    ----------
    target : str or path
        The project directory, or the configuration file in it.
    api_name, name : str or None
        Which API, where the file has several.

    Raises
    ------
    SpecError, ProjectError, HandlerError
        If the configuration, the project or the handler cannot be used.
    """
    if not isinstance(target, str | os.PathLike):
        raise SpecError(
            f"the target is a value of type {type(target).__name__}; allowed are a handler class (not an instance of "
            "it), a project directory, and its cortex.yaml"
        )
    file, apis = find_apis(target)
    return from_spec(_choose(apis, api_name or name, file), file.parent, config_file=file.name)


def find_apis(target: str | os.PathLike[str]) -> tuple[Path, list[ApiSpec]]:
    """Return the configuration file of a project directory, and the APIs in it.

    Parameters
    ----------
    target : str or path
        The project directory, or the configuration file in it.

    Raises
    ------
    SpecError
        If there is no such file, or it cannot be used.
    """
    file = _config_file(os.fspath(target))
    return file, load_apis(file)


def from_archive(api: ApiSpec, before: Target) -> Target:
    """Return what an API is with another configuration, on the project or the class that it has.

    Parameters
    ----------
    api : ApiSpec
        The new configuration.
    before : Target
        The API as it was.

    Raises
    ------
    SpecError, ProjectError
        If the configuration does not fit the project.
    """
    if before.pickled is None:
        assert before.archive is not None
        made = from_spec(api, Path(project_archive.unpack(before.archive.data, before.archive.hash)))
        return dataclasses.replace(made, folder=before.folder)
    handler = dataclasses.replace(
        before.handler,
        type=api.handler.type,
        env=dict(api.handler.env),
        log_level=api.handler.log_level,
        **_accessories(api),  # dependencies belong to the class, not to its configuration
    )
    return dataclasses.replace(
        before,
        api_id=_api_id(_described(api) + before.pickled + (before.handler.project or "").encode()),
        handler=handler,
        config=api.handler.config,
        **_needs(api),
        defaults=api.job,
    )


def from_spec(api: ApiSpec, folder: Path, *, config_file: str | None = None) -> Target:
    """Pack the project of an API whose configuration is at hand, and check it.

    Parameters
    ----------
    api : ApiSpec
        The configuration.
    folder : Path
        The project directory.
    config_file : str, optional
        The configuration file in it, for messages; it is not packed.

    Raises
    ------
    SpecError, ProjectError, HandlerError
        As for :func:`from_path`.
    """
    where = str(folder / config_file) if config_file else api.name
    archive = project_archive.pack(folder, config_file)
    _check_files(api, folder, where, archive)
    warnings = list(archive.warnings)
    if api.networking is not None:
        warnings.append(f"{where}: networking: nothing listens here, so this key does nothing")
    handler = HandlerSettings(
        kind="project",
        type=api.handler.type,
        path=api.handler.path,
        project=archive.hash,
        python_path=api.handler.python_path,
        env=dict(api.handler.env),
        log_level=api.handler.log_level,
        dependencies=_dependencies(api, {entry.name for entry in archive.files}),
        **_accessories(api),
    )
    return Target(
        api.name,
        _api_id(_described(api) + archive.hash.encode()),
        handler,
        config=api.handler.config,
        **_needs(api),
        defaults=api.job,
        folder=folder,
        archive=archive,
        warnings=tuple(warnings),
    )


def _described(api: ApiSpec) -> bytes:
    """Return what an API is, without what submissions say by default."""
    return orjson.dumps(api.model_dump(mode="json", exclude_none=True, exclude={"job"}), option=orjson.OPT_SORT_KEYS)


def _config_file(target: str) -> Path:
    if "://" in target:
        raise SpecError(f"the target {shown(target)} is a URL; a project directory on this machine is needed")
    path = Path(target).expanduser()
    if path.is_dir():
        for name in CONFIG_FILES:
            if (path / name).is_file():
                return (path / name).resolve()
        raise SpecError(
            f"the directory {path} holds no {CONFIG_FILES[0]}; name the configuration file, or make a project with "
            "cortex-dask init"
        )
    if not path.exists():
        near = nearest(path.name, [entry.name for entry in path.parent.iterdir()]) if path.parent.is_dir() else None
        hint = f"did you mean {path.parent / near}? " if near else ""
        raise SpecError(
            f"the target {path} does not exist; {hint}a project directory, its cortex.yaml, or "
            "the name of a deployed API is needed"
        )
    if path.suffix == ".py":
        raise SpecError(f"the target {path} is Python code; give the project directory, or its cortex.yaml")
    return path.resolve()


def _choose(apis: list[ApiSpec], name: str | None, file: Path) -> ApiSpec:
    names = [api.name for api in apis]
    if name is None:
        if len(apis) > 1:
            raise SpecError(f"{file} has {len(apis)} APIs; say which one with api: {', '.join(names)}")
        return apis[0]
    if name not in names:
        near = nearest(name, names)
        hint = f"did you mean {near}? " if near else ""
        raise SpecError(f"api: {file} has no API {shown(name)}; {hint}it has {', '.join(names)}")
    return apis[names.index(name)]


def _check_files(api: ApiSpec, folder: Path, where: str, archive: project_archive.Archive) -> None:
    """Check that the files which the configuration names are in the archive, and the handler's source."""
    handler = api.handler
    names = {entry.name for entry in archive.files}
    dependencies = handler.dependencies
    listed = {"handler.path": handler.path}
    for kind in ("pip", "conda", "shell"):
        if dependencies is not None and (path := getattr(dependencies, kind)) is not None:
            listed[f"handler.dependencies.{kind}"] = path
    for key, path in listed.items():
        place = folder / path
        if not place.is_file():
            near = nearest(path, names)
            hint = f"; did you mean {near}?" if near else ""
            raise SpecError(f"{where}: {key}: there is no file {path} in {folder}{hint}")
        if path not in names and not any(path.startswith(f"{entry}/") for entry in names):
            reason = next((entry.reason for entry in archive.ignored if _covers(entry.name, path)), "left out")
            raise ProjectError(f"{where}: {key}: {path} is left out of the project ({reason})")
    if handler.python_path is not None and not (folder / handler.python_path).is_dir():
        raise SpecError(f"{where}: handler.python_path: there is no folder {handler.python_path} in {folder}")
    check_source(_source_text(folder / handler.path), str(folder / handler.path), handler.type)


def _covers(entry: str, path: str) -> bool:
    return entry == path or (entry.endswith("/") and path.startswith(entry))


def _source_text(path: Path) -> str:
    try:
        with tokenize.open(path) as file:  # minds the encoding that the file declares
            return file.read()
    except (SyntaxError, UnicodeDecodeError) as error:
        raise HandlerError(f"{path}: cannot be read as Python: {error}") from None
    except OSError as error:
        raise HandlerError(f"{path}: cannot be read: {error.strerror}") from None


def _needs(api: ApiSpec) -> dict[str, Any]:
    """Return what an API says of the machines that it runs on."""
    return {
        "compute": api.compute,
        "shm": None if api.handler.shm_size is None else parse_bytes(api.handler.shm_size),
        "kubernetes": {} if api.kubernetes is None else api.kubernetes.plain(),
    }


def _accessories(api: ApiSpec) -> dict[str, Any]:
    """Return what an API says of images and models, by the names that the handler's settings have for it."""
    keys = ("image", "models", "server_side_batching", "tensorflow_serving_image")
    given = api.handler.model_dump(mode="json", include=set(keys), exclude_none=True)
    return {key: given.get(key) for key in keys}


def _dependencies(api: ApiSpec, names: set[str]) -> dict[str, str]:
    """Return which lists of dependencies the project has, so that no worker has to look for them."""
    given = api.handler.dependencies
    found = {kind: name for kind, name in _DEPENDENCIES.items() if name in names}
    return found if given is None else found | given.model_dump(exclude_none=True)


def _api_id(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]
