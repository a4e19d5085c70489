"""What a handler may return: anything that has rows, as an Arrow table.

================================================  =====================================================================
None                                              no rows
pandas, polars DataFrame; Arrow table or batch    its columns
dict of columns                                   lists, arrays, tensors, Series; single values are repeated
list of dicts                                     one row each; a field that a dict lacks is null
structured array                                  its fields
Series, array, tensor, list of values             the column ``prediction``; shape (n, 1) is taken as (n,), and (n, k)
                                                  becomes lists of the fixed length k
================================================  =====================================================================

A pandas index that has a name becomes a column (unless there is one of that name already); other indexes are dropped.
Categoricals become their values. Rows belong to the payload's rows in order; only a pandas object whose index is a
permutation of the payload's, as after sorting, is matched by its index where ``output.keep`` puts columns beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.types as pt

from cortex_dask.io.arrow.types import plain
from cortex_dask.io.rows.column import ResultError, as_numpy, from_numpy, from_values
from cortex_dask.io.rows.payload import columns_of, records_to_table

if TYPE_CHECKING:
    import pandas as pd

_COLUMN = "prediction"
_ALLOWED = (
    "None, a DataFrame or Series (pandas, polars), an Arrow table, a dict of columns, a list of dicts, "
    "an array or tensor, or a list of values"
)


class _Columns:
    """Columns by name, and how many rows there are even where there is no column."""

    def __init__(self, rows: int) -> None:
        self.rows = rows
        self.arrays: dict[str, pa.Array | pa.ChunkedArray] = {}
        self.order: np.ndarray[Any, Any] | None = None  # payload rows that the result's rows belong to; None: in order

    def add(self, name: str, array: pa.Array | pa.ChunkedArray) -> None:
        if name in self.arrays:
            raise ResultError(f"handle_batch returned two columns named {name!r}: give every column a name of its own")
        self.arrays[name] = array


def to_table(result: Any, data: pa.Table | list[Any], rows: int, keep: bool | tuple[str, ...]) -> pa.Table | None:
    """Return a handler's result as a table, None for None, or raise ``ResultError``.

    With ``keep``, it must have as many rows as the batch (``rows``). The kept columns of the input come before
    the returned ones; a returned column of the same name takes its place.
    """
    if result is None:
        return None
    returned = _columns(result)
    if keep:
        if returned.rows != rows:
            raise ResultError(
                f"handle_batch returned {returned.rows} rows for a batch of {rows} rows, but output.keep needs one for "
                f"each: return a value for every row of the payload, or leave keep out and return all columns yourself"
            )
        kept = _kept(data, keep)
        if returned.order is not None:
            kept = {name: array.take(pa.array(returned.order)) for name, array in kept.items()}
        returned.arrays = {name: array for name, array in kept.items() if name not in returned.arrays} | returned.arrays
    return pa.table(list(returned.arrays.values()), names=list(returned.arrays))


def _kept(data: pa.Table | list[Any], keep: bool | tuple[str, ...]) -> dict[str, pa.ChunkedArray]:
    if isinstance(data, pa.Table):
        names = data.column_names if keep is True else list(keep or ())
        for name in names:
            if name not in data.column_names:
                raise ResultError(
                    f"output.keep asks for the column {name!r}, which the input does not have: "
                    f"it has {', '.join(map(repr, data.column_names))}"
                )
        return {name: data.column(name) for name in names}
    strange = next((type(record) for record in data if not isinstance(record, dict)), None)
    if strange is not None:
        raise ResultError(
            f"output.keep: a sample is a value of type {strange.__name__}, which has no columns to keep: "
            "leave keep out and return what is wanted beside the predictions"
        )
    if keep is not True:
        data = [{name: record.get(name) for name in keep or ()} for record in data]
    try:
        table = records_to_table(data)
    except ValueError as error:
        what = str(error).partition(": use ")[0]
        raise ResultError(
            f"output.keep: {what}; name the columns to keep, or return this one in a type of its own"
        ) from None
    return dict(zip(table.column_names, table.columns, strict=True))


def _columns(result: Any) -> _Columns:
    libraries = {kind.__module__.partition(".")[0] for kind in type(result).__mro__}
    for library, convert in _LIBRARIES.items():
        columns = convert(result) if library in libraries else None
        if columns is not None:
            return columns
    if isinstance(result, Mapping):
        return _from_mapping(result)
    if isinstance(result, (list, tuple)):
        return _from_list(list(result))
    array = as_numpy(result)
    if array is not None:
        return _from_numpy(array)
    if hasattr(result, "__arrow_c_stream__"):
        return _from_table(pa.table(result))
    kind = type(result)
    advice = ": make it a list" if isinstance(result, Iterable) and not isinstance(result, (str, bytes)) else ""
    raise ResultError(
        f"handle_batch returned a value of type {kind.__module__}.{kind.__qualname__}{advice}; allowed are {_ALLOWED}"
    )


def _one_column(array: pa.Array | pa.ChunkedArray) -> _Columns:
    columns = _Columns(len(array))
    columns.add(_COLUMN, array)
    return columns


def _from_list(values: list[Any]) -> _Columns:
    dicts = len(values) if set(map(type, values)) == {dict} else sum(isinstance(value, Mapping) for value in values)
    if dicts and dicts < len(values):
        other = next(value for value in values if not isinstance(value, Mapping))
        raise ResultError(
            f"handle_batch returned a list of dicts that also holds a {type(other).__name__}: "
            f"return a dict for every row"
        )
    if not dicts:
        return _one_column(from_values(_COLUMN, values)) if values else _Columns(0)
    columns = _Columns(len(values))
    for name, column in columns_of(values).items():
        columns.add(_label(name), from_values(str(name), column))
    return columns


def _from_mapping(result: Mapping[Any, Any]) -> _Columns:
    arrays: dict[str, pa.Array | pa.ChunkedArray] = {}
    single: dict[str, Any] = {}
    names = [_label(name) for name in result]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ResultError(f"handle_batch returned two columns named {twice!r}: give every column a name of its own")
    for name, value in zip(names, result.values(), strict=True):
        array = _column_of(name, value)
        if array is None:
            single[name] = value
        else:
            arrays[name] = array
    lengths = {len(array) for array in arrays.values()}
    if len(lengths) > 1:
        shown = ", ".join(f"{name!r} has {len(array)}" for name, array in arrays.items())
        raise ResultError(f"handle_batch returned columns of different lengths: {shown} rows")
    if single and not arrays:
        raise ResultError(
            f"handle_batch returned a dict of single values ({', '.join(map(repr, single))}): "
            f"return a dict of columns, or a list with one dict for each row"
        )
    columns = _Columns(lengths.pop() if lengths else 0)
    for name in names:
        columns.add(name, arrays[name] if name in arrays else from_values(name, [single[name]] * columns.rows))
    return columns


def _column_of(name: str, value: Any) -> pa.Array | pa.ChunkedArray | None:
    """Return a dict's value as a column; None if it is a single value."""
    if isinstance(value, (list, tuple)):
        return from_values(name, list(value))
    if value is None or isinstance(value, (str, bytes, np.generic)):
        return None
    libraries = {kind.__module__.partition(".")[0] for kind in type(value).__mro__}
    if "pyarrow" in libraries and isinstance(value, (pa.Array, pa.ChunkedArray)):
        return value
    if "polars" in libraries and type(value).__name__ == "Series":
        return value.to_arrow()
    if "pandas" in libraries and hasattr(value, "dtype") and hasattr(value, "__len__"):
        return _pandas_values(name, value)
    array = as_numpy(value)
    if array is None:
        if isinstance(value, Mapping) or (isinstance(value, Iterable) and not isinstance(value, bytearray)):
            raise ResultError(
                f"column {name!r} of the result is a {type(value).__name__}: make it a list, an array or a Series"
            )
        return None
    return None if array.ndim == 0 else from_numpy(name, _squeezed(array))


