from __future__ import annotations

import contextlib
import gzip
import io
import json
import math
import os
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.json
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cortex_dask.errors import StorageError
from cortex_dask.io.arrow.cast import SchemaError
from cortex_dask.io.arrow.schema import decide_schema
from cortex_dask.io.job.settings import OutputSettings
from cortex_dask.io.json.encoder import json_lines
from cortex_dask.io.output.part import PartWriter
from cortex_dask.io.rows.result import to_table
from cortex_dask.io.store.store import Store

SCHEMA = pa.schema([("id", pa.int64()), ("score", pa.float64())])


@pytest.fixture(params=["local", "memory"])
def store(request, tmp_path) -> Store:
    return Store(str(tmp_path / "out") if request.param == "local" else f"memory://{tmp_path.name}/out")


def part(store: Store, name: str = "_temporary/1/0-a", schema: pa.Schema = SCHEMA, **options: Any) -> PartWriter:
    return PartWriter(store, name, OutputSettings(store.url, **options), schema)


def numbers(start: int, count: int) -> pa.Table:
    values = np.arange(start, start + count)
    return pa.table({"id": values, "score": values / 2}, schema=SCHEMA)


class TestParts:
    @pytest.mark.parametrize(
        ("options", "read"),
        [
            ({}, lambda data: pq.read_table(io.BytesIO(data)).to_pylist()),
            ({"compression": "zstd"}, lambda data: pq.read_table(io.BytesIO(data)).to_pylist()),
            ({"format": "json"}, lambda data: [json.loads(line) for line in data.splitlines()]),
            (
                {"format": "json", "compression": "gzip"},
                lambda data: [json.loads(line) for line in gzip.decompress(data).splitlines()],
            ),
        ],
        ids=["parquet", "zstd", "json", "gzip"],
    )
    def test_rows_come_back_in_order(self, store, options, read):
        writer = part(store, **options)
        for start in range(0, 1000, 100):
            writer.write(numbers(start, 100))
        assert writer.rows == 1000
        assert store.names() == []
        rows, size = writer.close()
        assert (rows, size) == (1000, store.size("_temporary/1/0-a"))
        assert read(store.read("_temporary/1/0-a")) == numbers(0, 1000).to_pylist()
        assert writer.close() == (rows, size)
        writer.discard()
        assert store.exists("_temporary/1/0-a")

    @pytest.mark.parametrize("options", [{}, {"format": "json"}, {"format": "json", "compression": "gzip"}], ids=str)
    def test_equal_rows_give_equal_bytes(self, store, options):
        data = []
        for name in ("a", "b"):
            writer = part(store, name, **options)
            writer.write(numbers(0, 10))
            writer.close()
            data.append(store.read(name))
        assert data[0] == data[1]

    def test_parquet_is_compressed_with_snappy_and_has_no_foreign_metadata(self, store):
        writer = part(store)
        writer.write(pa.Table.from_pandas(numbers(0, 10).to_pandas()))
        writer.write(numbers(10, 10))
        writer.close()
        file = pq.ParquetFile(io.BytesIO(store.read("_temporary/1/0-a")))
        assert file.metadata.row_group(0).column(0).compression == "SNAPPY"
        assert b"pandas" not in (file.schema_arrow.metadata or {})
        assert file.metadata.num_rows == 20

    def test_row_groups_are_gathered_and_divided(self, store):
        writer = part(store)
        for start in range(0, 300_000, 10_000):
            writer.write(numbers(start, 10_000))
        writer.write(numbers(300_000, 400_000))
        writer.close()
        file = pq.ParquetFile(io.BytesIO(store.read("_temporary/1/0-a")))
        groups = [file.metadata.row_group(number).num_rows for number in range(file.num_row_groups)]
        assert groups == [130_000, 130_000, 40_000, 100_000, 100_000, 100_000, 100_000]
        assert file.read().equals(numbers(0, 700_000))

    def test_wide_rows_make_smaller_row_groups(self, store):
        schema = pa.schema([("x", pa.binary())])
        writer = part(store, schema=schema)
        for _ in range(20):
            writer.write(pa.table({"x": [os.urandom(1 << 20)] * 10}, schema=schema))
        writer.write(pa.table({"x": [bytes(1 << 20)] * 200}, schema=schema))
        writer.close()
        file = pq.ParquetFile(io.BytesIO(store.read("_temporary/1/0-a")))
        groups = [file.metadata.row_group(number).num_rows for number in range(file.num_row_groups)]
        assert groups[:4] == [60, 60, 60, 20]
        assert max(groups) <= 64
        assert sum(groups) == 400

    @pytest.mark.parametrize("options", [{}, {"format": "json"}], ids=str)
    def test_no_rows_make_a_part_that_reads_as_empty(self, store, options):
        writer = part(store, **options)
        writer.write(numbers(0, 0))
        rows, size = writer.close()
        assert (rows, size) == (0, store.size("_temporary/1/0-a"))

    def test_rows_are_fitted_to_the_schema(self, store):
        writer = part(store)
        writer.write(pa.table({"score": [1, None], "id": [1.0, None]}))
        with pytest.raises(SchemaError, match="'id'"):
            writer.write(pa.table({"id": ["x"]}))
        writer.write(pa.table({"id": pa.nulls(1)}))
        assert writer.close()[0] == 3
        assert pq.read_table(io.BytesIO(store.read("_temporary/1/0-a"))).to_pylist() == [
            {"id": 1, "score": 1.0},
            {"id": None, "score": None},
            {"id": None, "score": None},
        ]


