"""One column of what a handler returned: Python values or a NumPy array, as an Arrow array of one type.

Arrow alone would make binary of text and bytes, dates of datetimes (losing the time), microseconds of pandas'
nanoseconds, and numbers of booleans. Here every value keeps what it is, or the column is refused with the types found.
"""

from __future__ import annotations

import datetime as dt
import sys
from collections.abc import Iterable, Mapping
from decimal import Decimal
from itertools import accumulate
from typing import Any

import numpy as np
import pyarrow as pa

# The first that matches counts: bool is an int, timedelta64 a NumPy integer, and datetime a date.
_GROUPS: tuple[tuple[str, tuple[type, ...]], ...] = (
    ("missing", (type(None),)),
    ("bool", (bool, np.bool_)),
    ("datetime64", (np.datetime64,)),
    ("timedelta64", (np.timedelta64,)),
    ("number", (int, float, np.integer, np.floating, Decimal)),
    ("text", (str,)),
    ("bytes", (bytes, bytearray, memoryview)),
    ("timestamp", (dt.datetime,)),
    ("date", (dt.date,)),
    ("time", (dt.time,)),
    ("duration", (dt.timedelta,)),
    ("dict", (Mapping,)),
    ("list", (list, tuple)),
)
#: What most columns of records are: no look at single values is needed, and small batches are fast.
_PLAIN = {int: pa.int64(), float: pa.float64(), str: pa.string(), bool: pa.bool_()}
_PANDAS_MISSING = ("NAType", "NaTType")
_TIME_UNITS = {"W": "s", "D": "s", "h": "s", "m": "s", "s": "s", "ms": "ms", "us": "us", "ns": "ns"}
_known_groups: dict[type, str] = {}


class ResultError(ValueError):
    """What a handler returned cannot be used."""


def from_values(name: str, values: list[Any], *, nan_is_null: bool = False) -> pa.Array:
    """Return Python values as an Arrow array, or raise :class:`ResultError` if no one type holds them.

    Nulls are None, ``pandas.NA`` and ``pandas.NaT``, NaN among values that are no numbers, and with ``nan_is_null`` (as
    in pandas) NaN among numbers too. The name is for messages.
    """
    kinds = set(map(type, values))
    if len(kinds) == 1 and (plain := _PLAIN.get(kind := next(iter(kinds)))) and not (nan_is_null and kind is float):
        try:
            return _plain_array(values, plain)
        except (pa.ArrowException, OverflowError, ValueError):
            pass  # an integer over 64 bits, a lone surrogate: what follows says what is wrong
    groups = {_group(kind) for kind in kinds}
    if groups & {"pandas missing"} or ("number" in groups and (nan_is_null or len(groups - {"missing"}) > 1)):
        values = [None if _is_missing(value) else value for value in values]
        groups = {_group(kind) for kind in set(map(type, values))}
    groups.discard("missing")
    if "unknown" in groups:
        raise _unknown(name, values)
    if "array" in groups:
        values, groups = [_unpacked(value) for value in values], groups - {"array"} | {"list"}
        if any(_group(type(value)) not in ("list", "array", "missing") for value in values):
            return from_values(name, values, nan_is_null=nan_is_null)
    if len(groups) > 1 or (groups == {"timestamp"} and len({v.tzinfo is None for v in values if v is not None}) > 1):
        raise _mixed(name, values)
    if groups == {"datetime64"} or groups == {"timedelta64"}:
        known: Any = next(value for value in values if value is not None)
        missing = type(known)("NaT", np.datetime_data(known.dtype)[0])
        return from_numpy(name, np.array([missing if value is None else value for value in values]))
    try:
        return pa.array(values, _needed_type(groups, values))
    except (pa.ArrowException, OverflowError, TypeError, ValueError) as error:
        if groups <= {"number"}:
            raise ResultError(
                f"column {name!r} of the result holds numbers that no one type can hold exactly ({error}): "
                f"convert them to one type, for instance to text"
            ) from None
        raise ResultError(
            f"column {name!r} of the result holds values that do not fit together ({error}): "
            f"give all rows the same nested types"
        ) from None


def from_numpy(name: str, array: np.ndarray[Any, Any], *, nan_is_null: bool = False) -> pa.Array:
    """Return a NumPy array of one dimension or more as an Arrow array; further dimensions are lists of fixed length.

    The values are copied: handlers fill one buffer again and again.
    """
    if isinstance(array, np.ma.MaskedArray) and array.ndim == 1:
        import pyarrow.compute as pc

        mask = np.ma.getmaskarray(array)
        values = from_numpy(name, np.asarray(array.data), nan_is_null=nan_is_null)
        return pc.if_else(pa.array(~mask), values, pa.scalar(None, values.type))
    if array.ndim > 1:
        flat = from_numpy(name, np.ascontiguousarray(array).reshape(-1), nan_is_null=nan_is_null)
        for length in reversed(array.shape[1:]):
            if length == 0:
                raise ResultError(f"column {name!r} of the result is an array of shape {array.shape}: it has no values")
            flat = pa.FixedSizeListArray.from_arrays(flat, length)
        return flat
    kind = array.dtype.kind
    if kind == "O" or array.dtype.hasobject:
        return from_values(name, array.tolist(), nan_is_null=nan_is_null)
    if kind in "Mm":
        return pa.array(_timed(name, array))
    if kind in "UST":
        return pa.array(array.tolist(), pa.binary() if kind == "S" else pa.string())
    if kind not in "biuf" or array.dtype.itemsize > 8:
        raise ResultError(
            f"column {name!r} of the result is a NumPy array of type {array.dtype}: "
            f"convert it to numbers of at most 64 bits, to text or to times"
        )
    if kind == "f" and array.dtype.itemsize == 2:
        array = array.astype(np.float32)  # Arrow's half floats are unknown to many readers
    native = array.astype(array.dtype.newbyteorder("="), order="C")  # always a copy
    if kind != "b" and not nan_is_null:
        # Unlike pa.array, this does not make pyarrow import pandas, which costs 0.3 s in each process.
        return pa.Array.from_buffers(pa.from_numpy_dtype(native.dtype), len(native), [None, pa.py_buffer(native)])
    return pa.array(native, from_pandas=nan_is_null)


