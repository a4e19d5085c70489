"""Planning: what the paths mean, what is refused and how, and splits that keep every worker busy."""

from __future__ import annotations

import datetime
import gzip
import json
from collections.abc import Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cortex_dask.errors import DatasetError
from cortex_dask.io.batch import Batch
from cortex_dask.io.input.files import list_files
from cortex_dask.io.job.splits import DatasetInput, Piece, Plan
from cortex_dask.io.planning import packing
from cortex_dask.io.planning import parquet as planning_parquet
from cortex_dask.io.planning.packing import Load, pack
from cortex_dask.io.planning.plan import plan
from cortex_dask.io.reading import read_split


def parquet(path: Path, rows: int = 3, **columns: Any) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"n": np.arange(rows), **columns}), path, row_group_size=max(rows, 1))
    return str(path)


def lines(path: Path, count: int = 3) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f'{{"n": {n}}}\n' for n in range(count)))
    return str(path)


def planned(*paths: str | Path, workers: int = 2, **options: Any) -> Plan:
    return plan(DatasetInput(tuple(map(str, paths)), **options), workers=workers)


def names(files: Sequence[Any], root: Path) -> list[str]:
    return [file.path.removeprefix(f"{root}/") for file in files]


# paths ----------------------------------------------------------------------------------------------------------------


def test_files_come_in_the_order_given_and_sorted_within_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("b/2.parquet", "b/10.parquet", "b/sub/1.parquet", "a.parquet", "c/x.parquet"):
        parquet(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    found = list_files(["c", f"{tmp_path}/b/", f"file://{tmp_path}/a.parquet"])
    assert names(found, tmp_path) == ["c/x.parquet", "b/10.parquet", "b/2.parquet", "b/sub/1.parquet", "a.parquet"]


def test_bookkeeping_is_left_out_unless_it_is_named(tmp_path: Path) -> None:
    for name in ("x.parquet", "_SUCCESS", ".x.crc", "_temporary/0/y.parquet", ".hidden/z.parquet", "_k=1/w.parquet"):
        parquet(tmp_path / name)
    assert names(list_files([str(tmp_path)]), tmp_path) == ["_k=1/w.parquet", "x.parquet"]
    assert names(list_files([f"{tmp_path}/**/*.parquet"]), tmp_path) == ["_k=1/w.parquet", "x.parquet"]
    assert names(list_files([f"{tmp_path}/_temporary"]), tmp_path) == ["_temporary/0/y.parquet"]


def test_globs_and_names_that_look_like_globs(tmp_path: Path) -> None:
    for name in ("y=1/a.parquet", "y=2/b.parquet", "y=2/c.txt", "[1].parquet"):
        parquet(tmp_path / name)
    assert names(list_files([f"{tmp_path}/[1].parquet"]), tmp_path) == ["[1].parquet"]
    found = list_files([f"{tmp_path}/y=*"])
    assert names(found, tmp_path) == ["y=1/a.parquet", "y=2/b.parquet", "y=2/c.txt"]
    assert [file.keys for file in found] == [(("y", "1"),), (("y", "2"),), (("y", "2"),)]
    assert list_files([f"{tmp_path}/y=2/*.parquet"])[0].keys == ()  # not below the given folder


def test_links_are_followed_but_not_in_circles(tmp_path: Path) -> None:
    parquet(tmp_path / "data" / "x.parquet")
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "linked").symlink_to(tmp_path / "data")
    (tmp_path / "data" / "back").symlink_to(tmp_path / "in")
    assert names(list_files([str(tmp_path / "in")]), tmp_path)[-1] == "in/linked/x.parquet"
    (tmp_path / "in" / "broken.parquet").symlink_to(tmp_path / "nothing")
    with pytest.raises(DatasetError, match=r"broken\.parquet is a broken link"):
        list_files([str(tmp_path / "in")])


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        (["{}/nothing"], r"the input .*/nothing does not exist"),
        (["{}/no*thing"], r"the input pattern .*/no\*thing matches no file"),
        (["{}/empty"], r"the input directory .*/empty holds no file"),
        (["{}/x.parquet", "{}/*.parquet"], r"x\.parquet is named by .*x\.parquet and by .*\*\.parquet, so its rows"),
        (["{}/x.parquet", "{}/x.parquet"], r"x\.parquet is named by .*x\.parquet twice"),
        ([" "], r"an input path is empty"),
        ([], r"the input names no path"),
        (["memory://nothing/there"], r"there is no input at memory://nothing/there"),
        (["nosuch://bucket/in"], r"unknown protocol 'nosuch'"),
        (["s3://key:secret@bucket/in"], r"the input path s3://\S*bucket/in holds a password"),
        (["{}/x.parquet", "{}/y.jsonl"], r"mixes formats: .*x\.parquet is Parquet and .*y\.jsonl is JSON"),
        (["{}/notes.txt"], r"the format of .*notes\.txt cannot be told"),
    ],
)
def test_paths_that_cannot_be_input(tmp_path: Path, paths: list[str], message: str) -> None:
    parquet(tmp_path / "x.parquet")
    lines(tmp_path / "y.jsonl")
    (tmp_path / "notes.txt").write_text("some notes")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "_SUCCESS").touch()
    with pytest.raises(DatasetError, match=message) as failure:
        planned(*(path.format(tmp_path) for path in paths))
    assert "secret" not in str(failure.value)
    assert "\n" not in str(failure.value)


