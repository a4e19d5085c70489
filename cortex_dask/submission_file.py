"""A submission as a document: a mapping, or a file of JSON or YAML that holds one."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cortex_dask.errors import SpecError
from cortex_dask.wording import shown

__all__ = ["STANDARD_INPUT", "load_submission"]

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
        from cortex_dask.io.jsonlines import parse_line

        try:
            return parse_line(data.removeprefix(b"\xef\xbb\xbf"))
        except json.JSONDecodeError as error:
            if source.endswith(".json"):
                raise SpecError(f"{source}:{error.lineno}:{error.colno}: this is no JSON: {error.msg}") from None
        except (ValueError, RecursionError) as error:
            raise SpecError(f"{source}: this is no JSON: {' '.join(str(error).split())}") from None
    from cortex_dask.yaml_file import parse_yaml

    return parse_yaml(data, source)
