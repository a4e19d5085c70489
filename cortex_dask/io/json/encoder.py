"""Rows as JSON lines: columns by Arrow, and a shorter way for records of plain values.

Through Arrow (:mod:`cortex_dask.io.json.encoder`) every row of a batch of 32 costs several microseconds, most of them
for columns that are made and thrown away. Rows that need no conversion need no columns. Whatever is not plainly what
the schema says is left to the long way, which converts it or says what is wrong.
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


_STEP_ROWS = 65_536
_STEP_BYTES = 32 << 20  # of a step's columns: their text stays far below the 2 GB that an Arrow string array holds
_DIGITS = {"s": 0, "ms": 3, "us": 6, "ns": 9}
_NON_FINITE = {"nan": '"NaN"', "inf": '"Infinity"', "-inf": '"-Infinity"'}


def json_lines(table: pa.Table, *, non_finite: bool = False) -> Iterator[pa.Buffer]:
    """Yield the rows of a table as JSON lines, some ten thousand in a buffer.

    Parameters
    ----------
    table : pyarrow.Table
        The rows.
    non_finite : bool
        Write NaN and the infinities as the texts ``"NaN"``, ``"Infinity"`` and ``"-Infinity"`` instead of null.
    """
    if table.num_rows == 0:
        return
    if table.num_columns == 0:
        yield pa.py_buffer(b"{}\n" * table.num_rows)
        return
    step = max(1, min(_STEP_ROWS, table.num_rows * _STEP_BYTES // max(1, table.nbytes)))
    for start in range(0, table.num_rows, step):
        for batch in table.slice(start, step).combine_chunks().to_batches():
            yield _text_of(encode_rows(batch, non_finite=non_finite))


def encode_rows(batch: pa.RecordBatch, *, non_finite: bool = False) -> pa.Array:
    """Return the rows of a record batch as an array of JSON lines, each with its line end."""
    return _objects(batch.schema.names, batch.columns, non_finite, end="}\n")


def _text_of(lines: pa.Array) -> pa.Buffer:
    """Return the text of all elements, which lie one after the other in the array's last buffer."""
    _, offsets, text = lines.buffers()
    bounds = np.frombuffer(offsets, dtype=np.int32)[lines.offset : lines.offset + len(lines) + 1]
    return text.slice(int(bounds[0]), int(bounds[-1] - bounds[0]))


def _objects(names: list[str], columns: list[pa.Array], non_finite: bool, end: str = "}") -> pa.Array:
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
        texts = _quoted(_plain_text(array))
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

    content = np.frombuffer(_text_of(texts), dtype=np.uint8)
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


def _plain_text(array: pa.Array) -> pa.Array:
    """Return text that needs no escapes for the values that JSON has no form for."""
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
        digits = _DIGITS[kind.unit]
        return pa.array([_seconds(value, digits) for value in array.cast(pa.int64()).to_pylist()], pa.string())
    if pt.is_date(kind):
        return array.cast(pa.date32()).cast(pa.string())
    return array.cast(pa.string())  # decimals, times


def _seconds(value: int | None, digits: int) -> str | None:
    if value is None:
        return None
    whole, rest = divmod(abs(value), 10**digits)
    fraction = f".{rest:0{digits}d}" if digits else ""
    return f"{'-' if value < 0 else ''}PT{whole}{fraction}S"


def dumps(value: Any) -> bytes:
    """Return a value as JSON, with integers of any size."""
    try:
        return orjson.dumps(value)
    except TypeError:  # orjson stops at 64 bits
        return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()
