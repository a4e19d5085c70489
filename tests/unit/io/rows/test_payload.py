from __future__ import annotations

import datetime as dt
import json
import subprocess
import sys
from decimal import Decimal
from typing import Any

import numpy as np
import orjson
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cortex_dask.io.json.encoder import dumps
from cortex_dask.io.rows.payload import rows_slice, to_payload, to_records

BIG = 2**60 + 1  # not a double
FORMATS = ["pandas", "pyarrow", "polars", "numpy", "records"]

TABLE = pa.table(
    {
        "id": [1, 2, 3],
        "some": [1, None, 3],
        "score": [0.5, None, 2.0],
        "name": ["a", None, "c"],
        "flag": [True, None, False],
        "at": pa.array([dt.datetime(2026, 1, 1), None, dt.datetime(2026, 1, 2)], pa.timestamp("us")),
        "list": [[1], None, [2, 3]],
        "struct": [{"a": 1}, None, {"a": 2}],
    }
)


def records() -> list[dict[str, Any]]:
    return [{"id": "01234", "n": 1, "tags": [1, 2]}, {"n": None, "tags": [3], "extra": {"a": [1]}}, {"id": "5"}]


class TestFromArrow:
    def test_pandas_is_what_read_parquet_makes_of_it(self, tmp_path):
        import pyarrow.parquet as pq

        pq.write_table(TABLE, tmp_path / "t.parquet")
        expected = pd.read_parquet(tmp_path / "t.parquet")
        pd.testing.assert_frame_equal(to_payload(TABLE, "pandas"), expected)

    def test_pandas_has_a_range_index_whatever_the_metadata_says(self):
        table = pa.Table.from_pandas(pd.DataFrame({"a": [1, 2]}, index=[7, 8]))
        frame = to_payload(table, "pandas")
        assert isinstance(frame.index, pd.RangeIndex)
        assert list(frame.columns) == ["a", "__index_level_0__"]

    @pytest.mark.parametrize(
        ("values", "kind", "dtype"),
        [
            ([1, None], pa.int64(), "float64"),
            ([2**53, None], pa.int64(), "float64"),
            ([BIG, None], pa.int64(), "Int64"),
            ([-BIG, None], pa.int64(), "Int64"),
            ([2**64 - 1, None], pa.uint64(), "UInt64"),
            ([BIG, 1], pa.int64(), "int64"),
            ([2**64 - 1, 1], pa.uint64(), "uint64"),
        ],
    )
    def test_integers_stay_exact_beside_nulls(self, values, kind, dtype):
        table = pa.table({"before": ["x", "y"], "x": pa.array(values, kind), "after": [1, 2]})
        frame = to_payload(table, "pandas")
        assert list(frame.columns) == ["before", "x", "after"]
        assert frame["x"].dtype == dtype
        assert [None if pd.isna(value) else int(value) for value in frame["x"]] == values
        array = to_payload(table, "numpy")["x"]
        assert [None if pd.isna(value) else int(value) for value in array] == values

    def test_integers_stay_exact_inside_lists_and_structs(self):
        table = pa.table({"l": [[BIG, None], None], "s": [{"a": BIG}, {"a": None}], "big": [BIG, None]})
        frame = to_payload(table, "pandas")
        assert frame["l"][0].tolist() == [BIG, None]
        assert frame["s"].tolist() == [{"a": BIG}, {"a": None}]
        assert frame["big"][0] == BIG
        assert to_payload(table, "numpy")["l"][0].tolist() == [BIG, None]

    def test_a_table_without_columns_keeps_its_rows(self):
        assert len(to_payload(pa.table({"a": [BIG, None]}).slice(0, 2), "pandas")) == 2
        assert len(to_payload(TABLE.slice(0, 0), "pandas")) == 0

    def test_numpy_arrays_are_typed_writable_and_two_dimensional_for_fixed_lists(self):
        table = pa.table(
            {
                "i": pa.array([1, 2], pa.int32()),
                "f": [0.5, None],
                "s": ["a", None],
                "b": [True, False],
                "at": pa.array([0, 1], pa.timestamp("ms", "Europe/Berlin")),
                "e": pa.array([[1.0, 2.0], [3.0, 4.0]], pa.list_(pa.float32(), 2)),
                "m": pa.array([[1.0, 2.0], None], pa.list_(pa.float32(), 2)),
                "big": [BIG, None],
                "bigs": [[BIG, None], [1, None]],
            }
        )
        arrays = to_payload(table, "numpy")
        assert {name: array.dtype.str for name, array in arrays.items()} == {
            "i": "<i4", "f": "<f8", "s": "|O", "b": "|b1", "at": "<M8[ms]", "e": "<f4", "m": "|O",
            "big": "|O", "bigs": "|O",
        }  # fmt: skip
        assert arrays["e"].shape == (2, 2)
        assert arrays["m"].shape == (2,)
        for array in arrays.values():
            array[0] = array[1]
        assert table["i"].to_pylist() == [1, 2]
        assert table["e"].to_pylist() == [[1.0, 2.0], [3.0, 4.0]]

    def test_numpy_takes_a_slice_for_a_slice(self):
        table = pa.table({"e": pa.array([[1, 2], [3, 4], [5, 6]], pa.list_(pa.int8(), 2))})
        assert to_payload(table.slice(1, 2), "numpy")["e"].tolist() == [[3, 4], [5, 6]]

    def test_polars_and_records_and_arrow(self):
        frame = to_payload(TABLE, "polars")
        assert isinstance(frame, pl.DataFrame)
        assert frame.rows(named=True) == TABLE.to_pylist()
        assert to_payload(TABLE, "records") == TABLE.to_pylist()
        assert to_payload(TABLE, "pyarrow") is TABLE

    @pytest.mark.parametrize("names", [TABLE.column_names[:6], ["id"], ["score"], ["at"]], ids=len)
    def test_what_a_handler_does_to_a_frame_is_not_seen_by_the_data(self, names):
        table = TABLE.select(names)
        before = table.to_pylist()
        frame = to_payload(table, "pandas")
        frame["new"] = 1
        for number in range(table.num_columns):
            frame.iloc[0, number] = frame.iloc[2, number]
            frame.loc[1, frame.columns[number]] = frame.iloc[2, number]
        assert frame.iloc[0, 0] == frame.iloc[2, 0]
        assert table.to_pylist() == before

    def test_an_unknown_format_is_named(self):
        with pytest.raises(ValueError, match="'xarray' is unknown"):
            to_payload(TABLE, "xarray")  # type: ignore[arg-type]


