"""The short way of records to JSON lines says what the long way says, or leaves the rows to it."""

from __future__ import annotations

import json
from collections import OrderedDict
from enum import StrEnum
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cortex_dask.io.arrow.cast import SchemaError, conform
from cortex_dask.io.json.encoder import json_lines, row_encoder
from cortex_dask.io.rows.column import ResultError
from cortex_dask.io.rows.result import to_table

SCHEMA = pa.schema({"n": pa.int64(), "x": pa.float64(), "t": pa.string(), "b": pa.bool_()})
VALUES: dict[str, st.SearchStrategy[Any]] = {
    "n": st.integers(-(2**64), 2**64) | st.integers(-100, 100),
    "x": st.floats(),
    "t": st.text(max_size=6),
    "b": st.booleans(),
}
STRANGE = st.none() | st.integers(-3, 3) | st.floats() | st.text(max_size=2) | st.just("\ud800") | st.just([1])


def rows(strange: float = 0.0) -> st.SearchStrategy[list[dict[str, Any]]]:
    """Rows of the schema, some with a value, a name or an order that is not its own."""
    plain = st.fixed_dictionaries(VALUES)
    odd = st.fixed_dictionaries({name: values | STRANGE for name, values in VALUES.items()})
    short = st.fixed_dictionaries({"n": VALUES["n"]}, optional={name: VALUES[name] for name in ("t", "x", "b")})
    return st.lists(plain | odd | short if strange else plain, max_size=6)


def parsed(text: bytes) -> list[str]:
    return [repr(sorted(json.loads(line, object_pairs_hook=list))) for line in text.splitlines()]


@settings(deadline=None)  # the first one imports pandas
@given(rows() | rows(strange=1.0))
def test_both_ways_write_the_same_or_the_short_one_declines(result: list[dict[str, Any]]) -> None:
    encode = row_encoder(SCHEMA)
    assert encode is not None
    encoded = encode(result)
    if encoded is None:
        return
    table = to_table(result, None, len(result), False)  # what the short way takes, the long one takes as well
    assert table is not None
    text = b"".join(bytes(buffer) for buffer in json_lines(conform(table, SCHEMA)))
    assert parsed(encoded.text) == parsed(text)
    assert (encoded.num_rows, encoded.nbytes) == (len(result), len(encoded.text))


def test_plain_rows_take_the_short_way() -> None:
    encode = row_encoder(SCHEMA)
    assert encode is not None
    result = [{"n": 1, "x": float("nan"), "t": 'a"\n\u00e9', "b": True}, {"n": -5, "x": 2.0, "t": None, "b": False}]
    encoded = encode(result)
    assert encoded is not None
    assert (
        encoded.text.decode() == '{"n":1,"x":null,"t":"a\\"\\n\u00e9","b":true}\n{"n":-5,"x":2.0,"t":null,"b":false}\n'
    )


class Color(StrEnum):
    RED = "red"


@pytest.mark.parametrize(
    "row",
    [
        {"n": 1.0, "x": 1.0, "t": "a", "b": True},
        {"n": True, "x": 1.0, "t": "a", "b": True},
        {"n": 1, "x": 1, "t": "a", "b": True},
        {"n": 2**63, "x": 1.0, "t": "a", "b": True},
        {"n": 1, "x": np.float64(1), "t": "a", "b": True},
        {"n": 1, "x": 1.0, "t": "\ud800", "b": True},
        {"n": 1, "x": 1.0, "t": Color.RED, "b": True},
        {"n": 1, "x": 1.0, "t": b"a", "b": True},
        {"n": 1, "x": 1.0, "t": "a"},
        {"n": 1, "x": 1.0, "t": "a", "c": True},
        {"n": 1, "x": 1.0, "t": "a", "b": True, "more": 1},
        OrderedDict(n=1, x=1.0, t="a", b=True),
        ("n", "x", "t", "b"),
        None,
    ],
)
def test_a_row_that_is_not_plainly_of_the_schema_takes_the_long_way(row: Any) -> None:
    encode = row_encoder(SCHEMA)
    assert encode is not None
    good = {"n": 1, "x": 1.0, "t": "a", "b": True}
    assert encode([good]) is not None
    assert encode([row]) is None
    assert encode([good, row, good]) is None


def test_the_order_of_names_is_the_rows_own() -> None:
    encode = row_encoder(SCHEMA)
    assert encode is not None
    encoded = encode([{"n": 1, "x": 1.0, "t": "a", "b": True}, {"n": 2, "t": None, "b": False, "x": 0.5}])
    assert encoded is not None
    assert encoded.text.splitlines()[1] == b'{"n":2,"t":null,"b":false,"x":0.5}'


@pytest.mark.parametrize("first", [":", ",", "}", "},{", ":x"])
def test_a_name_that_looks_like_the_end_of_a_text_takes_the_long_way(first: str) -> None:
    # Two rows in different orders could otherwise be cut within a text, and not between them.
    assert row_encoder(pa.schema({first: pa.string(), "},{": pa.string()} | {"a": pa.string()})) is None
    encode = row_encoder(pa.schema({"a": pa.string(), first: pa.string()}))
    assert encode is not None
    encoded = encode([{"a": "},{", first: "},{"}, {"a": '},{"a":', first: "},{"}])
    assert encoded is not None
    assert [json.loads(line) for line in encoded.text.splitlines()] == [
        {"a": "},{", first: "},{"},
        {"a": '},{"a":', first: "},{"},
    ]


def test_what_is_no_list_of_rows_takes_the_long_way() -> None:
    encode = row_encoder(SCHEMA)
    assert encode is not None
    assert [encode(result) for result in ([], {}, (), {"n": [1]}, [1], "nxtb", pa.table({"n": [1]}))] == [None] * 7


def test_rows_of_unequal_length_never_add_up_to_others() -> None:
    encode = row_encoder(pa.schema({"a": pa.int64(), "b": pa.int64()}))
    assert encode is not None
    assert encode([{"a": 1}, {"b": 2}, {"a": 3, "b": 4}]) is None
    assert encode([{"a": 1, "b": 2}, {"a": 3}, {"b": 4}]) is None


def test_a_null_where_none_is_allowed_is_the_long_ways_to_refuse() -> None:
    schema = pa.schema([pa.field("a", pa.int64(), nullable=False)])
    encode = row_encoder(schema)
    assert encode is not None
    assert encode([{"a": None}]) is None
    table = to_table([{"a": None}], None, 1, False)
    assert table is not None
    with pytest.raises((SchemaError, ResultError)):
        conform(table, schema)


@pytest.mark.parametrize("kind", [pa.int32(), pa.float32(), pa.list_(pa.int64()), pa.timestamp("us"), pa.null()])
def test_types_that_python_does_not_have_take_the_long_way(kind: pa.DataType) -> None:
    assert row_encoder(pa.schema({"a": pa.int64(), "b": kind})) is None
