"""JSON lines as a job wrote them, back in the types of the job's output schema."""

from __future__ import annotations

import base64
import datetime
from decimal import Decimal
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pyarrow as pa


def read_json_lines(data: bytes, schema: pa.Schema) -> pa.Table:
    """Return JSON lines as a table with exactly this schema.

    Text stays text, whatever it looks like; bytes come back from base64, durations from ISO 8601.
    """
    import pyarrow as pa
    from pyarrow import json

    if all(_is_read_by_arrow(field.type) for field in schema) and len(schema) and data:
        options = json.ParseOptions(explicit_schema=schema, unexpected_field_behavior="ignore")
        # One line may be as long as the file: the parser needs a block that holds it.
        blocks = json.ReadOptions(block_size=max(1 << 20, min(len(data), 1 << 28)))
        return json.read_json(pa.BufferReader(data), read_options=blocks, parse_options=options)
    import orjson

    rows = [orjson.loads(line) for line in data.splitlines()]
    columns = [pa.array([_value(row.get(field.name), field.type) for row in rows], field.type) for field in schema]
    return pa.table(columns, schema=schema) if columns else schema.empty_table()


def _is_read_by_arrow(kind: pa.DataType) -> bool:
    """Whether Arrow's own reader of JSON makes this type of what we write for it."""
    import pyarrow.types as pt

    if pt.is_list(kind):
        return _is_read_by_arrow(kind.value_type)
    if pt.is_struct(kind):
        return all(_is_read_by_arrow(field.type) for field in kind)
    simple = (pt.is_boolean, pt.is_integer, pt.is_string, pt.is_large_string, pt.is_timestamp, pt.is_null)
    return any(test(kind) for test in simple) or pt.is_float32(kind) or pt.is_float64(kind)


def _value(value: Any, kind: pa.DataType) -> Any:
    """Return a JSON value as what Arrow takes for this type."""
    import pyarrow.types as pt

    if value is None:
        return None
    if pt.is_dictionary(kind):
        return _value(value, kind.value_type)
    if pt.is_binary(kind) or pt.is_large_binary(kind) or pt.is_fixed_size_binary(kind) or pt.is_binary_view(kind):
        return base64.b64decode(value)
    if pt.is_decimal(kind):
        return Decimal(value)
    if pt.is_date(kind):
        return datetime.date.fromisoformat(value)
    if pt.is_time(kind):
        return _ticks(value, kind)
    if pt.is_timestamp(kind):
        return _timestamp(value, kind)
    if pt.is_duration(kind):
        sign = -1 if value.startswith("-") else 1
        return int(sign * Decimal(value.lstrip("-").removeprefix("PT").removesuffix("S")) * _PER_SECOND[kind.unit])
    if pt.is_map(kind):
        pairs = value.items() if isinstance(value, dict) else value
        return [(_value(key, kind.key_type), _value(item, kind.item_type)) for key, item in pairs]
    if pt.is_struct(kind):
        return {field.name: _value(value.get(field.name), field.type) for field in kind}
    if isinstance(value, list):
        return [_value(item, kind.value_type) for item in value]
    return value


_PER_SECOND = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}


def _ticks(text: str, kind: pa.DataType) -> int:
    """Return a time of day in units of its type; Python's own has no nanoseconds."""
    hours, minutes, seconds = text.split(":")
    return int((Decimal(seconds) + 60 * int(minutes) + 3600 * int(hours)) * _PER_SECOND[kind.unit])


def _timestamp(text: str, kind: pa.DataType) -> int:
    import numpy as np

    return int(np.datetime64(text.removesuffix("Z"), kind.unit).astype("int64"))
