"""Rows brought to a schema: values are kept exactly, or the mismatch is named."""

from __future__ import annotations

import datetime as dt
import math
import re
from decimal import Decimal

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cortex_dask.io.arrow.cast import SchemaError, conform
from cortex_dask.io.arrow.declaration import parse_schema


def conform_values(array: pa.Array, kind: pa.DataType) -> pa.Array:
    table = conform(pa.table({"x": array}), pa.schema([("x", kind)]))
    assert table.schema.field("x").type == kind
    return table.column("x").combine_chunks()


class TestConform:
    def test_an_equal_schema_costs_nothing(self):
        table = pa.table({"a": [1]})
        assert conform(table, table.schema) is table

    def test_columns_are_ordered_and_missing_ones_null(self):
        schema = parse_schema({"a": "string", "b": "int64", "c": "list<int64>"})
        table = conform(pa.table({"b": [1], "a": ["x"]}), schema)
        assert table.column_names == ["a", "b", "c"]
        assert table.to_pylist() == [{"a": "x", "b": 1, "c": None}]

    def test_an_empty_table_fits_any_schema(self):
        schema = parse_schema({"a": "string", "b": "struct<x: int64>"})
        assert conform(pa.table({}), schema) == schema.empty_table()

    @pytest.mark.parametrize(
        ("values", "source", "target"),
        [
            ([1, None, 3], pa.float64(), pa.int64()),
            ([1, 2], pa.int64(), pa.int8()),
            ([2**53, -(2**53)], pa.int64(), pa.float64()),
            ([2**63], pa.uint64(), pa.uint64()),
            ([0.5, math.inf, None], pa.float64(), pa.float32()),
            (["a", None], pa.large_string(), pa.string()),
            (["a", None], pa.string_view(), pa.string()),
            ([b"ab", None], pa.binary(), pa.binary(2)),
            ([None, None], pa.int64(), pa.string()),
            ([None, None], pa.null(), pa.struct([("a", pa.int64())])),
            ([dt.datetime(2026, 1, 1)], pa.timestamp("ns"), pa.timestamp("s")),
            ([dt.time(1, 2, 3)], pa.time64("ns"), pa.time32("s")),
            ([dt.timedelta(seconds=3)], pa.duration("us"), pa.duration("s")),
            ([Decimal("1.50")], pa.decimal128(10, 2), pa.decimal128(5, 1)),
            ([7, None], pa.int64(), pa.decimal128(5, 2)),
            ([Decimal("7.00")], pa.decimal128(5, 2), pa.int8()),
            ([[1.0, None], None, []], pa.list_(pa.float64()), pa.list_(pa.int32())),
            ([[1, 2], None], pa.large_list(pa.int64()), pa.list_(pa.float32(), 2)),
            ([[1, 2], [3, 4]], pa.list_(pa.int64(), 2), pa.list_(pa.int64())),
            ([[1, 2], None], pa.list_view(pa.int64()), pa.list_(pa.int64())),
            ([[("a", 1)], None, []], pa.map_(pa.string(), pa.int64()), pa.map_(pa.string(), pa.int8())),
        ],
        ids=str,
    )
    def test_values_that_are_kept_are_cast(self, values, source, target):
        padded = pa.concat_arrays([pa.array([None], source), pa.array(values, source), pa.array([None], source)])
        for array in (pa.array(values, source), padded.slice(1, len(values))):
            assert conform_values(array, target).to_pylist() == values

    def test_struct_fields_are_ordered_and_filled(self):
        target = pa.struct([("b", pa.string()), ("a", pa.int64())])
        array = pa.array([{"a": 1.0}, None, {"a": None}])
        assert conform_values(array, target).to_pylist() == [{"b": None, "a": 1}, None, {"b": None, "a": None}]

    def test_what_lies_under_a_null_does_not_count(self):
        child = pa.array([1.5, 2.0])
        array = pa.StructArray.from_arrays([child], names=["a"], mask=pa.array([True, False]))
        assert conform_values(array, pa.struct([("a", pa.int64())])).to_pylist() == [None, {"a": 2}]

    def test_nan_is_null_among_integers_and_stays_nan_among_floats(self):
        assert conform_values(pa.array([1.0, math.nan]), pa.int32()).to_pylist() == [1, None]
        assert math.isnan(conform_values(pa.array([math.nan]), pa.float32())[0].as_py())

    def test_dictionaries_become_their_values(self):
        assert conform_values(pa.array(["a", None, "a"]).dictionary_encode(), pa.string()).to_pylist() == [
            "a",
            None,
            "a",
        ]

    def test_the_instant_stays_where_the_zone_changes(self):
        array = pa.array([0], pa.timestamp("s", "Europe/Berlin"))
        assert conform_values(array, pa.timestamp("us", "UTC")).cast(pa.int64()).to_pylist() == [0]

    def test_midnights_are_dates_since_pandas_has_none(self):
        array = pa.array([dt.datetime(2026, 1, 2), None])
        assert conform_values(array, pa.date32()).to_pylist() == [dt.date(2026, 1, 2), None]

    @pytest.mark.parametrize(
        ("values", "source", "target", "shown"),
        [
            ([1.0, 2.5], pa.float64(), pa.int64(), "2.5"),
            ([1.0, 2.0**63], pa.float64(), pa.int64(), "9.223372036854776e+18"),
            ([1.0, math.inf], pa.float64(), pa.int64(), "inf"),
            ([1.0, -1.0], pa.float64(), pa.uint8(), "-1.0"),
            ([1, 300, 1], pa.int64(), pa.uint8(), "300"),
            ([1, 2**53 + 1], pa.int64(), pa.float64(), "9007199254740993"),
            ([0.5, 0.1], pa.float64(), pa.float32(), "0.1"),
            ([b"ab", b"abc"], pa.binary(), pa.binary(2), "b'abc'"),
            ([Decimal("1.50"), Decimal("1.55")], pa.decimal128(4, 2), pa.decimal128(4, 1), "Decimal('1.55')"),
            ([1, 10**6], pa.int64(), pa.decimal128(5, 2), "1000000"),
            (
                [dt.datetime(2026, 1, 1), dt.datetime(2026, 1, 1, 1)],
                pa.timestamp("us"),
                pa.date32(),
                "2026, 1, 1, 1, 0",
            ),
            ([dt.datetime(2026, 1, 1, 0, 0, 0, 5)], pa.timestamp("us"), pa.timestamp("s"), "0, 0, 0, 5)"),
            ([[1.0], [1.5]], pa.list_(pa.float64()), pa.list_(pa.int64()), "1.5"),
            ([[1, 2], [1]], pa.list_(pa.int64()), pa.list_(pa.int64(), 2), "[1]"),
            # types that never fit: the first value is shown
            (["1"], pa.string(), pa.int64(), "'1'"),
            ([1], pa.int64(), pa.string(), "1"),
            ([True], pa.bool_(), pa.int64(), "True"),
            ([1], pa.int64(), pa.bool_(), "1"),
            ([b"a"], pa.binary(), pa.string(), "b'a'"),
            ([Decimal("1.50")], pa.decimal128(4, 2), pa.float64(), "Decimal('1.50')"),
            ([dt.datetime(2026, 1, 1)], pa.timestamp("us"), pa.timestamp("us", "UTC"), "datetime.datetime(2026, 1, 1"),
            ([dt.date(2026, 1, 1)], pa.date32(), pa.timestamp("us"), "datetime.date(2026, 1, 1)"),
            ([1], pa.int64(), pa.list_(pa.int64()), "1"),
            ([1], pa.int64(), pa.null(), "1"),
        ],
        ids=str,
    )
    def test_a_value_that_would_change_is_refused_and_shown(self, values, source, target, shown):
        with pytest.raises(SchemaError) as caught:
            conform_values(pa.array([None, *values, None], source), target)
        message = str(caught.value)
        assert re.match(r"column 'x(\[\])?' holds ", message)
        assert shown in message.partition("but the output")[0]
        assert "declare the output's schema" in message

    def test_a_nested_misfit_has_a_dotted_path(self):
        array = pa.array([{"a": [{"b": 1.5}]}])
        target = pa.struct([("a", pa.list_(pa.struct([("b", pa.int64())])))])
        with pytest.raises(
            SchemaError, match=r"'x\.a\[\]\.b' holds 1\.5 \(double\), but the output's schema says int64"
        ):
            conform_values(array, target)

    def test_a_column_that_is_not_in_the_schema_is_refused(self):
        with pytest.raises(SchemaError, match="'extra' was returned, but the output's schema has only 'a'"):
            conform(pa.table({"a": [1], "extra": [1]}), pa.schema([("a", pa.int64())]))

    def test_a_field_that_is_not_in_a_struct_is_refused(self):
        with pytest.raises(SchemaError, match="'x' holds"):
            conform_values(pa.array([{"a": 1, "b": 2}]), pa.struct([("a", pa.int64())]))

    def test_nulls_are_refused_where_the_schema_was_declared_without(self):
        schema = pa.schema([pa.field("a", pa.int64(), nullable=False)])
        assert conform(pa.table({"a": [1.0]}), schema).to_pylist() == [{"a": 1}]
        with pytest.raises(SchemaError, match="'a' holds nulls"):
            conform(pa.table({"a": [1, None]}), schema)

    def test_long_values_are_cut_in_messages(self):
        with pytest.raises(SchemaError) as caught:
            conform_values(pa.array(["x" * 10_000]), pa.int64())
        assert len(str(caught.value)) < 400


