"""What fits a signature, and what is said of what does not."""

from __future__ import annotations

import datetime
import re
from decimal import Decimal
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from cortex_dask.errors import InputError
from cortex_dask.tensorflow.signature import ModelSignature, Tensor, choose_signature

MODEL = "the model m"


def tensor(dtype: Any, shape: tuple[int | None, ...] | None = (None,)) -> Tensor:
    return Tensor("x", np.dtype(dtype), shape)


@pytest.mark.parametrize(
    ("value", "wanted", "expected"),
    [
        ([1, 2], "float32", [1.0, 2.0]),
        ([1, 2], "uint8", [1, 2]),
        ([1.5, 2.5], "float16", [1.5, 2.5]),
        (np.array([1.5], "float64"), "float32", [1.5]),
        (np.array([7], "int64"), "int32", [7]),
        ([True, False], "bool", [True, False]),
        ([True, False], "int32", [1, 0]),
        (pd.Series([1, 2], dtype="Int64"), "int64", [1, 2]),
        (pd.Series([1, 2.5], dtype="object"), "float32", [1.0, 2.5]),
        (pa.array([1, 2, 3]), "float64", [1.0, 2.0, 3.0]),
        ([], "int32", []),
        (pd.Series([], dtype="object"), "int32", []),
        (["a", "ä"], "object", [b"a", "ä".encode()]),
        ([b"\x00\xff", b"zeros\x00\x00"], "object", [b"\x00\xff", b"zeros\x00\x00"]),
        ([b"\xff", "ä"], "object", [b"\xff", "ä".encode()]),
        ([], "object", []),
        (np.array([b"ab"]), "object", [b"ab"]),
        (pd.Series(["a", "b"]), "object", [b"a", b"b"]),
    ],
)
def test_values_of_the_same_kind_are_converted(value: Any, wanted: str, expected: list[Any]) -> None:
    found = tensor(wanted).convert(value, MODEL)
    assert found.dtype == np.dtype(wanted)
    assert found.tolist() == expected


def test_a_column_of_arrays_is_one_array() -> None:
    column = pd.Series([np.array([1.0, 2.0]), np.array([3.0, 4.0]), np.array([5.0, 6.0])])
    assert tensor("float32", (None, 2)).convert(column, MODEL).tolist() == [[1, 2], [3, 4], [5, 6]]
    nested = pd.Series([[["a", "b"]], [["c", "d"]]])
    assert tensor("object", (None, 1, 2)).convert(nested, MODEL).tolist() == [[[b"a", b"b"]], [[b"c", b"d"]]]


def test_a_dataframe_is_a_matrix() -> None:
    assert tensor("float32", (None, 2)).convert(pd.DataFrame({"a": [1, 2], "b": [3, 4]}), MODEL).tolist() == [
        [1, 3],
        [2, 4],
    ]


@pytest.mark.parametrize(
    ("value", "wanted", "found"),
    [
        ([1.5], "int32", "found float64"),
        (["1"], "float32", "found text"),
        ([1], "object", "found a value of type int at position 0"),
        (np.array([1.5]), "object", "found float64"),
        (["a", None], "object", "found a value of type NoneType at position 1"),
        ([None, 1.0], "float32", "found values of the types NoneType, float"),
        ([Decimal(1)], "float32", "found values of the types Decimal"),
        ([300], "uint8", "found 300, which uint8 cannot hold"),
        ([-1], "uint64", "found -1, which uint64 cannot hold"),
        ([1e300], "float32", "found float64 values too large for float32"),
        ([1 + 2j], "float32", "found complex128"),
        (np.array(["2026-01-01"], "datetime64[ns]"), "int64", "found datetime64[ns]"),
        ([datetime.date(2026, 1, 1)], "int64", "found values of the types date"),
        ([[1, 2], [3]], "float32", "its parts differ in shape"),
        (pd.Series([[1, 2], [3]]), "float32", "its parts differ in shape"),
        ([[1.0, 2.0]], "float32", "found the shape (1, 2)"),
        (1.0, "float32", "found the shape ()"),
    ],
)
def test_values_of_another_kind_are_refused(value: Any, wanted: str, found: str) -> None:
    shown = "text" if wanted == "object" else wanted
    message = f"{MODEL} does not take this for its input x: {found}; it takes x: {shown} (?,)"
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        tensor(wanted).convert(value, MODEL)


def test_numbers_are_not_copied_without_need() -> None:
    given = np.zeros((0, 2), "float32")
    assert tensor("float32", (None, 2)).convert(given, MODEL) is given
    assert tensor("float32", (None, 2)).convert(np.zeros((0, 2)), MODEL).shape == (0, 2)


def test_infinity_and_nan_are_numbers() -> None:
    found = tensor("float32").convert([np.inf, -np.inf, np.nan], MODEL)
    assert found[0] == np.inf
    assert found[1] == -np.inf
    assert np.isnan(found[2])


def test_any_shape_and_any_rank() -> None:
    assert tensor("float32", None).convert(np.zeros((2, 3, 4)), MODEL).shape == (2, 3, 4)
    assert tensor("float32", (None, None)).convert(np.zeros((2, 3)), MODEL).shape == (2, 3)
    assert str(tensor("float32", None)) == "x: float32 of any shape"
    assert str(tensor("int8", (None, 3))) == "x: int8 (?, 3)"


SIGNATURE = ModelSignature(
    "score", (Tensor("a", np.dtype("float32"), (None,)), Tensor("b", np.dtype(object), (None, 2))), ()
)
TAKES = "its signature score takes a: float32 (?,); b: text (?, 2)"


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"a": [1], "b": [["x", "y"]], "c": 1, "d": 2}, f"{MODEL} has no input c, d; {TAKES}"),
        ({"a": [1]}, f"{MODEL} lacks the input b; {TAKES}"),
        ({}, f"{MODEL} lacks the input a, b; {TAKES}"),
        ([1, 2], f"{MODEL} takes a dict of arrays, not a value of type list; {TAKES}"),
    ],
)
def test_names_must_be_those_of_the_signature(value: Any, message: str) -> None:
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        SIGNATURE.convert(value, MODEL)


def test_a_signature_takes_its_inputs_in_any_order() -> None:
    found = SIGNATURE.convert({"b": [["x", "y"]], "a": [1]}, MODEL)
    assert list(found) == ["a", "b"]


def test_choice_of_a_signature() -> None:
    assert choose_signature(["only"], None, MODEL) == "only"
    assert choose_signature(["one", "two"], "two", MODEL) == "two"
    for names, key, message in [
        ([], None, "has no signature; save it with one"),
        (["two", "one"], None, "has the signatures one, two; choose one with models.signature_key"),
        (["one"], "three", "has no signature 'three', which models.signature_key asks for; it has one"),
    ]:
        with pytest.raises(InputError, match=re.escape(f"{MODEL} {message}")):
            choose_signature(names, key, MODEL)
