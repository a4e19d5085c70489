"""Writing an output part: rows go to a staged file, a row group at a time, and appear with its commit or not at all."""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Iterator
from types import TracebackType
from typing import Any, Protocol, Self

import pyarrow as pa

from cortex_dask.errors import CortexDaskError
from cortex_dask.io.arrow.cast import SchemaError, conform
from cortex_dask.io.job.settings import OutputSettings
from cortex_dask.io.json.encoder import json_lines
from cortex_dask.io.store.errors import explain
from cortex_dask.io.store.staged_file import StagedFile
from cortex_dask.io.store.store import Store

_GROUP_ROWS = 128 * 1024  # small enough to prune by statistics, large enough that column chunks compress and seek well
_GROUP_BYTES = 64 << 20  # of uncompressed Arrow memory; what a part's writer holds at most, beside one batch
_GZIP_LEVEL = 6


class PartWriter:
    """Writes tables of one schema as one part, which lies under ``staged_name`` until it is published.

    Usage::

        with PartWriter(Store(url), "_temporary/1f2e3d4c/7-a1", settings, schema) as writer:
            for table in tables:
                writer.write(table)
            rows, size = writer.close()

    Leaving the block without :meth:`close` discards what was written, and so does any error. Tables are fitted to the
    schema without loss. ``SchemaError`` says that the format has no form for a type of the schema.
    """

    def __init__(self, output: Store, staged_name: str, settings: OutputSettings, schema: pa.Schema) -> None:
        self.rows = 0  # written so far
        self._schema = schema
        self._pending: list[pa.Table] = []
        self._pending_rows = 0
        self._pending_bytes = 0
        self._staged = output.stage(staged_name)
        self._done: tuple[int, int] | None = None
        try:
            make = _ParquetEncoder if settings.format == "parquet" else _JsonEncoder
            with _explaining(self._staged.url):
                self._encoder: _Encoder = make(self._staged, schema, settings.compression)
        except pa.ArrowNotImplementedError as error:
            self._staged.discard()
            raise SchemaError(
                f"the output's schema cannot be written as {settings.format} ({error}): return such values as text, "
                f"or write the output as JSON"
            ) from None
        except BaseException:
            self._staged.discard()
            raise

    def write(self, table: pa.Table) -> None:
        """Add rows."""
        table = conform(table, self._schema)
        size = table.nbytes
        full = self._pending_rows + table.num_rows > _GROUP_ROWS or self._pending_bytes + size > _GROUP_BYTES
        if self._pending and full:
            self._flush()
        self._pending.append(table)
        self._pending_rows += table.num_rows
        self._pending_bytes += size
        self.rows += table.num_rows
        if self._pending_rows >= _GROUP_ROWS or self._pending_bytes >= _GROUP_BYTES:
            self._flush()

    def write_text(self, text: bytes, rows: int) -> None:
        """Add rows that are JSON lines of the schema already."""
        self._flush()
        try:
            assert isinstance(self._encoder, _JsonEncoder)
            self._encoder.write_text(text)
        except BaseException:
            self.discard()
            raise
        self.rows += rows

    def close(self) -> tuple[int, int]:
        """Finish and commit the staged file; return its rows and bytes."""
        if self._done is None:
            try:
                self._flush()
                with _explaining(self._staged.url):
                    self._encoder.finish()
                self._done = self.rows, self._staged.commit()
            except BaseException:
                self.discard()
                raise
        return self._done

    def discard(self) -> None:
        """Remove what was written; after :meth:`close`, do nothing."""
        self._pending = []
        if self._done is None:
            try:
                self._encoder.discard()
            finally:
                self._staged.discard()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.discard()

    def _flush(self) -> None:
        """Encode what is pending as row groups of about equal size."""
        if not self._pending_rows:
            return
        table = pa.concat_tables(self._pending)
        pieces = max(-(-self._pending_rows // _GROUP_ROWS), -(-self._pending_bytes // _GROUP_BYTES), 1)
        self._pending, self._pending_rows, self._pending_bytes = [], 0, 0
        try:
            with _explaining(self._staged.url):
                self._encoder.write(table, -(-table.num_rows // pieces))
        except BaseException:
            self.discard()
            raise


@contextlib.contextmanager
def _explaining(url: str) -> Iterator[None]:
    """Give the errors of a file that Arrow writes itself the words that every store has for them."""
    try:
        yield
    except CortexDaskError:
        raise
    except OSError as error:
        raise explain(error, url) from error


class _Encoder(Protocol):
    def write(self, table: pa.Table, group: int) -> None: ...

    def finish(self) -> None: ...

    def discard(self) -> None: ...


class _ParquetEncoder:
    def __init__(self, staged: StagedFile, schema: pa.Schema, compression: str | None) -> None:
        import pyarrow.parquet as pq

        # Arrow writes a local file itself, which is faster and holds no lock of Python's.
        self._sink: Any = (
            pa.OSFile(staged.local_path, "wb") if staged.local_path else pa.PythonFile(_ArrowSink(staged), mode="w")
        )
        self._writer = pq.ParquetWriter(self._sink, schema.remove_metadata(), compression=compression or "snappy")

    def write(self, table: pa.Table, group: int) -> None:
        self._writer.write_table(table, row_group_size=max(1, group))

    def finish(self) -> None:
        self._writer.close()
        self._sink.close()

    def discard(self) -> None:
        # The writer is not closed: that would write a footer. An error of the sink concerns bytes that are discarded.
        self._writer.is_open = False
        with contextlib.suppress(OSError):
            self._sink.close()


class _JsonEncoder:
    def __init__(self, staged: StagedFile, schema: pa.Schema, compression: str | None) -> None:
        self._staged = staged
        # 16 + 15: a gzip header and the largest window; no file name or time in it, so equal rows give equal bytes.
        self._gzip = zlib.compressobj(_GZIP_LEVEL, zlib.DEFLATED, 31) if compression == "gzip" else None

    def write(self, table: pa.Table, group: int) -> None:
        for start in range(0, table.num_rows, max(1, group)):
            for text in json_lines(table.slice(start, group)):
                self.write_text(text)

    def write_text(self, text: bytes | pa.Buffer) -> None:
        self._put(text if self._gzip is None else self._gzip.compress(text))

    def finish(self) -> None:
        if self._gzip is not None:
            self._put(self._gzip.flush())

    def discard(self) -> None:
        self._gzip = None

    def _put(self, data: bytes | pa.Buffer) -> None:
        if len(data):
            self._staged.write(data)


class _ArrowSink:
    """A staged file as Arrow sees it: closing is not the end of it, the commit is."""

    def __init__(self, staged: StagedFile) -> None:
        self._staged = staged
        self._position = 0
        self.closed = False

    def write(self, data: Any) -> int:
        self._position += (written := self._staged.write(data))
        return written

    def tell(self) -> int:
        return self._position

    def flush(self) -> None:
        """Leave the time of uploads to the staged file."""

    def close(self) -> None:
        self.closed = True

    def readable(self) -> bool:
        return False

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return False
