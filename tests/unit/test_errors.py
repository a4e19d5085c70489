"""Exceptions carry the facts of their sentences, so that a program need not parse them."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest

import cortex_dask as cx
from cortex_dask import errors
from cortex_dask.io.store.store import Store
from cortex_dask.spec.resolution import resolve


class Handler:
    def __init__(self, config: dict[str, Any]) -> None: ...

    def handle_batch(self, payload: Any) -> Any: ...


@pytest.mark.parametrize(
    "error",
    [
        errors.SpecError("m", mistakes=[("a.b", "is missing")]),
        errors.DatasetError("m", path="in/*.parquet"),
        errors.OutputError("m", url="s3://b/out"),
        errors.StorageError("m", url="s3://b/out", code="AccessDenied"),
        errors.JobNotFoundError("m", api_name="a", job_id="j"),
        errors.JobRunningError("m", host="h", pid=7),
        errors.ClusterError("m", cluster="gateway"),
        errors.JobFailedError("m", status="worker error"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_facts_survive_pickling_and_copying(error: errors.CortexDaskError) -> None:
    for again in (pickle.loads(pickle.dumps(error)), copy.copy(error)):
        assert (type(again), str(again), vars(again)) == (type(error), str(error), vars(error))


def test_a_wrong_submission_names_each_key() -> None:
    with pytest.raises(cx.SpecError) as caught:
        resolve(Handler, input="in", batch_format="csv", timeout=-1)
    assert {path for path, _ in caught.value.mistakes} == {"batch_format", "timeout"}
    assert all(message for _, message in caught.value.mistakes)


def test_a_missing_job_is_named(tmp_path: Path) -> None:
    client = cx.Client(cx.Environment("here", str(tmp_path), "local"))
    with pytest.raises(cx.JobNotFoundError) as caught:
        client.get_job("digits", "nightly")
    assert caught.value.api_name == "digits"


def test_an_output_that_holds_data_is_named(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "data.parquet").touch()
    (tmp_path / "in.jsonl").write_text('{"id": 1}\n')
    client = cx.Client(cx.Environment("here", str(tmp_path / "store"), "local"))
    with pytest.raises(cx.OutputError) as caught:
        client.run(Handler, tmp_path / "in.jsonl", tmp_path / "out", cluster="inline", progress=False)
    assert caught.value.url == str(tmp_path / "out")


def test_a_store_that_refuses_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(cx.StorageError) as caught:
        Store(str(tmp_path / "file")).write("name", b"")
    assert caught.value.url == str(tmp_path / "file" / "name")
    assert caught.value.code is None
