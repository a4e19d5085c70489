"""Schemas declared as text: every type, and a sentence for what is none."""

from __future__ import annotations

import pyarrow as pa
import pytest

from cortex_dask.errors import SpecError
from cortex_dask.io.arrow.declaration import parse_schema


class TestParse:
    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("int64", pa.int64()),
            ("INT", pa.int64()),
            ("float", pa.float64()),
            ("double", pa.float64()),
            ("float32", pa.float32()),
            ("str", pa.string()),
            ("bytes", pa.binary()),
            ("date", pa.date32()),
            ("date32[day]", pa.date32()),
            ("timestamp", pa.timestamp("us")),
            ("timestamp[ms]", pa.timestamp("ms")),
            ("timestamp[us, UTC]", pa.timestamp("us", "UTC")),
            ("timestamp[us, tz=Europe/Berlin]", pa.timestamp("us", "Europe/Berlin")),
            ("time[ns]", pa.time64("ns")),
            ("time32[ms]", pa.time32("ms")),
            ("duration[s]", pa.duration("s")),
            ("decimal(10, 2)", pa.decimal128(10, 2)),
            ("decimal128(10, 2)", pa.decimal128(10, 2)),
            ("decimal(50)", pa.decimal256(50, 0)),
            ("list<string>", pa.list_(pa.string())),
            ("list<float32, 3>", pa.list_(pa.float32(), 3)),
            ("list< list< int8 > >", pa.list_(pa.list_(pa.int8()))),
            ("struct<a: int64, b: list<double>>", pa.struct([("a", pa.int64()), ("b", pa.list_(pa.float64()))])),
            ("map<string, int64>", pa.map_(pa.string(), pa.int64())),
        ],
    )
    def test_types(self, text, expected):
        assert parse_schema({"x": text}) == pa.schema([("x", expected)])

    @pytest.mark.parametrize("kind", [pa.int8(), pa.string(), pa.timestamp("us", "UTC"), pa.list_(pa.int64())], ids=str)
    def test_types_as_arrow_prints_them(self, kind):
        assert parse_schema({"x": str(kind)}).field("x").type == kind

    @pytest.mark.parametrize(
        "text",
        [
            "",
            "list<",
            "list<int",
            "list<int64> x",
            "timestamp[days]",
            "decimal(99, 1)",
            "decimal(1, 2)",
            "struct<a>",
            "map<string>",
            "list<int64, 0>",
            "list<int64, x>",
            "int64[",
            "struct<>",
        ],
    )
    def test_malformed_types_name_the_column_and_the_text(self, text):
        with pytest.raises(SpecError) as caught:
            parse_schema({"col": text})
        assert "'col'" in str(caught.value)
        assert repr(text) in str(caught.value)

    def test_an_unknown_type_lists_what_is_allowed_and_the_nearest(self):
        with pytest.raises(SpecError, match="did you mean 'string'") as caught:
            parse_schema({"x": "strnig"})
        assert "timestamp[s|ms|us|ns(, zone)]" in str(caught.value)

    @pytest.mark.parametrize("declared", [{}, {"a": 1}, {1: "int64"}, "int64"])
    def test_what_is_no_mapping_of_text(self, declared):
        with pytest.raises(SpecError, match=r"output\.schema"):
            parse_schema(declared)

    def test_an_arrow_schema_loses_its_metadata(self):
        schema = pa.schema([("a", pa.int8())], metadata={"pandas": "{}"})
        assert parse_schema(schema).metadata is None
        assert parse_schema(schema) == schema