class TestFromJson:
    def test_values_come_as_written(self):
        rows = [{"zip": "01234", "date": "2026-01-31", "n": BIG, "huge": 2**70, "f": 1.5, "t": True}]
        frame = to_payload(rows, "pandas")
        assert frame.to_dict("records") == rows
        assert [str(dtype) for dtype in frame.dtypes] == ["str" if pd.__version__ >= "3" else "object"] * 2 + [
            "int64", "object", "float64", "bool",
        ]  # fmt: skip
        arrays = to_payload(rows, "numpy")
        assert {name: array.dtype.kind for name, array in arrays.items()} == {
            "zip": "O", "date": "O", "n": "i", "huge": "O", "f": "f", "t": "b",
        }  # fmt: skip
        assert {name: array.tolist()[0] for name, array in arrays.items()} == rows[0]

    @pytest.mark.parametrize(
        ("values", "dtype"),
        [
            ([1, None], "float64"),
            ([BIG, None], "Int64"),
            ([2**64 - 1, None], "UInt64"),
            ([2**64 - 1, 0], "uint64"),
            ([2**63, -1], "object"),
            ([2**64, None], "object"),
            ([1, 2.5], "float64"),
            ([BIG, 2.5], "object"),
            ([1.5, None], "float64"),
            ([True, None], "object"),
            ([1, "a"], "object"),
            ([True, 1], "object"),
            ([[1], [2]], "object"),
            ([{"a": 1}, None], "object"),
            ([None, None], "object"),
        ],
    )
    def test_columns_of_a_frame(self, values, dtype):
        series = to_payload([{"x": value} for value in values], "pandas")["x"]
        assert series.dtype == dtype
        assert [None if value is None or value is pd.NA or value != value else value for value in series] == values

    def test_fields_stand_in_order_of_first_appearance_and_missing_ones_are_null(self):
        frame = to_payload(records(), "pandas")
        assert list(frame.columns) == ["id", "n", "tags", "extra"]
        assert isinstance(frame.index, pd.RangeIndex)
        assert frame["id"].isna().tolist() == [False, True, False]
        table = to_payload(records(), "pyarrow")
        assert table.column_names == ["id", "n", "tags", "extra"]
        assert table.column("extra").to_pylist() == [None, {"a": [1]}, None]
        assert to_payload(records(), "polars").columns == table.column_names
        assert list(to_payload(records(), "numpy")) == table.column_names
        assert to_payload(records(), "records") == records()

    @pytest.mark.parametrize("rows", [[], [{}, {}]])
    @pytest.mark.parametrize("batch_format", FORMATS)
    def test_records_without_fields(self, rows, batch_format):
        payload = to_payload(rows, batch_format)
        assert len(payload) in (len(rows), 0)
        if batch_format in ("pandas", "records"):
            assert len(payload) == len(rows)

    @pytest.mark.parametrize("batch_format", ["pyarrow", "polars"])
    @pytest.mark.parametrize(
        ("values", "message"),
        [
            ([1, "a"], "'x' of this batch holds values of different types.*int, str"),
            ([True, 1], "bool, int"),
            ([[1], 2], "int, list"),
            ([2**64], "no 64-bit column"),
            ([-1, 2**63], "no 64-bit column"),
            ([BIG, 1.5], "no 64-bit column"),
            ([{"a": 1}, {"a": "x"}], "'x' of this batch holds nested values that differ"),
        ],
    )
    def test_columns_of_mixed_types_are_refused_where_a_column_has_one(self, values, message, batch_format):
        with pytest.raises(ValueError, match=message):
            to_payload([{"x": value} for value in values], batch_format)

    @pytest.mark.parametrize("batch_format", ["pandas", "numpy", "records"])
    def test_what_a_handler_does_to_nested_values_is_not_seen_by_the_data(self, batch_format):
        data = records()
        payload = to_payload(data, batch_format)
        if batch_format == "records":
            payload[0]["tags"].append(9)
            payload[1]["extra"]["a"].append(9)
            payload[0]["n"] = 9
        else:
            payload["tags"][0].append(9)
            payload["extra"][1]["a"].append(9)
            payload["n"] = 9
        assert data == records()

    @settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(
        st.lists(
            st.dictionaries(
                st.sampled_from("abc"),
                st.none()
                | st.booleans()
                | st.integers(-(2**70), 2**70)
                | st.floats(allow_nan=False)
                | st.text(max_size=3),
            ),
            max_size=6,
        )
    )
    def test_no_value_changes_on_its_way_into_a_frame(self, rows):
        frame = to_payload(rows, "pandas")
        arrays = to_payload(rows, "numpy")
        for name in {name for row in rows for name in row}:
            for number, row in enumerate(rows):
                expected = row.get(name)
                for value in (frame[name][number], arrays[name][number]):
                    if expected is None:
                        assert pd.isna(value)
                    else:
                        assert value == expected
                        assert isinstance(value, str) == isinstance(expected, str)


