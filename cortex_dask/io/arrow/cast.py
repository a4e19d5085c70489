"""Fit rows to a settled schema without losing anything: every value that comes through equals the one that went in.

Allowed are reordering, nulls for missing columns, and casts that keep every value of this very batch: integers that
became floats because of a null go back to integers, doubles go to single precision where they survive the way back,
timestamps change their unit, or their zone while the instant stays. Text never turns into numbers, nor the reverse.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.types as pt

from cortex_dask.io.arrow.types import is_bytes, is_list, is_text

_SHOWN = 60  # characters of an offending value in a message


class SchemaError(ValueError):
    """Rows do not fit the schema that was decided or declared."""


class _MismatchError(Exception):
    """An array does not fit a type; ``value`` is one that does not, ``path`` leads to it inside nested values."""

    def __init__(self, found: pa.DataType, expected: pa.DataType, value: Any, path: tuple[str, ...] = ()) -> None:
        super().__init__()
        self.found, self.expected, self.value, self.path = found, expected, value, path


def conform(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """Return the table with exactly the columns and types of the schema, or raise :class:`SchemaError`.

    A table that has them already is returned as it is, at the cost of one comparison.
    """
    if table.schema.equals(schema):
        return table
    _check_names(table, schema)
    columns = []
    for field in schema:
        index = table.schema.get_field_index(field.name)
        if index < 0:
            column = pa.chunked_array([pa.nulls(table.num_rows, field.type)])
        else:
            column = _conform_column(field, table.column(index))
        if column.null_count and not field.nullable:
            raise SchemaError(
                f"column {field.name!r} holds nulls, but the output's schema does not allow any there: "
                f"return a value for every row, or declare the column as nullable"
            )
        columns.append(column)
    if not columns:
        return table.select([])
    return pa.table(columns, schema=schema)


def _check_names(table: pa.Table, schema: pa.Schema) -> None:
    names = table.column_names
    known = set(schema.names)
    extra = [name for name in names if name not in known]
    if extra:
        raise SchemaError(
            f"column {extra[0]!r} was returned, but the output's schema has only {', '.join(map(repr, schema.names))}: "
            f"return the same columns from every batch, or declare the output's schema with this column"
        )
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise SchemaError(f"column {twice!r} was returned twice: give every column a name of its own")


def _conform_column(field: pa.Field, column: pa.ChunkedArray) -> pa.ChunkedArray:
    if column.type.equals(field.type):
        return column
    try:
        return pa.chunked_array([_fit(chunk, field.type) for chunk in column.chunks], type=field.type)
    except _MismatchError as mismatch:
        name = ".".join((field.name, *mismatch.path)).replace(".[]", "[]")
        shown = repr(mismatch.value)
        shown = shown if len(shown) <= _SHOWN else f"{shown[:_SHOWN]}…"
        advice = (
            "the first rows had nothing but nulls there, so declare the output's schema"
            if pt.is_null(mismatch.expected)
            else "return that type from every batch, or declare the output's schema with a type that holds both"
        )
        raise SchemaError(
            f"column {name!r} holds {shown} ({mismatch.found}), but the output's schema says {mismatch.expected}, "
            f"which cannot hold it exactly: {advice}"
        ) from None


def _fit(array: pa.Array, target: pa.DataType) -> pa.Array:
    """Return the array as the type, every value kept, or raise :class:`_MismatchError`."""
    source = array.type
    if source.equals(target):
        return array
    if array.null_count == len(array):
        return pa.nulls(len(array), target)
    if pt.is_dictionary(source):
        return _fit(array.dictionary_decode(), target)
    if pt.is_run_end_encoded(source):
        import pyarrow.compute as pc

        return _fit(pc.run_end_decode(array), target)
    if isinstance(target, pa.BaseExtensionType):
        return pa.ExtensionArray.from_storage(target, _fit(array, target.storage_type))
    if isinstance(source, pa.BaseExtensionType):
        storage = array.storage
        return _fit(storage.cast(pa.bool_()) if source.extension_name == "arrow.bool8" else storage, target)
    if pt.is_dictionary(target):
        return _fit(array, target.value_type).dictionary_encode().cast(target)
    if is_list(source) and is_list(target):
        return _fit_list(array, target)
    if pt.is_map(source) and pt.is_map(target):
        return _fit_map(array, target)
    if pt.is_struct(source) and pt.is_struct(target):
        return _fit_struct(array, target)
    if _castable(source, target):
        return _cast(array, target)
    raise _mismatch(array, target)


def _castable(source: pa.DataType, target: pa.DataType) -> bool:
    """Return whether values of the one type may equal values of the other; whether these do, the cast shows."""
    if pt.is_integer(source) or pt.is_floating(source):
        exact = pt.is_integer(source) and pt.is_decimal(target)
        return bool(pt.is_integer(target) or pt.is_floating(target) or exact)
    if pt.is_decimal(source):
        return bool(pt.is_decimal(target) or pt.is_integer(target))
    if pt.is_timestamp(source):
        if pt.is_timestamp(target):
            return (source.tz is None) == (target.tz is None)
        return bool(pt.is_date(target)) and source.tz is None  # pandas has no dates, only midnights
    same = ((is_text, is_text), (is_bytes, is_bytes), (pt.is_date, pt.is_date), (pt.is_time, pt.is_time))
    return any(left(source) and right(target) for left, right in (*same, (pt.is_duration, pt.is_duration)))


def _cast(array: pa.Array, target: pa.DataType) -> pa.Array:
    try:
        return _exact(array, target)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        pass
    # Halve the array until one value is left that does not fit, so that the message can show it.
    while len(array) > 1:
        half = array.slice(0, len(array) // 2)
        try:
            _exact(half, target)
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
            array = half
        else:
            array = array.slice(len(half))
    raise _mismatch(array, target)


def _exact(array: pa.Array, target: pa.DataType) -> pa.Array:
    """Cast, or raise :class:`pyarrow.ArrowInvalid` where a value would change."""
    source = array.type
    if pt.is_floating(source):
        if pt.is_integer(target):
            return _whole_numbers(array, target)
        cast = array.cast(target)
        if target.bit_width < source.bit_width and not _same_floats(array, cast.cast(source)):
            raise pa.ArrowInvalid("a value does not survive the narrower type")
        return cast
    if pt.is_integer(source) and pt.is_decimal(target):
        array = array.cast(pa.decimal256(20 + max(target.scale, 0), max(target.scale, 0)))  # 20: digits of 2**64
    cast = array.cast(target, safe=True)
    if pt.is_date(target) and not cast.cast(source).equals(array):
        raise pa.ArrowInvalid("a time of day would be lost")
    return cast


def _whole_numbers(array: pa.Array, target: pa.DataType) -> pa.Array:
    import pyarrow.compute as pc

    array = pc.if_else(pc.is_nan(array), pa.scalar(None, array.type), array)
    if array.null_count == len(array):
        return pa.nulls(len(array), target)
    # Beyond the range of the integers the conversion of the processor decides, so the bounds are checked first.
    bits = target.bit_width
    low, high = (-(2.0 ** (bits - 1)), 2.0 ** (bits - 1)) if pt.is_signed_integer(target) else (0.0, 2.0**bits)
    bounds = pc.min_max(array.cast(pa.float64()))
    if bounds["min"].as_py() < low or bounds["max"].as_py() >= high:
        raise pa.ArrowInvalid("a value is out of range")
    return array.cast(target, safe=True)


def _same_floats(left: pa.Array, right: pa.Array) -> bool:
    import pyarrow.compute as pc

    nan = pc.and_(pc.is_nan(left), pc.is_nan(right))
    same = pc.all(pc.or_(pc.equal(left, right), nan), skip_nulls=True)
    return same.as_py() is not False


def _fit_list(array: pa.Array, target: pa.DataType) -> pa.Array:
    import pyarrow.compute as pc

    lengths = pc.fill_null(pc.list_value_length(array), 0).to_numpy(zero_copy_only=False)
    if pt.is_fixed_size_list(target):
        wrong = np.flatnonzero((lengths != target.list_size) & array.is_valid().to_numpy(zero_copy_only=False))
        if len(wrong):
            raise _mismatch(array.slice(wrong[0], 1), target)
    values = pc.list_flatten(array)  # of the slice only, without what may lie under a null
    try:
        values = _fit(values, target.value_type)
    except _MismatchError as mismatch:
        mismatch.path = ("[]", *mismatch.path)
        raise
    large = pt.is_large_list(target) or pt.is_large_list_view(target)
    offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int64() if large else pa.int32())
    mask = array.is_null() if array.null_count else None
    maker, kind = (pa.LargeListArray, pa.large_list) if large else (pa.ListArray, pa.list_)
    fitted = maker.from_arrays(offsets, values, type=kind(target.value_field), mask=mask)
    return fitted if fitted.type.equals(target) else fitted.cast(target)


def _fit_map(array: pa.Array, target: pa.DataType) -> pa.Array:
    offsets = array.offsets.to_numpy()
    start, stop = int(offsets[0]), int(offsets[-1])
    keys = _fit(array.keys.slice(start, stop - start), target.key_type)
    items = _fit(array.items.slice(start, stop - start), target.item_type)
    # A null offset marks a null map.
    nulls = np.append(array.is_null().to_numpy(zero_copy_only=False), False)
    fitted = pa.MapArray.from_arrays(pa.array(offsets - start, pa.int32(), mask=nulls), keys, items)
    return fitted if fitted.type.equals(target) else fitted.cast(target)


def _fit_struct(array: pa.Array, target: pa.DataType) -> pa.Array:
    found = {field.name: child for field, child in zip(array.type, array.flatten(), strict=True)}
    wanted = {field.name for field in target}
    if len(found) < array.type.num_fields or not wanted.issuperset(found):
        raise _mismatch(array, target)
    children = []
    for field in target:
        child = found.get(field.name)
        try:
            children.append(pa.nulls(len(array), field.type) if child is None else _fit(child, field.type))
        except _MismatchError as mismatch:
            mismatch.path = (field.name, *mismatch.path)
            raise
    mask = array.is_null() if array.null_count else None
    return pa.StructArray.from_arrays(children, fields=list(target), mask=mask)


def _mismatch(array: pa.Array, target: pa.DataType) -> _MismatchError:
    import pyarrow.compute as pc

    first = pc.index(array.is_valid(), True).as_py()
    return _MismatchError(array.type, target, array[max(first, 0)].as_py())
