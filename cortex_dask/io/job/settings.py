"""A job as it is stored: the resolved, validated submission that every process of the job reads.

Users write YAML, JSON and keyword arguments; :mod:`cortex_dask.spec.resolution` checks those (with pydantic) and
resolves them into :class:`JobSettings`, which travels as ``job.json`` in the job directory. It needs nothing but the
standard library, so the handler process reads it without the weight of a validator. It never holds a secret: no
``.env`` value, no storage credential.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, Self

from cortex_dask.io.job.splits import BatchFormat, DatasetInput


@dataclass(frozen=True, slots=True)
class HandlerSettings:
    """Where the handler comes from and how its process is set up."""

    #: ``project``: a packed project directory, ``path`` names the file in it. ``class``: a class pickled by value.
    kind: Literal["project", "class"]
    type: Literal["python", "tensorflow"] = "python"
    path: str | None = None  # of the file with the class ``Handler``, relative to the project directory
    project: str | None = None  # SHA-256 of the archive ``projects/<hash>.tar.gz`` in the environment's store
    python_path: str | None = None  # relative to the project directory; None: the project directory itself
    env: dict[str, str] = field(default_factory=dict)  # from ``handler.env`` (``.env`` stays in the archive)
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    #: For classes: the submitter's working directory and import path, used where they exist (on one machine they do).
    cwd: str | None = None
    sys_path: tuple[str, ...] = ()
    image: str | None = None  # a container image for the workers, on clusters that start containers
    python: str | None = None  # the version, as in 3.12, whose bytecode the pickle of a class holds
    dependencies: dict[str, str] = field(default_factory=dict)  # pip, conda and shell: a path in the project each
    models: dict[str, Any] | None = None  # what ``handler.models`` says, of ``type: tensorflow``
    server_side_batching: dict[str, Any] | None = None  # accepted, and without effect
    tensorflow_serving_image: str | None = None  # accepted, and without effect

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """Build settings from plain JSON values; earlier releases kept some of them below ``extra``."""
        return cls(**_known(cls, {**value, **value.get("extra", {})}, tuples=("sys_path",)))


@dataclass(frozen=True, slots=True)
class DeadLetterSettings:
    """Where failures are delivered as well: to a queue or to a folder."""

    max_receive_count: int  # attempts at a batch before it counts as failed
    queue_arn: str | None = None
    folder: str | None = None  # a path or URL


@dataclass(frozen=True, slots=True)
class OutputSettings:
    """Where and how the rows go that ``handle_batch`` returns."""

    url: str
    format: Literal["parquet", "json"] = "parquet"
    keep: bool | tuple[str, ...] = False  # input columns that stand beside the returned ones
    mode: Literal["error", "append", "overwrite"] = "error"
    schema: str | None = None  # a declared Arrow schema as base64 of Arrow IPC; None: settled from the first rows
    compression: str | None = None  # None: snappy for Parquet, none for JSON lines; JSON lines take gzip too

    @property
    def suffix(self) -> str:
        """The ending of a part's name."""
        if self.format == "parquet":
            return ".parquet"
        return ".jsonl.gz" if self.compression == "gzip" else ".jsonl"


@dataclass(frozen=True, slots=True)
class LimitSettings:
    """When to give up: times in seconds."""

    timeout: float | None = None  # the whole job
    batch_timeout: float | None = None  # one call of handle_batch
    stall_timeout: float | None = None  # a split without any progress (reading, handling or writing)
    max_attempts: int = 3  # of a batch: exceptions, crashes, memory kills, timeouts
    max_failed_batches: float | None = None  # >= 1: a number; < 1: a share of all batches; None: no limit


@dataclass(frozen=True, slots=True)
class ComputeSettings:
    """What one worker slot may use."""

    cpu: float | None = None  # threads for BLAS, OpenMP and Arrow in the handler process: max(1, floor(cpu))
    memory: int | None = None  # bytes of the handler process and its children; None: no limit
    gpu: float = 0.0  # devices for a slot; 0.5: two slots share one
    inf: int = 0  # AWS Neuron devices for a slot
    shm: int | None = None  # bytes of /dev/shm
    node_groups: tuple[str, ...] | None = None  # where workers may run

    @property
    def threads(self) -> int:
        """How many threads a handler process should use."""
        return max(int(self.cpu or 1), 1)


@dataclass(frozen=True, slots=True)
class ClusterSettings:
    """Where a job was submitted to, and how that cluster is made."""

    name: str = "local"  # or inline, gateway, kubernetes, or a scheduler's address
    options: dict[str, Any] = field(default_factory=dict)  # of the backend, over those of the environment
    kubernetes: dict[str, Any] = field(default_factory=dict)  # the API's ``kubernetes:``, checked
    gateway: dict[str, Any] = field(default_factory=dict)  # the environment's ``gateway:``: a site's names for options