NUMBERS = [pa.int8(), pa.int16(), pa.int32(), pa.int64(), pa.uint8(), pa.uint16(), pa.uint32(), pa.uint64()]
NUMBERS += [pa.float32(), pa.float64(), pa.decimal128(12, 3), pa.decimal256(50, 0), pa.string(), pa.bool_()]
INTERESTING = st.one_of(
    st.integers(-(2**63), 2**64 - 1),
    st.sampled_from([0, 1, -1, 127, 128, 255, 256, 2**24, 2**24 + 1, 2**53, 2**53 + 1, 2**63 - 1, 2**63, -(2**63)]),
    st.floats(),
    st.integers(-(2**60), 2**60).map(float),
    st.floats(width=32),
)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.none() | INTERESTING, max_size=6), st.sampled_from(NUMBERS), st.sampled_from(NUMBERS), st.booleans())
def test_whatever_conform_accepts_is_equal_to_what_went_in(values, source, target, nested):
    try:
        array = pa.array(values, source)
    except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError, TypeError, ValueError):
        return  # not values of this type
    if nested:
        array, target = pa.array([array.to_pylist()], pa.list_(source)), pa.list_(target)
    before = array.to_pylist()
    try:
        after = conform_values(array, target).to_pylist()
    except SchemaError:
        return
    if nested:
        [before], [after] = before, after
    whole = not pa.types.is_floating(target.value_type if nested else target)
    for old, new in zip(before, after, strict=True):
        if isinstance(old, float) and math.isnan(old):
            assert new is None if whole and source != target else (new is None or math.isnan(new))
        else:
            assert old == new
            assert isinstance(old, str) == isinstance(new, str)
