"""Inputs of samples: what is listed, counted, and cut into splits, read back as handlers get it."""

from __future__ import annotations

import bz2
import gzip
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from cortex_dask.errors import DatasetError
from cortex_dask.io.batch import BadLine, Batch
from cortex_dask.io.input.files import InputFile, list_prefixes
from cortex_dask.io.job.settings import HandlerSettings, JobSettings, OutputSettings, SampleInput
from cortex_dask.io.job.splits import DatasetInput, Plan
from cortex_dask.io.json.file import JsonFile
from cortex_dask.io.planning import items as planning_items
from cortex_dask.io.planning import line_counts
from cortex_dask.io.planning.items import encode_items
from cortex_dask.io.planning.line_counts import CountedFile
from cortex_dask.io.planning.samples import cut_pieces, enqueue, survey
from cortex_dask.io.reading import read_split
from cortex_dask.io.store.source import UnreadableInput
from cortex_dask.io.store.store import Store

COMPRESS = {
    "": lambda data: data,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".zst": lambda data: pa.compress(data, "zstd", asbytes=True),
}


def job(kind: Any, *, paths: Any = (), batch_size: int = 2, workers: int = 1, **given: Any) -> JobSettings:
    output = given.pop("output", None)
    return JobSettings(
        job_id="job-1",
        api_name="api",
        api_id="1",
        created_time="",
        handler=HandlerSettings(kind="class"),
        dataset=DatasetInput(tuple(map(str, paths)), format="json", batch_size=batch_size),
        samples=SampleInput(kind, **given),
        workers=workers,
        output=output,
    )


def read(made: Plan) -> tuple[list[list[Any]], list[BadLine]]:
    """Return the batches of all splits, and malformed lines."""
    batches, bad = [], []
    for split in made:
        found = [item for item in read_split(split, made.header) if isinstance(item, Batch)]
        assert [batch.index for batch in found] == list(range(split.batches or 0))
        batches += [batch.data for batch in found]
        bad += [item for item in read_split(split, made.header) if isinstance(item, BadLine)]
        for only in range(split.batches or 0):  # as a retry reads it
            again = list(read_split(replace(split, base=split.number, only=(only,)), made.header))
            assert again == [found[only]]
    return batches, bad


