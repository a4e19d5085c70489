"""What a submission says: the input, the output, how to run, and when to give up.

Users write it as keyword arguments, as options of the command line, and under ``job:`` in ``cortex.yaml`` as defaults.
The short keys ``input``, ``batch_size``, ``keep`` … stand for the long ones, ``dataset.paths``, ``dataset.batch_size``,
``output.keep`` …; :func:`canonical` moves them to their places.
"""

from __future__ import annotations

import inspect
import json
import operator
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypedDict, TypeVar

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from cortex_dask.errors import DatasetError, SpecError
from cortex_dask.formatting import shown
from cortex_dask.spec.validation import Document

#: The input kinds: a job has exactly one.
INPUT_KINDS = ("dataset", "item_list", "file_path_lister", "delimited_files")

_COUNT = "a whole number from 1 on"
_SECONDS = "a number of seconds above 0"
_PATHS = "a path or URL, or a list of them"
_NAMES = "a list of column names"

#: Short keys and the places they stand for. ``batch_size`` belongs to whichever input kind there is.
_SHORT = {
    "input": ("dataset", "paths"),
    "format": ("dataset", "format"),
    "columns": ("dataset", "columns"),
    "filters": ("dataset", "filters"),
    "batch_format": ("dataset", "batch_format"),
    "keep": ("output", "keep"),
    "mode": ("output", "mode"),
}


def _paths(value: Any) -> list[str]:
    items = [value] if isinstance(value, str | os.PathLike) else value
    if not isinstance(items, Sequence) or not items:
        raise ValueError(f"found {shown(value)}; allowed is {_PATHS}")
    paths = []
    for item in items:
        path = os.fspath(item) if isinstance(item, os.PathLike) else item
        if not isinstance(path, str) or not path.strip() or "\0" in path:
            raise ValueError(f"found {shown(item)}; allowed is {_PATHS}")
        paths.append(path)
    return paths


def _path(value: Any) -> str:
    if not isinstance(value, str | os.PathLike):
        raise ValueError(f"found {shown(value)}; allowed is a path or URL")
    return _paths(value)[0]


def _whole(value: Any) -> Any:
    """Take the integers of NumPy for what they are."""
    return value if isinstance(value, bool) or not hasattr(value, "__index__") else operator.index(value)


def _list(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _names(value: Any) -> list[str]:
    items = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else []
    if not items or not all(isinstance(item, str) and item for item in items):
        raise ValueError(f"found {shown(value)}; allowed is {_NAMES}")
    twice = [item for item in items if items.count(item) > 1]
    if twice:
        raise ValueError(f"found the column {twice[0]!r} twice; each may stand once")
    return items


def _keep(value: Any) -> bool | list[str]:
    if isinstance(value, bool):
        return value
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise ValueError(f"found {shown(value)}; allowed is true, false or {_NAMES}")
    return _names(value) if value else False


def _glob(value: str) -> str:
    from cortex_dask.io.input.glob import compile_glob

    try:
        compile_glob(value)
    except ValueError as error:
        raise ValueError(f"the pattern {shown(value)} {error}") from None
    return value


def _filters(value: Any) -> Any:
    from cortex_dask.io.input.filters import parse_filters, plain_filters

    try:
        return plain_filters(parse_filters(value))
    except DatasetError as error:
        raise ValueError(str(error)) from None


def _schema(value: Any) -> str:
    """Return a declared schema as base64 of Arrow IPC."""
    import pyarrow as pa

    from cortex_dask.io.arrow.declaration import parse_schema
    from cortex_dask.io.arrow.schema import encode_schema

    if not isinstance(value, pa.Schema):
        if not isinstance(value, Mapping) or not value:
            raise ValueError(f"found {shown(value)}; allowed is a mapping of column names to types, such as id: int64")
        wrong = next(
            (name for name, kind in value.items() if not isinstance(name, str) or not isinstance(kind, str)), None
        )
        if wrong is not None:
            raise ValueError(f"the type of {shown(wrong)} is {shown(value[wrong])}; a type is text, such as int64")
    try:
        return encode_schema(parse_schema(value))
    except SpecError as error:
        raise ValueError(str(error).removeprefix("output.schema: ")) from None


def _workers(value: Any) -> Any:
    """Return a number of workers, or ``{"min": …, "max": …}``; ``2-20`` stands for the latter."""
    allowed = f"{_COUNT}, or {{min: 0, max: 20}} (as text 0-20) for as many as there is work for"
    if isinstance(value, str) and (match := re.fullmatch(r"\s*([0-9]+)(?:\s*-\s*([0-9]+))?\s*", value)):
        value = int(match[1]) if match[2] is None else {"min": int(match[1]), "max": int(match[2])}
    value = _whole(value)
    if isinstance(value, Mapping):
        least, most = _whole(value.get("min", 0)), _whole(value.get("max"))
        if not {"max"} <= set(value) <= {"min", "max"} or not all(
            isinstance(item, int) and not isinstance(item, bool) for item in (least, most)
        ):
            raise ValueError(f"found {shown(value)}; allowed is {allowed}")
        if not 0 <= least <= most or most < 1:
            raise ValueError(f"found {shown(value)}; min must be from 0 to max, and max at least 1")
        return {"min": least, "max": most}
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"found {shown(value)}; allowed is {allowed}")
    return value


