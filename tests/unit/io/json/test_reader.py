"""JSON files: every good line once and exactly as written, every bad line named, for any layout and any cuts."""

from __future__ import annotations

import bz2
import gzip
import itertools
import json
import re
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cortex_dask.io.batch import BadLine, Batch
from cortex_dask.io.job.splits import DatasetInput, Piece, PlanHeader, Split
from cortex_dask.io.json import file
from cortex_dask.io.json import reader as json_reader
from cortex_dask.io.json.batcher import LineEdges
from cortex_dask.io.json.reader import may_hold_long_integers
from cortex_dask.io.planning.plan import plan
from cortex_dask.io.reading import read_split
from cortex_dask.io.store.source import UnreadableInput


def header(batch_size: int = 3, **changes: Any) -> PlanHeader:
    values: dict[str, Any] = {
        "format": "json",
        "batch_size": batch_size,
        "schema": None,
        "columns": None,
        "filters": None,
        "files": 1,
        "splits": 1,
        "batches": 0,
        "batches_exact": False,
        "rows": 0,
        "bytes": 0,
    }
    return PlanHeader(**{**values, **changes})


def split_of(*paths: Path, cuts: Sequence[int] = (), **changes: Any) -> Split:
    """A split with all pieces; plain files are cut at the given bytes."""
    pieces = []
    for path in paths:
        size = path.stat().st_size
        tag = f"mtime:{path.stat().st_mtime_ns}"
        bounds = [0, *sorted(min(cut, size) for cut in cuts), size]
        pieces += [Piece(str(path), *pair, None, None, size, tag) for pair in itertools.pairwise(bounds)]
    return Split(0, tuple(pieces), None, None, 0, **changes)


def read(split: Split, plan_header: PlanHeader) -> tuple[list[Any], list[BadLine], list[Batch]]:
    items = list(read_split(split, plan_header))
    batches = [item for item in items if isinstance(item, Batch)]
    bad = [item for item in items if isinstance(item, BadLine)]
    assert [batch.index for batch in batches] == list(range(len(batches)))
    assert all(batch.rows == len(batch.data) == plan_header.batch_size for batch in batches[:-1])
    return [record for batch in batches for record in batch.data], bad, batches


def placed(items: Iterable[Batch | BadLine]) -> list[Any]:
    """What was read, and where it lay."""
    return [(item, item.position if isinstance(item, Batch) else None) for item in items]


def write(folder: Path, name: str, data: bytes) -> Path:
    path = folder / name
    path.write_bytes(data)
    return path


def test_files_that_another_thread_reads_give_the_same(tmp_path: Path) -> None:
    """Lines, an array, compressed lines, a malformed line, a file that is damaged in its middle: all in order."""
    lines = b"".join(b'{"n": %d}\n' % number for number in range(50))
    paths = [
        write(tmp_path, "a.jsonl", lines),
        write(tmp_path, "b.json", json.dumps([{"n": number} for number in range(20)]).encode()),
        write(tmp_path, "c.jsonl.gz", gzip.compress(lines)),
        write(tmp_path, "d.jsonl", b'{"n": 1}\n{"n": \n{"n": 2}\n'),
        write(tmp_path, "e.jsonl.gz", gzip.compress(lines)[:-12]),
    ]
    threads: set[int] = set()

    def ahead(items: Iterator[Any], size: Callable[[Any], int]) -> Iterator[Any]:
        with ThreadPoolExecutor(1) as pool:
            while True:
                item = pool.submit(next, items, None).result()
                threads.add(pool.submit(threading.get_ident).result())
                if item is None:
                    return
                assert 0 <= size(item) <= 1 << 20
                yield item

    def found(items: Iterator[Any]) -> list[Any]:
        seen: list[Any] = []
        with pytest.raises(UnreadableInput, match=r"e\.jsonl\.gz is truncated"):
            seen.extend(items)  # keeps those before the error
        return placed(seen)

    split = split_of(*paths)
    expected = found(read_split(split, header()))
    assert len([item for item, _ in expected if isinstance(item, BadLine)]) == 1
    assert found(read_split(split, header(), ahead)) == expected
    assert threads
    assert threading.get_ident() not in threads