def write(path: Path, text: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    data = text.encode() if isinstance(text, str) else text
    path.write_bytes(COMPRESS[path.suffix if path.suffix in COMPRESS else ""](data))
    return path


# delimited files ------------------------------------------------------------------------------------------------------

lines = st.lists(
    st.sampled_from(
        ['{"a": 1}', "[1, 2]", '"text"', "0", "null", "", " ", "\t\r", "\x0b\x0c", "oops", "{", '  {"b": 2}']
    )
    | st.integers().map(str)
    | st.text(max_size=30).map(json.dumps),
    max_size=30,
)
files = st.lists(
    st.tuples(lines, st.sampled_from(["\n", "\r\n"]), st.booleans(), st.booleans(), st.sampled_from(list(COMPRESS))),
    min_size=1,
    max_size=5,
)


def is_json(line: str) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(files, st.integers(1, 7), st.integers(1, 4), st.integers(1, 40), st.integers(1, 60), st.integers(1, 40))
@example([(["1"] * 9, "\n", True, False, ".gz"), (["2"] * 9, "\n", False, False, "")], 2, 2, 8, 8, 8)
def test_every_line_is_a_sample_of_one_batch_in_order_wherever_files_are_cut(
    tmp_path_factory: pytest.TempPathFactory,
    written: list[Any],
    batch_size: int,
    workers: int,
    mark: int,
    cut: int,
    block: int,
) -> None:
    folder = tmp_path_factory.mktemp("x")
    expected: list[str] = []
    for number, (texts, end, ended, bom, compression) in enumerate(written):
        text = end.join(texts) + (end if ended and texts else "")
        write(folder / f"{number}.jsonl{compression}", (b"\xef\xbb\xbf" if bom else b"") + text.encode())
        expected += [line for line in text.split("\n") if line.encode().strip()]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(line_counts, "_MARK", mark)
        patch.setattr(line_counts, "_RANGE", cut)
        patch.setattr("cortex_dask.io.json.file.LOCAL_BLOCK", block)
        asked = job("delimited_files", paths=[f"{folder}/"], batch_size=batch_size, workers=workers)
        good = [line for line in expected if is_json(line)]
        if not good and (not expected or len(expected) >= 10):
            with pytest.raises(DatasetError, match=r"no samples|does not hold JSON lines"):
                enqueue(Store(str(folder)), asked)
            return
        made = enqueue(Store(str(folder)), asked)
        batches, bad = read(made)
    slots = [expected[at : at + batch_size] for at in range(0, len(expected), batch_size)]
    assert batches == [[json.loads(line) for line in slot if is_json(line)] for slot in slots]
    assert [item.text for item in bad] == [line.rstrip("\r") for line in expected if not is_json(line)]
    assert (made.header.rows, made.header.batches, made.header.batches_exact) == (len(expected), len(slots), True)
    assert sum(split.batches or 0 for split in made) == len(slots)
    assert all((split.rows or 0) % batch_size == 0 for split in made.splits[:-1])
    found = survey(asked)
    assert (found.samples, found.batches, found.splits) == (len(expected), len(slots), len(made.splits))


def test_a_malformed_line_is_told_with_file_and_line(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", "1\n\n2\noops\n3\n")
    write(tmp_path / "b.jsonl.gz", "4\n\n{\n")
    made = enqueue(Store(str(tmp_path)), job("delimited_files", paths=[f"{tmp_path}/"], batch_size=2, workers=8))
    batches, bad = read(made)
    assert batches == [[1, 2], [3], [4]]
    assert [(Path(item.path).name, item.line) for item in bad] == [("a.jsonl", 4), ("b.jsonl.gz", 3)]


def test_a_batch_of_malformed_lines_alone_keeps_its_number(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", "1\n2\n{\n}\n3\n")
    made = enqueue(Store(str(tmp_path)), job("delimited_files", paths=[tmp_path / "a"], batch_size=2))
    made = replace(made, splits=(replace(made.splits[0], pieces=tuple(p for s in made for p in s.pieces), batches=3),))
    assert read(made)[0] == [[1, 2], [], [3]]


def test_files_that_hold_something_else_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "a.csv", "x,y\n" * 20)
    with pytest.raises(DatasetError, match=r"a\.csv does not hold JSON lines: none of the first 20 lines"):
        enqueue(Store(str(tmp_path)), job("delimited_files", paths=[tmp_path / "a.csv"]))


def test_a_file_that_changes_after_it_was_counted_is_an_error(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", "1\n2\n")
    made = enqueue(Store(str(tmp_path)), job("delimited_files", paths=[path]))
    path.write_text("1\n")
    with pytest.raises(UnreadableInput, match="has changed since the job was planned"):
        read(made)


def test_a_file_that_loses_lines_unnoticed_is_an_error(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", "1\n2\n3\n4\n")
    made = enqueue(Store(str(tmp_path)), job("delimited_files", paths=[path], batch_size=10))
    path.write_text("1\n2\n3\n  ")
    untagged = replace(made.splits[0].pieces[0], tag="")
    with pytest.raises(UnreadableInput, match="has 1 lines less than when they were counted"):
        read(replace(made, splits=(replace(made.splits[0], pieces=(untagged,)),)))


@pytest.mark.parametrize("damaged", [b"\x1f\x8b\x08\x00broken", "[1]\n".encode("utf-16")])
def test_a_file_that_cannot_be_read_is_an_error_of_the_input(tmp_path: Path, damaged: bytes) -> None:
    (tmp_path / "a").write_bytes(damaged)
    with pytest.raises(DatasetError, match=r"the input cannot be read: .*/a is (truncated|damaged|UTF-16)"):
        enqueue(Store(str(tmp_path)), job("delimited_files", paths=[tmp_path / "a"]))


def test_blank_files_are_no_input(tmp_path: Path) -> None:
    write(tmp_path / "a", "\n \n")
    with pytest.raises(DatasetError, match=r"no samples: .*/a holds nothing but white space"):
        enqueue(Store(str(tmp_path)), job("delimited_files", paths=[tmp_path / "a"]))
    write(tmp_path / "a2", "")
    with pytest.raises(DatasetError, match=r"each of the 2 files, such as .*/a, is empty"):
        enqueue(Store(str(tmp_path)), job("delimited_files", paths=[tmp_path / "a"]))


def test_counting_reads_in_bounded_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.jsonl", b'{"n": 12345}\n' * 2_000_000)
    largest = 0
    blocks = JsonFile.blocks

    def measured(self: JsonFile, start: int, stop: int) -> Any:
        nonlocal largest
        for block in blocks(self, start, stop):
            largest = max(largest, len(block.data))
            yield block

    monkeypatch.setattr(JsonFile, "blocks", measured)
    monkeypatch.setattr(line_counts, "_RANGE", 4 << 20)
    made = enqueue(Store(str(tmp_path)), job("delimited_files", paths=[path], batch_size=1000, workers=4))
    assert (made.header.rows, made.header.batches) == (2_000_000, 2000)
    assert 0 < largest < 2 << 20
    assert all(piece.skip * 13 <= line_counts._MARK + 13 for split in made for piece in split.pieces)


def test_the_callback_can_end_the_counting(tmp_path: Path) -> None:
    write(tmp_path / "a", "1\n")
    with pytest.raises(KeyError):
        enqueue(Store(str(tmp_path)), job("delimited_files", paths=[tmp_path / "a"]), {}.popitem)


# splits ---------------------------------------------------------------------------------------------------------------


@given(
    st.lists(st.tuples(st.integers(1, 60), st.booleans()), min_size=1, max_size=8),
    st.integers(1, 5),
    st.integers(1, 6),
    st.integers(1, 5),
)
def test_splits_end_at_whole_batches_and_leave_nothing_out(
    given_files: list[tuple[int, bool]], batch_size: int, batches: int, workers: int
) -> None:
    counted = [
        CountedFile(
            InputFile(str(number), count, ""),
            compressed,
            (0, count) if compressed else range(count + 1),
            (0, count) if compressed else range(count + 1),
            count,
        )
        for number, (count, compressed) in enumerate(given_files)
    ]
    splits = list(cut_pieces(counted, batches * batch_size, batch_size, workers))
    covered: dict[str, list[int]] = {}
    for pieces in splits:
        assert pieces
        for piece in pieces:
            assert piece.rows
            covered.setdefault(piece.path, []).extend(
                range(piece.start + piece.skip, piece.start + piece.skip + piece.rows)
            )
    assert list(covered) == [file.file.path for file in counted]
    assert [at for file in covered.values() for at in file] == [n for count, _ in given_files for n in range(count)]
    rows = [sum(piece.rows or 0 for piece in pieces) for pieces in splits]
    assert all(count % batch_size == 0 for count in rows[:-1])
    if not any(compressed for _, compressed in given_files):
        assert all(count == batches * batch_size for count in rows[:-1])
    for number, (count, compressed) in enumerate(given_files):  # what makes a reader decompress a file again
        deep = [p.skip for pieces in splits for p in pieces if p.path == str(number) and p.skip >= batch_size]
        assert not compressed or len(deep) <= workers + 1, count


def test_jobs_without_an_output_have_small_splits_and_others_large_ones(tmp_path: Path) -> None:
    write(tmp_path / "a", "1\n" * 100_000)
    without = job("delimited_files", paths=[tmp_path / "a"], batch_size=1)
    assert enqueue(Store(str(tmp_path)), without).header.splits == 1000
    output = replace(without, output=OutputSettings(str(tmp_path / "out")))
    assert enqueue(Store(str(tmp_path)), output).header.splits == 8


def test_large_batches_are_worth_a_warning(tmp_path: Path) -> None:
    write(tmp_path / "a", ('"' + "x" * 1000 + '"\n') * 1000)
    made = enqueue(Store(str(tmp_path)), job("delimited_files", paths=[tmp_path / "a"], batch_size=500))
    assert [text.split(": the")[0] for text in made.header.warnings] == ["delimited_files.batch_size"]
    assert enqueue(Store(str(tmp_path)), job("delimited_files", paths=[tmp_path / "a"])).header.warnings == ()


# items ----------------------------------------------------------------------------------------------------------------

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(values, min_size=1, max_size=20), st.integers(1, 6), st.integers(1, 3), st.integers(1, 50))
def test_items_come_back_as_they_were_given(
    tmp_path_factory: pytest.TempPathFactory, given_items: list[Any], batch_size: int, workers: int, chunk: int
) -> None:
    store = Store(str(tmp_path_factory.mktemp("job")))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planning_items, "_CHUNK", chunk)
        items = encode_items(given_items, batch_size)
    items.write(store)
    asked = job("item_list", batch_size=batch_size, workers=workers, items=items.count, digest=items.digest)
    made = enqueue(store, asked)
    batches, bad = read(made)
    assert not bad
    assert batches == [given_items[at : at + batch_size] for at in range(0, len(given_items), batch_size)]
    assert [list(map(type, batch)) for batch in batches] == [
        list(map(type, given_items[at : at + batch_size])) for at in range(0, len(given_items), batch_size)
    ]
    assert made.header.batches == len(batches)
    found = survey(asked)
    assert (found.samples, found.batches, found.files) == (len(given_items), len(batches), ())


def test_items_may_be_what_json_has_a_form_for() -> None:
    items = encode_items([(1, 2), np.int64(3), np.array([1.5]), Path("/a"), {"x": (None,)}], 1)
    assert items.chunks == (b'[1,2]\n3\n[1.5]\n"/a"\n{"x":[null]}\n',)
    assert (items.count, items.objects) == (5, False)


@pytest.mark.parametrize(
    ("item", "problem"),
    [
        (float("nan"), r"item_list\.items\[1\]: found the number nan"),
        ({"a": [1, float("inf")]}, r"item_list\.items\[1\]\.a\[1\]: found the number inf"),
        ({"a": {1: 2}}, r"item_list\.items\[1\]\.a: found the key 1; keys must be text"),
        ({None: 2}, r"items\[1\]: found the key nothing"),
        (object(), r"items\[1\]: found a value of type object; allowed are JSON values"),
        (b"x", r"items\[1\]: found a value of type bytes"),
        ("\ud800", r"items\[1\]: found text with half of a surrogate pair"),
    ],
)
def test_items_that_json_has_no_form_for_are_refused(item: Any, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        encode_items([0, item], 1)


def test_what_cortex_would_refuse_is_worth_a_warning() -> None:
    assert encode_items(["x" * 1000] * 200, 200).warnings == ()
    (warning,) = encode_items(["x" * 1000] * 300, 300).warnings
    assert "the largest batch has 294 KiB, Cortex takes 256 KiB" in warning
    assert "11 MiB" in encode_items(["x" * 1000] * 11_500, 1).warnings[0]


def test_items_that_are_not_all_there_are_an_error(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    items = encode_items([1, 2, 3], 1)
    replace(items, chunks=(b"1\n2\n",)).write(store)
    with pytest.raises(DatasetError, match="holds 2 items, but 3 were submitted"):
        enqueue(store, job("item_list", items=items.count, digest=items.digest))


# prefixes -------------------------------------------------------------------------------------------------------------

TREE = ["images-x/3.png", "images/.h.png", "images/img/2.png", "images/img_1.png", "images/o.txt", "images.png", "z"]


@pytest.fixture(params=["local", pytest.param("s3", marks=pytest.mark.s3), "memory"])
def tree(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A folder with the files of ``TREE``, and what stands for folders."""
    if request.param == "local":
        root = str(tmp_path)
        for name in TREE:
            write(tmp_path / name, "x")
        (tmp_path / "images/empty").mkdir()
        return root
    root = f"{request.getfixturevalue('s3')}/root" if request.param == "s3" else f"memory://{tmp_path.name}"
    fs, path = fsspec.url_to_fs(root)
    for name in TREE:
        fs.pipe(f"{path}/{name}", b"x")
    if request.param == "s3":
        for name in ("images/", "images/empty/", "images_$folder$"):
            fs.call_s3("put_object", Bucket=path.split("/")[0], Key=f"root/{name}", Body=b"")
    return root


@pytest.mark.parametrize(
    ("prefixes", "found"),
    [
        (["images/img"], ["images/img/2.png", "images/img_1.png"]),
        (["images"], [*TREE[:1], "images.png", *TREE[1:5]]),
        (["images/"], TREE[1:5]),
        ([""], [*TREE[:1], "images.png", *TREE[1:5], "z"]),
        (["z"], ["z"]),
        (["z", "images/img_", "images/", "z"], ["z", "images/img_1.png", "images/.h.png", "images/img/2.png", TREE[4]]),
        (["nowhere", "z"], ["z"]),
    ],
)
def test_prefixes(tree: str, prefixes: list[str], found: list[str]) -> None:
    listed = list(list_prefixes([f"{tree}/{prefix}" for prefix in prefixes], [], []))
    assert [file.path for file in listed] == [f"{tree}/{name}" for name in found]
    assert {file.size for file in listed} == {1}


def test_globs_see_the_full_path(tree: str) -> None:
    def listed(*includes: str, excludes: tuple[str, ...] = ()) -> list[str]:
        return [file.path[len(tree) + 1 :] for file in list_prefixes([f"{tree}/"], includes, excludes)]

    assert listed("**.png", excludes=("**/images/**",)) == ["images-x/3.png", "images.png"]
    assert listed(f"{tree}/*/*.png") == ["images-x/3.png", "images/.h.png", "images/img_1.png"]
    assert listed(f"{tree}/images/{{img_?,o}}.{{png,txt}}") == ["images/img_1.png", "images/o.txt"]


def test_nothing_matched_says_why(tree: str) -> None:
    with pytest.raises(DatasetError, match=r"excludes leave none of the 7 files below .*matched against"):
        list(list_prefixes([f"{tree}/"], ["*.png"], []))
    with pytest.raises(DatasetError, match=r"path begins with .*nowhere/\*\.png: .*wildcards go into includes"):
        list(list_prefixes([f"{tree}/nowhere/*.png"], [], []))


@pytest.mark.s3
def test_a_listing_of_many_pages(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cortex_dask.io.store.listing._PAGE", 3)
    fs, path = fsspec.url_to_fs(s3)
    names = sorted(f"{path}/p/{number}" for number in range(11))
    fs.pipe(dict.fromkeys(names, b"x"))
    assert [file.path for file in list_prefixes([f"{s3}/p"], [], [])] == [f"s3://{name}" for name in names]


@pytest.mark.s3
def test_a_missing_bucket_is_said(s3: str) -> None:
    with pytest.raises(DatasetError, match="bucket"):
        list(list_prefixes(["s3://no-such-bucket-here/x"], [], []))


def test_a_password_in_a_path_is_not_shown() -> None:
    with pytest.raises(DatasetError, match="holds a password") as caught:
        list(list_prefixes(["ftp://me:hunter2@host/x"], [], []))
    assert "hunter2" not in str(caught.value)


def test_links_in_circles_and_broken_ones(tmp_path: Path) -> None:
    write(tmp_path / "a/b/1", "x")
    (tmp_path / "a/b/up").symlink_to(tmp_path / "a")
    (tmp_path / "a/broken").symlink_to(tmp_path / "gone")
    (tmp_path / "other").mkdir()
    write(tmp_path / "other/2", "x")
    (tmp_path / "a/link").symlink_to(tmp_path / "other")
    assert [Path(file.path).name for file in list_prefixes([f"{tmp_path}/a/"], [], [])] == ["1", "2"]


def test_file_lists_are_written_to_the_job_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(25):
        write(tmp_path / f"in/{number:02d}.png", "x")
    monkeypatch.setattr(planning_items, "_CHUNK", 200)
    store = Store(str(tmp_path / "job"))
    asked = job("file_path_lister", paths=[f"{tmp_path}/in/"], excludes=("**/1?.png",), batch_size=4, workers=2)
    made = enqueue(store, asked)
    batches, _ = read(made)
    paths = [f"{tmp_path}/in/{number:02d}.png" for number in range(25) if not 10 <= number < 20]
    assert batches == [paths[at : at + 4] for at in range(0, 15, 4)]
    assert len(store.names("input")) > 1
    found = survey(asked)
    assert [file.path for file, _ in found.files] == paths
    assert (found.samples, found.batches, found.splits) == (15, 4, made.header.splits)
    second = enqueue(store, asked)  # another attempt does not touch what the first one wrote
    assert read(made)[0] == read(second)[0] == batches