def _seconds(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
        raise ValueError(f"found {shown(value)}; allowed is {_SECONDS}")
    return float(value)


def _job_seconds(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 1 <= value < float("inf"):
        raise ValueError(f"found {shown(value)}; allowed is a number of seconds from 1 on")
    return float(value)


def _failures(value: Any) -> float:
    """Return a number of batches (a whole number from 1 on), or a share (0 or more and less than 1)."""
    allowed = "a whole number of batches (10) or a share below 1 (0.05 or 5%)"
    number, share = value, False
    if isinstance(value, str) and (match := re.fullmatch(r"\s*([0-9]+(?:\.[0-9]*)?|\.[0-9]+)\s*%\s*", value)):
        number, share = float(match[1]) / 100, True
    if isinstance(number, bool) or not isinstance(number, int | float) or not 0 <= number < float("inf"):
        raise ValueError(f"found {shown(value)}; allowed is {allowed}")
    if number >= 1 and (share or number != int(number)):
        raise ValueError(f"found {shown(value)}; allowed is {allowed}; leave the key out for no limit")
    return float(number)


def _job_id(value: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,98}[A-Za-z0-9])?", value):
        raise ValueError(
            f"found {shown(value)}; allowed are at most 100 letters, digits, dashes, underscores and dots, "
            "with a letter or digit at both ends"
        )
    return value


Paths = Annotated[list[str], BeforeValidator(_paths)]
Count = Annotated[int, BeforeValidator(_whole), Field(ge=1)]
Globs = Annotated[list[Annotated[str, AfterValidator(_glob)]], BeforeValidator(_list)]
Seconds = Annotated[float, BeforeValidator(_seconds)]


class Dataset(Document):
    """``dataset``: rows of Parquet or JSON files."""

    paths: Paths | None = Field(default=None, description=_PATHS)
    format: Literal["auto", "parquet", "json"] | None = None
    columns: Annotated[list[str], BeforeValidator(_names)] | None = Field(default=None, description=_NAMES)
    filters: Annotated[Any, BeforeValidator(_filters)] = Field(
        default=None, description="a list of [column, operator, value]"
    )
    batch_size: Count | None = Field(default=None, description=_COUNT)
    batch_format: Literal["pandas", "pyarrow", "polars", "numpy", "records"] | None = None


class ItemList(Document):
    """``item_list``: the samples themselves."""

    items: Annotated[list[Any], BeforeValidator(_list)] | None = Field(
        default=None, description="a list of at least one JSON value", min_length=1
    )
    batch_size: Count | None = Field(default=None, description=_COUNT)


class FilesInput(Document):
    """``file_path_lister`` and ``delimited_files``: files by prefix, narrowed down by globs."""

    s3_paths: Paths | None = Field(default=None, description=_PATHS)
    includes: Globs | None = Field(default=None, description="a list of globs")
    excludes: Globs | None = Field(default=None, description="a list of globs")
    batch_size: Count | None = Field(default=None, description=_COUNT)

    @model_validator(mode="before")
    @classmethod
    def _alias(cls, value: Any) -> Any:
        if isinstance(value, Mapping) and "paths" in value:
            if value.get("s3_paths") is not None:
                raise ValueError("paths and s3_paths mean the same; give one of them")
            value = {("s3_paths" if key == "paths" else key): item for key, item in value.items()}
        return value


class Output(Document):
    """``output``: where the rows go that ``handle_batch`` returns."""

    path: Annotated[str, BeforeValidator(_path)] | None = Field(
        default=None, description="a path or URL of a directory"
    )
    format: Literal["parquet", "json"] | None = None
    keep: Annotated[bool | list[str], BeforeValidator(_keep)] | None = Field(
        default=None, description=f"true, false or {_NAMES}"
    )
    mode: Literal["error", "append", "overwrite"] | None = None
    schema_: Annotated[str, BeforeValidator(_schema)] | None = Field(
        default=None, alias="schema", description="a mapping of column names to types"
    )
    compression: Literal["none", "snappy", "gzip", "zstd", "lz4", "brotli"] | None = None


def _arn(value: str) -> str:
    if not re.fullmatch(r"arn:aws[a-z-]*:sqs:[a-z0-9-]+:[0-9]{12}:[A-Za-z0-9_-]{1,80}(?:\.fifo)?", value):
        raise ValueError(
            f"found {shown(value)}; allowed is the ARN of an SQS queue: arn:aws:sqs:<region>:<account>:<name>"
        )
    return value


class SqsDeadLetterQueue(Document):
    """``sqs_dead_letter_queue``: where batches go that failed for good."""

    arn: Annotated[str, AfterValidator(_arn)] = Field(description="the ARN of an SQS queue")
    max_receive_count: Count = Field(description=_COUNT)


class DeadLetter(Document):
    """``dead_letter``: the same, in storage."""

    path: Annotated[str, BeforeValidator(_path)] = Field(description="a path or URL of a directory")
    max_receive_count: Count = Field(description=_COUNT)


class Submission(Document):
    """A submission, or the defaults of one; whatever is not said is None."""

    also_known: ClassVar[tuple[str, ...]] = (*_SHORT, "batch_size", "dry_run")

    dataset: Dataset | None = Field(default=None, description="a mapping with at least the key paths")
    item_list: ItemList | None = Field(default=None, description="a mapping with the keys items and batch_size")
    file_path_lister: FilesInput | None = Field(
        default=None, description="a mapping with the keys s3_paths and batch_size"
    )
    delimited_files: FilesInput | None = Field(
        default=None, description="a mapping with the keys s3_paths and batch_size"
    )
    output: Output | None = Field(default=None, description="a path or URL, or a mapping with at least the key path")
    workers: Annotated[int | dict[str, int], BeforeValidator(_workers)] | None = Field(
        default=None, description=f"{_COUNT}, or {{min: 0, max: 20}}"
    )
    config: dict[str, Any] | None = Field(default=None, description="a mapping")
    timeout: Annotated[float, BeforeValidator(_job_seconds)] | None = Field(
        default=None, description="a number of seconds from 1 on"
    )
    batch_timeout: Seconds | None = Field(default=None, description=_SECONDS)
    stall_timeout: Seconds | None = Field(default=None, description=_SECONDS)
    max_attempts: Count | None = Field(default=None, description=_COUNT)
    max_failed_batches: Annotated[float, BeforeValidator(_failures)] | None = Field(
        default=None, description="a whole number of batches (10) or a share below 1 (0.05 or 5%)"
    )
    sqs_dead_letter_queue: SqsDeadLetterQueue | None = Field(
        default=None, description="a mapping with the keys arn and max_receive_count"
    )
    dead_letter: DeadLetter | None = Field(
        default=None, description="a mapping with the keys path and max_receive_count"
    )
    dry_run: bool | None = Field(default=None, alias="dryRun", description="true or false")
    job_id: Annotated[str, AfterValidator(_job_id)] | None = Field(
        default=None, description="letters, digits, dashes, underscores and dots"
    )

    @property
    def kinds(self) -> list[str]:
        """The input kinds that are given."""
        return [kind for kind in INPUT_KINDS if getattr(self, kind) is not None]


def canonical(
    given: Mapping[str, Any], *, source: str = "", prefix: str = "", default_kind: str = "dataset"
) -> tuple[dict[str, Any], dict[str, str]]:
    """Move short keys to the places they stand for.

    Parameters
    ----------
    given : mapping
        A submission as the user wrote it.
    source, prefix : str
        Where it stands: the file, and the key in it.
    default_kind : str
        The input kind that ``batch_size`` belongs to where ``given`` has none.

    Returns
    -------
    dict, dict
        The submission with long keys only, and for the path of each moved value the path where the user wrote it.

    Raises
    ------
    SpecError
        If a value is given by its short and its long key.
    """
    start = f"{source}: " if source else ""
    dotted = f"{prefix}." if prefix else ""
    moved = {key: item for key, item in given.items() if key not in _SHORT and key != "batch_size"}
    names: dict[str, str] = {}
    mistakes = []
    if "dry_run" in moved and "dryRun" not in moved:
        moved["dryRun"] = moved.pop("dry_run")
        names[f"{dotted}dryRun"] = f"{dotted}dry_run"
    if isinstance(moved.get("output"), str | os.PathLike):
        names[f"{dotted}output.path"] = f"{dotted}output"
        moved["output"] = {"path": moved["output"]}
    kinds = [kind for kind in INPUT_KINDS if moved.get(kind) is not None]
    places = {**_SHORT, "batch_size": (kinds[0] if kinds else default_kind, "batch_size")}
    for short, (section, key) in places.items():
        if given.get(short) is None:
            continue
        target = moved.get(section)
        if target is None:
            target = {}
        if not isinstance(target, Mapping):
            continue  # the model says what is wrong with it
        if target.get(key) is not None:
            mistakes.append(f"{start}{dotted}{short} and {dotted}{section}.{key} mean the same; give one of them")
        moved[section] = {**target, key: given[short]}
        names[f"{dotted}{section}.{key}"] = f"{dotted}{short}"
    if mistakes:
        raise SpecError("\n".join(mistakes))
    return moved, names


#: The file name that stands for standard input.
STANDARD_INPUT = "-"


def load_submission(job: object) -> tuple[dict[str, Any], str]:
    """Return a submission's keys and where they stand, for messages.

    Parameters
    ----------
    job : mapping, str or path
        The keys themselves, the name of a file, or ``-`` for standard input.

    Raises
    ------
    SpecError
        If it is neither, or the file cannot be read or holds no mapping.
    """
    if isinstance(job, Mapping):
        return dict(job), "job"
    if not isinstance(job, str | os.PathLike):
        raise SpecError(f"job: found {shown(job)}; allowed is a mapping, or the name of a JSON or YAML file")
    name = os.fspath(job)
    source = "standard input" if name == STANDARD_INPUT else name
    value = _parsed(_read(name), source)
    if not isinstance(value, dict):
        found = "nothing" if value is None else f"a {type(value).__name__}"
        raise SpecError(f"{source}: holds {found}; a submission is a mapping with an input kind such as item_list")
    return value, source


def _read(name: str) -> bytes:
    try:
        return sys.stdin.buffer.read() if name == STANDARD_INPUT else Path(name).expanduser().read_bytes()
    except OSError as error:
        raise SpecError(f"job: the file {name} cannot be read: {error.strerror or error}") from None


def _parsed(data: bytes, source: str) -> Any:
    """Parse JSON where it is JSON, as a YAML parser takes minutes for what may be a million items."""
    if data.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"{"):
        from cortex_dask.io.json.reader import parse_line

        try:
            return parse_line(data.removeprefix(b"\xef\xbb\xbf"))
        except json.JSONDecodeError as error:
            if source.endswith(".json"):
                raise SpecError(f"{source}:{error.lineno}:{error.colno}: this is no JSON: {error.msg}") from None
        except (ValueError, RecursionError) as error:
            raise SpecError(f"{source}: this is no JSON: {' '.join(str(error).split())}") from None
    from cortex_dask.spec.yaml import parse_yaml

    return parse_yaml(data, source)


