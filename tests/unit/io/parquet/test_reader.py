"""Parquet: every row that passes in exactly one batch, in order, for any layout of files, row groups and batches."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cortex_dask.io.batch import Batch
from cortex_dask.io.job.splits import DatasetInput, Plan, PlanHeader, Split
from cortex_dask.io.parquet import reader as parquet_reader
from cortex_dask.io.planning.plan import plan
from cortex_dask.io.reading import read_split
from cortex_dask.io.store.source import UnreadableInput


def write_groups(path: Path, tables: Sequence[pa.Table], **options: Any) -> Path:
    """Write a file with one row group for each table."""
    with pq.ParquetWriter(path, tables[0].schema, **options) as writer:
        for table in tables:
            writer.write_table(table, row_group_size=max(1, len(table)))
    return path


def batches_of(made: Plan) -> list[Batch]:
    """Read all splits as a worker does: from their JSON form. Checks what must hold for any plan."""
    header = PlanHeader.from_json(made.header.to_json())
    found: list[Batch] = []
    for number, split in enumerate(made):
        assert split.number == number
        again = Split.from_json(split.to_json())
        assert again == split
        batches = [item for item in read_split(again, header) if isinstance(item, Batch)]
        assert [batch.index for batch in batches] == list(range(split.batches or 0))
        assert all(batch.rows == header.batch_size for batch in batches[:-1])
        assert sum(batch.rows for batch in batches) == split.rows
        assert all(isinstance(batch.data, pa.Table) and len(batch.data) == batch.rows for batch in batches)
        found += batches
    assert (header.splits, header.batches) == (len(made.splits), len(found))
    assert header.rows == sum(batch.rows for batch in found)
    return found


def values(batches: list[Batch], column: str = "n") -> list[Any]:
    return [value for batch in batches for value in batch.data.column(column).to_pylist()]  # type: ignore[union-attr]


# any layout -----------------------------------------------------------------------------------------------------------

LAYOUTS = st.lists(st.lists(st.integers(0, 40), min_size=1, max_size=5), min_size=1, max_size=6).filter(
    lambda files: sum(map(sum, files)) > 0
)


@settings(max_examples=100, deadline=None)
@given(
    layout=LAYOUTS,
    batch_size=st.integers(1, 30),
    workers=st.integers(1, 6),
    stretch=st.integers(1, 50),
    wanted=st.none()
    | st.lists(
        st.tuples(st.sampled_from(["=", "!=", "<", ">", "<=", ">="]), st.integers(-1, 12)), min_size=1, max_size=2
    ),
    statistics=st.booleans(),
    retry=st.sets(st.integers(0, 40), min_size=1, max_size=4),
)
def test_every_row_that_passes_is_in_exactly_one_batch(
    layout: list[list[int]],
    batch_size: int,
    workers: int,
    stretch: int,
    wanted: list[tuple[str, int]] | None,
    statistics: bool,
    retry: set[int],
) -> None:
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(parquet_reader, "ROWS_AT_A_TIME", stretch)
        at, expected, places = 0, [], {}
        for number, groups in enumerate(layout):
            path, tables, row = Path(folder) / f"{number:03d}.parquet", [], 0
            for rows in groups:
                numbers = np.arange(at, at + rows)
                # Sorted in some places and not in others, with nulls: statistics prove all, nothing, or none.
                keys = [None if n % 7 == 6 else int(n // 9 % 11 if n // 60 % 2 else n % 11) for n in numbers]
                tables.append(
                    pa.table(
                        {
                            "n": numbers,
                            "k": pa.array(keys, pa.int64()),
                            "s": pa.array([f"row {n}" for n in numbers], pa.string()),
                        }
                    )
                )
                tests = [(key is not None and _passes(key, wanted)) if wanted else True for key in keys]
                expected += [int(n) for n, passes in zip(numbers, tests, strict=True) if passes]
                places.update({int(n): (str(path), row + i) for i, n in enumerate(numbers)})
                at, row = at + rows, row + rows
            write_groups(path, tables, write_statistics=statistics)
        filters = None if wanted is None else [[("k", op, value)] for op, value in wanted]
        dataset = DatasetInput((folder,), batch_size=batch_size, filters=filters, columns=("s", "n"))
        if not expected:
            with pytest.raises(ValueError, match=r"none of the \d+ rows in \d+ files passes"):
                plan(dataset, workers=workers)
            return
        made = plan(dataset, workers=workers)
        assert plan(dataset, workers=workers) == made
        batches = batches_of(made)
        assert values(batches) == expected
        assert values(batches, "s") == [f"row {n}" for n in expected]
        _check_positions(batches, places, filtered=wanted is not None)
        for split in made:
            again = list(read_split(replace(split, base=split.number, only=tuple(retry)), made.header))
            assert again == [batch for batch in read_split(split, made.header) if batch.index in retry]


def _passes(key: int, wanted: list[tuple[str, int]]) -> bool:
    tests = {"=": int.__eq__, "!=": int.__ne__, "<": int.__lt__, ">": int.__gt__, "<=": int.__le__, ">=": int.__ge__}
    return any(tests[op](key, value) for op, value in wanted)


def _check_positions(batches: list[Batch], places: dict[int, tuple[str, int]], *, filtered: bool) -> None:
    for batch in batches:
        rows = [places[n] for n in values([batch])]
        inside = [(p.path, row) for p in batch.position for row in range(p.start, p.stop)]
        assert set(rows) <= set(inside)
        assert len(batch.position) == len({path for path, _ in rows})
        if not filtered:
            assert rows == inside


# schemas --------------------------------------------------------------------------------------------------------------


def test_harmless_drift_is_promoted_and_missing_columns_are_null(tmp_path: Path) -> None:
    tables = [
        pa.table({"n": pa.array([1, 2], pa.int32()), "x": pa.array([1, 2], pa.int64())}),
        pa.table({"x": [2.5, None], "n": pa.array([3, 4], pa.int64()), "extra": ["a", "b"]}),
        pa.table({"n": pa.array([5], pa.int8())}),
    ]
    for number, table in enumerate(tables):
        pq.write_table(table, tmp_path / f"{number}.parquet")
    (batch,) = batches_of(plan(DatasetInput((str(tmp_path),), batch_size=10), workers=1))
    assert batch.data.to_pydict() == {  # type: ignore[union-attr]
        "n": [1, 2, 3, 4, 5],
        "x": [1.0, 2.0, 2.5, None, None],
        "extra": [None, None, "a", "b", None],
    }
    assert batch.data.schema.types == [pa.int64(), pa.float64(), pa.string()]  # type: ignore[union-attr]


def test_a_conflict_names_the_column_both_types_and_both_files(tmp_path: Path) -> None:
    pq.write_table(pa.table({"n": [1], "ok": [1]}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"n": ["x"], "ok": [1]}), tmp_path / "b.parquet")
    with pytest.raises(ValueError, match=r"'n' is int64 in .*a\.parquet but string in .*b\.parquet"):
        plan(DatasetInput((str(tmp_path),)), workers=1)
    made = plan(DatasetInput((str(tmp_path),), columns=("ok",)), workers=1)  # columns that are not read may differ
    assert values(batches_of(made), "ok") == [1, 1]


def test_a_value_that_the_promoted_type_cannot_hold_is_an_error(tmp_path: Path) -> None:
    pq.write_table(pa.table({"n": [2**60 + 1]}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"n": [0.5]}), tmp_path / "b.parquet")
    made = plan(DatasetInput((str(tmp_path),)), workers=1)
    with pytest.raises(UnreadableInput, match=r"a\.parquet does not fit .* column 'n' is int64 here and double"):
        batches_of(made)


def test_dictionaries_of_different_files_come_as_one(tmp_path: Path) -> None:
    for name, words in (("a", ["x", "y"]), ("b", ["z", "x"])):
        pq.write_table(pa.table({"w": pa.array(words).dictionary_encode()}), tmp_path / f"{name}.parquet")
    (batch,) = batches_of(plan(DatasetInput((str(tmp_path),), batch_size=4), workers=1))
    assert batch.data.column("w").num_chunks == 1  # type: ignore[union-attr]
    assert values([batch], "w") == ["x", "y", "z", "x"]


def test_nested_and_extension_columns_come_back_as_they_are(tmp_path: Path) -> None:
    table = pa.table(
        {
            "list": pa.array([[1, 2], None, []], pa.list_(pa.int8())),
            "struct": pa.array([{"a": 1, "b": {"c": "x"}}, None, {"a": None, "b": None}]),
            "map": pa.array([[("k", 1)], [], None], pa.map_(pa.string(), pa.int64())),
            "tensor": pa.ExtensionArray.from_storage(
                pa.fixed_shape_tensor(pa.float32(), [2]), pa.array([[1, 2], [3, 4], [5, 6]], pa.list_(pa.float32(), 2))
            ),
            "a.b": [1, 2, 3],
            "blob": [b"\x00", b"", None],
        }
    )
    pq.write_table(table, tmp_path / "x.parquet")
    made = plan(DatasetInput((str(tmp_path),), batch_size=2), workers=1)
    assert pa.concat_tables([batch.data for batch in batches_of(made)]).combine_chunks() == table
    made = plan(DatasetInput((str(tmp_path),), columns=("blob", "struct", "a.b"), batch_size=3), workers=1)
    assert batches_of(made)[0].data == table.select(["blob", "struct", "a.b"])
    assert 0 < made.header.bytes < plan(DatasetInput((str(tmp_path),)), workers=1).header.bytes


def test_partition_keys_are_columns(tmp_path: Path) -> None:
    for folder in ("y=2024/s=007", "y=2025/s=a%20b", "y=__HIVE_DEFAULT_PARTITION__/s=007"):
        (tmp_path / folder).mkdir(parents=True)
        pq.write_table(pa.table({"n": [1, 2]}), tmp_path / folder / "x.parquet")
    made = plan(DatasetInput((str(tmp_path),), batch_size=10), workers=1)
    (batch,) = batches_of(made)
    assert batch.data.to_pydict() == {  # type: ignore[union-attr]
        "n": [1, 2] * 3,
        "y": [2024, 2024, 2025, 2025, None, None],
        "s": ["007", "007", "a b", "a b", "007", "007"],
    }
    only_keys = plan(
        DatasetInput((str(tmp_path),), columns=("y",), filters=[("s", "=", "007"), ("n", ">", 1)]), workers=1
    )
    assert [batch.data.to_pydict() for batch in batches_of(only_keys)] == [{"y": [2024, None]}]  # type: ignore[union-attr]


def test_a_key_that_is_also_in_the_files_is_taken_from_the_folders(tmp_path: Path) -> None:
    (tmp_path / "k=1").mkdir()
    pq.write_table(pa.table({"k": ["in the file"], "n": [1]}), tmp_path / "k=1" / "x.parquet")
    made = plan(DatasetInput((str(tmp_path),)), workers=1)
    assert batches_of(made)[0].data.to_pydict() == {"n": [1], "k": [1]}  # type: ignore[union-attr]
    assert made.header.warnings == (
        "the column 'k' is in the files and in the names of their folders: the folders' values are used",
    )


# faults ---------------------------------------------------------------------------------------------------------------


def test_a_file_that_changed_since_it_was_planned_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"n": [1, 2]}), path)
    made = plan(DatasetInput((str(path),)), workers=1)
    stat = path.stat()
    pq.write_table(pa.table({"n": [3, 4]}), path)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    with pytest.raises(UnreadableInput, match=r"x\.parquet has changed since the job was planned"):
        batches_of(made)
    path.unlink()
    with pytest.raises(UnreadableInput, match=r"x\.parquet is gone since the job was planned"):
        batches_of(made)


def test_damage_inside_a_file_is_unreadable(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"n": np.random.default_rng(0).integers(0, 1 << 60, 10_000)}), path, compression="zstd")
    content = bytearray(path.read_bytes())
    content[4:2000] = bytes(1996)
    path.write_bytes(content)
    made = plan(DatasetInput((str(path),)), workers=1)
    with pytest.raises(UnreadableInput, match=r"x\.parquet is damaged: ") as failure:
        batches_of(made)
    assert failure.value.path == str(path)
    assert "\n" not in str(failure.value)


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in other units elsewhere")
def test_memory_does_not_grow_with_the_row_group(tmp_path: Path) -> None:
    """Reading one row group of 240 MB takes a fraction of it (measured in a process of its own)."""
    rows = 3_000_000
    table = pa.table({name: np.random.default_rng(0).random(rows) for name in "abcdefghij"})
    path = tmp_path / "x.parquet"
    pq.write_table(table, path, row_group_size=rows, compression="none", use_dictionary=False)
    made = plan(DatasetInput((str(path),), batch_size=1000), workers=1)
    del table
    reader = (
        "import resource, sys, json\n"
        "from cortex_dask.io.reading import read_split\n"
        "from cortex_dask.io.job.splits import PlanHeader, Split\n"
        "import cortex_dask.io.parquet.reader\n"
        "header, *splits = map(json.loads, sys.stdin)\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "rows = sum(b.rows for s in splits for b in read_split(Split.from_json(s), PlanHeader.from_json(header)))\n"
        "print(rows, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)\n"
    )
    lines = [json.dumps(made.header.to_json()), *(json.dumps(split.to_json()) for split in made)]
    done = subprocess.run(
        [sys.executable, "-c", reader], input="\n".join(lines), text=True, capture_output=True, check=True
    )
    count, growth = map(int, done.stdout.split())
    assert count == rows
    assert growth < 130, f"{growth} MiB"
