"""Many small files on S3: how many requests it takes to plan and to read them."""

from __future__ import annotations

import functools
import gzip
import http.server
import io
import json
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cortex_dask.errors import DatasetError
from cortex_dask.io.batch import Batch
from cortex_dask.io.input.files import list_files
from cortex_dask.io.job.splits import DatasetInput, Plan, Split
from cortex_dask.io.planning.line_counts import count_files
from cortex_dask.io.planning.plan import plan
from cortex_dask.io.reading import read_split
from cortex_dask.io.store.source import UnreadableInput
from tests.support.faulty_s3 import FaultyS3

pytestmark = pytest.mark.s3

FILES = 40  # more than are fetched together


def parquet(number: int, rows: int = 10) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.table({"n": range(number * rows, (number + 1) * rows), "x": [0.5] * rows}), buffer)
    return buffer.getvalue()


def lines(number: int, rows: int = 10) -> bytes:
    return b"".join(b'{"n": %d}\n' % n for n in range(number * rows, (number + 1) * rows))


@pytest.fixture
def put(faulty_s3: FaultyS3) -> Any:
    """Puts files into a folder of the bucket; the requests are counted from then on."""

    def put(folder: str, files: dict[str, bytes]) -> str:
        url = f"{faulty_s3.bucket}/{folder}/"
        fsspec.filesystem("s3").pipe({url + name: data for name, data in files.items()})
        faulty_s3.heal()
        return url

    return put


def asked(proxy: FaultyS3) -> Counter[str]:
    """Return how many requests of each kind there were."""
    kinds: Counter[str] = Counter()
    for request in proxy.requests:
        kinds["list" if "list-type" in request.path else request.method] += 1
    return kinds


def numbers(made: Plan, splits: tuple[Split, ...] | None = None) -> list[int]:
    found: list[int] = []
    for split in splits or made.splits:
        for item in read_split(split, made.header):
            assert isinstance(item, Batch)
            data = item.data if isinstance(item.data, list) else item.data.to_pylist()
            found += [row["n"] for row in data]
    return found


