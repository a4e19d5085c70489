"""Batch processing on Dask: map a ``Handler`` over a partitioned dataset and get every row exactly once.

::

    import cortex_dask as cx

    class Handler:
        def __init__(self, config):
            self.threshold = config["threshold"]

        def handle_batch(self, payload, batch_id):
            return payload.assign(large=payload["value"] > self.threshold)

    job = cx.run(Handler, "data/in", "data/out", batch_size=1024, workers=4, config={"threshold": 0.5})
    job.to_pandas()

Every public name is imported when it is first used, so that ``import cortex_dask`` costs next to nothing: each handler
process does it, and none of them may pay for dask, pandas or pydantic.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cortex_dask.client import Client, run, submit
    from cortex_dask.environments import Environment
    from cortex_dask.errors import (
        ClusterError,
        CortexDaskError,
        DatasetError,
        HandlerError,
        InputError,
        JobFailedError,
        JobNotFoundError,
        JobRunningError,
        JobStoppedError,
        JobTimedOutError,
        OutputError,
        ProjectError,
        SpecError,
        StorageError,
    )
    from cortex_dask.job import Job
    from cortex_dask.runtime.handler_process.log import logger

__version__ = "0.1.0"

__all__ = [
    "Client",
    "ClusterError",
    "CortexDaskError",
    "DatasetError",
    "Environment",
    "HandlerError",
    "InputError",
    "Job",
    "JobFailedError",
    "JobNotFoundError",
    "JobRunningError",
    "JobStoppedError",
    "JobTimedOutError",
    "OutputError",
    "ProjectError",
    "SpecError",
    "StorageError",
    "__version__",
    "logger",
    "run",
    "submit",
]

#: Where each public name that is not an error lives.
_HOMES = {
    "Client": "cortex_dask.client",
    "Environment": "cortex_dask.environments",
    "Job": "cortex_dask.job",
    "logger": "cortex_dask.runtime.handler_process.log",
    "run": "cortex_dask.client",
    "submit": "cortex_dask.client",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(_HOMES.get(name, "cortex_dask.errors")), name)
    globals()[name] = value  # the next access does not come here
    return value


def __dir__() -> list[str]:
    """List the public names, imported or not."""
    return sorted({*globals(), *__all__})