def test_two_threads_may_ask_where_lines_lie() -> None:
    lines = [b"x" * (10 + number % 7) for number in range(20_000)]
    starts = [0, *itertools.accumulate(len(line) + 1 for line in lines)]
    edges = LineEdges(lines, 0, starts[-1])
    asked = threading.Event()

    def wrong(numbers: Iterable[int]) -> list[int]:
        return [number for number in numbers if edges.edge(number) != starts[number]]

    def forwards() -> Iterator[int]:
        while not asked.is_set():
            yield from range(0, 20_000, 50)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(1) as pool:
            reader = pool.submit(wrong, forwards())
            try:
                assert wrong(number * 7919 % 20_000 for number in range(3000)) == []
            finally:
                asked.set()
            assert reader.result() == []
    finally:
        sys.setswitchinterval(interval)


# any layout -----------------------------------------------------------------------------------------------------------

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(10**45), 10**45)
    | st.sampled_from([2**63, -(2**63) - 1, 2**64, 2**64 - 1, 10**19, -(10**19), "01234", "2024-01-31", "1e5", "NaN"])
    | st.floats(allow_nan=False, allow_infinity=False)
    | TEXT
)
OBJECTS = st.dictionaries(
    TEXT,
    st.recursive(SCALARS, lambda v: st.lists(v, max_size=2) | st.dictionaries(TEXT, v, max_size=2), max_leaves=4),
    max_size=3,
)
MALFORMED = st.sampled_from(
    [b"{bad", b"3", b'"text"', b"null", b'{"a": "\xff"}', b'{"a": 1} x', b'{"a": "\\ud800"}', b'{"a":', b"}",
     b"{'a': 1}", b'{"n": 12345678901234567890123', b"{" * 20]
)  # fmt: skip
GOOD = st.tuples(st.just("good"), OBJECTS, st.booleans())
LINES = st.lists(
    GOOD
    | GOOD
    | GOOD
    | st.tuples(st.just("bad"), MALFORMED)
    | st.tuples(st.just("blank"), st.sampled_from([b"", b" ", b"\t"])),
    max_size=25,
)


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lines=LINES,
    end=st.sampled_from([b"\n", b"\r\n"]),
    bom=st.booleans(),
    last_end=st.booleans(),
    cuts=st.lists(st.tuples(st.integers(0, 25), st.integers(-1, 20)), max_size=5),
    block=st.integers(1, 200),
    batch_size=st.integers(1, 6),
    packing=st.sampled_from(["plain", "gzip", "bz2", "zstd"]),
)
def test_every_line_is_read_once_and_exactly(
    tmp_path: Path,
    lines: list[tuple[Any, ...]],
    end: bytes,
    bom: bool,
    last_end: bool,
    cuts: list[tuple[int, int]],
    block: int,
    batch_size: int,
    packing: str,
) -> None:
    written, good, bad, starts, offset = [], [], [], [], 3 * bom
    for number, (kind, value, *ascii_only) in enumerate(lines, 1):
        line = json.dumps(value, ensure_ascii=ascii_only[0]).encode() if kind == "good" else value
        if kind == "good":
            good.append(value)
        elif kind == "bad":
            bad.append((number, offset))
        written.append(line)
        starts.append(offset)
        offset += len(line) + len(end)
    data = b"\xef\xbb\xbf" * bom + end.join(written) + end * last_end
    compress = {
        "plain": bytes,
        "gzip": gzip.compress,
        "bz2": bz2.compress,
        "zstd": lambda raw: pa.compress(raw, "zstd", asbytes=True),
    }[packing]
    path = write(tmp_path, "x.json", compress(data))
    starts.append(offset)
    at = [max(0, starts[min(line, len(lines))] + delta) for line, delta in cuts] if packing == "plain" else []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(file, "LOCAL_BLOCK", block)
        records, malformed, batches = read(split_of(path, cuts=at), header(batch_size))
        pieces = [read(split_of_piece, header(batch_size)) for split_of_piece in _one_by_one(split_of(path, cuts=at))]
    assert repr(records) == repr(good)  # repr tells 1 from 1.0 and True
    assert [(item.line, item.offset) for item in malformed] == bad
    assert [repr(record) for piece in pieces for record in piece[0]] == [repr(record) for record in good]
    assert [(item.line, item.offset) for piece in pieces for item in piece[1]] == bad
    for batch in batches:  # a position holds exactly the rows of its batch
        if packing == "plain" and not bad:
            (position,) = batch.position
            inside = data[position.start : position.stop].removeprefix(b"\xef\xbb\xbf")
            assert [json.loads(line) for line in inside.split(b"\n") if line.strip()] == batch.data
        assert batch.again is None or repr(batch.again()) == repr(batch.data)


