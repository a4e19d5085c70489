"""Planning inputs that are very large, or very many: what the splits are like, and that nothing is read for them."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cortex_dask.io.job.directory import JobDirectory
from cortex_dask.io.job.splits import DatasetInput, Piece, Plan, Split
from cortex_dask.io.planning import packing
from cortex_dask.io.planning.packing import Load, pack
from cortex_dask.io.planning.plan import plan
from cortex_dask.runtime.coordinator.split_queue import SplitQueue

GIB = 1 << 30
GROUP_ROWS = 1 << 20


def giant(path: Path, groups: int) -> int:
    """Make a Parquet file of which only the footer is real: row groups of 8 MiB each, a sparse file of that size."""
    buffer = io.BytesIO()
    rows = pa.table({"x": pa.nulls(GROUP_ROWS, pa.int64()).fill_null(0)})
    pq.write_table(rows, buffer, use_dictionary=False, compression="zstd", row_group_size=GROUP_ROWS)
    buffer.seek(0)
    one = pq.read_metadata(buffer)
    whole = pq.read_metadata(buffer)
    for _ in range(groups - 1):
        whole.append_row_groups(one)
    footer = io.BytesIO()
    whole.write_metadata_file(footer)
    size = one.row_group(0).total_byte_size * groups
    with path.open("wb") as file:
        file.write(b"PAR1")
        file.seek(size)
        file.write(footer.getvalue()[4:])
    return size


def stretches(made: Plan) -> list[tuple[int, int, int]]:
    """Return the stretches of all splits: row group, first row, and the row behind the last."""
    return [(piece.group or 0, piece.start, piece.stop) for split in made for piece in split.pieces]


@pytest.mark.parametrize("workers", [4, 2000])
def test_one_file_of_50_gib_is_split_evenly(tmp_path: Path, workers: int) -> None:
    groups = 6400
    size = giant(tmp_path / "giant.parquet", groups)
    assert 50 * GIB < size < 51 * GIB
    assert (tmp_path / "giant.parquet").stat().st_blocks * 512 < 8 << 20  # the rest is a hole
    made = plan(DatasetInput((str(tmp_path / "giant.parquet"),), batch_size=4096), workers=workers)
    assert made.header.rows == groups * GROUP_ROWS
    sizes = [split.bytes for split in made]
    assert max(sizes) <= 1.5 * (64 << 20)
    assert min(sizes[:-1]) >= 0.5 * max(sizes)
    assert all((split.rows or 0) % 4096 == 0 for split in made)
    at = (0, 0)
    for group, start, stop in stretches(made):  # in order, without gaps, each row once
        assert (group, start) == at
        at = (group, stop) if stop < GROUP_ROWS else (group + 1, 0)
    assert at == (groups, 0)


def test_one_giant_row_group_is_cut_for_the_workers_there_are(tmp_path: Path) -> None:
    size = giant(tmp_path / "giant.parquet", 1)
    made = plan(DatasetInput((str(tmp_path / "giant.parquet"),), batch_size=4096), workers=4)
    sizes = [split.bytes for split in made]
    assert len(sizes) >= 8
    assert max(sizes) <= 1.5 * size / len(sizes)


def tiny(number: int, rows: int = 10, size: int = 200) -> Load:
    return Load(Piece(f"{number}.parquet", 0, rows, rows, 0, 2000, "tag"), rows, size, size, size)


def test_a_hundred_thousand_tiny_files_are_packed_into_few_splits() -> None:
    loads = [tiny(number) for number in range(100_000)]
    for workers in (1, 4, 64):
        packed = list(pack(loads, target=100_000 * 200 / (workers * 8), batch_size=1000))
        assert [load.piece.path for split in packed for load in split] == [load.piece.path for load in loads]
        assert all(sum(load.rows for load in split) % 1000 == 0 for split in packed)
        assert max(map(len, packed)) <= packing._MOST_PIECES
        assert len(packed) <= max(110, 2 * workers * 8)  # whole batches: a split may have half of what is aimed at


def test_a_batch_may_need_more_files_than_a_split_has_otherwise() -> None:
    packed = list(pack([tiny(number) for number in range(30_000)], target=1.0, batch_size=100_000))
    assert [sum(load.rows for load in split) for split in packed] == [100_000] * 3


def test_a_plan_of_packed_files_is_written_and_read_some_megabytes_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cortex_dask.io.job.directory._CHUNK", 10_000)
    monkeypatch.setattr("cortex_dask.runtime.coordinator.split_queue._CHUNK_PIECES", 100)
    pieces = tuple(tiny(number).piece for number in range(30))
    splits = [Split(number, pieces, 300, 1, 6000) for number in range(20)]
    pq.write_table(pa.table({"x": [1]}), tmp_path / "x.parquet")
    header = plan(DatasetInput((str(tmp_path / "x.parquet"),)), workers=1).header
    job = JobDirectory(str(tmp_path / "job"))
    job.write_plan(header, splits)
    chunks = job.store.sizes("plan/splits-")
    assert len(chunks) == 5
    assert max(chunks.values()) < 20_000
    assert list(job.splits()) == splits
    read = 0

    def reading() -> Iterator[Split]:
        nonlocal read
        for split in job.splits():
            read += 1
            yield split

    source = SplitQueue(reading(), lambda number: number == 7)
    found = []
    while (split := source.next(in_order=False)) is not None:
        found.append(split.number)
        assert read <= 4 * (1 + len(found) // 4) + 4
    assert found == [number for number in range(20) if number != 7]
    assert source.next(in_order=False) is None