def _from_numpy(array: np.ndarray[Any, Any]) -> _Columns:
    if array.ndim == 0:
        raise ResultError("handle_batch returned an array without a dimension: return one value for each row")
    if array.dtype.names:
        columns = _Columns(len(array))
        for name in array.dtype.names:
            columns.add(name, from_numpy(name, array[name]))
        return columns
    return _one_column(from_numpy(_COLUMN, _squeezed(array)))


def _squeezed(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Models with one output return (n, 1) where a column of n values is meant."""
    return array[:, 0] if array.ndim == 2 and array.shape[1] == 1 else array


def _from_arrow(result: Any) -> _Columns | None:
    if isinstance(result, pa.RecordBatchReader):
        result = result.read_all()
    if isinstance(result, pa.RecordBatch):
        result = pa.Table.from_batches([result])
    if isinstance(result, pa.Table):
        return _from_table(result)
    return _one_column(result) if isinstance(result, (pa.Array, pa.ChunkedArray)) else None


def _from_table(table: pa.Table) -> _Columns:
    columns = _Columns(table.num_rows)
    for name, column in zip(table.column_names, table.columns, strict=True):
        columns.add(name, column)
    return columns


def _from_polars(result: Any) -> _Columns | None:
    import polars as pl

    if isinstance(result, pl.LazyFrame):
        result = result.collect()
    if isinstance(result, pl.DataFrame):
        return _from_table(result.to_arrow())
    return _one_column(result.to_arrow()) if isinstance(result, pl.Series) else None


def _from_pandas(result: Any) -> _Columns | None:
    import pandas as pd

    if isinstance(result, (pd.Index, pd.api.extensions.ExtensionArray)):
        return _one_column(_pandas_values(_COLUMN, result))
    if not isinstance(result, (pd.DataFrame, pd.Series)):
        return None
    columns = _Columns(len(result))
    labels = [_COLUMN] if isinstance(result, pd.Series) else [_label(label) for label in result.columns]
    for level, name in enumerate(result.index.names):
        if name is not None and str(name) not in labels:
            columns.add(_label(name), _pandas_values(str(name), result.index.get_level_values(level)))
    for number, label in enumerate(labels):
        columns.add(label, _pandas_values(label, result if isinstance(result, pd.Series) else result.iloc[:, number]))
    columns.order = _permutation(result.index)
    return columns


def _permutation(index: pd.Index[Any]) -> np.ndarray[Any, Any] | None:
    """Return the index if it names the rows 0 to n - 1 in another order, else None."""
    if index.dtype.kind not in "iu" or index.nlevels > 1:
        return None
    order = index.to_numpy()
    rows = np.arange(len(order))
    return None if np.array_equal(order, rows) or not np.array_equal(np.sort(order), rows) else order


def _pandas_values(name: str, values: Any) -> pa.Array | pa.ChunkedArray:
    """Return a pandas Series, Index or array as an Arrow array; NaN is a null, as pandas means it."""
    import pandas as pd

    dtype = values.dtype
    if isinstance(dtype, pd.CategoricalDtype):
        codes = np.asarray(values.cat.codes if isinstance(values, pd.Series) else values.codes)
        categories = _pandas_values(name, dtype.categories)
        return categories.take(pa.array(np.where(codes < 0, 0, codes), mask=codes < 0))
    if isinstance(dtype, pd.PeriodDtype):
        raise ResultError(
            f"column {name!r} of the result holds periods, which no column can: "
            f"convert them with to_timestamp() or to text"
        )
    if isinstance(dtype, pd.SparseDtype):
        values, dtype = np.asarray(values), dtype.subtype
    if isinstance(dtype, np.dtype):
        return from_numpy(name, np.asarray(values), nan_is_null=True)
    array = pa.array(values.copy(), from_pandas=True)  # a copy: masked arrays would be shared with the handler
    return array.cast(plain(array.type)) if pt.is_dictionary(array.type) else array


def _label(label: Any) -> str:
    """Return a column's label as text; a frame made of an array has numbers."""
    if isinstance(label, str):
        return label
    if isinstance(label, (int, np.integer)) and not isinstance(label, bool):
        return str(label)
    raise ResultError(
        f"handle_batch returned a column with the name {label!r} of type {type(label).__name__}: name columns with text"
    )


_LIBRARIES: dict[str, Callable[[Any], _Columns | None]] = {
    "pandas": _from_pandas,
    "polars": _from_polars,
    "pyarrow": _from_arrow,
}