class Options(TypedDict, total=False):
    """The keywords of a submission; keys of ``cortex.yaml`` and options of the command line have the same names."""

    api: str  # which one of the APIs in the target, when it has several
    batch_size: int
    batch_format: str
    columns: Sequence[str]
    filters: Any
    format: str
    keep: bool | Sequence[str]
    mode: str
    workers: int | Mapping[str, int]
    config: Mapping[str, Any]
    timeout: float
    batch_timeout: float
    stall_timeout: float
    max_attempts: int
    max_failed_batches: float | str
    job_id: str
    name: str
    item_list: Mapping[str, Any]
    file_path_lister: Mapping[str, Any]
    delimited_files: Mapping[str, Any]
    dataset: Mapping[str, Any]
    job: Mapping[str, Any] | str | Path  # a submission with these keys, or a JSON or YAML file of it
    dry_run: bool
    sqs_dead_letter_queue: Mapping[str, Any]
    dead_letter: Mapping[str, Any]
    compute: Mapping[str, Any]
    cluster_options: Mapping[str, Any]


_Function = TypeVar("_Function", bound=Callable[..., Any])


def spelt_out(function: _Function) -> _Function:
    """Show the keywords of :class:`Options` in the signature, for ``help`` and for completion in notebooks."""
    signature = inspect.signature(function)
    fixed = [item for item in signature.parameters.values() if item.kind is not inspect.Parameter.VAR_KEYWORD]
    options = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Options.__annotations__[name])
        for name in Options.__annotations__
    ]
    function.__signature__ = signature.replace(parameters=[*fixed, *options])  # type: ignore[attr-defined]  # functions take it
    return function