def _one_by_one(split: Split) -> Iterator[Split]:
    for piece in split.pieces:
        yield Split(0, (piece,), None, None, 0)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    elements=st.lists(OBJECTS | SCALARS, max_size=12),
    indent=st.sampled_from([None, 1]),
    block=st.integers(1, 60),
    packed=st.booleans(),
)
def test_arrays_are_read_element_by_element(
    tmp_path: Path, elements: list[Any], indent: int | None, block: int, packed: bool
) -> None:
    data = b" \n" + json.dumps(elements, indent=indent, ensure_ascii=False).encode() + b"\n"
    path = write(tmp_path, "x.json", gzip.compress(data) if packed else data)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(file, "LOCAL_BLOCK", block)
        records, bad, _ = read(split_of(path), header())
    assert repr(records) == repr([element for element in elements if isinstance(element, dict)])
    others = [element for element in elements if not isinstance(element, dict)]
    assert [json.loads(item.text) for item in bad] == others
    assert len({item.offset for item in bad}) == len(bad)


# single points --------------------------------------------------------------------------------------------------------


def test_a_line_longer_than_a_block_is_read(tmp_path: Path) -> None:
    long = {"text": "x" * (3 << 20), "n": 10**30}
    path = write(tmp_path, "x.jsonl", b"\n".join(json.dumps(r).encode() for r in ({"a": 1}, long, {"a": 2})))
    for cuts in ([], [1000], [1 << 20, 2 << 20]):
        records, bad, _ = read(split_of(path, cuts=cuts), header())
        assert (records, bad) == ([{"a": 1}, long, {"a": 2}], [])


def test_integers_are_exact_at_every_size(tmp_path: Path) -> None:
    numbers = [sign * (10**digits + delta) for digits in range(1, 40) for delta in (-1, 0, 1) for sign in (1, -1)]
    numbers += [2**63 - 1, 2**63, -(2**63), -(2**63) - 1, 2**64 - 1, 2**64]
    for number in numbers:
        path = write(tmp_path, "x.jsonl", b'{"a": [%d], "%d": 0.5}\n{"a": 1}' % (number, number))
        assert read(split_of(path), header())[0] == [{"a": [number], str(number): 0.5}, {"a": 1}]


def test_nan_and_infinity_are_read_as_python_writes_them(tmp_path: Path) -> None:
    path = write(tmp_path, "x.jsonl", b'{"a": NaN}\n{"a": -Infinity}\n')
    records, bad, _ = read(split_of(path), header())
    assert repr(records) == "[{'a': nan}, {'a': -inf}]"
    assert not bad


@pytest.mark.parametrize(
    ("line", "error"),
    [
        (b"{'a': 1}", "not JSON: Expecting property name enclosed in double quotes at character 2"),
        (b"[1]", "not a JSON object but an array"),
        (b"17", "not a JSON object but a number"),
        (b'{"a": "\xff"}', "not UTF-8: invalid start byte at byte 7 of the line"),
        (b'{"a": "\\udc00"}', "text with half of a surrogate pair"),
        (b'{"a":' * 100_000, "nested too deeply"),
    ],
)
def test_a_bad_line_says_what_is_wrong(tmp_path: Path, line: bytes, error: str) -> None:
    path = write(tmp_path, "x.jsonl", b'{"a": 1}\n' + line + b'\n{"a": 2}\n')
    records, (bad,), _ = read(split_of(path), header())
    assert records == [{"a": 1}, {"a": 2}]
    assert (bad.path, bad.line, bad.offset, bad.error) == (str(path), 2, 9, error)
    assert bad.text == line[: 64 << 10].decode(errors="backslashreplace")


