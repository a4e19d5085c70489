"""The short way of records to JSON lines: dicts whose values are plain and of the schema's types, encoded as they are.

Through Arrow (:mod:`cortex_dask.io.json_text`) every row of a batch of 32 costs several microseconds, most of them for
columns that are made and thrown away. Rows that need no conversion need no columns. Whatever is not plainly what the
schema says is left to the long way, which converts it or says what is wrong.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import orjson
import pyarrow as pa

__all__ = ["EncodedRows", "row_encoder"]

_TYPES = {pa.int64(): int, pa.float64(): float, pa.string(): str, pa.large_string(): str, pa.bool_(): bool}
_DICTS = {dict}
_BEHIND_TEXT = (":", ",", "}")  # what follows the quote at a text's end: a name that begins so would look like an end


class EncodedRows(NamedTuple):
    """Rows as JSON lines."""

    text: bytes
    num_rows: int

    @property
    def nbytes(self) -> int:
        """The size of the text."""
        return len(self.text)


def row_encoder(schema: pa.Schema) -> Callable[[Any], EncodedRows | None] | None:
    r"""Return what encodes a handler's result as rows of a schema, or returns None where that takes the long way.

    None where the schema has types that need it.

    Examples
    --------
    >>> encode = row_encoder(pa.schema({"id": pa.int64(), "name": pa.string()}))
    >>> encode([{"id": 1, "name": "a"}, {"id": 2, "name": None}])
    EncodedRows(text=b'{"id":1,"name":"a"}\n{"id":2,"name":null}\n', num_rows=2)
    >>> encode([{"id": "1", "name": "a"}])
    """
    names = list(map(sys.intern, schema.names))  # names in a handler's source are: then equal ones are identical
    types = [_TYPES.get(kind) for kind in schema.types]
    if not names or None in types or len(set(names)) < len(names) or names[0][:1] in _BEHIND_TEXT:
        return None
    columns = [(name, kind, field.nullable) for name, kind, field in zip(names, types, schema, strict=True)]
    dumps = orjson.dumps
    # What lies between two rows that begin with the first name, and nowhere else: in a text a quote has a backslash.
    between = b"},{" + dumps(names[0]) + b":"
    line_end = between.replace(b",", b"\n", 1)
    width = len(names)

    def encode(result: Any) -> EncodedRows | None:
        if type(result) is not list or set(map(type, result)) != _DICTS:
            return None
        rows = len(result)
        if sum(map(len, result)) != rows * width:  # if each row has each name, which is seen below, it has no other
            return None
        try:
            for name, kind, nullable in columns:  # plain loops: half as long as with map and sets, from Python 3.11 on
                for row in result:
                    if type(row[name]) is not kind and not (nullable and row[name] is None):
                        return None
            # Integers of more than 53 bits take the long way, since orjson takes some that no int64 holds.
            text = dumps(result, None, orjson.OPT_STRICT_INTEGER)
        except (KeyError, orjson.JSONEncodeError, RecursionError):
            return None  # another name, half of a surrogate pair, a long integer, a name that only equals one
        lines = text[1:-1].replace(between, line_end) + b"\n"
        return EncodedRows(lines, rows) if lines.count(b"\n") == rows else None

    return encode
