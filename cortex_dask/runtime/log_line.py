"""One line of a job's log as JSON: its reserved keys, and values that JSON does not know as text."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from typing import Any

import orjson

#: Longer lines are dropped, and the drop is logged.
MAX_LINE = 5 * 1024 * 1024

_RESERVED = frozenset({"asctime", "levelname", "message", "process", "labels"})
_OPTIONS = orjson.OPT_NON_STR_KEYS | orjson.OPT_SERIALIZE_NUMPY


def line(
    level: str,
    message: str,
    labels: Mapping[str, str],
    *,
    batch_id: str | None = None,
    extra: Mapping[str, Any] | None = None,
    process: int | None = None,
    created: float | None = None,
) -> bytes:
    """Return one line of JSON, without a line feed.

    Values of ``extra`` that JSON does not know are written as text; none of them can make the line fail.
    """
    created = time.time() if created is None else created
    milliseconds = int(created * 1000) % 1000
    value: dict[str, Any] = {
        "asctime": f"{time.strftime('%Y-%m-%d %H:%M:%S', time.gmtime(created))},{milliseconds:03d}",
        "levelname": level,
        "message": message,
        "process": os.getpid() if process is None else process,
    }
    if batch_id is not None:
        value["batch_id"] = batch_id
    if extra:
        value.update((str(key), item) for key, item in extra.items() if str(key) not in _RESERVED)
    value["labels"] = labels
    return _dumps(value)


def _dumps(value: dict[str, Any]) -> bytes:
    try:
        return orjson.dumps(value, default=to_text, option=_OPTIONS)
    except Exception:  # noqa: BLE001 - huge integers, lone surrogates, cycles, a __str__ that raises: try it key by key
        return b"{" + b",".join(_pair(key, item) for key, item in value.items()) + b"}"


def _pair(key: str, item: Any) -> bytes:
    name = _to_json(key)
    try:
        return name + b":" + orjson.dumps(item, default=to_text, option=_OPTIONS)
    except Exception:  # noqa: BLE001 - as above
        try:
            return name + b":" + _to_json(item)
        except Exception:  # noqa: BLE001 - as above
            return name + b":" + _to_json(to_text(item))


def _to_json(value: Any) -> bytes:
    # Lone surrogates have no form in UTF-8, and written as an escape they are refused by readers.
    return json.dumps(value, default=to_text, allow_nan=False, ensure_ascii=False).encode(errors="replace")


def to_text(value: Any) -> str:
    """Return the text of a value, also of one whose ``str`` fails."""
    try:
        return str(value)
    except Exception:  # noqa: BLE001 - the line is written even if a __str__ of the user fails
        return f"<{type(value).__name__}>"


def dropped(size: int) -> str:
    """Return the message that stands for a line that was too long."""
    return f"a log line of {size:,} bytes was dropped: a line may have {MAX_LINE:,}"
