"""A job id that is submitted again: it stands for the same job as long as the settings are the same."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from cortex_dask.errors import SpecError
from cortex_dask.io.settings import JobSettings

__all__ = ["check_same"]

#: Settings that two submissions of the same job may differ in.
_INCIDENTAL = ("api_id", "cluster", "created_time", "environment", "workers_said")
#: Settings whose values are the user's own and are never shown.
_PRIVATE = ("config", "handler.env", "job_config")


def check_same(existing: JobSettings, new: JobSettings) -> None:
    """Compare a submission with the job that has its id.

    Raises
    ------
    SpecError
        If they differ in more than what may change.
    """
    differences = list(_differences(existing.to_json(), new.to_json()))
    if differences:
        raise SpecError(
            f"job_id: the job {new.job_id!r} of {new.api_name} exists with other settings ({'; '.join(differences)}): "
            "choose another job id, or submit the same as before to attach to it or resume it"
        )


def _differences(existing: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key in sorted({*existing, *new}):
        path = f"{prefix}{key}"
        old, now = existing.get(key), new.get(key)
        if isinstance(old, tuple):
            old = list(old)
        if isinstance(now, tuple):
            now = list(now)
        if old == now or path in _INCIDENTAL:
            continue
        if path in _PRIVATE:
            yield f"{path} differs"
        elif isinstance(old, Mapping) and isinstance(now, Mapping):
            yield from _differences(old, now, f"{path}.")
        else:
            yield f"{path} was {old!r}, is {now!r}"
