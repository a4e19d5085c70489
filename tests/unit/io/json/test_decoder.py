"""JSON lines come back in the types of the schema, whatever those are."""

import datetime
from decimal import Decimal

import pyarrow as pa
import pytest

from cortex_dask.io.json.decoder import read_json_lines
from cortex_dask.io.json.encoder import json_lines

COLUMNS = {
    "integers": pa.array([2**62, None, -1]),
    "unsigned": pa.array([2**64 - 1, None, 0], pa.uint64()),
    "floats": pa.array([1.5, None, 1e300]),
    "halves": pa.array([1.5, None, -2.0], pa.float16()),
    "booleans": pa.array([True, None, False]),
    "text that looks like something": pa.array(["2026-01-31", None, "01234"]),
    "dates": pa.array([datetime.date(2026, 1, 31), None, datetime.date(1900, 1, 1)]),
    "timestamps in ns": pa.array([1706702400123456789, None, -1], pa.timestamp("ns")),
    "timestamps with a zone": pa.array([1706702400123456, None, 0], pa.timestamp("us", "Europe/Berlin")),
    "times in ns": pa.array([3723000000001, None, 0], pa.time64("ns")),
    "times in s": pa.array([3723, None, 0], pa.time32("s")),
    "durations": pa.array([1500, None, -1500], pa.duration("ms")),
    "decimals": pa.array([Decimal("1.50"), None, Decimal("-99999999.99")], pa.decimal128(10, 2)),
    "bytes": pa.array([b"\x00\xff", None, b""]),
    "lists": pa.array([[1, None], None, []], pa.list_(pa.int32())),
    "large lists of dates": pa.array([[datetime.date(2026, 1, 31)], None, []], pa.large_list(pa.date32())),
    "fixed lists": pa.array([[1.0, 2.0], None, [3.0, 4.0]], pa.list_(pa.float32(), 2)),
    "structs": pa.array([{"a": 1, "b": b"x"}, None, {"a": None, "b": None}]),
    "maps": pa.array([[("k", 1)], None, []], pa.map_(pa.string(), pa.int64())),
    "maps of integers": pa.array([[(1, "a")], None, []], pa.map_(pa.int64(), pa.string())),
    "categories": pa.array(["a", None, "b"]).dictionary_encode(),
    "nothing": pa.nulls(3),
}


@pytest.mark.parametrize("name", COLUMNS)
def test_a_column_comes_back_as_it_was(name):
    table = pa.table({name: COLUMNS[name]})

    found = read_json_lines(b"".join(bytes(piece) for piece in json_lines(table)), table.schema)

    assert found.schema == table.schema
    assert found.column(0).combine_chunks().to_pylist() == table.column(0).combine_chunks().to_pylist()


def test_no_lines_are_no_rows():
    schema = pa.schema([("x", pa.int64())])

    assert read_json_lines(b"", schema).schema == schema


def test_a_line_may_be_longer_than_a_block():
    table = pa.table({"text": ["x" * (3 << 20), "y"]})

    found = read_json_lines(b"".join(bytes(piece) for piece in json_lines(table)), table.schema)

    assert found.equals(table)