@dataclass(frozen=True, slots=True)
class SampleInput:
    """An input of samples rather than rows: what is to be listed, or which items lie in the job directory."""

    kind: Literal["item_list", "file_path_lister", "delimited_files"]
    includes: tuple[str, ...] = ()  # globs over full paths; the prefixes stand in ``dataset.paths``
    excludes: tuple[str, ...] = ()
    items: int | None = None  # how many, of an ``item_list``
    digest: str | None = None  # of the items: ``input/<digest>/items-00000.jsonl`` … in the job directory
    size: int = 0  # of the items, in bytes


@dataclass(frozen=True, slots=True)
class JobSettings:
    """A resolved submission, as stored in ``job.json``."""

    job_id: str
    api_name: str
    api_id: str
    created_time: str  # ISO 8601, UTC
    handler: HandlerSettings
    dataset: DatasetInput
    batch_format: BatchFormat = "pandas"
    samples: SampleInput | None = None  # set: ``dataset`` holds no more than the prefixes and the batch size
    config: dict[str, Any] = field(default_factory=dict)  # handler.config overridden deeply by the job's config
    job_config: dict[str, Any] = field(default_factory=dict)  # the config as given in the submission
    output: OutputSettings | None = None
    workers: int = 1
    min_workers: int | None = None  # fewer, while there is less to do; None: ``workers``, as long as there is enough
    workers_said: bool = True  # False: nobody has said how many, and a cluster may use all that it has
    compute: ComputeSettings = ComputeSettings()
    limits: LimitSettings = LimitSettings()
    dead_letters: DeadLetterSettings | None = None
    labels: dict[str, str] = field(default_factory=dict)
    #: ``name`` and ``cluster`` of the environment that it was submitted to: for clients that its handlers make.
    environment: dict[str, str] = field(default_factory=dict)
    cluster: ClusterSettings = ClusterSettings()

    @property
    def kept(self) -> tuple[str, ...]:
        """The input columns that stand beside the output, where they are named."""
        keep = self.output.keep if self.output else False
        return () if isinstance(keep, bool) else keep

    def to_json(self) -> dict[str, Any]:
        """Return the settings as plain JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """Build settings from what :meth:`to_json` returned; keys of newer versions are ignored."""
        data = _known(cls, value)
        if "dead_letters" not in data:
            data["dead_letters"] = _earlier_dead_letters(data["handler"].get("extra", {}))
        data["handler"] = HandlerSettings.from_json(data["handler"])
        data["dataset"] = DatasetInput(**_known(DatasetInput, data["dataset"], tuples=("paths", "columns")))
        if data.get("samples") is not None:
            data["samples"] = SampleInput(**_known(SampleInput, data["samples"], tuples=("includes", "excludes")))
        if data.get("output") is not None:
            data["output"] = OutputSettings(**_known(OutputSettings, data["output"], tuples=("keep",)))
        compute = _known(ComputeSettings, data.get("compute", {}), tuples=("node_groups",))
        data["compute"] = ComputeSettings(**compute)
        data["cluster"] = ClusterSettings(**_known(ClusterSettings, data.get("cluster", {})))
        data["limits"] = LimitSettings(**_known(LimitSettings, data.get("limits", {})))
        if data.get("dead_letters") is not None:
            data["dead_letters"] = DeadLetterSettings(**_known(DeadLetterSettings, data["dead_letters"]))
        return cls(**data)


def _earlier_dead_letters(value: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the dead-letter settings that an earlier release wrote among those of the handler."""
    if queue := value.get("sqs_dead_letter_queue"):
        return {"queue_arn": queue["arn"], "max_receive_count": queue["max_receive_count"]}
    if folder := value.get("dead_letter"):
        return {"folder": folder["path"], "max_receive_count": folder["max_receive_count"]}
    return None


def _known(cls: type, value: Mapping[str, Any], tuples: tuple[str, ...] = ()) -> dict[str, Any]:
    """Keep the keys that the dataclass has, and make tuples of the lists that JSON made of them."""
    names = {item.name for item in fields(cls)}
    known = {key: item for key, item in value.items() if key in names}
    return {key: tuple(item) if key in tuples and isinstance(item, list) else item for key, item in known.items()}


#: Settings that two submissions of the same job may differ in.
_MAY_DIFFER = ("api_id", "cluster", "created_time", "environment", "workers_said")
#: Settings whose values are the user's own and are never shown.
_PRIVATE = ("config", "handler.env", "job_config")


def differences(existing: JobSettings, new: JobSettings) -> list[str]:
    """Return in words how a submission differs from the job that has its id; empty if it is the same job."""
    return list(_differences(existing.to_json(), new.to_json(), ""))


def _differences(existing: Mapping[str, Any], new: Mapping[str, Any], prefix: str) -> Iterator[str]:
    for key in sorted({*existing, *new}):
        path = f"{prefix}{key}"
        old, now = existing.get(key), new.get(key)
        if isinstance(old, tuple):
            old = list(old)
        if isinstance(now, tuple):
            now = list(now)
        if old == now or path in _MAY_DIFFER:
            continue
        if path in _PRIVATE:
            yield f"{path} differs"
        elif isinstance(old, Mapping) and isinstance(now, Mapping):
            yield from _differences(old, now, f"{path}.")
        else:
            yield f"{path} was {old!r}, is {now!r}"
