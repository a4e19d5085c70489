"""The parts that sentences about a user's mistakes are made of; the standard library only, so it costs nothing."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping

__all__ = ["nearest", "shown"]

_LONGEST = 80  # characters of a value that a message shows
_SECRET = re.compile(r"(?<=://)[^/@\s]*@")  # user and password in a URL


def nearest(name: str, known: Iterable[str]) -> str | None:
    """Return the known name that a misspelt one most likely means."""
    by_simple = {_simple(item): item for item in known}
    matches = difflib.get_close_matches(_simple(name), by_simple, n=1, cutoff=0.6)
    return by_simple[matches[0]] if matches else None


def shown(value: object) -> str:
    """Return a value as a message shows it: short, and without a password."""
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Mapping):
        return "a mapping"
    if isinstance(value, list | tuple | set) and len(value) > 3:
        return f"a list of {len(value)}"
    text = _SECRET.sub("…@", repr(value))
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"


def _simple(name: str) -> str:
    return name.lower().replace("-", "_")
