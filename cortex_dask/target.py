"""What a job's target stands for: a handler class, or the API that a project directory configures."""

from __future__ import annotations

import hashlib
import os
import re
import sys
import tokenize
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson

from cortex_dask import project
from cortex_dask.api_spec import ApiSpec, ComputeSpec, check_name, load_apis
from cortex_dask.errors import HandlerError, ProjectError, SpecError
from cortex_dask.handler import check_class, check_source
from cortex_dask.io.settings import HandlerSettings
from cortex_dask.pickling import pickle_class
from cortex_dask.submission import Submission
from cortex_dask.wording import nearest, shown

__all__ = ["CONFIG_FILES", "Target", "from_class", "from_path"]

#: What the configuration file of a project directory is called, the usual name first.
CONFIG_FILES = ("cortex.yaml", "cortex.yml")

_PICKLE_WARNING = 10 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Target:
    """The API that a target stands for."""

    name: str
    api_id: str
    handler: HandlerSettings
    config: dict[str, Any] = field(default_factory=dict)
    compute: ComputeSpec = field(default_factory=ComputeSpec)
    defaults: Submission = field(default_factory=Submission)
    folder: Path | None = None  # what relative paths in the defaults are relative to
    archive: project.Archive | None = None
    pickled: bytes | None = None
    warnings: tuple[str, ...] = ()


def from_class(cls: type, name: str | None) -> Target:
    """Check and pickle a handler class.

    Parameters
    ----------
    cls : type
        The class.
    name : str or None
        The API's name; None: made from the class' name.

    Raises
    ------
    SpecError
        If the name is no DNS label.
    HandlerError
        If the class has a wrong signature or cannot be pickled.
    """
    check_class(cls)
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
        kind="class", cwd=cwd, sys_path=tuple(entry or cwd or "." for entry in sys.path if isinstance(entry, str))
    )
    return Target(api_name, _api_id(pickled), handler, pickled=pickled, warnings=tuple(warnings))


def _label(text: str) -> str:
    """Return a DNS label for a class' name: ``MyClassifier`` becomes ``my-classifier``."""
    text = text.rpartition("<locals>.")[2]
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "-", text).lower()
    return re.sub(r"[^a-z0-9]+", "-", words).strip("-")[:63].strip("-") or "handler"


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
    file = _config_file(os.fspath(target))
    apis = load_apis(file)
    api = _choose(apis, api_name or name, file)
    archive = project.pack(file.parent, file.name)
    names = {entry.name for entry in archive.files}
    _check_files(api, file, archive, names)
    warnings = list(archive.warnings)
    if api.networking is not None:
        warnings.append(f"{file}: networking: nothing listens here, so this key does nothing")
    described = orjson.dumps(
        api.model_dump(mode="json", exclude_none=True, exclude={"job"}), option=orjson.OPT_SORT_KEYS
    )
    handler = HandlerSettings(
        kind="project",
        type=api.handler.type,
        path=api.handler.path,
        project=archive.hash,
        python_path=api.handler.python_path,
        env=dict(api.handler.env),
        log_level=api.handler.log_level,
        extra=_extra(api),
    )
    return Target(
        api.name,
        _api_id(described + archive.hash.encode()),
        handler,
        config=api.handler.config,
        compute=api.compute,
        defaults=api.job,
        folder=file.parent,
        archive=archive,
        warnings=tuple(warnings),
    )


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
        raise SpecError(f"the target {path} does not exist; {hint}a project directory or its cortex.yaml is needed")
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


def _check_files(api: ApiSpec, file: Path, archive: project.Archive, names: set[str]) -> None:
    """Check that the files which the configuration names are in the archive, and the handler's source."""
    handler = api.handler
    dependencies = handler.dependencies
    listed = {"handler.path": handler.path}
    for kind in ("pip", "conda", "shell"):
        if dependencies is not None and (path := getattr(dependencies, kind)) is not None:
            listed[f"handler.dependencies.{kind}"] = path
    for key, path in listed.items():
        place = file.parent / path
        if not place.is_file():
            near = nearest(path, names)
            hint = f"; did you mean {near}?" if near else ""
            raise SpecError(f"{file}: {key}: there is no file {path} in {file.parent}{hint}")
        if path not in names and not any(path.startswith(f"{entry}/") for entry in names):
            reason = next((entry.reason for entry in archive.ignored if _covers(entry.name, path)), "left out")
            raise ProjectError(f"{file}: {key}: {path} is left out of the project ({reason})")
    if handler.python_path is not None and not (file.parent / handler.python_path).is_dir():
        raise SpecError(f"{file}: handler.python_path: there is no folder {handler.python_path} in {file.parent}")
    check_source(_source_text(file.parent / handler.path), str(file.parent / handler.path), handler.type)


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


def _extra(api: ApiSpec) -> dict[str, Any]:
    """Return what the engine itself has no use for."""
    keys = {"image", "shm_size", "dependencies", "models", "server_side_batching", "tensorflow_serving_image"}
    extra = api.handler.model_dump(mode="json", include=keys, exclude_none=True)
    compute = api.compute.model_dump(
        mode="json", include={"inf", "node_groups"}, exclude_none=True, exclude_defaults=True
    )
    return {**extra, "compute": compute} if compute else extra


def _api_id(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]
