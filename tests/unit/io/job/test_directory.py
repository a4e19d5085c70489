"""The plan as it is stored."""

from __future__ import annotations

from dataclasses import replace

import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cortex_dask.io.job.directory import JobDirectory
from cortex_dask.io.job.splits import DatasetInput, Piece, PlanHeader, Split
from cortex_dask.io.planning.plan import plan

HEADER = PlanHeader("json", 10, None, None, None, 1, 0, 0, False, 0, 0)


def split(number: int) -> Split:
    return Split(number, (Piece("/in/a.jsonl", number, number + 1, None),), None, None, 1)


def test_splits_come_back_without_those_that_are_done(tmp_path, monkeypatch):
    monkeypatch.setattr("cortex_dask.io.job.directory._SPLITS_PER_CHUNK", 4)
    job = JobDirectory(str(tmp_path))
    splits = [split(number) for number in range(11)]
    job.write_plan(replace(HEADER, splits=11), iter(splits))
    assert len(job.store.names("plan/splits-")) == 3
    assert list(job.splits()) == splits
    assert [item.number for item in job.splits({0, 3, 4, 9, 10}.__contains__)] == [1, 2, 5, 6, 7, 8]


def test_a_plan_that_was_interrupted_leaves_nothing_in_a_shorter_one(tmp_path, monkeypatch):
    monkeypatch.setattr("cortex_dask.io.job.directory._SPLITS_PER_CHUNK", 2)
    job = JobDirectory(str(tmp_path))
    writer = job.plan_writer()
    for number in range(9):
        writer.add(split(number))
    assert job.plan_header() is None
    job.write_plan(replace(HEADER, splits=3), (split(number) for number in range(3)))
    assert [item.number for item in job.splits()] == [0, 1, 2]


@pytest.mark.parametrize("ending", ["parquet", "jsonl"])
def test_a_plan_is_written_while_it_is_made(tmp_path, ending):
    folder = tmp_path / "in"
    folder.mkdir()
    for number in range(20):
        if ending == "parquet":
            pq.write_table(pa.table({"n": range(100)}), folder / f"{number:02d}.parquet")
        else:
            (folder / f"{number:02d}.jsonl").write_text('{"n": 1}\n' * 100)
    dataset = DatasetInput((str(folder),), batch_size=10)
    job = JobDirectory(str(tmp_path / "job"))
    writer = job.plan_writer()
    made = plan(dataset, workers=2, sink=writer.add)
    writer.finish(made.header)
    whole = plan(dataset, workers=2)
    assert made.splits == ()
    assert job.plan_header() == made.header == whole.header
    assert tuple(job.splits()) == whole.splits
    assert len(whole.splits) > 10


def test_what_is_done_is_not_decoded(tmp_path, monkeypatch):
    job = JobDirectory(str(tmp_path))
    job.write_plan(HEADER, [split(0), split(1)])
    monkeypatch.setattr(Split, "from_json", lambda value: pytest.fail(f"decoded {value}"))
    assert list(job.splits(lambda number: True)) == []


def test_a_line_in_another_order_is_read_as_well(tmp_path):
    job = JobDirectory(str(tmp_path))
    job.write_plan(HEADER, [split(0)])
    line = dict(reversed(orjson.loads(job.store.read("plan/splits-00000.jsonl")).items()))
    job.store.write("plan/splits-00000.jsonl", orjson.dumps(line))
    assert list(job.splits()) == [split(0)]