def test_a_plan_takes_one_request_a_file_and_one_a_page(
    faulty_s3: FaultyS3, put: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = put("in", {f"{number:03d}.parquet": parquet(number) for number in range(FILES)})
    monkeypatch.setattr("cortex_dask.io.store.listing._PAGE", 7)
    made = plan(DatasetInput((url,), batch_size=100), workers=2)
    assert (made.header.files, made.header.rows) == (FILES, 10 * FILES)
    pages = -(-FILES // 7)
    # is it a file (HEAD), or does anything lie below it (a listing of one)?
    assert asked(faulty_s3) == {"HEAD": 1, "list": 1 + pages, "GET": FILES}
    assert all("Range" not in request.path for request in faulty_s3.requests)


@pytest.mark.parametrize("made_of", [parquet, lines])
def test_a_small_file_is_read_with_one_request(faulty_s3: FaultyS3, put: Any, made_of: Any) -> None:
    ending = "parquet" if made_of is parquet else "jsonl"
    url = put("in", {f"{number:03d}.{ending}": made_of(number) for number in range(FILES)})
    made = plan(DatasetInput((url,), batch_size=100), workers=1)
    faulty_s3.heal()
    assert numbers(made) == list(range(10 * FILES))
    assert asked(faulty_s3) == {"GET": FILES}


def test_a_request_that_fails_is_made_again(faulty_s3: FaultyS3, put: Any) -> None:
    url = put("in", {f"{number:03d}.parquet": parquet(number) for number in range(FILES)})
    made = plan(DatasetInput((url,), batch_size=100), workers=1)
    for how in ("503", "404 NoSuchKey", "403 AccessDenied"):
        faulty_s3.heal()
        faulty_s3.fail(5, how=how, match=r"GET .*parquet")
        assert numbers(made) == list(range(10 * FILES))
        assert faulty_s3.failed == 1
    faulty_s3.heal()
    faulty_s3.fail(3, how="404 NoSuchKey", match=r"GET .*parquet")
    assert plan(DatasetInput((url,), batch_size=100), workers=1) == made
    assert faulty_s3.failed == 1


def test_batches_that_are_read_again_take_only_their_files(faulty_s3: FaultyS3, put: Any) -> None:
    url = put("in", {f"{number:03d}.parquet": parquet(number) for number in range(FILES)})
    made = plan(DatasetInput((url,), batch_size=100), workers=1)
    whole = Split(0, tuple(piece for split in made for piece in split.pieces), 10 * FILES, FILES // 10, 0)
    faulty_s3.heal()
    assert numbers(made, (replace(whole, only=(1, 3)),)) == [*range(100, 200), *range(300, 400)]
    assert asked(faulty_s3) == {"GET": 20}


def test_a_reader_that_stops_early_leaves_nothing_behind(faulty_s3: FaultyS3, put: Any) -> None:
    url = put("in", {f"{number:03d}.parquet": parquet(number) for number in range(3 * FILES)})
    made = plan(DatasetInput((url,), batch_size=100), workers=1)
    whole = Split(0, tuple(piece for split in made for piece in split.pieces), 30 * FILES, 12, 0)
    faulty_s3.heal()
    batches: Iterator[Any] = read_split(whole, made.header)
    next(batches)
    batches.close()  # type: ignore[attr-defined]
    assert asked(faulty_s3)["GET"] <= 64  # those that are read and those behind them


@pytest.mark.parametrize("made_of", [parquet, lines])
def test_a_small_file_that_changed_is_refused(faulty_s3: FaultyS3, put: Any, made_of: Any) -> None:
    ending = "parquet" if made_of is parquet else "jsonl"
    files = {f"{number:03d}.{ending}": made_of(number) for number in range(3)}
    made = plan(DatasetInput((put("in", files),), batch_size=100), workers=1)
    put("in", {f"001.{ending}": made_of(7).replace(b"1", b"2", 1)})
    with pytest.raises(UnreadableInput, match=rf"001\.{ending} has changed since the job was planned"):
        numbers(made)


def test_lines_of_small_files_are_counted_with_one_request_each(
    faulty_s3: FaultyS3, put: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cortex_dask.io.input.prefetch._SMALL", 2000)
    files = {f"{number:03d}.jsonl": lines(number, rows=number) for number in range(FILES)}
    files |= {"005.jsonl": b"", "011.jsonl": lines(11, rows=500), "017.jsonl.gz": gzip.compress(lines(0, rows=17))}
    listed = list_files([put("in", files)])
    faulty_s3.heal()
    counted = list(count_files(listed, lambda: None))
    assert [file.file.path for file in counted] == [file.path for file in listed if file.size]
    samples = {file.file.path.rpartition("/")[2]: file.samples for file in counted}
    expected = {f"{number:03d}.jsonl": number for number in range(1, FILES)} | {"011.jsonl": 500, "017.jsonl.gz": 17}
    del expected["005.jsonl"]
    assert samples == expected
    large = sum("011.jsonl" in request.path for request in faulty_s3.requests)
    assert len(faulty_s3.requests) == len(listed) - 3 + large  # two files are empty, one is large
    faulty_s3.heal()
    faulty_s3.fail(7, how="404 NoSuchKey", match="GET .*jsonl")
    assert [file.samples for file in count_files(listed, lambda: None)] == [file.samples for file in counted]
    put("in", {"020.jsonl": lines(1, rows=19) + b"      "})
    with pytest.raises(DatasetError, match=r"020\.jsonl has changed"):
        list(count_files(listed, lambda: None))


def test_a_server_of_another_kind(tmp_path: Path) -> None:
    for number in range(3):
        (tmp_path / f"{number}.jsonl").write_bytes(lines(number))
    handler = functools.partial(_Quiet, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            urls = [f"http://127.0.0.1:{server.server_port}/{number}.jsonl" for number in range(3)]
            made = plan(DatasetInput(tuple(urls), batch_size=10), workers=1)
            assert numbers(made) == list(range(30))
            (tmp_path / "1.jsonl").write_bytes(json.dumps({"n": 1}).encode())
            with pytest.raises(UnreadableInput, match=r"1\.jsonl has changed"):
                numbers(made)
        finally:
            server.shutdown()
            thread.join()


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        """Print nothing."""


def test_planning_ends_when_it_is_told_to(faulty_s3: FaultyS3, put: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    url = put("in", {f"{number:03d}.parquet": parquet(number) for number in range(FILES)})
    monkeypatch.setattr("cortex_dask.io.parquet.footer._FILES_PER_GROUP", 4)

    def check() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        plan(DatasetInput((url,), batch_size=100), workers=1, check=check)
    assert asked(faulty_s3)["GET"] < FILES
