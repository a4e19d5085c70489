"""Rows as JSON lines: tables by columns, through Arrow, and lists of plain records with one call of orjson.

Arrow converts every type. It takes several microseconds for each row of a small batch, most of them for columns that
are made and thrown away. Records whose values are exactly what the schema says need no columns.
"""

from __future__ import annotations

import base64
import json
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.types as pt

from cortex_dask.io.arrow.types import is_bytes, is_list, is_text

_ROWS_PER_BUFFER = 65_536
_BYTES_PER_BUFFER = 32 << 20  # of columns: their text stays far below the 2 GB that an Arrow string array holds
_SUBSECOND_DIGITS = {"s": 0, "ms": 3, "us": 6, "ns": 9}
_NON_FINITE = {"nan": '"NaN"', "inf": '"Infinity"', "-inf": '"-Infinity"'}

#: The types of records' values that need no conversion.
_PYTHON_TYPES = {pa.int64(): int, pa.float64(): float, pa.string(): str, pa.large_string(): str, pa.bool_(): bool}
_ONLY_DICTS = {dict}
#: What follows the quote at a text's end: a column's name that begins with it would look like such an end.
_AFTER_TEXT = (":", ",", "}")

# pyarrow.compute is imported in the functions that use it: the import takes 20 ms, a tenth of a handler process' start,
# and most jobs use none of them.


class EncodedRows(NamedTuple):
    """Rows as JSON lines."""

    text: bytes
    num_rows: int

    @property
    def nbytes(self) -> int:
        """The size of the text."""
        return len(self.text)


def dumps(value: Any) -> bytes:
    """Return a value as JSON, with integers of any size."""
    try:
        return orjson.dumps(value)
    except TypeError:  # orjson stops at 64 bits
        return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


