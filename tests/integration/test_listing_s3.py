"""Listing on S3: the files that a folder or a pattern names, page by page, without those that nobody asked for."""

from __future__ import annotations

from typing import Any
from urllib.parse import parse_qs, urlsplit

import fsspec
import pytest

from cortex_dask.errors import DatasetError
from cortex_dask.io.input.files import list_files
from tests.support.faulty_s3 import FaultyS3

pytestmark = pytest.mark.s3

KEYS = [
    "in/a.json",
    "in/ab.json",
    "in/b.json",
    "in/_SUCCESS",
    "in/.hidden/x.json",
    "in/[odd].json",
    "in/day=1/x.json",
    "in/day=1/y.json",
    "in/day=1/deep/z.json",
    "in/day=2/x.json",
    "in/day=2/_temporary/x.json",
    "in/night=1/x.json",
    "in/ä/ö.json",
    "other/day=1/x.json",
]
PATTERNS = ["in/*", "in/?.json", "in/[!a]*.json", "in/day=*", "in/day=*/x.json", "*/day=*/*.json", "in/*/*/z.json", "*"]


@pytest.fixture
def bucket(faulty_s3: FaultyS3, monkeypatch: pytest.MonkeyPatch) -> str:
    fs: Any = fsspec.filesystem("s3")
    fs.pipe({f"{faulty_s3.bucket}/{key}": key.encode() for key in KEYS})
    monkeypatch.setattr("cortex_dask.io.store.listing._PAGE", 2)
    faulty_s3.heal()
    return faulty_s3.bucket


def names(url: str, bucket: str) -> list[str]:
    return [file.path.removeprefix(f"{bucket}/") for file in list_files([url])]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_pattern_names_what_glob_finds(bucket: str, pattern: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = list_files([f"{bucket}/{pattern}"])
    assert ours == sorted(ours, key=lambda file: file.path)
    assert all(file.size == len(file.path.removeprefix(f"{bucket}/").encode()) for file in ours)
    monkeypatch.setattr("cortex_dask.io.input.files.is_s3", lambda fs, url: False)
    assert ours == list_files([f"{bucket}/{pattern}"])  # by glob and find of s3fs
    assert len(ours) > 1 or pattern == "in/*/*/z.json"


def test_a_folder_is_what_find_finds(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = list_files([f"{bucket}/in"])
    assert len(ours) == 10
    assert [file.keys for file in ours if "day=2" in file.path] == [(("day", "2"),)]
    monkeypatch.setattr("cortex_dask.io.input.files.is_s3", lambda fs, url: False)
    assert ours == list_files([f"{bucket}/in/"])


def test_an_object_and_a_folder_of_one_name(bucket: str) -> None:
    fsspec.filesystem("s3").pipe(f"{bucket}/in/b.json/below.json", b"1")
    both = ["in/b.json", "in/b.json/below.json"]  # of which glob of s3fs loses one
    assert names(f"{bucket}/in/b*", bucket) == both
    assert [name for name in names(f"{bucket}/in/", bucket) if "b.json" in name and "ab" not in name] == both


def test_only_what_may_match_is_listed(faulty_s3: FaultyS3, bucket: str) -> None:
    assert names(f"{bucket}/in/day=*/x.json", bucket) == ["in/day=1/x.json", "in/day=2/x.json"]
    queries = [parse_qs(urlsplit(request.path).query) for request in faulty_s3.requests]
    asked = {query["prefix"][0] for query in queries if query.get("delimiter") == ["/"] and "max-keys" in query}
    assert {"in/day=", "in/day=1/x.json", "in/day=2/x.json"} <= asked
    assert not any("night" in prefix or "other" in prefix for prefix in asked)


def test_a_pattern_that_matches_nothing(bucket: str) -> None:
    for pattern in ("in/*.parquet", "nowhere/*/x.json", "in/day=*/y/*.json"):
        with pytest.raises(DatasetError, match=r"matches no file"):
            list_files([f"{bucket}/{pattern}"])


def test_a_page_that_fails_is_asked_for_again(faulty_s3: FaultyS3, bucket: str) -> None:
    expected = names(f"{bucket}/in/", bucket)
    faulty_s3.heal()
    faulty_s3.fail(4, how="503", match="list-type")
    assert names(f"{bucket}/in/", bucket) == expected
    assert faulty_s3.failed == 1
