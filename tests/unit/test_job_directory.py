"""The plan as it is stored."""

from __future__ import annotations

from dataclasses import replace

import orjson
import pytest

from cortex_dask.io.job_directory import JobDirectory
from cortex_dask.io.splits import Piece, PlanHeader, Split

HEADER = PlanHeader("json", 10, None, None, None, 1, 0, 0, False, 0, 0)


def split(number: int) -> Split:
    return Split(number, (Piece("/in/a.jsonl", number, number + 1, None),), None, None, 1)


def test_splits_come_back_without_those_that_are_done(tmp_path, monkeypatch):
    monkeypatch.setattr("cortex_dask.io.job_directory._SPLITS_PER_CHUNK", 4)
    job = JobDirectory(str(tmp_path))
    splits = [split(number) for number in range(11)]
    job.write_plan(replace(HEADER, splits=11), iter(splits))
    assert len(job.store.names("plan/splits-")) == 3
    assert list(job.splits()) == splits
    assert [item.number for item in job.splits({0, 3, 4, 9, 10}.__contains__)] == [1, 2, 5, 6, 7, 8]


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