def as_numpy(value: Any) -> np.ndarray[Any, Any] | None:
    """Return an array or tensor of any library as a NumPy array; None for what is neither.

    Tensors that need a gradient or lie on a device are detached and brought to the host.
    """
    if isinstance(value, np.ndarray):
        return value
    if isinstance(value, (type, np.generic)):
        return None
    if callable(getattr(value, "detach", None)) and callable(getattr(value, "cpu", None)):
        value = value.detach().cpu()
        if str(value.dtype) == "torch.bfloat16":
            value = value.float()  # NumPy has no such type; every value is kept
    if hasattr(value, "__array__"):
        return np.asarray(value)
    if callable(getattr(value, "numpy", None)):
        return np.asarray(value.numpy())
    return None


def _plain_array(values: list[Any], kind: pa.DataType) -> pa.Array:
    """Return values of one Python type as an array, without pa.array: that would make pyarrow import pandas."""
    count = len(values)
    if kind == pa.bool_():
        bits = np.packbits(np.array(values, dtype=bool), bitorder="little")
        return pa.Array.from_buffers(kind, count, [None, pa.py_buffer(bits)])
    if kind == pa.string():
        if "pandas" in sys.modules:  # then nothing is to be saved, and Arrow is faster from some hundred values on
            return pa.array(values, kind)
        texts = [value.encode() for value in values]
        ends = np.fromiter(accumulate(map(len, texts), initial=0), np.int64, count + 1)
        if ends[-1] >= 2**31:
            return pa.array(values, kind)
        buffers = [None, pa.py_buffer(ends.astype(np.int32)), pa.py_buffer(b"".join(texts))]
        return pa.Array.from_buffers(kind, count, buffers)
    numbers = np.array(values, dtype=np.int64 if kind == pa.int64() else np.float64)
    return pa.Array.from_buffers(kind, count, [None, pa.py_buffer(numbers)])


def _group(kind: type) -> str:
    group = _known_groups.get(kind)
    if group is None:
        group = _known_groups[kind] = _find_group(kind)
    return group


def _find_group(kind: type) -> str:
    if kind.__name__ in _PANDAS_MISSING and kind.__module__.startswith("pandas."):
        return "pandas missing"
    for group, kinds in _GROUPS:
        if issubclass(kind, kinds):
            return group
    return "array" if hasattr(kind, "__array__") or hasattr(kind, "numpy") else "unknown"


def _is_missing(value: Any) -> bool:
    return (isinstance(value, (float, np.floating)) and value != value) or _group(type(value)) == "pandas missing"


def _unpacked(value: Any) -> Any:
    """Return an array as Arrow takes it inside a list, and an array without a dimension as the value in it."""
    if _group(type(value)) != "array":
        return value
    array = as_numpy(value)
    if array is None or array.ndim == 0:
        return value if array is None else array[()]
    if array.ndim > 1 or array.dtype.kind not in "biuf":
        return array.tolist()
    return array.astype(np.float32) if array.dtype == np.float16 else array


def _needed_type(groups: set[str], values: list[Any]) -> pa.DataType | None:
    """Return the type that Arrow must be told, since it would guess one that loses something."""
    if groups == {"number"}:
        integers = [value for value in values if isinstance(value, (int, np.integer))]
        present = sum(value is not None for value in values)
        if integers and len(integers) == present and max(integers) >= 2**63:
            return pa.uint64()
    if groups == {"timestamp"} and any(getattr(value, "nanosecond", 0) for value in values):
        zone = next(value.tzinfo for value in values if value is not None)
        return pa.timestamp("ns", None if zone is None else "UTC")
    if groups == {"duration"} and any(getattr(value, "nanoseconds", 0) for value in values):
        return pa.duration("ns")
    return None


def _timed(name: str, array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Bring times to a unit that Arrow has."""
    unit = np.datetime_data(array.dtype)[0]
    if unit == "D" and array.dtype.kind == "M":
        return array.copy()  # dates
    if unit == "generic" and np.isnat(array).all():
        unit = "s"
    if unit not in _TIME_UNITS:
        raise ResultError(
            f"column {name!r} of the result is a NumPy array of type {array.dtype}: "
            f"convert it to one of the units D, s, ms, us and ns"
        )
    return array.astype(f"{array.dtype.kind}8[{_TIME_UNITS[unit]}]")


def _mixed(name: str, values: Iterable[Any]) -> ResultError:
    found: dict[str, Any] = {}
    for value in values:
        if value is not None:
            aware = " with a zone" if isinstance(value, dt.datetime) and value.tzinfo else ""
            found.setdefault(type(value).__name__ + aware, value)
    shown = " and ".join(f"{kind} ({_short(value)})" for kind, value in list(found.items())[:3])
    return ResultError(f"column {name!r} of the result mixes types, {shown}: give all its values one type")


def _unknown(name: str, values: Iterable[Any]) -> ResultError:
    bad = next(value for value in values if _group(type(value)) == "unknown")
    kind = type(bad)
    return ResultError(
        f"column {name!r} of the result holds a {kind.__module__}.{kind.__qualname__} ({_short(bad)}), which no column "
        f"can hold: return numbers, text, bytes, booleans, dates and times, lists or dicts"
    )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:40]}…"