def json_lines(table: pa.Table, *, non_finite: bool = False) -> Iterator[pa.Buffer]:
    """Yield the rows of a table as JSON lines, some ten thousand in a buffer.

    JSON has no form for NaN and the infinities: they become null, or with ``non_finite`` texts like ``"NaN"``.
    """
    if table.num_rows == 0:
        return
    if table.num_columns == 0:
        yield pa.py_buffer(b"{}\n" * table.num_rows)
        return
    step = max(1, min(_ROWS_PER_BUFFER, table.num_rows * _BYTES_PER_BUFFER // max(1, table.nbytes)))
    for start in range(0, table.num_rows, step):
        for batch in table.slice(start, step).combine_chunks().to_batches():
            yield _content(_objects(batch.schema.names, batch.columns, non_finite, end="}\n"))


def row_encoder(schema: pa.Schema) -> Callable[[Any], EncodedRows | None] | None:
    r"""Return a function that encodes records of a schema, or None where the schema has types that need Arrow.

    The function returns None for a result that is not a list of records with exactly these columns and types:
    converting it, or saying what is wrong with it, is left to Arrow.

    Examples
    --------
    >>> encode = row_encoder(pa.schema({"id": pa.int64(), "name": pa.string()}))
    >>> encode([{"id": 1, "name": "a"}, {"id": 2, "name": None}])
    EncodedRows(text=b'{"id":1,"name":"a"}\n{"id":2,"name":null}\n', num_rows=2)
    >>> encode([{"id": "1", "name": "a"}])
    """
    names = list(map(sys.intern, schema.names))  # like names in a handler's source: equal ones are then identical
    types = [_PYTHON_TYPES.get(arrow_type) for arrow_type in schema.types]
    if not names or None in types or len(set(names)) < len(names) or names[0][:1] in _AFTER_TEXT:
        return None
    columns = [
        (name, python_type, field.nullable) for name, python_type, field in zip(names, types, schema, strict=True)
    ]
    to_json = orjson.dumps
    # Found between two rows, which begin with the first name, and nowhere else: in a text a quote has a backslash.
    between = b"},{" + to_json(names[0]) + b":"
    line_end = between.replace(b",", b"\n", 1)
    width = len(names)

    def encode(result: Any) -> EncodedRows | None:
        if type(result) is not list or set(map(type, result)) != _ONLY_DICTS:
            return None
        rows = len(result)
        if sum(map(len, result)) != rows * width:  # with the names checked below, a row has no others
            return None
        try:
            for name, python_type, nullable in columns:  # loops take half as long as map and sets, from Python 3.11 on
                for row in result:
                    if type(row[name]) is not python_type and not (nullable and row[name] is None):
                        return None
            # Strict: without it, orjson accepts integers that no int64 holds. Those beyond 53 bits are left to Arrow.
            text = to_json(result, None, orjson.OPT_STRICT_INTEGER)
        except (KeyError, orjson.JSONEncodeError, RecursionError):
            return None  # another name, half of a surrogate pair, a long integer, a name that only equals one
        lines = text[1:-1].replace(between, line_end) + b"\n"
        return EncodedRows(lines, rows) if lines.count(b"\n") == rows else None

    return encode


def _content(lines: pa.Array) -> pa.Buffer:
    """Return the text of all elements: they lie one after the other in the array's last buffer."""
    _, offsets, text = lines.buffers()
    bounds = np.frombuffer(offsets, dtype=np.int32)[lines.offset : lines.offset + len(lines) + 1]
    return text.slice(int(bounds[0]), int(bounds[-1] - bounds[0]))


def _objects(names: list[str], columns: list[pa.Array], non_finite: bool, end: str = "}") -> pa.Array:
    """Return an array of JSON objects, one for each row of the columns."""
    pieces: list[Any] = []
    lead = "{"
    for name, column in zip(names, columns, strict=True):
        pieces += (f"{lead}{orjson.dumps(name).decode()}:", _encode(column, non_finite))
        lead = ","
    return _concat(*pieces, end)


def _encode(array: pa.Array, non_finite: bool) -> pa.Array:
    """Return an array of JSON texts, one for each value, with ``null`` for nulls."""
    kind = array.type
    if array.null_count == len(array):
        return pa.array(["null"] * len(array), pa.string())
    if pt.is_dictionary(kind):
        return _encode(array.dictionary_decode(), non_finite)
    if isinstance(kind, pa.BaseExtensionType):
        return _encode(array.storage, non_finite)
    if pt.is_floating(kind):
        texts = _floats(array, non_finite)
    elif pt.is_integer(kind) or pt.is_boolean(kind):
        texts = array.cast(pa.string())
    elif is_text(kind):
        texts = _quoted(_escaped(array.cast(pa.string())))
    elif is_list(kind):
        texts = _lists(array, non_finite)
    elif pt.is_struct(kind):
        texts = _structs(array, non_finite)
    elif pt.is_map(kind):
        texts = _maps(array, non_finite)
    else:
        texts = _quoted(_unescaped(array))
    return texts.fill_null("null") if texts.null_count else texts


def _concat(*pieces: Any) -> pa.Array:
    import pyarrow.compute as pc

    return pc.binary_join_element_wise(*pieces, "")


def _quoted(texts: pa.Array) -> pa.Array:
    return _concat('"', texts, '"')


def _floats(array: pa.Array, non_finite: bool) -> pa.Array:
    import pyarrow.compute as pc

    texts = array.cast(pa.string())
    numbers = array.to_numpy(zero_copy_only=False)  # nulls are NaN here
    finite = np.isfinite(numbers)
    whole = finite & (np.trunc(numbers) == numbers)
    if whole.any():  # Arrow writes 2.0 as 2, which readers would take for an integer
        bare = pc.and_(pa.array(whole), pc.less(pc.find_substring(texts, "e"), 0))
        texts = pc.if_else(bare, _concat(texts, ".0"), texts)
    if not finite.all():
        if non_finite:
            for text, replacement in _NON_FINITE.items():
                texts = pc.if_else(pc.equal(texts, text), replacement, texts)
        else:
            texts = pc.if_else(pa.array(finite), texts, pa.scalar(None, pa.string()))
    return texts


def _escaped(texts: pa.Array) -> pa.Array:
    """Escape quotation marks, backslashes and control characters, where there are any."""
    import pyarrow.compute as pc

    content = np.frombuffer(_content(texts), dtype=np.uint8)
    special = np.unique(content[(content < 0x20) | (content == 0x22) | (content == 0x5C)])
    for code in sorted(special, key=lambda code: code != 0x5C):  # backslashes first: the others bring new ones
        character = chr(code)
        texts = pc.replace_substring(texts, character, orjson.dumps(character)[1:-1].decode())
    return texts


def _lists(array: pa.Array, non_finite: bool) -> pa.Array:
    import pyarrow.compute as pc

    values = _encode(pc.list_flatten(array), non_finite)
    lengths = pc.fill_null(pc.list_value_length(array), 0).to_numpy(zero_copy_only=False)
    return _bracketed("[", values, lengths, "]", array)


def _maps(array: pa.Array, non_finite: bool) -> pa.Array:
    offsets = array.offsets.to_numpy()
    start, length = int(offsets[0]), int(offsets[-1] - offsets[0])
    keys = _encode(array.keys.slice(start, length), non_finite)
    items = _encode(array.items.slice(start, length), non_finite)
    if is_text(array.type.key_type):
        return _bracketed("{", _concat(keys, ":", items), np.diff(offsets), "}", array)
    return _bracketed("[", _concat("[", keys, ",", items, "]"), np.diff(offsets), "]", array)


def _bracketed(start: str, values: pa.Array, lengths: Any, end: str, like: pa.Array) -> pa.Array:
    import pyarrow.compute as pc

    offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int32())
    joined = pc.binary_join(pa.ListArray.from_arrays(offsets, values), ",")
    return pc.if_else(like.is_valid(), _concat(start, joined, end), pa.scalar(None, pa.string()))


def _structs(array: pa.Array, non_finite: bool) -> pa.Array:
    import pyarrow.compute as pc

    names = [field.name for field in array.type]
    if not names:
        return pc.if_else(array.is_valid(), "{}", pa.scalar(None, pa.string()))
    objects = _objects(names, array.flatten(), non_finite)
    return pc.if_else(array.is_valid(), objects, pa.scalar(None, pa.string()))


def _unescaped(array: pa.Array) -> pa.Array:
    """Return the texts of values that JSON has no form for; none of them needs escapes."""
    kind = array.type
    if is_bytes(kind):
        texts = [None if value is None else base64.b64encode(value).decode() for value in array.to_pylist()]
        return pa.array(texts, pa.string())
    if pt.is_timestamp(kind):
        import pyarrow.compute as pc

        naive = array if kind.tz is None else array.cast(pa.int64()).cast(pa.timestamp(kind.unit))
        texts = pc.replace_substring(naive.cast(pa.string()), " ", "T")
        return texts if kind.tz is None else _concat(texts, "Z")
    if pt.is_duration(kind):
        digits = _SUBSECOND_DIGITS[kind.unit]
        return pa.array([_iso_duration(value, digits) for value in array.cast(pa.int64()).to_pylist()], pa.string())
    if pt.is_date(kind):
        return array.cast(pa.date32()).cast(pa.string())
    return array.cast(pa.string())  # decimals, times


def _iso_duration(value: int | None, digits: int) -> str | None:
    """Return a whole number of a unit as an ISO 8601 duration in seconds; the unit has this many decimal digits."""
    if value is None:
        return None
    whole, rest = divmod(abs(value), 10**digits)
    fraction = f".{rest:0{digits}d}" if digits else ""
    return f"{'-' if value < 0 else ''}PT{whole}{fraction}S"
