"""Schemas: settled once for a whole job, of the input while enqueuing and of the output from its first rows.

>>> import pyarrow as pa
>>> unify([("a.parquet", pa.schema({"n": pa.int32()})), ("b.parquet", pa.schema({"n": pa.float64()}))])
n: double
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.types as pt

from cortex_dask.errors import DatasetError
from cortex_dask.io.arrow.cast import SchemaError
from cortex_dask.io.arrow.types import TypeConflictError, has_null, join_fields, plain

if TYPE_CHECKING:
    import pyarrow as pa


def encode_schema(schema: pa.Schema) -> str:
    """Return an Arrow schema as base64 of its IPC form."""
    return base64.b64encode(schema.serialize().to_pybytes()).decode()


def decode_schema(text: str) -> pa.Schema:
    """Return the Arrow schema that :func:`encode_schema` encoded."""
    import pyarrow as pa

    return pa.ipc.read_schema(pa.py_buffer(base64.b64decode(text)))


_RECENT = 8  # distinct schemas that are compared whole before a schema is joined column by column


def unify(schemas: Iterable[tuple[str, pa.Schema]]) -> pa.Schema:
    """Return one schema for files (in input order) whose schemas differ harmlessly, or raise ``DatasetError``.

    Integers and floats are widened, text and binary of different kinds brought together, timestamps take the finer
    unit, lists and structs are joined inside, and a column that a file lacks (or has as nulls only) is null there.
    Columns stand in the order in which they are first seen. Metadata is left out, among it pandas' own: an index that
    was stored as a column is a column.
    """
    distinct: list[tuple[str, pa.Schema]] = []
    recent: list[pa.Schema] = []
    fields: dict[str, pa.Field] = {}
    for file, schema in schemas:
        if any(schema is seen or schema.equals(seen) for seen in recent):
            continue
        recent = [schema, *recent[: _RECENT - 1]]
        _refuse_duplicates(file, schema)
        try:
            _join_into(fields, schema, first=not distinct)
        except TypeConflictError as conflict:
            raise _drift_error(conflict, distinct, file, schema) from None
        distinct.append((file, schema))
    if not distinct:
        raise DatasetError("the input has no file to take a schema from: check the paths")
    return pa.schema([field.remove_metadata() for field in fields.values()])


def decide_schema(tables: Sequence[pa.Table], *, final: bool = False) -> pa.Schema:
    """Decide the output's schema from the first tables, in input order, or raise ``SchemaError`` if they conflict.

    Types are the plain ones that every reader understands (see :func:`~cortex_dask.io.arrow.types.plain`), promoted
    across the tables as in :func:`unify`; every column may hold nulls; there is no metadata.

    Before the ``final`` decision, a float column with nothing but nulls counts as unknown: pandas has it for any column
    whose values are all missing. In the final one it is a float column.
    """
    fields: dict[str, pa.Field] = {}
    for table in tables:
        schema = pa.schema([(field.name, _decided_type(table, field, final)) for field in table.schema])
        try:
            _join_into(fields, schema, first=False)
        except TypeConflictError as conflict:
            raise SchemaError(
                f"column {_dotted(conflict.path)} was returned as {conflict.left} by one batch and as "
                f"{conflict.right} by a later one: return one type always, or declare the output's schema"
            ) from None
    return pa.schema(list(fields.values()))


def is_decided(schema: pa.Schema) -> bool:
    """Return whether every column has a type, that is none is (or holds) nothing but nulls so far."""
    return not any(has_null(field.type) for field in schema)


def _decided_type(table: pa.Table, field: pa.Field, final: bool) -> pa.DataType:
    if not final and pt.is_floating(field.type) and table.num_rows:
        column = table.column(field.name)
        if column.null_count == len(column):
            return pa.null()
    return plain(field.type)


def _join_into(fields: dict[str, pa.Field], schema: pa.Schema, *, first: bool) -> None:
    """Join a schema into the fields gathered so far."""
    missing = dict(fields)
    for field in schema:
        known = missing.pop(field.name, None)
        if known is not None:
            if not known.equals(field):
                fields[field.name] = join_fields(known, field)
        else:
            fields[field.name] = field if first else field.with_nullable(True)
    for name, field in missing.items():
        if not field.nullable:
            fields[name] = field.with_nullable(True)


def _refuse_duplicates(file: str, schema: pa.Schema) -> None:
    if len(set(schema.names)) == len(schema.names):
        return
    twice = next(name for name in schema.names if schema.names.count(name) > 1)
    raise DatasetError(f"{file} has more than one column named {twice!r}: give every column a name of its own")


def _drift_error(
    conflict: TypeConflictError, earlier: list[tuple[str, pa.Schema]], file: str, schema: pa.Schema
) -> DatasetError:
    """Find the first file that the new one contradicts, and say what to do."""
    name = conflict.path[0]
    other = next((path for path, known in earlier if name in known.names), file)
    for path, known in earlier:
        if name in known.names:
            try:
                join_fields(known.field(name), schema.field(name))
            except TypeConflictError as found:
                conflict, other = found, path
                break
    return DatasetError(
        f"column {_dotted(conflict.path)} is {conflict.left} in {other} but {conflict.right} in {file}, "
        f"and no type holds both: convert one of the files, leave one of them out of the input, "
        f"or leave the column out with `columns`"
    )


def _dotted(path: tuple[str, ...]) -> str:
    return repr(".".join(path).replace(".[]", "[]"))
