from __future__ import annotations

import datetime as dt
import math
import sys
import uuid
from decimal import Decimal
from typing import Any

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cortex_dask.io.arrow.cast import conform
from cortex_dask.io.arrow.schema import decide_schema
from cortex_dask.io.rows.column import ResultError, from_values
from cortex_dask.io.rows.result import to_table

DATA = pa.table({"id": [1, 2, 3], "text": ["a", "b", "c"]})


class Tensor:
    """Looks like a tensor of PyTorch: on a device, with a gradient."""

    def __init__(self, values: Any, ready: bool = False) -> None:
        self.values, self.ready, self.dtype = np.asarray(values), ready, "torch.float32"

    def detach(self) -> Tensor:
        return self

    def cpu(self) -> Tensor:
        return Tensor(self.values, ready=True)

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        if not self.ready:
            raise RuntimeError("can't convert a device tensor that needs a gradient")
        return self.values


class EagerTensor:
    """Looks like a tensor of TensorFlow."""

    def __init__(self, values: Any) -> None:
        self.values = np.asarray(values)

    def numpy(self) -> np.ndarray:
        return self.values


def convert(result: Any, keep: bool | tuple[str, ...] = False, data: Any = DATA, rows: int = 3) -> pa.Table:
    table = to_table(result, data, rows, keep)
    assert table is not None
    table.validate(full=True)
    return table


def rows_of(result: Any, keep: bool | tuple[str, ...] = False, data: Any = DATA) -> list[dict[str, Any]]:
    return convert(result, keep, data).to_pylist()


