from __future__ import annotations

import time

import pyarrow as pa
import pytest

from cortex_dask.errors import DatasetError
from cortex_dask.io.arrow.cast import SchemaError, conform
from cortex_dask.io.arrow.schema import decide_schema, is_decided, unify


def unify_types(*kinds: pa.DataType) -> pa.DataType:
    files = [(f"file-{number}.parquet", pa.schema([("x", kind)])) for number, kind in enumerate(kinds)]
    return unify(files).field("x").type


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
        settled = decide_schema([table])
        expected = [pa.string(), pa.string(), pa.binary(), pa.list_(pa.string()), pa.string(), pa.float32()]
        assert settled.types == [*expected, pa.struct([("a", pa.string())])]
        assert settled.metadata is None
        assert conform(table, settled).to_pylist() == table.to_pylist()

    def test_tables_are_promoted_together(self):
        tables = [pa.table({"a": [1], "b": pa.nulls(1)}), pa.table({"a": [1.5], "c": ["x"]}), pa.table({"b": ["y"]})]
        assert decide_schema(tables) == pa.schema([("a", pa.float64()), ("b", pa.string()), ("c", pa.string())])

    def test_a_contradiction_names_the_column_and_both_types(self):
        with pytest.raises(SchemaError, match="'a' was returned as int64 by one batch and as string by a later one"):
            decide_schema([pa.table({"a": [1]}), pa.table({"a": ["x"]})])

    def test_columns_of_nulls_are_not_settled(self):
        assert not is_decided(decide_schema([pa.table({"a": pa.nulls(1)})]))
        assert not is_decided(pa.schema([("a", pa.list_(pa.struct([("b", pa.null())])))]))
        assert not is_decided(pa.schema([("a", pa.struct([]))]))
        assert is_decided(pa.schema([("a", pa.list_(pa.struct([("b", pa.int8())])))]))

    def test_a_float_column_of_nulls_only_may_become_anything_until_the_end(self):
        unknown = pa.table({"a": pa.nulls(2, pa.float64())})  # what pandas has for any column with nothing in it
        assert not is_decided(decide_schema([unknown]))
        assert decide_schema([unknown, pa.table({"a": ["x"]})]).types == [pa.string()]
        assert decide_schema([unknown], final=True).types == [pa.float64()]
        assert decide_schema([pa.table({"a": [float("nan")]})]).types == [pa.float64()]
