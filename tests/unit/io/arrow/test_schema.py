from __future__ import annotations

import datetime as dt
import math
import re
import time
from decimal import Decimal

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cortex_dask.errors import DatasetError, SpecError
from cortex_dask.io.arrow.cast import SchemaError, conform
from cortex_dask.io.arrow.declaration import parse
from cortex_dask.io.arrow.schema import is_settled, settle, unify


def unify_types(*kinds: pa.DataType) -> pa.DataType:
    files = [(f"file-{number}.parquet", pa.schema([("x", kind)])) for number, kind in enumerate(kinds)]
    return unify(files).field("x").type


def conform_values(array: pa.Array, kind: pa.DataType) -> pa.Array:
    table = conform(pa.table({"x": array}), pa.schema([("x", kind)]))
    assert table.schema.field("x").type == kind
    return table.column("x").combine_chunks()


class TestUnify:
    @pytest.mark.parametrize(
        ("left", "right", "expected"),
        [
            (pa.int32(), pa.int64(), pa.int64()),
            (pa.uint8(), pa.uint32(), pa.uint32()),
            (pa.uint8(), pa.int8(), pa.int16()),
            (pa.uint32(), pa.int8(), pa.int64()),
            (pa.int32(), pa.float64(), pa.float64()),
            (pa.int8(), pa.float32(), pa.float64()),
            (pa.float32(), pa.float64(), pa.float64()),
            (pa.null(), pa.string(), pa.string()),
            (pa.string(), pa.large_string(), pa.large_string()),
            (pa.string_view(), pa.string(), pa.string()),
            (pa.binary(), pa.large_binary(), pa.large_binary()),
            (pa.binary(4), pa.binary(8), pa.binary()),
            (pa.dictionary(pa.int8(), pa.string()), pa.string(), pa.string()),
            (pa.dictionary(pa.int8(), pa.string()), pa.dictionary(pa.int32(), pa.string()), pa.string()),
            (pa.timestamp("ms"), pa.timestamp("ns"), pa.timestamp("ns")),
            (pa.timestamp("s", "UTC"), pa.timestamp("us", "+00:00"), pa.timestamp("us", "UTC")),
            (pa.date32(), pa.date64(), pa.date32()),
            (pa.time32("s"), pa.time64("us"), pa.time64("us")),
            (pa.decimal128(5, 2), pa.decimal128(6, 4), pa.decimal128(7, 4)),
            (pa.decimal128(5, 2), pa.int32(), pa.decimal128(12, 2)),
            (pa.list_(pa.int32()), pa.list_(pa.float64()), pa.list_(pa.float64())),
            (pa.list_(pa.int32()), pa.large_list(pa.int32()), pa.large_list(pa.int32())),
            (pa.list_(pa.int8(), 3), pa.list_(pa.int16(), 3), pa.list_(pa.int16(), 3)),
            (pa.list_(pa.int8(), 3), pa.list_(pa.int8(), 4), pa.list_(pa.int8())),
            (pa.map_(pa.string(), pa.int8()), pa.map_(pa.string(), pa.int16()), pa.map_(pa.string(), pa.int16())),
            (
                pa.struct([("a", pa.int8())]),
                pa.struct([("b", pa.string()), ("a", pa.int16())]),
                pa.struct([("a", pa.int16()), ("b", pa.string())]),
            ),
        ],
        ids=str,
    )
    def test_harmless_differences_are_promoted(self, left, right, expected):
        assert unify_types(left, right) == expected
        swapped = unify_types(right, left)
        assert swapped == expected or pa.types.is_struct(expected)  # whose fields stand in the order of the first

    @pytest.mark.parametrize(
        ("left", "right"),
        [
            (pa.int64(), pa.string()),
            (pa.int64(), pa.uint64()),
            (pa.int8(), pa.uint64()),
            (pa.string(), pa.binary()),
            (pa.bool_(), pa.int8()),
            (pa.date32(), pa.timestamp("us")),
            (pa.timestamp("us"), pa.timestamp("us", "UTC")),
            (pa.timestamp("us", "Europe/Berlin"), pa.timestamp("us", "UTC")),
            (pa.decimal128(10, 2), pa.float64()),
            (pa.decimal256(76, 0), pa.decimal256(76, 10)),
            (pa.list_(pa.int8()), pa.int8()),
            (pa.struct([("a", pa.int8())]), pa.map_(pa.string(), pa.int8())),
        ],
        ids=str,
    )
    def test_a_conflict_names_the_column_both_types_and_both_files(self, left, right):
        with pytest.raises(DatasetError) as caught:
            unify(
                [
                    ("good.parquet", pa.schema([("y", left)])),
                    ("a", pa.schema([("x", left)])),
                    ("b", pa.schema([("x", right)])),
                ]
            )
        message = str(caught.value)
        assert "'x'" in message
        assert f"{left} in a but {right} in b" in message
        assert "good.parquet" not in message

    def test_a_nested_conflict_has_a_dotted_path_and_the_file_that_it_came_from(self):
        files = [
            ("a", pa.schema([("x", pa.struct([("u", pa.list_(pa.struct([("v", pa.int64())])))]))])),
            ("b", pa.schema([("x", pa.struct([("w", pa.int64())]))])),
            ("c", pa.schema([("x", pa.struct([("u", pa.list_(pa.struct([("v", pa.string())])))]))])),
        ]
        with pytest.raises(DatasetError, match=r"'x\.u\[\]\.v' is int64 in a but string in c"):
            unify(files)

    def test_a_conflict_with_a_promoted_type_names_a_file_that_really_has_it(self):
        files = [("a", pa.schema([("x", pa.int8())])), ("b", pa.schema([("x", pa.int64())]))]
        with pytest.raises(DatasetError, match="int8 in a but uint64 in c"):
            unify([*files, ("c", pa.schema([("x", pa.uint64())]))])

    def test_columns_stand_in_the_order_of_first_sight_and_missing_ones_may_be_null(self):
        first = pa.schema([pa.field("a", pa.int64(), nullable=False), pa.field("b", pa.int64(), nullable=False)])
        second = pa.schema([pa.field("c", pa.int64(), nullable=False), pa.field("a", pa.int64(), nullable=False)])
        settled = unify([("1", first), ("2", second)])
        assert settled.names == ["a", "b", "c"]
        assert [settled.field(name).nullable for name in settled.names] == [False, True, True]

    def test_metadata_is_left_out_and_a_stored_index_stays_a_column(self):
        import pandas as pd

        schema = pa.Schema.from_pandas(pd.DataFrame({"a": [1, 2]}, index=[5, 7]))
        settled = unify([("a", schema)])
        assert settled.metadata is None
        assert settled.names == ["a", "__index_level_0__"]

    def test_a_column_that_is_there_twice_is_refused(self):
        with pytest.raises(DatasetError, match="f has more than one column named 'a'"):
            unify([("f", pa.schema([("a", pa.int8()), ("a", pa.int8())]))])

    def test_no_file_at_all(self):
        with pytest.raises(DatasetError, match="no file"):
            unify([])

    def test_a_hundred_thousand_equal_schemas_are_compared_not_joined(self):
        schema = pa.schema([(f"c{number}", pa.int64()) for number in range(10)])
        other = pa.schema([(f"c{number}", pa.int32()) for number in range(10)])
        started = time.process_time()
        assert unify(("f", other if number % 2 else schema) for number in range(100_000)) == schema
        assert time.process_time() - started < 20  # joining them one by one would take minutes


