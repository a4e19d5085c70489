"""The API configuration, ``cortex.yaml``: a list of APIs, one is common."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, field_validator, model_validator

from cortex_dask.errors import SpecError
from cortex_dask.formatting import nearest, shown
from cortex_dask.spec.kubernetes import KubernetesSpec
from cortex_dask.spec.quantity import ALLOWED, parse_bytes, parse_quantity
from cortex_dask.spec.submission import Submission, canonical
from cortex_dask.spec.validation import Document, validate
from cortex_dask.spec.yaml import load_yaml

#: The one kind of API that runs here.
KIND: Literal["BatchAPI"] = "BatchAPI"
#: Cortex' other kinds; a file may describe such APIs too.
_OTHER_KINDS = ("RealtimeAPI", "AsyncAPI", "TaskAPI", "TrafficSplitter")

_NAME = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?")
_DURATION = re.compile(r"(?:[0-9]+(?:\.[0-9]*)?(?:ns|us|µs|ms|s|m|h))+")


def check_name(value: str) -> str:
    """Return a name if it is a DNS label.

    Raises
    ------
    ValueError
        If it is none.
    """
    if not _NAME.fullmatch(value):
        better = re.sub(r"[^a-z0-9]+", "-", value.lower()).strip("-")[:63].strip("-")
        hint = f"; {better} would do" if better else ""
        raise ValueError(
            f"found {shown(value)}; allowed are at most 63 lower-case letters, digits and dashes, with no dash "
            f"at either end{hint}"
        )
    return value


def _inside(value: str) -> str:
    path = PurePosixPath(value)
    if not value or path.is_absolute() or ".." in path.parts or "\0" in value:
        raise ValueError(f"found {shown(value)}; allowed is a path inside the project directory, relative to it")
    return str(path)


def _quantity(value: Any) -> Any:
    if parse_quantity(value) <= 0:
        raise ValueError(f"found {shown(value)}; allowed is {ALLOWED}, more than 0")
    return value


def _bytes(value: Any) -> Any:
    parse_bytes(value)
    return value


def _duration(value: str) -> str:
    if not _DURATION.fullmatch(value):
        raise ValueError(f"found {shown(value)}; allowed is a duration such as 250ms, 1.5s or 2m")
    return value


Name = Annotated[str, AfterValidator(check_name)]
ProjectPath = Annotated[str, AfterValidator(_inside)]
Quantity = Annotated[Any, AfterValidator(_quantity)]
Memory = Annotated[Any, AfterValidator(_bytes)]

_PATH = "a path inside the project directory, relative to it"


class DependencySpec(Document):
    """``handler.dependencies``: where the lists of what to install lie."""

    pip: ProjectPath | None = Field(default=None, description=_PATH)
    conda: ProjectPath | None = Field(default=None, description=_PATH)
    shell: ProjectPath | None = Field(default=None, description=_PATH)


class ModelEntry(Document):
    """An entry of ``handler.models.paths``."""

    name: str = Field(description="the name that the handler calls the model by", min_length=1)
    path: str = Field(description="a path or URL", min_length=1)
    signature_key: str | None = Field(default=None, description="the name of a signature of the model", min_length=1)


class ModelSpec(Document):
    """``handler.models``: exactly one of ``path``, ``paths`` and ``dir``."""

    path: str | None = Field(default=None, description="a path or URL", min_length=1)
    paths: list[ModelEntry] | None = Field(
        default=None, description="a list of {name, path, signature_key}", min_length=1
    )
    dir: str | None = Field(default=None, description="a path or URL of a folder of models", min_length=1)
    signature_key: str | None = Field(default=None, description="the name of a signature of the model", min_length=1)

    @model_validator(mode="after")
    def _one(self) -> ModelSpec:
        given = [name for name in ("path", "paths", "dir") if getattr(self, name) is not None]
        if len(given) != 1:
            found = " and ".join(given) or "none of them"
            raise ValueError(f"found {found}; exactly one of path, paths and dir is needed")
        names = [entry.name for entry in self.paths or ()]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"found the model name {twice[0]!r} twice in paths; each name may stand once")
        return self


class ServerSideBatching(Document):
    """``handler.server_side_batching``: accepted for TensorFlow."""

    max_batch_size: int = Field(description="a whole number from 2 on", ge=2)
    batch_interval: Annotated[str, AfterValidator(_duration)] = Field(description="a duration such as 250ms")


class HandlerSpec(Document):
    """``handler``: the file with the class, and how its process is set up."""

    type: Literal["python", "tensorflow"] = "python"
    path: ProjectPath = Field(description=f"{_PATH}: the file with the class Handler")
    config: dict[str, Any] = Field(default_factory=dict, description="a mapping")
    python_path: ProjectPath | None = Field(default=None, description=_PATH)
    image: str | None = Field(default=None, description="the name of a container image", min_length=1)
    env: dict[str, str] = Field(default_factory=dict, description="text; put numbers, true and false in quotes")
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    shm_size: Memory = Field(default=None, description=ALLOWED)
    dependencies: DependencySpec | None = Field(
        default=None, description="a mapping with the keys pip, conda and shell"
    )
    models: ModelSpec | None = Field(default=None, description="a mapping with one of the keys path, paths and dir")
    server_side_batching: ServerSideBatching | None = Field(
        default=None, description="a mapping with the keys max_batch_size and batch_interval"
    )
    tensorflow_serving_image: str | None = Field(
        default=None, description="the name of a container image", min_length=1
    )

    @field_validator("env")
    @classmethod
    def _variables(cls, value: dict[str, str]) -> dict[str, str]:
        for name, text in value.items():
            if not name or "=" in name or "\0" in name + text:
                raise ValueError(
                    f"found the name {shown(name)}; a variable's name has no =, and neither it nor its value "
                    "holds a null character"
                )
        return value

    @model_validator(mode="after")
    def _fits_type(self) -> HandlerSpec:
        if self.type == "tensorflow" and self.models is None:
            raise ValueError("type: tensorflow needs the key models: {path | paths | dir}")
        if self.type == "python":
            for name in ("models", "server_side_batching", "tensorflow_serving_image"):
                if getattr(self, name) is not None:
                    raise ValueError(f"the key {name} is for type: tensorflow only; remove it, or change the type")
        return self


_GPU = "a whole number from 0 on, or the part of one for a worker that shares it: 0.5, 0.25, 0.1 (1/n)"


def _gpus(value: Any) -> float:
    """Return a number of devices; a part of one as exactly 1/n."""
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < float("inf"):
        if value == int(value):
            return int(value)
        parts = round(1 / value) if value < 1 else 0
        # 0.33 and 0.333 are meant as a third; 0.34 is more than that, and three of them do not fit.
        written = [1 / parts, *(10**digits // parts / 10**digits for digits in range(2, 8))] if parts else []
        if any(abs(value - part) < 1e-9 for part in written):
            return 1 / parts
    raise ValueError(f"found {shown(value)}; allowed is {_GPU}")


class ComputeSpec(Document):
    """``compute``: what one worker may use."""

    cpu: Quantity = Field(default=None, description=ALLOWED)
    gpu: Any = Field(default=0, description=_GPU)
    inf: int = Field(default=0, description="a whole number from 0 on", ge=0)
    mem: Memory = Field(default=None, description=ALLOWED)
    node_groups: list[str] | None = Field(default=None, description="a list of names")

    @field_validator("gpu", mode="before")
    @classmethod
    def _whole_or_part(cls, value: Any) -> float:
        return _gpus(value)

    def cpus(self) -> float | None:
        """Return the CPUs, None where nothing is said."""
        return None if self.cpu is None else float(parse_quantity(self.cpu))

    def memory(self) -> int | None:
        """Return the memory in bytes, None where nothing is said."""
        return None if self.mem is None else parse_bytes(self.mem)


class Networking(Document):
    """``networking``: accepted; there is nothing to do here."""

    endpoint: str | None = Field(default=None, description="text")


class ApiSpec(Document):
    """One API of ``cortex.yaml``."""

    name: Name = Field(description="lower-case letters, digits and dashes")
    kind: Literal["BatchAPI"] = KIND
    handler: HandlerSpec = Field(description="a mapping with at least the key path")
    compute: ComputeSpec = Field(default_factory=ComputeSpec, description="a mapping")
    networking: Networking | None = Field(default=None, description="a mapping with the key endpoint")
    kubernetes: KubernetesSpec | None = Field(
        default=None, description="a mapping with the keys namespace, labels and pod"
    )
    #: What a submission says where it says nothing else.
    job: Submission = Field(default_factory=Submission, description="a mapping with the keys of a submission")


def load_apis(path: str | Path) -> list[ApiSpec]:
    """Read the batch APIs of a configuration file.

    Parameters
    ----------
    path : str or Path
        The file, usually ``cortex.yaml``.

    Returns
    -------
    list of ApiSpec
        At least one. APIs of Cortex' other kinds are left out: nothing here can run them.

    Raises
    ------
    SpecError
        If the file cannot be read, is no YAML, holds no batch API, or anything in it is unknown or impossible; with a
        line for each mistake.
    """
    file = Path(path)
    document = load_yaml(file)
    if isinstance(document, Mapping):
        raise SpecError(
            f"{file}: found a mapping; a list of APIs is needed, put a dash before the first key: - name: …"
        )
    if not isinstance(document, list) or not document:
        found = "nothing" if not document else f"a value of type {type(document).__name__}"
        raise SpecError(f"{file}: found {found}; a list of APIs is needed, each with at least name, kind and handler")
    apis: list[ApiSpec] = []
    mistakes: list[str] = []
    for number, item in enumerate(document):
        if isinstance(item, Mapping) and item.get("kind") in _OTHER_KINDS:
            continue
        name = item.get("name") if isinstance(item, Mapping) else None
        where = f"{file}: {name}" if isinstance(name, str) and len(document) > 1 else str(file)
        try:
            apis.append(parse_api(item, source=where))
        except SpecError as error:
            mistakes.append(str(error) if name is not None or len(document) == 1 else f"{error} (entry {number + 1})")
    names = [api.name for api in apis]
    mistakes += [
        f"{file}: two APIs have the name {name!r}; each needs its own"
        for name in sorted(set(names))
        if names.count(name) > 1
    ]
    if mistakes:
        raise SpecError("\n".join(mistakes))
    if not apis:
        raise SpecError(f"{file}: it holds no API of the kind {KIND}, the only one that runs here")
    return apis


def parse_api(value: object, *, source: str = "") -> ApiSpec:
    """Check one API as a mapping.

    Parameters
    ----------
    value : object
        What stands in ``cortex.yaml``, or what was given to ``deploy``.
    source : str
        Stands before every message.

    Raises
    ------
    SpecError
        With a line for each mistake.
    """
    names: dict[str, str] = {}
    if isinstance(value, Mapping):
        if (
            isinstance(kind := value.get("kind"), str)
            and kind != KIND
            and (near := nearest(kind, (KIND, *_OTHER_KINDS)))
        ):
            other = near in _OTHER_KINDS
            hint = f"an API of the kind {near} cannot run here" if other else f"did you mean {near}?"
            raise SpecError(f"{source}: kind: found {shown(kind)}; allowed is {KIND}; {hint}".removeprefix(": "))
        if isinstance(job := value.get("job"), Mapping):
            moved, names = canonical(job, source=source, prefix="job")
            value = {**value, "job": moved}
    return validate(ApiSpec, value, source=source, names=names)