@pytest.mark.parametrize("any_value", [False, True])
def test_lines_that_would_be_values_only_together_are_malformed(tmp_path: Path, any_value: bool) -> None:
    # Lines are parsed many at once: joined by commas, these seven would be seven objects.
    lines = [b'{"a": 1}', b'{"a": [{}', b"{}]}", b'{"a": 2},{"a": 3}', b'{"a": "', b'"}', b'{"a": 4},{"a": 5}']
    path = write(tmp_path, "x.jsonl", b"\n".join(lines))
    records, bad, _ = read(split_of(path), header(batch_size=10, any_json=any_value))
    assert records == [{"a": 1}]
    assert [item.line for item in bad] == [2, 3, 4, 5, 6, 7]


def test_lines_that_hold_the_separator_are_read_as_they_are(tmp_path: Path) -> None:
    joint = json_reader.SEPARATOR.strip(b",")
    lines = [b"[1]", joint, b'{"a": %b}' % joint, b"1%b2" % json_reader.SEPARATOR, joint]
    path = write(tmp_path, "x.jsonl", b"\n".join(lines))
    records, bad, _ = read(split_of(path), header(batch_size=10, any_json=True))
    assert records == [[1], int(joint), {"a": int(joint)}, int(joint)]
    assert [item.line for item in bad] == [4]


