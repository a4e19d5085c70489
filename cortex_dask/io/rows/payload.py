"""What a handler is given: a batch in the format that its API asks for.

Whatever the format, values are those that were read. Integers stay exact, also where a column has nulls and values
above 2**53 (pandas then gets the nullable ``Int64``); text from JSON is never taken for a number or a date.

A payload is the handler's own: what it changes in there is not seen by ``output.keep``, by a second attempt or by the
dead letter.
"""

from __future__ import annotations

import contextlib
from itertools import chain
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.types as pt

from cortex_dask.io.arrow.types import is_list
from cortex_dask.io.job.splits import BatchFormat
from cortex_dask.io.json.encoder import json_lines

if TYPE_CHECKING:
    import pandas as pd

_Rows = TypeVar("_Rows", pa.Table, list[Any])

_EXACT = 2**53  # up to here every integer is a double
_THREADED = 2_000_000  # values from which Arrow's threads are worth their start
_NESTED = (dict, list)


def to_payload(data: pa.Table | list[dict[str, Any]], batch_format: BatchFormat) -> Any:
    """Return a batch in a format.

    ==========  =====================================================================================================
    pandas      a DataFrame with a RangeIndex, as ``pandas.read_parquet`` makes it; integers with nulls are floats
                unless one lies beyond 2**53, then ``Int64`` or ``UInt64``. JSON: integers beyond 64 bits, nested values
                and columns of mixed types are object columns
    pyarrow     a Table; from JSON every column needs one type
    polars      a DataFrame; from JSON every column needs one type
    numpy       a dict of writable arrays; missing numbers are NaN, or the column is of objects where that would not be
                exact; lists of one fixed length are two-dimensional; times are in UTC
    records     a list of dicts of Python values
    ==========  =====================================================================================================

    JSON records may differ in fields: columns stand in order of first appearance, a missing field is null.

    Raises
    ------
    ValueError
        If JSON values of one column have no common type, and the format needs one.
    ModuleNotFoundError
        If the format needs a package that is not installed.
    """
    if batch_format == "pandas":
        return _table_to_pandas(data) if isinstance(data, pa.Table) else _records_to_pandas(data)
    if batch_format == "numpy":
        if isinstance(data, pa.Table):
            return {name: _to_numpy(column) for name, column in zip(data.column_names, data.columns, strict=True)}
        return {name: _typed(values, _kinds(values)) for name, values in columns_of(data).items()}
    if batch_format == "records":
        return data.to_pylist() if isinstance(data, pa.Table) else [_own(record) for record in data]
    table = data if isinstance(data, pa.Table) else records_to_table(data)
    if batch_format == "pyarrow":
        return table
    if batch_format == "polars":
        return _to_polars(table)
    raise ValueError(f"batch_format {batch_format!r} is unknown: allowed are pandas, pyarrow, polars, numpy, records")


def rows_slice(data: _Rows, start: int, stop: int) -> _Rows:
    """Return the rows from ``start`` to before ``stop``, without copying values."""
    return data.slice(start, stop - start) if isinstance(data, pa.Table) else data[start:stop]


def to_records(data: pa.Table | list[dict[str, Any]]) -> list[Any]:
    """Return the rows as values that JSON can hold, for dead letters.

    Values look as in the output's JSON lines (:mod:`cortex_dask.io.json.encoder`: bytes as base64, times as ISO 8601,
    decimals as text), but NaN and infinities are the texts ``"NaN"``, ``"Infinity"`` and ``"-Infinity"``: they may be
    why the batch failed. JSON records are returned as they are. Integers may exceed 64 bits, so write
    them with :func:`dumps`.
    """
    if not isinstance(data, pa.Table):
        return data
    lines = b"".join(memoryview(buffer) for buffer in json_lines(data, non_finite=True))
    rows: list[Any] = orjson.loads(b"[" + lines[:-1].replace(b"\n", b",") + b"]")
    return rows


def columns_of(records: list[dict[str, Any]]) -> dict[str, list[Any]]:
    """Return the records' values column by column, in order of first appearance; missing ones are None."""
    names = dict.fromkeys(records[0]) if records else {}
    if all(len(record) == len(names) for record in records):
        with contextlib.suppress(KeyError):  # records of one length, but with differing names
            return {name: [record[name] for record in records] for name in names}
    names = dict.fromkeys(chain.from_iterable(records))
    return {name: [record.get(name) for record in records] for name in names}


def records_to_table(records: list[dict[str, Any]]) -> pa.Table:
    """Return JSON records as an Arrow table; raise ``ValueError`` if the values of a column have no common type."""
    columns = columns_of(records)
    return pa.table([_json_array(name, values) for name, values in columns.items()], names=list(columns))


def _json_array(name: str, values: list[Any]) -> pa.Array:
    kinds = set(map(type, values)) - {type(None)}
    if len(kinds) > 1 and kinds != {int, float}:
        found = ", ".join(sorted(kind.__name__ for kind in kinds))
        raise ValueError(
            f"column {name!r} of this batch holds values of different types ({found}), "
            f"which an Arrow or polars column cannot: use batch_format pandas or records"
        )
    try:
        if kinds == {int} and max(value for value in values if value is not None) >= 2**63:
            return pa.array(values, pa.uint64())
        return pa.array(values)
    except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError) as error:
        if kinds <= {int, float}:
            raise ValueError(
                f"column {name!r} of this batch holds integers that no 64-bit column can hold exactly: "
                f"use batch_format pandas or records"
            ) from error
        raise ValueError(
            f"column {name!r} of this batch holds nested values that differ in type ({error}): "
            f"use batch_format pandas or records"
        ) from error