class TestAllowed:
    @pytest.mark.parametrize("keep", [False, True, ("id",)])
    def test_none_is_no_rows(self, keep):
        assert to_table(None, DATA, 3, keep) is None

    @pytest.mark.parametrize(
        "result",
        [
            pd.DataFrame({"a": [1, 2], "s": ["x", None]}),
            pd.DataFrame({"a": [1, 2], "s": ["x", None]}, index=[7, 9]),
            pl.DataFrame({"a": [1, 2], "s": ["x", None]}),
            pl.DataFrame({"a": [1, 2], "s": ["x", None]}).lazy(),
            pa.table({"a": [1, 2], "s": ["x", None]}),
            pa.record_batch({"a": [1, 2], "s": ["x", None]}),
            pa.table({"a": [1, 2], "s": ["x", None]}).to_reader(),
            {"a": [1, 2], "s": ("x", None)},
            {"a": np.array([1, 2]), "s": pd.Series(["x", None], index=[8, 9])},
            {"a": pa.array([1, 2]), "s": pl.Series(["x", None])},
            {"a": Tensor([1, 2]), "s": pd.Categorical(["x", None])},
            {"a": EagerTensor([1, 2]), "s": pa.array(["x", None]).dictionary_encode()},
            [{"a": 1, "s": "x"}, {"a": 2}],
            [{"a": np.int64(1), "s": np.str_("x")}, {"a": 2, "s": float("nan")}],
            ({"a": 1, "s": "x"}, {"a": 2, "s": pd.NA}),
            np.array([(1, "x"), (2, None)], dtype=[("a", "i8"), ("s", "O")]),
            np.array([(1, "x"), (2, None)], dtype=[("a", "i8"), ("s", "O")]).view(np.recarray),
        ],
        ids=lambda result: f"{type(result).__module__}.{type(result).__name__}",
    )
    def test_columns(self, result):
        table = convert(result)
        assert table.to_pylist() == [{"a": 1, "s": "x"}, {"a": 2, "s": None}]
        assert decide_schema([table]) == pa.schema([("a", pa.int64()), ("s", pa.string())])

    @pytest.mark.parametrize(
        "result",
        [
            [1.5, 2.5],
            (1.5, 2.5),
            np.array([1.5, 2.5]),
            np.array([[1.5], [2.5]]),
            np.array([1.5, 2.5], dtype=">f8"),
            np.array([0, 1.5, 0, 2.5])[1::2],
            np.ma.array([1.5, 2.5]),
            pd.Series([1.5, 2.5], name="other"),
            pd.Index([1.5, 2.5]),
            pd.array([1.5, 2.5], dtype="Float64"),
            pl.Series("other", [1.5, 2.5]),
            pa.array([1.5, 2.5]),
            pa.chunked_array([[1.5], [2.5]]),
            Tensor([1.5, 2.5]),
            Tensor([[1.5], [2.5]]),
            EagerTensor([1.5, 2.5]),
            [Tensor(1.5), Tensor(2.5)],
            [np.float64(1.5), 2.5],
            [np.array(1.5), np.array(2.5)],
        ],
        ids=lambda result: type(result).__name__,
    )
    def test_one_column_is_called_prediction(self, result):
        table = convert(result)
        assert table.to_pylist() == [{"prediction": 1.5}, {"prediction": 2.5}]
        assert decide_schema([table]) == pa.schema([("prediction", pa.float64())])

    @pytest.mark.parametrize(
        ("result", "kind"),
        [
            (np.ones((2, 3), np.float32), pa.list_(pa.float32(), 3)),
            (np.asfortranarray(np.ones((2, 3), np.float16)), pa.list_(pa.float32(), 3)),
            (np.ones((2, 2, 1)), pa.list_(pa.list_(pa.float64(), 1), 2)),
            ({"prediction": np.ones((2, 3))}, pa.list_(pa.float64(), 3)),
            ([[1.0, 2.0], [3.0]], pa.list_(pa.float64())),
            ([np.ones(2, np.float32), np.ones(3, np.float32)], pa.list_(pa.float32())),
            ([np.ones((2, 2)), None], pa.list_(pa.list_(pa.float64()))),
            (pd.Series([np.ones(2), None]), pa.list_(pa.float64())),
        ],
        ids=lambda value: str(value).split(" at 0x")[0][:20],
    )
    def test_vectors_are_lists(self, result, kind):
        table = convert(result)
        assert table.schema.field("prediction").type == kind
        assert table.num_rows == 2

    @pytest.mark.parametrize(
        ("dtype", "kind"),
        [
            ("M8[D]", pa.date32()),
            ("M8[h]", pa.timestamp("s")),
            ("M8[ms]", pa.timestamp("ms")),
            ("M8[ns]", pa.timestamp("ns")),
            ("m8[m]", pa.duration("s")),
            ("m8[us]", pa.duration("us")),
        ],
    )
    def test_numpy_times(self, dtype, kind):
        table = convert(np.array([1, "NaT"], dtype=dtype))
        assert table.schema.field("prediction").type == kind
        assert table.column("prediction").null_count == 1
        assert convert([np.array(1, dtype)[()], None]).schema == table.schema

    def test_numpy_text_and_bytes_and_masks(self):
        assert rows_of({"u": np.array(["ab", "c"]), "s": np.array([b"ab", b"c"])}) == [
            {"u": "ab", "s": b"ab"},
            {"u": "c", "s": b"c"},
        ]
        assert rows_of(np.ma.array([1, 2], mask=[False, True])) == [{"prediction": 1}, {"prediction": None}]

    def test_pandas_types(self):
        frame = pd.DataFrame(
            {
                "i": pd.array([1, None], "Int64"),
                "b": pd.array([True, None], "boolean"),
                "s": pd.array(["x", None], "string"),
                "c": pd.Categorical(["u", None], categories=["v", "u"]),
                "n": pd.Categorical([5, None]),
                "at": pd.to_datetime(["2026-01-01", None]),
                "tz": pd.to_datetime(["2026-01-01", None]).tz_localize("UTC"),
                "td": pd.to_timedelta([1, None], "s"),
                "a": pd.array([1.5, None], "float64[pyarrow]"),
                "sp": pd.arrays.SparseArray([0.0, 1.0]),
                "o": [Decimal("1.5"), None],
                "d": [dt.date(2026, 1, 1), pd.NaT],
                "l": [[1, 2], None],
                "nan": [np.nan, 1.0],
            }
        )
        assert rows_of(frame)[0] == {
            "i": 1, "b": True, "s": "x", "c": "u", "n": 5, "at": dt.datetime(2026, 1, 1),
            "tz": dt.datetime(2026, 1, 1, tzinfo=dt.UTC), "td": dt.timedelta(seconds=1), "a": 1.5, "sp": 0.0,
            "o": Decimal("1.5"), "d": dt.date(2026, 1, 1), "l": [1, 2], "nan": None,
        }  # fmt: skip
        assert rows_of(frame)[1] == dict.fromkeys(frame.columns) | {"sp": 1.0, "nan": 1.0}

    def test_a_named_index_becomes_a_column_and_others_are_dropped(self):
        frame = pd.DataFrame({"a": [1, 2]}, index=pd.Index([7, 8], name="key"))
        assert rows_of(frame) == [{"key": 7, "a": 1}, {"key": 8, "a": 2}]
        assert rows_of(frame["a"]) == [{"key": 7, "prediction": 1}, {"key": 8, "prediction": 2}]
        assert rows_of(frame.rename_axis(None)) == [{"a": 1}, {"a": 2}]
        assert rows_of(frame.rename_axis("a")) == [{"a": 1}, {"a": 2}]
        grouped = pd.DataFrame({"g": ["x", "x", "y"], "h": [1, 1, 1], "v": [1, 2, 3]}).groupby(["g", "h"]).sum()
        assert rows_of(grouped) == [{"g": "x", "h": 1, "v": 3}, {"g": "y", "h": 1, "v": 3}]

    def test_numbered_columns_get_their_number_as_name(self):
        assert rows_of(pd.DataFrame(np.eye(2))) == [{"0": 1.0, "1": 0.0}, {"0": 0.0, "1": 1.0}]

    def test_single_values_are_repeated_beside_columns(self):
        result = {"a": [1, 2], "model": "v1", "weight": np.float32(0.5), "none": None, "zero-d": np.array(7)}
        assert rows_of(result)[1] == {"a": 2, "model": "v1", "weight": 0.5, "none": None, "zero-d": 7}

    def test_records_may_differ_in_fields(self):
        assert rows_of([{"a": 1}, {"b": "x", "a": None}]) == [{"a": 1, "b": None}, {"a": None, "b": "x"}]

    def test_nan_is_a_null_in_pandas_only(self):
        assert rows_of(pd.Series([1.0, np.nan]))[1] == {"prediction": None}
        for result in ([1.0, math.nan], np.array([1.0, math.nan]), [{"prediction": 1.0}, {"prediction": math.nan}]):
            assert math.isnan(rows_of(result)[1]["prediction"])

    @pytest.mark.parametrize(
        "result",
        [
            pd.DataFrame(),
            [],
            {},
            np.array([]),
            pd.DataFrame({"a": pd.Series([], dtype="int64")}),
            {"a": []},
            pl.DataFrame(),
        ],
        ids=str,
    )
    def test_zero_rows_are_fine(self, result):
        schema = pa.schema([("a", pa.int64()), ("prediction", pa.float64())])
        assert conform(convert(result), schema) == schema.empty_table()
        with pytest.raises(ResultError, match="returned 0 rows for a batch of 3"):
            convert(result, keep=True)

    def test_nanoseconds_and_large_integers_survive(self):
        moment = pd.Timestamp("2026-01-01 00:00:00.000000001")
        assert rows_of([moment, None])[0]["prediction"] == moment
        assert rows_of([pd.Timedelta(1, "ns")])[0]["prediction"] == pd.Timedelta(1, "ns")
        assert rows_of([2**63, None, 2**64 - 1]) == [
            {"prediction": 2**63},
            {"prediction": None},
            {"prediction": 2**64 - 1},
        ]
        assert rows_of(pd.DataFrame({"x": [2**60 + 1, None]}, dtype=object)) == [{"x": 2**60 + 1}, {"x": None}]

    @pytest.mark.parametrize(
        "make", [lambda x: x, lambda x: pd.DataFrame({"a": x}, copy=False), lambda x: {"a": x}, lambda x: [x]]
    )
    def test_a_buffer_that_the_handler_fills_again_is_copied(self, make):
        buffer = np.array([1.0, 2.0])
        table = convert(make(buffer))
        before = table.to_pylist()
        buffer[:] = 9
        assert table.to_pylist() == before

    def test_a_masked_pandas_array_that_the_handler_fills_again_is_copied(self):
        array = pd.array([1, 2], "Int64")
        table = convert(pd.DataFrame({"a": array}, copy=False))
        array[0] = 9
        assert table.to_pylist() == [{"a": 1}, {"a": 2}]