class TestNothingIsLeftBehind:
    @pytest.mark.parametrize("options", [{}, {"format": "json"}], ids=str)
    def test_by_discard_or_an_exception(self, store, options):
        writer = part(store, **options)
        writer.write(numbers(0, 300_000))
        writer.discard()
        writer.discard()
        with contextlib.suppress(KeyError), part(store, **options) as writer:
            writer.write(numbers(0, 300_000))
            raise KeyError
        with part(store, **options) as writer:
            writer.write(numbers(0, 10))
        assert store.names() == []
        assert _files(store) == []

    def test_by_a_schema_that_parquet_cannot_hold(self, store):
        for kind in (pa.month_day_nano_interval(), pa.struct([])):
            schema = pa.schema([("x", kind)])
            with pytest.raises(SchemaError, match="cannot be written as parquet"):
                part(store, schema=schema)
        assert _files(store) == []

    @pytest.mark.parametrize("options", [{}, {"format": "json"}, {"format": "json", "compression": "gzip"}], ids=str)
    @pytest.mark.parametrize("rows", [20_000, 300_000])
    def test_by_a_file_system_that_takes_no_more(self, tmp_path, options, rows):
        store = Store(str(tmp_path / "out"))
        table = pa.table({"id": np.arange(rows), "score": np.random.default_rng(1).random(rows)})
        with _largest_file(50_000), pytest.raises(StorageError, match="0-a"):
            _write_whole(store, table, **options)
        assert _files(store) == []


def _write_whole(store: Store, table: pa.Table, **options: Any) -> None:
    with part(store, **options) as writer:
        writer.write(table)
        writer.close()


def _files(store: Store) -> list[str]:
    if not store.is_local:
        return store.names()
    return [name for _, _, names in os.walk(store.url) for name in names]


