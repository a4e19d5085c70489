"""The short way of records to JSON lines: dicts whose values are plain and of the schema's types, encoded as they are.

Through Arrow (:mod:`cortex_dask.io.json_text`) every row of a batch of 32 costs several microseconds, most of them for
columns that are made and thrown away. Rows that need no conversion need no columns. Whatever is not plainly what the
schema says is left to the long way, which converts it or says what is wrong.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from itertools import chain
from typing import Any, NamedTuple

import orjson
import pyarrow as pa

__all__ = ["EncodedRows", "row_encoder"]

_TYPES = {pa.int64(): int, pa.float64(): float, pa.string(): str, pa.large_string(): str, pa.bool_(): bool}
_DICTS = {dict}
#: Integers of more than 53 bits take the long way, since orjson takes some that no int64 holds.
_OPTIONS = orjson.OPT_APPEND_NEWLINE | orjson.OPT_STRICT_INTEGER


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
    if not names or None in types or len(set(names)) < len(names):
        return None
    allowed = [{kind, type(None)} if field.nullable else {kind} for kind, field in zip(types, schema, strict=True)]
    dumps = orjson.dumps
    known: dict[int, tuple[list[str], list[Any]]] = {}  # of batches with so many rows; few sizes occur

    def encode(result: Any) -> EncodedRows | None:
        if type(result) is not list or set(map(type, result)) != _DICTS:
            return None
        rows = len(result)
        if rows not in known:
            known.clear()
            known[rows] = names * rows, types * rows
        all_names, all_types = known[rows]
        # A dict has a name once, so names in this order can only be those of whole rows.
        if [*chain.from_iterable(result)] != all_names:
            return None
        if [*map(type, chain.from_iterable(map(dict.values, result)))] != all_types:
            columns = zip(*map(dict.values, result), strict=True)
            if not all(kinds.issuperset(map(type, column)) for kinds, column in zip(allowed, columns, strict=True)):
                return None
        try:
            return EncodedRows(b"".join([dumps(row, None, _OPTIONS) for row in result]), rows)
        except (orjson.JSONEncodeError, RecursionError):
            return None  # half of a surrogate pair, a long integer, a name that only equals one

    return encode