class TestRefused:
    @pytest.mark.parametrize(
        ("result", "message"),
        [
            ((x for x in [1]), "builtins.generator: make it a list; allowed are None, a DataFrame"),
            ({1, 2}, "builtins.set: make it a list"),
            ("text", "builtins.str; allowed"),
            (b"bytes", "builtins.bytes; allowed"),
            (3.5, "builtins.float"),
            (object(), "builtins.object"),
            (pd.Timestamp("2026-01-01"), "pandas.*Timestamp"),
            (pa.scalar(1), "pyarrow.*Int64Scalar"),
            (np.float64(1), "numpy.float64"),
            (np.array(3), "array without a dimension"),
            (Tensor(3), "array without a dimension"),
            (np.ones((2, 0)), r"shape \(2, 0\)"),
            (np.array([1j]), "complex128"),
            (np.array(["2026"], "M8[Y]"), r"datetime64\[Y\]"),
            ({"a": 1.0, "b": "x"}, "dict of single values .'a', 'b'."),
            ({"a": [1, 2], "b": [1]}, "different lengths: 'a' has 2, 'b' has 1 rows"),
            ({"a": [1], "b": {"c": 1}}, "'b' of the result is a dict"),
            ({"a": (x for x in [1])}, "'a' of the result is a generator"),
            ({1: [1], "1": [2]}, "two columns named '1'"),
            ([{"a": 1}, 3], "also holds a int"),
            ([1, "a"], r"'prediction' of the result mixes types, int \(1\) and str \('a'\)"),
            ([True, 1], "bool .* and int"),
            (["a", b"b"], "str .* and bytes"),
            ([dt.date(2026, 1, 1), dt.datetime(2026, 1, 1, 5)], "date .* and datetime"),
            ([dt.datetime(2026, 1, 1), dt.datetime(2026, 1, 1, tzinfo=dt.UTC)], "datetime .* and datetime with a zone"),
            ([{"x": 1}, {"x": [1]}], "'x' of the result mixes types, int .* and list"),
            ([{"x": [1]}, {"x": ["a"]}], "'x' of the result holds values that do not fit together"),
            (pd.DataFrame({"x": [1, "a"]}), "'x' of the result mixes types"),
            ([uuid.UUID(int=1)], "uuid.UUID"),
            ([{1, 2}], "builtins.set"),
            ([2**64], "no one type can hold exactly"),
            ([-1, 2**63], "no one type can hold exactly"),
            ([2**60 + 1, 0.5], "no one type can hold exactly"),
            (pd.DataFrame([[1, 2]], columns=["a", "a"]), "two columns named 'a'"),
            (pa.table([[1], [2]], names=["a", "a"]), "two columns named 'a'"),
            (pd.DataFrame([[1]], columns=pd.MultiIndex.from_tuples([("a", 1)])), r"the name \('a', 1\) of type tuple"),
            (pd.DataFrame([[1]], columns=[None]), "name columns with text"),
            (pd.DataFrame({"p": pd.period_range("2026", periods=1, freq="D")}), "'p' of the result holds periods"),
        ],
        ids=lambda value: str(value).split(" at 0x")[0][:30],
    )
    def test_says_what_was_found_and_what_is_allowed(self, result, message):
        with pytest.raises(ResultError, match=message) as caught:
            convert(result)
        assert isinstance(caught.value, ValueError)
        assert "\n" not in str(caught.value)