def test_the_format_is_told_by_the_first_bytes_where_the_name_is_silent(tmp_path: Path) -> None:
    parquet(tmp_path / "a" / "part-00000")
    lines(tmp_path / "b" / "part-00000.txt")
    assert planned(tmp_path / "a").header.format == "parquet"
    assert planned(tmp_path / "b").header.format == "json"


# refused --------------------------------------------------------------------------------------------------------------


def test_truncated_and_foreign_files_are_named(tmp_path: Path) -> None:
    whole = Path(parquet(tmp_path / "x.parquet", 1000)).read_bytes()
    for content, message in (
        (whole[:-10], r"x\.parquet is truncated, or is not a Parquet file"),
        (whole[:6], r"x\.parquet is truncated, or is not a Parquet file"),
        (b"", r"x\.parquet is empty \(0 bytes\)"),
        (b"a,b\n1,2\n" * 100, r"x\.parquet is truncated, or is not a Parquet file"),
    ):
        (tmp_path / "x.parquet").write_bytes(content)
        with pytest.raises(DatasetError, match=message):
            planned(tmp_path)


def test_an_input_without_rows_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"the input has no rows: .*0\.parquet is empty"):
        planned(parquet(tmp_path / "0.parquet", 0))
    parquet(tmp_path / "1.parquet", 1)
    assert planned(tmp_path).header.rows == 1
    for name, content in (("a.jsonl", ""), ("b.jsonl", " \n\n"), ("c.json", "[ ]")):
        (tmp_path / name).write_text(content)
        with pytest.raises(DatasetError, match="the input has no rows"):
            planned(tmp_path / name)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a,b\n" * 20, r"x\.json does not hold JSON lines: none of the first 20 lines"),
        ('{\n  "a": 1\n}\n', r"x\.json is one JSON object over several lines"),
        ('{"a": 1}'.encode("utf-16"), r"x\.json is UTF-16"),
        (gzip.compress(b'{"a": 1}' * 1000, mtime=0)[:-9], r"x\.json is truncated or damaged"),
    ],
)
def test_files_that_are_not_json_lines(tmp_path: Path, content: str | bytes, message: str) -> None:
    (tmp_path / "x.json").write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(DatasetError, match=message):
        planned(tmp_path, format="json")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"columns": ("n", "textt")},
            r"columns names the column 'textt', .* did you mean 'text'\? It has n, text, when",
        ),
        ({"columns": ()}, r"columns is empty"),
        ({"batch_size": 0}, r"batch_size is 0"),
        ({"filters": "n > 1"}, r"is not a list of \(column, operator, value\)"),
        ({"filters": ["n", ">", 1]}, r"is not a list of \(column, operator, value\)"),
        ({"filters": [("n", ">")]}, r"\('n', '>'\) is not \(column, operator, value\)"),
        ({"filters": [("n", "~", 1)]}, r"unknown operator '~': allowed are =, ==, !=, <, >, <=, >=, in, not in"),
        ({"filters": [("m", ">", 1)]}, r"filters names the column 'm', which the input does not have"),
        ({"filters": [("n", ">", "1")]}, r"'n' is int64, which does not compare with '1' \(str\)"),
        ({"filters": [("text", "=", 1)]}, r"'text' is string, which does not compare with 1 \(int\)"),
        ({"filters": [("when", ">", "soon")]}, r"'when' is date32\[day\], which does not compare with 'soon'"),
        ({"filters": [("n", "=", None)]}, r"compares with null"),
        ({"filters": [("n", "=", float("nan"))]}, r"compares with NaN"),
        ({"filters": [("n", "in", "12")]}, r"needs a list of values after 'in'"),
        ({"filters": [("n", "=", True)]}, r"does not compare with True"),
        ({"filters": [("n", ">", 99)]}, r"none of the 3 rows in 1 files passes the filters"),
        ({"filters": [("n", "in", [])]}, r"none of the 3 rows in 1 files passes the filters"),
    ],
)
def test_options_that_do_not_fit_the_input(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    parquet(tmp_path / "x.parquet", 3, text=["a", "b", "c"], when=[datetime.date(2024, 1, day) for day in (1, 2, 3)])
    with pytest.raises(DatasetError, match=message):
        planned(tmp_path, **options)


def test_a_column_that_no_sampled_record_has(tmp_path: Path) -> None:
    lines(tmp_path / "x.jsonl")
    with pytest.raises(DatasetError, match=r"columns names the column 'm', which the input does not have"):
        planned(tmp_path, columns=("m",))
    lines(tmp_path / "y.jsonl", 100_000)  # records may differ: not all of these are looked at
    assert "filters names the column 'm'" in planned(tmp_path, filters=[("m", "=", 1)]).header.warnings[0]


# filters --------------------------------------------------------------------------------------------------------------

VALUES: dict[str, tuple[pa.DataType, list[Any], list[Any]]] = {
    "integers": (pa.uint8(), [0, 1, 200, 255, None], [-1, 0, 1.5, 200, 255.5, 1e300]),
    "long integers": (pa.int64(), [2**53 + 1, 2**53, -1, None], [float(2**53), 2**53 + 1, 2**70, -(2**70), 0.5]),
    "floats": (pa.float64(), [0.5, float("nan"), -1.0, None], [0.5, 0, -1, Decimal("0.5")]),
    "floats and nothing else": (pa.float64(), [0.5, float("nan"), 0.5], [0.5, 0]),
    "single floats": (pa.float32(), [0.1, 2.0, None], [0.1, 2]),
    "text": (pa.string(), ["", "a", "b", None], ["", "a", "aa"]),
    "categories": (pa.dictionary(pa.int8(), pa.string()), ["x", "y", None], ["x", "z"]),
    "booleans": (pa.bool_(), [True, False, None], [True, False]),
    "decimals": (pa.decimal128(6, 2), [Decimal("1.50"), Decimal("-2.25"), None], [1.5, "1.5", 1, Decimal("-2.250")]),
    "dates": (
        pa.date32(),
        [datetime.date(2024, 1, 1), datetime.date(2024, 2, 1), None],
        ["2024-01-01", datetime.date(2024, 1, 15), datetime.datetime(2024, 2, 1)],
    ),
    "times": (
        pa.timestamp("ns"),
        [datetime.datetime(2024, 1, 1), datetime.datetime(2024, 1, 1, 12), None],
        ["2024-01-01", "2024-01-01T12:00:00", datetime.date(2024, 1, 1)],
    ),
    "times with a zone": (
        pa.timestamp("us", "Europe/Berlin"),
        [datetime.datetime(2024, 1, 1, tzinfo=datetime.UTC), datetime.datetime(2024, 1, 2, tzinfo=datetime.UTC), None],
        ["2024-01-01T01:00:00+01:00", "2024-01-02", datetime.datetime(2024, 1, 1, 12, tzinfo=datetime.UTC)],
    ),
    "nulls": (pa.null(), [None, None], [1, "x"]),
}


def expected(found: Any, op: str, value: Any) -> bool:
    """What a filter means, spelled out on Python values."""
    if found is None:
        return False
    if isinstance(value, str) and isinstance(found, datetime.date):
        value = datetime.datetime.fromisoformat(value)
        if isinstance(found, datetime.datetime) and found.tzinfo and not value.tzinfo:
            value = value.replace(tzinfo=datetime.UTC)
    if isinstance(found, datetime.datetime) and not isinstance(value, datetime.datetime):
        value = datetime.datetime.combine(value, datetime.time())
    elif isinstance(found, datetime.date) and not isinstance(found, datetime.datetime):
        value = value.date() if isinstance(value, datetime.datetime) else value
    if isinstance(found, Decimal):
        value = Decimal(str(value))
    if isinstance(found, float):
        value = float(value)
    results = {"=": found == value, "!=": found != value}
    if op not in results:
        results |= {"<": found < value, ">": found > value, "<=": found <= value, ">=": found >= value}
    return bool(results[op])


@pytest.mark.parametrize("kind", VALUES)
@pytest.mark.parametrize("groups", ["one row group", "a row group for each row"])
def test_filters_on_every_type(tmp_path: Path, kind: str, groups: str) -> None:
    data_type, column, against = VALUES[kind]
    array = pa.array(column, data_type) if not pa.types.is_dictionary(data_type) else pa.array(column).cast(data_type)
    table = pa.table({"v": array, "row": range(len(column))})
    pq.write_table(table, tmp_path / "x.parquet", row_group_size=1 if groups != "one row group" else 100)
    stored = table.column("v").to_pylist()
    for value in against:
        rounded = pa.scalar(float(value), data_type).as_py() if kind == "single floats" else value
        for op in ("=", "!=", "<", ">", "<=", ">=", "in", "not in"):
            plain = {"in": "=", "not in": "!="}.get(op, op)
            wanted = [row for row, found in enumerate(stored) if expected(found, plain, rounded)]
            filters = [("v", op, [value] if "in" in op else value)]
            if not wanted:
                with pytest.raises(DatasetError, match="passes the filters"):
                    planned(tmp_path, filters=filters)
                continue
            made = planned(tmp_path, filters=filters, columns=("row",))
            assert json.loads(json.dumps(made.header.to_json()))["filters"] == made.header.filters
            rows = [row for split in made for batch in read_split(split, made.header) for row in _rows(batch)]
            assert (op, value, rows) == (op, value, wanted)
            assert made.header.rows == len(wanted)


def _rows(batch: Any) -> list[Any]:
    assert isinstance(batch, Batch)
    return batch.data.column("row").to_pylist()  # type: ignore[union-attr]


def test_row_groups_that_cannot_match_are_not_planned(tmp_path: Path) -> None:
    pq.write_table(pa.table({"n": range(1000)}), tmp_path / "x.parquet", row_group_size=100)
    made = planned(tmp_path, filters=[("n", ">=", 250), ("n", "<", 500)], batch_size=1000)
    (split,) = made
    assert [(piece.group, piece.rows) for piece in split.pieces] == [(2, 50), (3, 100), (4, 100)]
    (tmp_path / "x.parquet").unlink()  # where statistics prove everything, nothing but the footer is read
    for year in (2023, 2024):
        parquet(tmp_path / f"y={year}" / "x.parquet", 10)
    made = planned(tmp_path, filters=[[("y", "=", 2024)], [("n", ">", 100)]])
    assert [piece.keys for split in made for piece in split.pieces] == [(("y", "2024"),)]


# splits ---------------------------------------------------------------------------------------------------------------


def busiest(made: Plan, workers: int) -> float:
    """The share of the rows that the busiest worker gets when each takes the next split as soon as it is free."""
    loads = [0] * workers
    for split in made:
        assert split.rows is not None
        loads[loads.index(min(loads))] += split.rows
    return max(loads) / sum(loads)


def test_four_large_files_among_64_keep_every_worker_busy(tmp_path: Path) -> None:
    for number in range(64):
        parquet(tmp_path / f"{number:02d}.parquet", 20_000 if number % 16 == 5 else 333)
    for workers in (2, 4, 8):
        made = planned(tmp_path, workers=workers, batch_size=100)
        assert busiest(made, workers) < 1.1 / workers
        assert len(made.splits) <= 16 * workers
        assert max(len(split.pieces) for split in made) > 5  # small files are packed


def test_one_row_group_is_parallel_too(tmp_path: Path) -> None:
    path = parquet(tmp_path / "x.parquet", 100_000)
    made = planned(path, workers=4, batch_size=256)
    assert busiest(made, 4) < 1.05 / 4
    assert all(split.rows % 256 == 0 for split in made.splits[:-1] if split.rows)
    assert len(planned(path, workers=4, batch_size=100_000).splits) == 1  # one batch is not cut
    filtered = planned(path, workers=4, batch_size=256, filters=[("n", "!=", 500)])
    assert busiest(filtered, 4) < 1.25 / 4
    assert (filtered.header.rows, sum(1 for split in filtered if (split.rows or 0) % 256)) == (99_999, 1)


def test_row_groups_that_are_dear_to_decode_again_are_cut_coarsely(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = parquet(tmp_path / "x.parquet", 100_000)
    fine = planned(path, workers=4, batch_size=256)
    monkeypatch.setattr(planning_parquet, "_DECODED_AGAIN", 0)
    coarse = planned(path, workers=4, batch_size=256)
    assert len(coarse.splits) == 12
    assert len(fine.splits) > 32
    assert busiest(coarse, 4) < 1.25 / 4


@pytest.mark.parametrize("files", [32, 50, 64, 100])
def test_the_last_splits_are_half_as_large(tmp_path: Path, files: int) -> None:
    for number in range(files):
        parquet(tmp_path / f"{number:03d}.parquet", 1000)
    rows = [split.rows or 0 for split in planned(tmp_path, workers=2, batch_size=100)]
    first = rows[: len(rows) // 2]
    assert all(0.7 < size / (files * 1000 / 16) < 1.3 for size in first)
    assert sum(size < 0.7 * max(first) for size in rows) >= 4 * (files > 32)


def test_splits_of_a_large_input_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "_LARGEST", packing._LARGEST // 100)
    rows = 3000
    for number in range(8):
        columns = {name: np.random.default_rng(number).random(rows) for name in "abcdefghijklmnop"}
        pq.write_table(pa.table(columns), tmp_path / f"{number}.parquet", row_group_size=500, compression="none")
    made = planned(tmp_path, workers=1)
    assert 3e6 < made.header.bytes < 4e6
    assert all(0.2e6 < split.bytes < 1e6 for split in made.splits[: len(made.splits) // 2])
    assert all(0.05e6 < split.bytes < 1e6 for split in made)
    assert made.header.bytes == sum(split.bytes for split in made)


@settings(max_examples=200, deadline=None)
@given(
    files=st.lists(st.lists(st.integers(1, 200), min_size=1, max_size=4), min_size=1, max_size=12),
    target=st.integers(1, 400),
    batch_size=st.integers(1, 120),
    mixed=st.booleans(),
)
def test_packing_keeps_every_row_and_the_order(
    files: list[list[int]], target: int, batch_size: int, mixed: bool
) -> None:
    loads = [
        Load(Piece(str(number), 0, rows, rows, group), rows, 8 * rows, rows, None if mixed and rows % 2 else rows)
        for number, groups in enumerate(files)
        for group, rows in enumerate(groups)
    ]
    packed = list(pack(loads, target=target, batch_size=batch_size))

    def every_row(parts: Sequence[Load]) -> list[tuple[str, int | None, int]]:
        pieces = [part.piece for part in parts]
        return [(piece.path, piece.group, row) for piece in pieces for row in range(piece.start, piece.stop)]

    flat = [load for loads_of_split in packed for load in loads_of_split]
    assert every_row(flat) == every_row(loads)
    assert all(load.rows == load.piece.rows == load.piece.stop - load.piece.start for load in flat)
    assert sum(load.weight for load in flat) == sum(load.weight for load in loads)
    for loads_of_split in packed[:-1]:
        assert sum(load.rows for load in loads_of_split) >= batch_size
    for before in packed:
        assert len({(load.piece.path, load.piece.group) for load in before}) == len(before)


def test_small_files_are_packed_into_full_batches() -> None:
    loads = [Load(Piece(str(n), 0, 7, 7, 0), 7, 56, 112, 112) for n in range(1000)]
    packed = list(pack(loads, target=2000, batch_size=32))
    assert [sum(load.rows for load in split) % 32 for split in packed] == [0] * (len(packed) - 1) + [7000 % 32]


def test_json_files_are_cut_and_packed(tmp_path: Path) -> None:
    lines(tmp_path / "large.jsonl", 50_000)
    for number in range(20):
        lines(tmp_path / f"small{number}.jsonl", 10)
    made = planned(tmp_path, workers=4, batch_size=100)
    assert not made.header.batches_exact
    assert abs(made.header.rows - 50_200) < 2500
    assert len(made.splits) > 8
    assert max(len(split.pieces) for split in made) >= 15
    (tmp_path / "large.jsonl.gz").write_bytes(gzip.compress((tmp_path / "large.jsonl").read_bytes()))
    (tmp_path / "large.jsonl").unlink()
    made = planned(tmp_path, workers=4, batch_size=100)
    assert abs(made.header.rows - 50_200) < 10_000
    assert next(piece for split in made for piece in split.pieces if piece.path.endswith("gz")).start == 0
    assert "large.jsonl.gz is read by one worker alone" in made.header.warnings[0]