class TestSettle:
    def test_types_are_the_plain_ones_whichever_library_they_came_from(self):
        table = pa.table(
            {
                "s": pa.array(["a"], pa.large_string()),
                "v": pa.array(["a"], pa.string_view()),
                "b": pa.array([b"a"], pa.large_binary()),
                "l": pa.array([["a"]], pa.large_list(pa.large_string())),
                "d": pa.array(["a"]).dictionary_encode(),
                "h": pa.array([1.0], pa.float16()),
                "st": pa.array([{"a": "x"}], pa.struct([("a", pa.large_string())])),
            }
        ).replace_schema_metadata({"pandas": "{}"})
        settled = settle([table])
        expected = [pa.string(), pa.string(), pa.binary(), pa.list_(pa.string()), pa.string(), pa.float32()]
        assert settled.types == [*expected, pa.struct([("a", pa.string())])]
        assert settled.metadata is None
        assert conform(table, settled).to_pylist() == table.to_pylist()

    def test_tables_are_promoted_together(self):
        tables = [pa.table({"a": [1], "b": pa.nulls(1)}), pa.table({"a": [1.5], "c": ["x"]}), pa.table({"b": ["y"]})]
        assert settle(tables) == pa.schema([("a", pa.float64()), ("b", pa.string()), ("c", pa.string())])

    def test_a_contradiction_names_the_column_and_both_types(self):
        with pytest.raises(SchemaError, match="'a' was returned as int64 by one batch and as string by a later one"):
            settle([pa.table({"a": [1]}), pa.table({"a": ["x"]})])

    def test_columns_of_nulls_are_not_settled(self):
        assert not is_settled(settle([pa.table({"a": pa.nulls(1)})]))
        assert not is_settled(pa.schema([("a", pa.list_(pa.struct([("b", pa.null())])))]))
        assert not is_settled(pa.schema([("a", pa.struct([]))]))
        assert is_settled(pa.schema([("a", pa.list_(pa.struct([("b", pa.int8())])))]))

    def test_a_float_column_of_nulls_only_may_become_anything_until_the_end(self):
        unknown = pa.table({"a": pa.nulls(2, pa.float64())})  # what pandas has for any column with nothing in it
        assert not is_settled(settle([unknown]))
        assert settle([unknown, pa.table({"a": ["x"]})]).types == [pa.string()]
        assert settle([unknown], final=True).types == [pa.float64()]
        assert settle([pa.table({"a": [float("nan")]})]).types == [pa.float64()]