class TestKeep:
    def test_input_columns_stand_before_the_returned_ones(self):
        assert rows_of([7, 8, 9], keep=True)[0] == {"id": 1, "text": "a", "prediction": 7}
        assert rows_of([7, 8, 9], keep=("text",))[2] == {"text": "c", "prediction": 9}
        assert convert([7, 8, 9], keep=("text", "id")).column_names == ["text", "id", "prediction"]

    def test_a_returned_column_takes_the_place_of_the_kept_one(self):
        table = convert({"id": [7, 8, 9], "p": [1, 2, 3]}, keep=True)
        assert table.column_names == ["text", "id", "p"]
        assert table.column("id").to_pylist() == [7, 8, 9]

    @pytest.mark.parametrize("result", [[1, 2], [1, 2, 3, 4], np.ones(2), pd.DataFrame({"a": [1]}), {"a": [1, 2]}])
    def test_row_counts_must_match(self, result):
        with pytest.raises(ResultError, match=r"returned \d rows for a batch of 3 rows"):
            convert(result, keep=True)

    def test_a_frame_without_columns_but_with_rows_keeps_them(self):
        assert rows_of(pd.DataFrame(index=range(3)), keep=("id",)) == [{"id": 1}, {"id": 2}, {"id": 3}]

    def test_a_sorted_frame_is_matched_by_its_index(self):
        frame = DATA.to_pandas().sort_values("id", ascending=False)
        frame["double"] = frame["id"] * 2
        assert rows_of(frame[["double"]], keep=("id",)) == [
            {"id": 3, "double": 6},
            {"id": 2, "double": 4},
            {"id": 1, "double": 2},
        ]

    def test_a_frame_with_an_index_of_its_own_is_matched_in_order(self):
        assert rows_of(pd.Series([7, 8, 9], index=[2, 3, 4]), keep=("id",))[0] == {"id": 1, "prediction": 7}

    def test_a_column_that_the_input_lacks_is_named(self):
        with pytest.raises(ResultError, match=r"asks for the column 'nope'.*it has 'id', 'text'"):
            convert([1, 2, 3], keep=("nope",))

    def test_json_records(self):
        data = [{"a": 1, "b": "x"}, {"a": None, "c": [1]}, {}]
        assert rows_of([7, 8, 9], keep=True, data=data)[1] == {"a": None, "b": None, "c": [1], "prediction": 8}
        assert rows_of([7, 8, 9], keep=("b", "absent"), data=data)[0] == {"b": "x", "absent": None, "prediction": 7}

    def test_json_values_of_mixed_types_cannot_be_kept(self):
        data = [{"a": 1, "b": 1}, {"a": "x", "b": 2}, {}]
        with pytest.raises(
            ResultError, match=r"output\.keep: column 'a' of this batch holds values of different types"
        ):
            convert([7, 8, 9], keep=True, data=data)
        assert rows_of([7, 8, 9], keep=("b",), data=data)[0] == {"b": 1, "prediction": 7}
        assert rows_of({"a": [0, 0, 0]}, keep=("b",), data=data)[0] == {"b": 1, "a": 0}