def test_line_numbers_of_a_piece_count_from_the_start_of_the_file(tmp_path: Path) -> None:
    lines = [b'{"a": %d}' % number if number % 100 else b"oops" for number in range(1, 1001)]
    path = write(tmp_path, "x.jsonl", b"\n".join(lines))
    size = path.stat().st_size
    whole = split_of(path, cuts=[size // 3, size // 2])
    for piece in reversed(whole.pieces):  # so that none finds what the one before has counted
        _, bad, _ = read(Split(0, (piece,), None, None, 0), header())
        assert all(lines[item.line - 1] == b"oops" for item in bad)
        assert bad


def test_columns_filters_and_partition_keys(tmp_path: Path) -> None:
    records = [{"a": 1, "b": "x"}, {"a": 2}, {"b": "y", "a": None}, {"c": 3}, {"a": "2"}, {"a": 2.0, "b": True}]
    for key in ("2024", "2025"):
        (tmp_path / f"year={key}").mkdir()
        write(tmp_path / f"year={key}", "x.jsonl", b"\n".join(json.dumps(r).encode() for r in records))

    def rows(**options: Any) -> list[dict[str, Any]]:
        made = plan(DatasetInput((str(tmp_path),), **options), workers=2)
        return [row for split in made for row in read(split, made.header)[0]]

    assert rows()[0] == {"a": 1, "b": "x", "year": 2024}
    assert rows(columns=("year", "a"))[1:4] == [{"year": 2024, "a": 2}, {"year": 2024, "a": None}, {"year": 2024}]
    assert rows(filters=[("a", "=", 2), ("year", ">", 2024)], columns=("a",)) == [{"a": 2}, {"a": 2.0}]
    assert rows(filters=[("a", "!=", 2)], columns=("a",)) == [{"a": 1}, {"a": "2"}] * 2
    assert rows(filters=[[("b", "in", ["x", "z"])], [("c", ">=", 3)]], columns=("a", "c")) == [{"a": 1}, {"c": 3}] * 2


def test_any_json_value_is_a_sample_where_that_is_asked_for(tmp_path: Path) -> None:
    path = write(tmp_path, "items.jsonl", b'[1, 2]\n"text"\n3\n{"a": 1}\nnull\noops\n')
    made = plan(DatasetInput((str(path),), batch_size=2, format="json"), workers=1, any_json=True)
    plan_header = PlanHeader.from_json(made.header.to_json())
    parts = [read(split, plan_header) for split in made]
    assert [record for records, _, _ in parts for record in records] == [[1, 2], "text", 3, {"a": 1}, None]
    assert [item.line for _, bad, _ in parts for item in bad] == [6]


def test_a_retry_reads_only_the_batches_asked_for(tmp_path: Path) -> None:
    lines = [b'{"n": %d}' % number for number in range(20)]
    lines[4] = b"oops"
    path = write(tmp_path, "x.jsonl", b"\n".join(lines))
    _, _, all_batches = read(split_of(path), header())
    again = list(read_split(split_of(path, base=0, only=(4, 1)), header()))
    assert placed(again) == placed([all_batches[1], all_batches[4]])


@pytest.mark.parametrize("compress", [gzip.compress, bz2.compress, lambda raw: pa.compress(raw, "zstd", asbytes=True)])
def test_a_truncated_compressed_file_is_unreadable(tmp_path: Path, compress: Any) -> None:
    data = b"".join(b'{"n": %d}\n' % (number**5) for number in range(5000))
    path = write(tmp_path, "x.jsonl.gz", compress(data)[:-20])
    with pytest.raises(UnreadableInput, match=r"x\.jsonl\.gz is (truncated|damaged)"):
        read(split_of(path), header())


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[{}, {]", "Expecting property name enclosed in double quotes at element 2, line 1, character 7"),
        ('[{},\n{"a": 1}', "',' or ']' expected at element 3"),
        ("[{}] {}", "more text after the array"),
        ("[{},]", "another element expected after ','"),
        ("[{}]]", "more text after the array"),
    ],
)
def test_a_malformed_array_names_the_position(tmp_path: Path, text: str, problem: str) -> None:
    path = write(tmp_path, "x.json", text.encode())
    with pytest.raises(UnreadableInput) as failure:
        read(split_of(path), header())
    assert str(failure.value).startswith(f"{path} is not a JSON array: ")
    assert problem in str(failure.value)


def test_a_file_that_changed_since_it_was_planned_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, "x.jsonl", b'{"a": 1}\n')
    split = split_of(path)
    write(tmp_path, "x.jsonl", b'{"a": 2}\n\n')
    with pytest.raises(UnreadableInput, match="has changed since the job was planned"):
        read(split, header())
    path.unlink()
    with pytest.raises(UnreadableInput, match="is gone since the job was planned"):
        read(split, header())


LONG = re.compile(rb"[0-9]{20}|-[0-9]{19}")
PIECES = st.lists(
    st.integers(1, 40).map(lambda count: b"8" * count) | st.sampled_from([b"-", b" ", b"/", b":", b"\xff", b'{"a": ']),
    max_size=30,
)


@settings(max_examples=300)
@given(pieces=PIECES, before=st.integers(0, 7), behind=st.sampled_from([0, 1, 2, 3, 20_000]))
def test_long_integers_are_found_wherever_they_lie(pieces: list[bytes], before: int, behind: int) -> None:
    text = b" " * before + b"".join(pieces) + b" " * behind
    assert may_hold_long_integers(text) == bool(LONG.search(text))


@pytest.mark.parametrize("size", [100, 16 * 1024, 16 * 1024 + 3, 1 << 20])
@pytest.mark.parametrize("end", range(8))
@pytest.mark.parametrize("number", [b"12345678901234567890", b"-1234567890123456789"])
def test_a_long_integer_at_the_end_is_found(size: int, end: int, number: bytes) -> None:
    filler = b'{"a": 1234567890123456789}\n'  # 19 digits, which 64 bits can hold
    text = (filler * (size // len(filler) + 1))[: size - len(number) - end]
    text = text[: text.rfind(b"\n") + 1].ljust(size - len(number) - end)
    assert not may_hold_long_integers(text + b" " * (len(number) + end))
    assert may_hold_long_integers(text + number + b" " * end)