class TestConform:
    def test_an_equal_schema_costs_nothing(self):
        table = pa.table({"a": [1]})
        assert conform(table, table.schema) is table

    def test_columns_are_ordered_and_missing_ones_null(self):
        table = conform(pa.table({"b": [1], "a": ["x"]}), parse({"a": "string", "b": "int64", "c": "list<int64>"}))
        assert table.column_names == ["a", "b", "c"]
        assert table.to_pylist() == [{"a": "x", "b": 1, "c": None}]

    def test_an_empty_table_fits_any_schema(self):
        schema = parse({"a": "string", "b": "struct<x: int64>"})
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
            ("duration[s]", pa.duration("s")),
            ("decimal(10, 2)", pa.decimal128(10, 2)),
            ("decimal(50)", pa.decimal256(50, 0)),
            ("list<string>", pa.list_(pa.string())),
            ("list<float32, 3>", pa.list_(pa.float32(), 3)),
            ("list< list< int8 > >", pa.list_(pa.list_(pa.int8()))),
            ("struct<a: int64, b: list<double>>", pa.struct([("a", pa.int64()), ("b", pa.list_(pa.float64()))])),
            ("map<string, int64>", pa.map_(pa.string(), pa.int64())),
        ],
    )
    def test_types(self, text, expected):
        assert parse({"x": text}) == pa.schema([("x", expected)])

    @pytest.mark.parametrize("kind", [pa.int8(), pa.string(), pa.timestamp("us", "UTC"), pa.list_(pa.int64())], ids=str)
    def test_types_as_arrow_prints_them(self, kind):
        assert parse({"x": str(kind)}).field("x").type == kind

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
            parse({"col": text})
        assert "'col'" in str(caught.value)
        assert repr(text) in str(caught.value)

    def test_an_unknown_type_lists_what_is_allowed_and_the_nearest(self):
        with pytest.raises(SpecError, match="did you mean 'string'") as caught:
            parse({"x": "strnig"})
        assert "timestamp[s|ms|us|ns(, zone)]" in str(caught.value)

    @pytest.mark.parametrize("declared", [{}, {"a": 1}, {1: "int64"}, "int64"])
    def test_what_is_no_mapping_of_text(self, declared):
        with pytest.raises(SpecError, match=r"output\.schema"):
            parse(declared)

    def test_an_arrow_schema_loses_its_metadata(self):
        schema = pa.schema([("a", pa.int8())], metadata={"pandas": "{}"})
        assert parse(schema).metadata is None
        assert parse(schema) == schema
