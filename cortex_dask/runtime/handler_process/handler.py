"""The handler as it is loaded in a process: its class found, its instance made, its methods called by name."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cortex_dask.errors import HandlerError
from cortex_dask.io.job.directory import JobDirectory
from cortex_dask.io.job.settings import JobSettings
from cortex_dask.io.job.splits import PlanHeader
from cortex_dask.io.store.store import Store
from cortex_dask.project.contract import HandlerSignature, check_class
from cortex_dask.project.loader import load_file
from cortex_dask.runtime.metrics import MetricsClient
from cortex_dask.runtime.progress_cell import ProgressCell


@dataclass(slots=True)
class LoadedHandler:
    """A handler's instance, and what is remembered for as long as it lives."""

    instance: Any
    signature: HandlerSignature
    rows_limit: int | None = None  # the most rows at once: what worked after a batch had taken too much memory
    handle_nanoseconds: int = 0  # spent in ``handle_batch``
    exhausted: int = 0  # batches that have run out of memory, of any size
    #: With so many of them, a single row that runs out of memory is not given up before it was tried in a new process:
    #: a device's memory may be in pieces. None: there is no other process.
    patience: int | None = None

    @classmethod
    def construct(
        cls,
        handler: type,
        signature: HandlerSignature,
        settings: JobSettings,
        spec: Mapping[str, Any] | None,
        metrics: Any,
        directory: str | None = None,
    ) -> LoadedHandler:
        """Call ``__init__`` with the arguments that it declares; the handler gets copies of its own."""
        client = None
        if settings.handler.type == "tensorflow":
            from cortex_dask.tensorflow.client import connect

            client = connect(settings, directory)
        available: dict[str, Callable[[], Any]] = {
            "config": lambda: copy.deepcopy(settings.config),
            "job_spec": lambda: copy.deepcopy(dict(spec or {})),
            "metrics_client": lambda: metrics,
            **({"tensorflow_client": lambda: client} if client is not None else {}),
        }
        missing = signature.init - available.keys()
        if missing:
            raise HandlerError(
                f"__init__ declares {', '.join(sorted(missing))}, which this version of cortex_dask does not provide"
            )
        instance = handler(**{name: available[name]() for name in signature.init})
        if client is not None:
            client.prepare()  # after __init__, which may set TensorFlow up in its own way
        return cls(instance, signature)

    def handle(self, payload: Any, batch_id: Callable[[], str]) -> Any:
        """Call ``handle_batch`` with the arguments that it declares."""
        declared = self.signature.handle_batch
        arguments = {"payload": payload} if "payload" in declared else {}
        if "batch_id" in declared:
            arguments["batch_id"] = batch_id()
        started = time.perf_counter_ns()
        try:
            return self.instance.handle_batch(**arguments)
        finally:
            self.handle_nanoseconds += time.perf_counter_ns() - started

    def limit_rows(self, rows: int) -> None:
        """Handle no more than so many rows at once, or fewer if that is the limit already."""
        self.rows_limit = min(rows, self.rows_limit or rows)

    def count_exhausted(self) -> None:
        """Count a batch that has run out of memory."""
        self.exhausted += 1

    def set_patience(self, patience: int) -> None:
        """Set how many batches may run out of memory before a single row is tried in a new process."""
        self.patience = patience

    def complete(self) -> None:
        """Call ``on_job_complete``, if there is one."""
        if self.signature.on_job_complete:
            self.instance.on_job_complete()


@dataclass(frozen=True, slots=True)
class LoadedJob:
    """What all splits of a job have in common in one process."""

    settings: JobSettings
    header: PlanHeader
    store: Store  # the job directory
    handler: LoadedHandler
    metrics: MetricsClient
    cell: ProgressCell


def load_class(settings: JobSettings, job: JobDirectory, directory: str | None) -> tuple[type, HandlerSignature]:
    """Load and check the handler's class, from ``handler.pkl`` or from the unpacked project in ``directory``.

    Raises HandlerError if it cannot be loaded, or its methods do not fit.
    """
    handler = settings.handler
    if handler.kind == "class":
        import cloudpickle

        try:
            cls = cloudpickle.loads(job.store.read("handler.pkl"))
        except (ImportError, AttributeError) as error:
            raise HandlerError(
                f"the handler class cannot be loaded here: {type(error).__name__}: {error}; what it imports must be "
                "installed on the workers, or submit it as a project directory"
            ) from error
    else:
        if directory is None or handler.path is None:
            raise HandlerError("the job has no project directory: submit it again")
        cls = load_file(str(Path(directory) / handler.path))
    return cls, check_class(cls, handler.type)


def job_spec(settings: JobSettings, *, total_batch_count: int, start_time: str) -> dict[str, Any]:
    """Return what a handler that declares ``job_spec`` gets: the keys of Cortex, and where the output is (or None)."""
    return {
        "job_id": settings.job_id,
        "api_name": settings.api_name,
        "config": settings.job_config,
        "workers": settings.workers,
        "total_batch_count": total_batch_count,
        "start_time": start_time,
        "output": settings.output.url if settings.output else None,
    }
