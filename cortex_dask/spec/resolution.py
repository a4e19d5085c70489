"""``resolve``: a submission over its API's defaults, checked, as :class:`~cortex_dask.io.job.settings.JobSettings`.

What comes next is told by :mod:`cortex_dask.runtime.coordinator.coordinator`, which runs the job.
"""

from __future__ import annotations

import copy
import dataclasses
import datetime
import math
import os
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cortex_dask.errors import OutputError, SpecError
from cortex_dask.formatting import shown
from cortex_dask.io.job.settings import (
    ClusterSettings,
    ComputeSettings,
    DeadLetterSettings,
    JobSettings,
    LimitSettings,
    OutputSettings,
    SampleInput,
)
from cortex_dask.io.job.splits import DatasetInput
from cortex_dask.project import archive as project_archive
from cortex_dask.spec.api import ComputeSpec
from cortex_dask.spec.submission import INPUT_KINDS, Submission, canonical, load_submission
from cortex_dask.spec.target import Target, from_class, from_path
from cortex_dask.spec.validation import validate

if TYPE_CHECKING:
    from cortex_dask.io.planning.items import EncodedItems


def count_cores() -> int:
    """Return how many there are: those that a container or ``taskset`` leaves to it, where the system tells."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return max(1, len(os.sched_getaffinity(0)))
    return os.cpu_count() or 1


_DEFAULT_BATCH_SIZE = 1024


@dataclass(frozen=True, slots=True)
class ResolvedJob:
    """A checked submission, and the handler that has to be put beside it."""

    settings: JobSettings
    archive: project_archive.Archive | None = None
    pickled: bytes | None = field(default=None, repr=False)
    warnings: tuple[str, ...] = ()
    items: EncodedItems | None = None  # of an ``item_list``
    dry_run: bool = False  # whether the submission asks to be looked at only


def resolve(
    target: type | str | os.PathLike[str] | Target,
    *,
    input: Any = None,
    output: Any = None,
    api: str | None = None,
    name: str | None = None,
    job: Any = None,
    **keys: Any,
) -> ResolvedJob:
    """Check a submission, pack the project or pickle the class, and return the job's settings; nothing is written.

    ::

        resolve(Handler, input="data/in", output="data/out", batch_size=1024, workers=4)
        resolve("my-classifier/cortex.yaml", input="s3://bucket/in/", output={"path": "s3://bucket/out/", "keep": True})

    Parameters
    ----------
    target : type, str, path or Target
        A handler class, a project directory, or its ``cortex.yaml``; or what such a one stands for.
    input : str, path, or list of them, optional
        Files, directories or globs. Relative ones are relative to the working directory; those in ``cortex.yaml`` to
        the project directory.
    output : str, path or mapping, optional
        The output directory, or a mapping with the key ``path`` and others of ``output``.
    api : str, optional
        Which API, where the target has several; for a class its name.
    name : str, optional
        The API's name, for a class; default: made from the class' name.
    job : mapping, str or path, optional
        A submission, or the file that holds one (JSON or YAML; ``-`` is standard input), over which the other
        arguments go. Relative paths in it are relative to the working directory.
    **keys
        The other keys of a submission; None stands for a key that is not given.

    Raises
    ------
    SpecError
        If a key is unknown or has an impossible value, or something is missing; with a line for each mistake.
    HandlerError, ProjectError
        If the handler or its project cannot be used.
    """
    compute = keys.pop("compute", None)
    given = {**keys, "input": input, "output": output}
    document, where = ({}, "") if job is None else load_submission(job)
    if isinstance(target, Target):
        source = target
    else:
        source = from_class(target, name or api) if isinstance(target, type) else from_path(target, api, name)
    if compute is not None:
        source = dataclasses.replace(source, compute=_over_compute(source.compute, compute))
    spec = _merge(source, {key: value for key, value in given.items() if value is not None}, document, where)
    items = _items(spec)
    handler_config = copy.deepcopy(source.config)
    job_config = plain(spec.get("config", {}), "config")
    fewest, most = _workers(spec.get("workers"))
    settings = JobSettings(
        job_id=spec.get("job_id") or _new_job_id(),
        api_name=source.name,
        api_id=source.api_id,
        created_time=datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds"),
        handler=source.handler,
        dead_letters=_dead_letters(spec),
        dataset=_dataset(spec, source),
        batch_format=spec.get("dataset", {}).get("batch_format", "pandas") if _kind(spec) == "dataset" else "records",
        samples=_samples(spec, items),
        config=deep_merge(plain(handler_config, "handler.config"), job_config),
        job_config=job_config,
        output=_output(spec),
        workers=most or count_cores(),
        min_workers=fewest,
        workers_said=most is not None,
        compute=ComputeSettings(
            cpu=source.compute.cpus(),
            memory=source.compute.memory(),
            gpu=float(source.compute.gpu),
            inf=source.compute.inf,
            shm=source.shm,
            node_groups=None if source.compute.node_groups is None else tuple(source.compute.node_groups),
        ),
        cluster=ClusterSettings(kubernetes=copy.deepcopy(source.kubernetes)),
        limits=_limits(spec),
    )
    _check_keep(settings, items)
    _check_output(settings)
    return ResolvedJob(
        settings,
        source.archive,
        source.pickled,
        (*source.warnings, *(() if items is None else items.warnings)),
        items,
        spec.get("dry_run", False),
    )


def deep_merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``base`` overridden key by key by ``over``; mappings are merged, everything else is replaced.

    Examples
    --------
    >>> deep_merge({"a": {"b": 1, "c": 2}}, {"a": {"b": 3}})
    {'a': {'b': 3, 'c': 2}}
    """
    merged = dict(base)
    for key, value in over.items():
        old = merged.get(key)
        merged[key] = deep_merge(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return merged


# the submission -----------------------------------------------------------------------------------------------------


def _merge(source: Target, given: Mapping[str, Any], document: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return the submission over the API's defaults, with absolute paths; what nobody says is not in it."""
    base = _absolute(_said(source.defaults), lambda: source.folder or Path.cwd())
    written = _layer(document, where, _kind(base))
    submission = _over(written, _layer(given, "", _kind(written if _kinds(written) else base)))
    kinds = _kinds(submission)
    if len(kinds) > 1:
        stray = list(submission["dataset"]) if kinds[0] == "dataset" else ["paths"]
        if "paths" not in stray:
            raise SpecError(f"{stray[0]}: only a dataset has this key, and the input is {kinds[1]}; leave it out")
        raise SpecError(f"found the input kinds {' and '.join(kinds)}; exactly one is allowed")
    if kinds:
        base = {key: value for key, value in base.items() if key not in INPUT_KINDS or key in kinds}
    merged = _over(base, submission)
    if len(kinds := _kinds(merged)) > 1:
        raise SpecError(f"found the input kinds {' and '.join(kinds)}; exactly one is allowed")
    return merged


def _layer(given: Mapping[str, Any], where: str, default_kind: str) -> dict[str, Any]:
    moved, names = canonical(given, source=where, default_kind=default_kind)
    return _absolute(_said(validate(Submission, moved, source=where, names=names)), Path.cwd)


def _over(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Return one submission over another."""
    merged = {**base, **over}
    for key in (*INPUT_KINDS, "output"):
        if key in base and key in over:
            merged[key] = {**base[key], **over[key]}
    if "config" in base and "config" in over:
        merged["config"] = deep_merge(base["config"], over["config"])
    return merged


def _kinds(spec: Mapping[str, Any]) -> list[str]:
    return [kind for kind in INPUT_KINDS if kind in spec]


def _kind(spec: Mapping[str, Any]) -> str:
    return next(iter(_kinds(spec)), "dataset")


def _said(submission: Submission) -> dict[str, Any]:
    said = submission.model_dump(exclude_none=True, exclude={"item_list": {"items"}})
    if submission.item_list is not None and submission.item_list.items is not None:
        said["item_list"]["items"] = submission.item_list.items  # as they are: there may be millions
    return said


def _absolute(spec: dict[str, Any], folder: Any) -> dict[str, Any]:
    """Make local paths absolute, so that they mean the same wherever the job runs."""
    places = {"dataset": "paths", "file_path_lister": "s3_paths", "delimited_files": "s3_paths"}
    for section, key in {**places, "output": "path", "dead_letter": "path"}.items():
        value = spec.get(section, {}).get(key)
        if isinstance(value, list):
            spec[section][key] = [_absolute_path(item, folder) for item in value]
        elif isinstance(value, str):
            spec[section][key] = _absolute_path(value, folder)
    return spec


def _absolute_path(path: str, folder: Any) -> str:
    if "://" in path or "::" in path:
        return path
    path = os.path.expanduser(path)  # noqa: PTH111 - a Path would drop the slash at the end, which prefixes mind
    if not os.path.isabs(path):  # noqa: PTH117 - as above
        path = f"{str(folder()).rstrip('/')}/{path}"
    end = "/" if path.endswith("/") else ""
    return os.path.normpath(path).rstrip("/") + end or "/"


def _dataset(spec: Mapping[str, Any], source: Target) -> DatasetInput:
    kind = _kind(spec)
    if kind != "dataset":
        return DatasetInput(
            paths=tuple(spec[kind].get("s3_paths", ())), format="json", batch_size=spec[kind]["batch_size"]
        )
    dataset = spec.get("dataset", {})
    if not dataset.get("paths"):
        where = " (or job: input in cortex.yaml)" if source.folder else ""
        raise SpecError(f"input: is missing{where}; name the files, directories or globs to read")
    return DatasetInput(
        paths=tuple(dataset["paths"]),
        format=dataset.get("format", "auto"),
        columns=tuple(dataset["columns"]) if "columns" in dataset else None,
        filters=dataset.get("filters"),
        batch_size=dataset.get("batch_size", _DEFAULT_BATCH_SIZE),
    )


def _items(spec: Mapping[str, Any]) -> EncodedItems | None:
    """Check that an input of samples is whole, and return the items of an ``item_list``."""
    kind = _kind(spec)
    if kind == "dataset":
        return None
    needed = "items" if kind == "item_list" else "s3_paths"
    for key in (needed, "batch_size"):
        if key not in spec[kind]:
            raise SpecError(f"{kind}.{key}: is missing; {kind} needs the keys {needed} and batch_size")
    if kind != "item_list":
        return None
    from cortex_dask.io.planning.items import encode_items

    try:
        return encode_items(spec[kind]["items"], spec[kind]["batch_size"])
    except ValueError as error:
        raise SpecError(str(error)) from None


def _samples(spec: Mapping[str, Any], items: EncodedItems | None) -> SampleInput | None:
    match _kind(spec):
        case "item_list":
            assert items is not None
            return SampleInput("item_list", items=items.count, digest=items.digest, size=items.size)
        case "file_path_lister" | "delimited_files" as kind:
            files = spec[kind]
            return SampleInput(kind, tuple(files.get("includes", ())), tuple(files.get("excludes", ())))
    return None


def _check_output(settings: JobSettings) -> None:
    """Refuse an output that a later job over the same input would read as well."""
    if settings.output is None or settings.samples is not None:
        return
    output = f"{settings.output.url.rstrip('/')}/"
    for path in settings.dataset.paths:
        folder = f"{path.rstrip('/')}/"
        inside = output.removeprefix(folder) if output.startswith(folder) else None
        if inside is None or any(part.startswith(("_", ".")) for part in inside.split("/")):
            continue  # readers skip such names
        if inside or settings.output.mode != "error":
            what = "lies in the input" if inside else "is the input"
            raise OutputError(
                f"the output directory {settings.output.url} {what} directory {path}: jobs would read it as input, "
                "choose another"
            )


def _check_keep(settings: JobSettings, items: EncodedItems | None) -> None:
    """Refuse to keep the fields of samples that have none."""
    if settings.samples is None or settings.output is None or not settings.output.keep:
        return
    if settings.samples.kind == "file_path_lister" or (items is not None and not items.objects):
        what = "the items are not all mappings" if items is not None else "the samples are paths"
        raise SpecError(f"output.keep: {what}, which have no columns to keep; return them from handle_batch instead")


def _output(spec: Mapping[str, Any]) -> OutputSettings | None:
    output = spec.get("output")
    if output is None:
        return None
    if "path" not in output:
        raise SpecError(f"output: is missing, but {', '.join(sorted(output))} speak of it; name a directory")
    kind, compression = output.get("format", "parquet"), output.get("compression")
    if kind == "json" and compression not in (None, "none", "gzip"):
        raise SpecError(f"output.compression: found {shown(compression)}; allowed for json is none or gzip")
    keep = output.get("keep", False)
    return OutputSettings(
        url=output["path"],
        format=kind,
        keep=tuple(keep) if isinstance(keep, list) else keep,
        mode=output.get("mode", "error"),
        schema=output.get("schema_"),
        compression=None if kind == "json" and compression == "none" else compression,
    )


def _over_compute(base: ComputeSpec, given: Any) -> ComputeSpec:
    """Return an API's ``compute`` with what the submission says instead."""
    said = given if not isinstance(given, Mapping) else {**base.model_dump(exclude_unset=True), **given}
    return validate(ComputeSpec, said, prefix="compute")


def _workers(value: int | dict[str, int] | None) -> tuple[int | None, int | None]:
    """Return the least number of workers (None: it is fixed) and the greatest (None: nobody has said)."""
    if isinstance(value, dict):
        return value["min"], value["max"]
    return None, value


def _limits(spec: Mapping[str, Any]) -> LimitSettings:
    said = {
        key: spec[key] for key in ("timeout", "batch_timeout", "stall_timeout", "max_failed_batches") if key in spec
    }
    attempts = spec.get("max_attempts")
    for key in ("sqs_dead_letter_queue", "dead_letter"):
        if key not in spec:
            continue
        count = spec[key]["max_receive_count"]
        if attempts is not None and attempts != count:
            raise SpecError(f"max_attempts: found {attempts}, but {key}.max_receive_count is {count}; give one of them")
        attempts = count
    return LimitSettings(**said, **({} if attempts is None else {"max_attempts": attempts}))


def _dead_letters(spec: Mapping[str, Any]) -> DeadLetterSettings | None:
    queue, folder = spec.get("sqs_dead_letter_queue"), spec.get("dead_letter")
    if queue is not None and folder is not None:
        raise SpecError("found sqs_dead_letter_queue and dead_letter; at most one of them is allowed")
    if queue is not None:
        return DeadLetterSettings(queue["max_receive_count"], queue_arn=queue["arn"])
    if folder is not None:
        return DeadLetterSettings(folder["max_receive_count"], folder=folder["path"])
    return None


def plain(value: Any, path: str) -> Any:
    """Return a configuration as JSON has it: what the handler gets must not depend on where it was read.

    Parameters
    ----------
    value : object
        The configuration.
    path : str
        Where it stands, for messages.

    Raises
    ------
    SpecError
        If something in it has no place in JSON.
    """
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, Mapping):
        wrong = next((key for key in value if not isinstance(key, str)), None)
        if wrong is not None:
            raise SpecError(f"{path}: found the key {shown(wrong)}; keys must be text, put it in quotes")
        return {key: plain(item, f"{path}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item, f"{path}[{number}]") for number, item in enumerate(value)]
    if not isinstance(value, int | float) and getattr(value, "shape", None) == () and hasattr(value, "item"):
        value = value.item()  # a scalar of NumPy
    if isinstance(value, int) and -(2**63) <= value < 2**64:
        return int(value)
    if isinstance(value, float) and math.isfinite(value):
        return float(value)
    found = f"the number {value}" if isinstance(value, int | float) else f"a value of type {type(value).__name__}"
    raise SpecError(
        f"{path}: found {found}; allowed are text, finite numbers of 64 bits, true, false, null, lists and mappings"
    )


def _new_job_id() -> str:
    """Return an id that is readable, unique, and sorts by time: ``20261123-201509-7f3a9c``."""
    return f"{datetime.datetime.now(datetime.UTC):%Y%m%d-%H%M%S}-{secrets.token_hex(3)}"
