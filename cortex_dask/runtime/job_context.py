"""The context of a handler: the environment that its job belongs to, and the names that Cortex offered.

A handler may deploy APIs and submit jobs. Those go to the store of its own job, run on the cluster of its own job, and
know nothing of the variables that were set for this one process.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from cortex_dask.io.job.settings import JobSettings

_NAMES = ("cortex", "cortex_internal")
_FOLDER = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "compat")  # noqa: PTH100, PTH118, PTH120 - compared with entries of sys.path


@dataclass(frozen=True, slots=True)
class JobContext:
    """The environment of a job, as its handlers see it."""

    job_url: str
    store: str
    name: str
    cluster: str
    python: str  # the interpreter of the process that started this one
    variables: dict[str, str] = field(repr=False)  # its environment variables


_current: JobContext | None = None


def current() -> JobContext | None:
    """Return the context of this process' job; None outside of handler processes."""
    return _current


def describe(job_url: str, settings: JobSettings) -> dict[str, Any] | None:
    """Return a job's context for its handler processes, as JSON values; None for a job that is in no environment."""
    url = job_url.rstrip("/")
    place = f"/jobs/{settings.api_name}/{settings.job_id}"
    if not url.endswith(place):
        return None
    known = settings.environment
    return {
        "job_url": url,
        "store": url.removesuffix(place),
        "name": known.get("name", "local"),
        "cluster": known.get("cluster", "local"),
        "python": sys.executable,
    }


def enter(described: Mapping[str, Any] | None, changed: Mapping[str, str | None]) -> None:
    """Set the context of this process' job, as :func:`describe` returned it, before the handler's variables are set.

    ``changed`` holds variables that were set for this process alone, and what they were before (None: not set).
    """
    global _current
    if described is None:
        _current = None
        return
    before = {name: value for name, value in {**os.environ, **changed}.items() if value is not None}
    _current = JobContext(**described, variables=before)


def offer_names() -> None:
    """Make ``cortex`` and ``cortex_internal`` importable in this process.

    They come last, so that a module of the project's own, or an installed one, has precedence; but before an installed
    client of Cortex, for there is no operator here that it could speak to.
    """
    if _FOLDER in sys.path:
        return
    client = (place for place, entry in enumerate(sys.path) if os.path.isdir(f"{entry}/cortex/binary"))  # noqa: PTH112 - as above
    sys.path.insert(next(client, len(sys.path)), _FOLDER)


def withdraw_names() -> None:
    """Remove the names again, where a handler has run in the caller's own process."""
    if _FOLDER in sys.path:
        sys.path.remove(_FOLDER)
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] in _NAMES and str(getattr(module, "__file__", None) or "").startswith(_FOLDER):
            del sys.modules[name]
