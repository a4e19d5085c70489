"""Planning and reading from a real S3 API: the same rows as locally, few requests, and errors that say what to do."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cortex_dask.errors import DatasetError, StorageError
from cortex_dask.io.batch import BadLine, Batch
from cortex_dask.io.input import prefetch
from cortex_dask.io.job.splits import DatasetInput, Plan
from cortex_dask.io.parquet import footer
from cortex_dask.io.planning.plan import plan
from cortex_dask.io.reading import read_split
from cortex_dask.io.store.source import UnreadableInput
from tests.support.faulty_s3 import FaultyS3

pytestmark = pytest.mark.s3


@pytest.fixture
def bucket(s3: str) -> Any:
    return fsspec.filesystem("s3"), s3


def read(made: Plan) -> tuple[list[Any], list[BadLine]]:
    rows: list[Any] = []
    bad = []
    for split in made:
        for item in read_split(split, made.header):
            if isinstance(item, BadLine):
                bad.append(item)
            else:
                rows += item.data if isinstance(item.data, list) else item.data.to_pylist()
    return rows, bad


def test_a_partitioned_parquet_dataset(bucket: Any, tmp_path: Path) -> None:
    fs, url = bucket
    at = 0
    for number in range(6):
        folder = tmp_path / "in" / f"day={number // 2}"
        folder.mkdir(parents=True, exist_ok=True)
        table = pa.table({"n": np.arange(at, at + 500), "text": [f"row {n}" for n in range(at, at + 500)]})
        pq.write_table(table, folder / f"{number}.parquet", row_group_size=180)
        at += 500
    (tmp_path / "in" / "_SUCCESS").touch()
    fs.put(str(tmp_path / "in"), f"{url}/in", recursive=True)
    for filters in (None, [("day", ">", 0), ("n", "<", 2750), ("text", "!=", "row 1700")]):
        options: dict[str, Any] = {"batch_size": 64, "filters": filters}
        remote = plan(DatasetInput((f"{url}/in/",), **options), workers=3)
        local = plan(DatasetInput((str(tmp_path / "in"),), **options), workers=3)
        assert read(remote) == read(local)
        assert remote.header.batches == local.header.batches
        assert [split.rows for split in remote] == [split.rows for split in local]
    globbed = plan(DatasetInput((f"{url}/in/day=*/[0-3].parquet",)), workers=1)
    assert (globbed.header.rows, globbed.header.files) == (2000, 4)


def test_a_footer_larger_than_the_first_request(bucket: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fs, url = bucket
    pq.write_table(pa.table({f"column {n}": [1, 2, 3] for n in range(200)}), tmp_path / "x.parquet")
    fs.put(str(tmp_path / "x.parquet"), f"{url}/x.parquet")
    expected = plan(DatasetInput((f"{url}/x.parquet",)), workers=1)
    monkeypatch.setattr(footer, "_TAIL", 100)
    assert plan(DatasetInput((f"{url}/x.parquet",)), workers=1) == expected
    assert len(read(expected)[0]) == 3
    fs.pipe(f"{url}/x.parquet", (tmp_path / "x.parquet").read_bytes()[:-4])
    with pytest.raises(DatasetError, match=r"x\.parquet is truncated, or is not a Parquet file"):
        plan(DatasetInput((f"{url}/x.parquet",)), workers=1)


def test_json_lines_plain_and_compressed(bucket: Any) -> None:
    fs, url = bucket
    lines = [b'{"n": %d, "id": "%05d"}' % (n**9, n) for n in range(3000)]
    lines[1234] = b"oops"
    data = b"\n".join(lines)
    fs.pipe({f"{url}/plain/x.jsonl": data, f"{url}/packed/x.jsonl.gz": gzip.compress(data)})
    expected = [{"n": n**9, "id": f"{n:05d}"} for n in range(3000) if n != 1234]
    for folder in ("plain", "packed"):
        made = plan(DatasetInput((f"{url}/{folder}/",), batch_size=100), workers=2)
        rows, bad = read(made)
        assert rows == expected
        assert [(item.line, item.text) for item in bad] == [(1235, "oops")]
        assert (len(made.splits) > 4) == (folder == "plain")


def test_an_object_that_changed_is_refused(bucket: Any) -> None:
    fs, url = bucket
    fs.pipe(f"{url}/x.jsonl", b'{"n": 1}\n')
    made = plan(DatasetInput((f"{url}/",)), workers=1)
    assert read(made) == ([{"n": 1}], [])
    fs.pipe(f"{url}/x.jsonl", b'{"n": 2}\n')
    with pytest.raises(UnreadableInput, match=r"x\.jsonl has changed since the job was planned"):
        read(made)
    fs.rm(f"{url}/x.jsonl")
    with pytest.raises(UnreadableInput, match=r"x\.jsonl is gone since the job was planned"):
        read(made)


def test_an_object_that_changes_while_it_is_read_is_refused(bucket: Any, tmp_path: Path) -> None:
    fs, url = bucket
    for name, value in (("old", 1), ("new", 2)):
        columns = {c: np.full(300_000, value) for c in "ab"}
        pq.write_table(
            pa.table(columns), tmp_path / name, row_group_size=100_000, use_dictionary=False, compression="none"
        )
    fs.put(str(tmp_path / "old"), f"{url}/x.parquet")
    (split, *_), header = (
        (made := plan(DatasetInput((f"{url}/x.parquet",), batch_size=100_000), workers=1)),
        made.header,
    )
    whole = read_split(type(split)(0, tuple(p for s in made for p in s.pieces), 300_000, 3, 0), header)
    first = next(whole)
    assert isinstance(first, Batch)
    fs.put(str(tmp_path / "new"), f"{url}/x.parquet")
    with pytest.raises(UnreadableInput, match="has changed since the job was planned"):
        list(whole)


def test_what_is_not_there_is_said_so(s3: str) -> None:
    with pytest.raises(DatasetError, match=r"there is no input at s3://.*/nothing: check the bucket and the path"):
        plan(DatasetInput((f"{s3}/nothing",)), workers=1)
    with pytest.raises(DatasetError, match=r"no-such-bucket"):
        plan(DatasetInput(("s3://no-such-bucket-at-all/in",)), workers=1)


def test_requests_are_few_and_survive_a_store_that_stumbles(
    faulty_s3: FaultyS3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fs, url = fsspec.filesystem("s3"), faulty_s3.bucket
    for number in range(5):
        table = pa.table(
            {"n": np.arange(number * 1000, number * 1000 + 1000), "x": np.zeros(1000), "y": np.zeros(1000)}
        )
        pq.write_table(table, tmp_path / f"{number}.parquet", row_group_size=1000)
    fs.put(str(tmp_path), f"{url}/in", recursive=True)
    fs.pipe(f"{url}/lines.jsonl", b"".join(b'{"n": %d}\n' % n for n in range(5000)))
    faulty_s3.heal()
    made = plan(DatasetInput((f"{url}/in/",), batch_size=1000, columns=("n", "x")), workers=1)
    asked = [str(request) for request in faulty_s3.requests]
    assert len([request for request in asked if ".parquet" in request]) == 5, asked  # one for each footer
    assert len(asked) <= 10, asked
    lines = plan(DatasetInput((f"{url}/lines.jsonl",), batch_size=1000), workers=1)
    for match, when, how, small in (
        ("GET", "after", "drop", 1 << 20),
        ("GET", "after", "drop", 0),
        ("HEAD", "before", "503", 0),
    ):
        monkeypatch.setattr(prefetch, "_SMALL", small)
        faulty_s3.heal()
        faulty_s3.fail(2, when=when, how=how, match=match)  # type: ignore[arg-type]
        assert [row["n"] for row in read(made)[0]] == list(range(5000))
        assert [row["n"] for row in read(lines)[0]] == list(range(5000))
        assert faulty_s3.failed == 1


def test_a_refused_read_is_the_stores_trouble_not_the_files(faulty_s3: FaultyS3) -> None:
    fs, url = fsspec.filesystem("s3"), faulty_s3.bucket
    fs.pipe(f"{url}/x.jsonl", b'{"n": 1}\n')
    made = plan(DatasetInput((f"{url}/x.jsonl",)), workers=1)
    faulty_s3.fail(how="403 AccessDenied", match="x.jsonl", count=None)
    with pytest.raises(StorageError, match=r"access to s3://.*x\.jsonl is denied"):
        read(made)
    with pytest.raises(DatasetError, match=r"access to s3://.*x\.jsonl is denied"):
        plan(DatasetInput((f"{url}/x.jsonl",)), workers=1)