@contextlib.contextmanager
def _largest_file(size: int) -> Iterator[None]:
    """Let the operating system refuse to write more; Python ignores the signal, so the write fails."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


class TestPartsReadTogether:
    """Batches whose types were guessed differently must still make one dataset."""

    BATCHES = (
        pd.DataFrame({"id": [1, 2], "label": [None, None], "count": [1, 2], "tags": [["a"], ["b"]]}),
        pd.DataFrame({"id": [3, 4], "label": ["x", None], "count": [5.0, np.nan], "tags": [None, None]}),
        pd.DataFrame({"id": [5], "label": [np.nan], "count": [np.nan], "tags": [[]]}),
        {"tags": [["c"]], "count": [7], "id": np.array([6], np.int8), "label": ["y"]},
        [{"id": 7}, {"id": 8, "label": "z"}],
    )
    ROWS = tuple(
        {"id": number, "label": label, "count": count, "tags": tags}
        for number, label, count, tags in [
            (1, None, 1, ["a"]), (2, None, 2, ["b"]), (3, "x", 5, None), (4, None, None, None),
            (5, None, None, []), (6, "y", 7, ["c"]), (7, None, None, None), (8, "z", None, None),
        ]
    )  # fmt: skip

    @pytest.fixture(params=["parquet", "json"])
    def output(self, request, tmp_path) -> tuple[str, list[str]]:
        tables = [to_table(batch, [], 0, False) for batch in self.BATCHES]
        schema = decide_schema(tables[:2])
        assert schema == pa.schema(
            [("id", pa.int64()), ("label", pa.string()), ("count", pa.float64()), ("tags", pa.list_(pa.string()))]
        )
        paths = []
        for number, table in enumerate(tables):
            name = f"part-{number:06d}.{request.param}"
            writer = part(Store(str(tmp_path)), name, schema, format=request.param)
            writer.write(table)
            writer.close()
            paths.append(str(tmp_path / name))
        return request.param, paths

    def test_by_every_reader(self, output, tmp_path):
        kind, paths = output
        expected = [dict(row) for row in self.ROWS]
        if kind == "parquet":
            assert len({str(pq.read_schema(path)) for path in paths}) == 1
            assert ds.dataset(str(tmp_path)).to_table().to_pylist() == expected
            assert pl.read_parquet(tmp_path / "*.parquet").rows(named=True) == expected
            frame = pd.read_parquet(tmp_path)
        else:
            lines = [line for path in paths for line in Path(path).read_bytes().splitlines()]
            assert [orjson.loads(line) for line in lines] == expected
            tables = [pyarrow.json.read_json(path) for path in paths]
            assert pa.concat_tables(tables, promote_options="permissive").to_pylist() == expected
            assert (
                pl.concat([pl.read_ndjson(path) for path in paths], how="diagonal_relaxed").rows(named=True) == expected
            )
            frame = pd.concat([pd.read_json(path, lines=True) for path in paths], ignore_index=True)
        assert frame["id"].tolist() == [1, 2, 3, 4, 5, 6, 7, 8]
        assert frame["label"].isna().tolist() == [True, True, False, True, True, False, True, False]
        assert frame["count"].dropna().tolist() == [1, 2, 5, 7]

    def test_floats_that_are_whole_stay_floats_in_json(self):
        [text] = json_lines(pa.table({"x": [1.0, -0.0, 1e20, 2.5e-7, 1e16, None]}))
        values = [json.loads(line)["x"] for line in text.to_pybytes().splitlines()]
        assert values == [1.0, 0.0, 1e20, 2.5e-7, 1e16, None]
        assert all(value is None or isinstance(value, float) for value in values)
        assert math.copysign(1, values[1]) == -1


JSON_TEXT = (
    st.text(max_size=6)
    | st.text(st.characters(max_codepoint=0x24), max_size=6)
    | st.sampled_from(['"', "\\", "\\\\n", "\u2028"])
)
COLUMNS = {
    "i": (st.integers(-(2**63), 2**63 - 1), pa.int64()),
    "u": (st.integers(0, 2**64 - 1), pa.uint64()),
    "f": (st.floats(allow_nan=False, allow_infinity=False), pa.float64()),
    'key "quoted" \\ é': (JSON_TEXT, pa.string()),
    "b": (st.booleans(), pa.bool_()),
    "l": (st.lists(st.none() | JSON_TEXT, max_size=3), pa.list_(pa.string())),
    "ll": (st.lists(st.none() | st.lists(st.integers(0, 9), max_size=2), max_size=2), pa.list_(pa.list_(pa.int8()))),
    "s": (st.fixed_dictionaries({"a": st.none() | JSON_TEXT, "b": st.none() | st.booleans()}), None),
}


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_json_lines_read_back_as_the_same_rows(data):
    rows = data.draw(st.integers(1, 5))
    arrays = {}
    for name, (values, kind) in COLUMNS.items():
        drawn = data.draw(st.lists(st.none() | values, min_size=rows, max_size=rows))
        kind = kind or pa.struct([("a", pa.string()), ("b", pa.bool_())])
        arrays[name] = pa.array(drawn, kind)
    table = pa.table(arrays)
    for piece in (table, table.slice(rows // 2)):
        lines = b"".join(buffer.to_pybytes() for buffer in json_lines(piece)).splitlines()
        assert [orjson.loads(line) for line in lines] == piece.to_pylist()
        assert [json.loads(line) for line in lines] == piece.to_pylist()


def test_json_lines_come_in_bounded_pieces():
    table = pa.table({"x": pa.array(["y" * 1000]).take(pa.array(np.zeros(100_000, dtype=np.int64)))})
    pieces = [buffer.size for buffer in json_lines(table)]
    assert sum(pieces) == 100_000 * 1009
    assert max(pieces) < 40 << 20
    assert len(pieces) >= 3


@pytest.mark.parametrize("options", [{}, {"format": "json"}], ids=str)
def test_a_part_holds_about_a_row_group_in_memory(tmp_path, options):
    writer = part(Store(str(tmp_path)), **options)
    pool = pa.default_memory_pool()
    before, most = pool.bytes_allocated(), 0
    for start in range(0, 8_000_000, 100_000):
        writer.write(numbers(start, 100_000).take(pa.array(np.arange(100_000))))  # take: memory of Arrow's own
        most = max(most, pool.bytes_allocated() - before)
    assert writer.close()[0] == 8_000_000
    assert most < 24 << 20  # all rows are 128 MB
