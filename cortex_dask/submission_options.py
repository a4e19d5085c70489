"""The keywords of a submission, as ``run`` and ``submit`` take them, and functions whose signatures show them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict, TypeVar

__all__ = ["Options", "spelt_out"]


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
