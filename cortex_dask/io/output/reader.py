"""The committed parts of a job, read back; other files beside them are ignored."""

from __future__ import annotations

import gzip
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cortex_dask.io.arrow.schema import decode_schema
from cortex_dask.io.job.settings import OutputSettings
from cortex_dask.io.json.decoder import read_json_lines
from cortex_dask.io.store.store import Store


@dataclass(frozen=True, slots=True)
class JobOutput:
    """The committed parts of one job."""

    settings: OutputSettings
    names: tuple[str, ...]  # of the parts, in input order
    schema: str | None  # base64 of Arrow IPC; None: the handler returned no rows

    def to_arrow(self) -> pa.Table:
        """Return all rows in input order."""
        schema = _schema(self.schema)
        tables = [read_part(name, settings=self.settings, schema=self.schema) for name in self.names]
        return pa.concat_tables(tables) if tables else schema.empty_table()

    def to_dask(self) -> Any:
        """Return a :class:`dask.dataframe.DataFrame` with one partition for each part; nothing is read yet."""
        import dask.dataframe as dd

        meta = _schema(self.schema).empty_table().to_pandas(ignore_metadata=True)
        if not self.names:
            return dd.from_pandas(meta, npartitions=1)
        return dd.from_map(
            _read_frame, self.names, settings=self.settings, schema=self.schema, meta=meta, label="cortex-dask-part"
        )


def read_part(
    name: str, *, settings: OutputSettings, schema: str | None, columns: Sequence[str] | None = None
) -> pa.Table:
    """Read one part, or only some of its columns."""
    data = Store(settings.url).read(name)
    if settings.format == "parquet":
        table = pq.read_table(pa.BufferReader(data), columns=None if columns is None else list(columns))
        return table.replace_schema_metadata(None)
    table = read_json_lines(gzip.decompress(data) if name.endswith(".gz") else data, _schema(schema))
    return table if columns is None else table.select(list(columns))


def _read_frame(
    name: str, *, settings: OutputSettings, schema: str | None, columns: Sequence[str] | None = None
) -> Any:
    return read_part(name, settings=settings, schema=schema, columns=columns).to_pandas(ignore_metadata=True)


def _schema(text: str | None) -> pa.Schema:
    return pa.schema([]) if text is None else decode_schema(text).remove_metadata()