def _own(value: Any) -> Any:
    """Copy a JSON value so deep that no container is shared."""
    if isinstance(value, dict):
        return {key: _own(item) if isinstance(item, _NESTED) else item for key, item in value.items()}
    if isinstance(value, list):
        return [_own(item) if isinstance(item, _NESTED) else item for item in value]
    return value


# pandas ---------------------------------------------------------------------------------------------------------------


def _table_to_pandas(table: pa.Table) -> pd.DataFrame:
    import pandas as pd

    inexact = [index for index, column in enumerate(table.columns) if _floats_would_lose(column)]
    rest = table.remove_column(inexact[0]) if len(inexact) == 1 else table
    if len(inexact) > 1:
        rest = table.select([index for index in range(table.num_columns) if index not in inexact])
    threads = table.num_rows * table.num_columns >= _THREADED
    frame: pd.DataFrame = rest.to_pandas(use_threads=threads, ignore_metadata=True)
    if rest.num_columns == 0:
        frame = pd.DataFrame(index=pd.RangeIndex(table.num_rows))
    nullable = {pa.int64(): pd.Int64Dtype(), pa.uint64(): pd.UInt64Dtype()}
    for index in inexact:
        column = table.column(index)
        if pt.is_integer(column.type):
            series = column.to_pandas(types_mapper=nullable.get)
        else:
            series = column.to_pandas(integer_object_nulls=True)
        frame.insert(index, table.column_names[index], series)
    return frame


def _floats_would_lose(column: pa.ChunkedArray | pa.Array) -> bool:
    """Return whether there are integers beside nulls, so that they would become floats, that no float can hold."""
    kind = column.type
    if pt.is_int64(kind) or pt.is_uint64(kind):
        if not column.null_count or column.null_count == len(column):
            return False
        import pyarrow.compute as pc

        bounds = pc.min_max(column)
        return bool(bounds["max"].as_py() > _EXACT or bounds["min"].as_py() < -_EXACT)
    if is_list(kind):
        import pyarrow.compute as pc

        return _floats_would_lose(pc.list_flatten(column))
    if pt.is_struct(kind):
        return any(_floats_would_lose(child) for child in column.flatten())
    return False


def _records_to_pandas(records: list[dict[str, Any]]) -> pd.DataFrame:
    import pandas as pd

    columns: dict[str, Any] = {}
    for name, values in columns_of(records).items():
        kinds = _kinds(values)
        array = _typed(values, kinds)
        if array.dtype != object:
            columns[name] = array
        elif kinds - {type(None)} == {str}:
            columns[name] = pd.Series(array)  # pandas picks its type for text
        else:
            nullable = _nullable(values) if kinds - {type(None)} == {int} else None
            columns[name] = pd.Series(values if nullable else array, dtype=nullable or "object")
    return pd.DataFrame(columns, index=pd.RangeIndex(len(records)))


def _nullable(values: list[int | None]) -> str | None:
    """Return pandas' nullable type that holds these integers; None where they need more than 64 bits."""
    present = [value for value in values if value is not None]
    low, high = min(present), max(present)
    if low >= -(2**63) and high < 2**63:
        return "Int64"
    return "UInt64" if low >= 0 and high < 2**64 else None


def _kinds(values: list[Any]) -> set[type]:
    return set(map(type, values))


def _typed(values: list[Any], kinds: set[type]) -> np.ndarray[Any, Any]:
    """Return JSON values as an array of the narrowest exact type: bool, int64, uint64, float64, else object."""
    present = kinds - {type(None)}
    if kinds == {bool}:
        return np.array(values, dtype=bool)
    if kinds == {int}:
        low, high = min(values), max(values)
        if low >= -(2**63) and high < 2**63:
            return np.array(values, dtype=np.int64)
        if low >= 0 and high < 2**64:
            return np.array(values, dtype=np.uint64)
    elif present == {float} or (present and present <= {int, float} and _are_doubles(values)):
        return np.array(values, dtype=np.float64)  # None becomes NaN
    array = np.empty(len(values), dtype=object)
    array[:] = values if kinds.isdisjoint(_NESTED) else _own(values)
    return array


def _are_doubles(values: list[Any]) -> bool:
    integers = [value for value in values if type(value) is int]
    return min(integers) >= -_EXACT and max(integers) <= _EXACT


# numpy and polars -----------------------------------------------------------------------------------------------------


def _to_numpy(column: pa.ChunkedArray) -> np.ndarray[Any, Any]:
    kind = column.type
    if pt.is_fixed_size_list(kind) and not column.null_count:
        import pyarrow.compute as pc

        values = pc.list_flatten(column)
        value = kind.value_type
        if not values.null_count and (pt.is_integer(value) or pt.is_floating(value) or pt.is_boolean(value)):
            return _writable(values).reshape(len(column), kind.list_size)
    return _writable(column)


def _writable(column: pa.ChunkedArray) -> np.ndarray[Any, Any]:
    plain = (pt.is_integer(column.type) or pt.is_floating(column.type)) and not column.null_count
    if plain and column.num_chunks:
        # Unlike to_numpy, this does not make pyarrow import pandas, which costs 0.3 s in each process.
        chunks = [np.from_dlpack(chunk) for chunk in column.chunks]
        return np.concatenate(chunks) if len(chunks) > 1 else chunks[0].copy()
    if _floats_would_lose(column):
        array = np.asarray(column.to_pandas(integer_object_nulls=True), dtype=object)
    else:
        array = column.to_numpy(zero_copy_only=False)
    return array if array.flags.writeable else array.copy()


def _to_polars(table: pa.Table) -> Any:
    try:
        import polars as pl
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "batch_format polars needs the package polars: add it to the handler's requirements.txt, "
            "or install cortex-dask with the extra polars"
        ) from None
    return pl.from_arrow(table)
