"""YAML as users write it: only ever loaded safely, and a key that stands twice is an error."""

from __future__ import annotations

from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from cortex_dask.errors import SpecError

# The loader in C, where PyYAML has it, builds the same values several times faster.
_Base: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class _Loader(_Base):  # type: ignore[misc]  # which of the two it is, only running it can tell
    """The safe loader, which also looks at keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: dict[str, int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag == "tag:yaml.org,2002:merge":
                continue
            line = key.start_mark.line + 1
            if key.value in seen:
                raise _DuplicateKeyError(key.value, seen[key.value], line)
            seen[key.value] = line
        mapping: dict[Hashable, Any] = super().construct_mapping(node, deep=deep)
        return mapping


class _DuplicateKeyError(Exception):
    """A key stands twice in one mapping: its name, and both lines."""


def load_yaml(path: Path) -> Any:
    """Return the one document of a YAML (or JSON) file; None where it is empty.

    Raises
    ------
    SpecError
        If the file cannot be read or is no YAML, or if a mapping has a key twice; with the file and the line.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise SpecError(f"{path} cannot be read: {error.strerror or error}") from None
    return parse_yaml(data, str(path))


def parse_yaml(data: bytes, path: str) -> Any:
    """Return the one document of YAML (or JSON) text; None where it is empty.

    Parameters
    ----------
    data : bytes
        The text.
    path : str
        How messages call it.

    Raises
    ------
    SpecError
        As for :func:`load_yaml`.
    """
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise SpecError(f"{path}:{line}: the file is not UTF-8 text") from None
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506 - derived from the safe loader
    except _DuplicateKeyError as error:
        key, first, second = error.args
        raise SpecError(
            f"{path}:{second}: the key {key!r} stands twice, already in line {first}; remove one of them"
        ) from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{path}:{mark.line + 1}" if mark else path
        raise SpecError(f"{where}: this is no YAML: {error.problem or error.context}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # an impossible date, brackets nested too deep
        raise SpecError(f"{path}: this is no YAML: {' '.join(str(error).split())}") from None