SCALARS = st.one_of(
    st.integers(-(2**63), 2**63 - 1),
    st.floats(allow_nan=False),
    st.text(max_size=4),
    st.booleans(),
    st.binary(max_size=4),
    st.datetimes(),
    st.dates(),
    st.lists(st.integers(-9, 9), max_size=3),
)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.none() | SCALARS, max_size=5), st.sampled_from(["list", "records", "dict", "object array", "frame"]))
def test_values_come_back_equal_or_are_refused(values, form):
    array = np.empty(len(values), dtype=object)
    array[:] = values
    result = {
        "list": values,
        "records": [{"prediction": value} for value in values],
        "dict": {"prediction": values},
        "object array": array,
        "frame": pd.DataFrame({"prediction": pd.Series(array, dtype=object)}),
    }[form]
    try:
        table = to_table(result, DATA, 3, False)
    except ResultError:
        refused = True
    else:
        refused = False
    if refused:
        assert len({type(value) for value in values} - {type(None)}) > 1
        return
    found = table.column("prediction").to_pylist() if table.num_columns else []
    assert found == values
    for old, new in zip(values, found, strict=True):
        assert type(old) is type(new) or {type(old), type(new)} <= {int, float}


PLAIN = {
    pa.int64(): st.integers(-(2**63), 2**63 - 1),
    pa.float64(): st.floats(),
    pa.string(): st.text(max_size=5),
    pa.bool_(): st.booleans(),
}


@pytest.mark.parametrize("kind", PLAIN)
@pytest.mark.parametrize("with_pandas", [True, False])
@settings(deadline=None)
@given(data=st.data())
def test_plain_values_are_what_arrow_makes_of_them(kind: pa.DataType, with_pandas: bool, data: st.DataObject) -> None:
    values = data.draw(st.lists(PLAIN[kind], min_size=1, max_size=20))
    with pytest.MonkeyPatch.context() as patch:
        if not with_pandas:
            patch.delitem(sys.modules, "pandas")
        array = from_values("n", values)
    array.validate(full=True)
    assert repr((array.type, array.to_pylist())) == repr((kind, values))