class TestSlices:
    def test_rows(self):
        assert rows_slice(TABLE, 1, 3).to_pylist() == TABLE.to_pylist()[1:3]
        assert rows_slice(records(), 1, 3) == records()[1:3]


class TestDeadLetters:
    def test_values_are_those_of_json(self):
        table = pa.table(
            {
                "i": [BIG, None],
                "u": pa.array([2**64 - 1, 0], pa.uint64()),
                "f": [float("nan"), float("-inf")],
                "s": ['q"\\\n\x01é', ""],
                "by": [b"\x00\xff", None],
                "at": pa.array([dt.datetime(2026, 1, 2, 3, 4, 5, 6), None], pa.timestamp("us")),
                "tz": pa.array([0, None], pa.timestamp("s", "Europe/Berlin")),
                "d": [dt.date(2026, 1, 2), None],
                "t": [dt.time(3, 4, 5), None],
                "du": [dt.timedelta(seconds=-1, milliseconds=-500), None],
                "dec": [Decimal("1.20"), None],
                "l": [[0.5, float("inf")], None],
                "st": [{"a": b"x"}, None],
                "m": pa.array([[("k", 1)], None], pa.map_(pa.string(), pa.int64())),
                "mi": pa.array([[(1, 1.5)], []], pa.map_(pa.int64(), pa.float64())),
                "c": pa.array(["u", None]).dictionary_encode(),
                "n": pa.nulls(2),
            }
        )
        first = {
            "i": BIG, "u": 2**64 - 1, "f": "NaN", "s": 'q"\\\n\x01é',
            "by": "AP8=",
            "at": "2026-01-02T03:04:05.000006",
            "tz": "1970-01-01T00:00:00Z", "d": "2026-01-02", "t": "03:04:05.000000",
            "du": "-PT1.500000S", "dec": "1.20",
            "l": [0.5, "Infinity"], "st": {"a": "eA=="}, "m": {"k": 1}, "mi": [[1, 1.5]],
            "c": "u", "n": None,
        }  # fmt: skip
        second = dict.fromkeys(first) | {"u": 0, "f": "-Infinity", "s": "", "mi": []}
        assert to_records(table) == [first, second]
        assert to_records(table.slice(1)) == [second]
        assert to_records(table.slice(0, 0)) == []
        assert orjson.loads(dumps(to_records(table))) == [first, second]

    def test_json_records_are_themselves_and_any_integer_survives(self):
        rows = [{"x": 2**70, "y": "é"}]
        assert to_records(rows) is rows
        assert json.loads(dumps(rows)) == rows
        assert b"\\u" not in dumps(rows)


def test_dataframe_libraries_are_not_imported_before_they_are_used():
    code = (
        "import sys, cortex_dask.io.rows.payload, cortex_dask.io.rows.result, cortex_dask.io.arrow.schema; "
        "import cortex_dask.io.output.part; "
        "heavy = ('pandas', 'polars', 'pyarrow.parquet', 'dask', 'distributed', 'pydantic', 's3fs'); "
        "sys.exit([name for name in heavy if name in sys.modules] or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_polars_missing_is_explained(monkeypatch):
    monkeypatch.setitem(sys.modules, "polars", None)
    with pytest.raises(ModuleNotFoundError, match="needs the package polars"):
        to_payload(TABLE, "polars")


def test_numpy_of_several_chunks_is_one_array():
    table = pa.table({"a": pa.chunked_array([[1], [2]])})
    array = to_payload(table, "numpy")["a"]
    assert isinstance(array, np.ndarray)
    assert array.tolist() == [1, 2]
