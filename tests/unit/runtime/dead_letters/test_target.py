"""The failures of a file, and a folder as target of dead letters."""

from __future__ import annotations

from pathlib import Path

import orjson
import pytest

from cortex_dask.errors import SpecError
from cortex_dask.io.job.settings import DeadLetterSettings
from cortex_dask.io.store.store import Store
from cortex_dask.runtime.dead_letters.target import read_failures
from tests.support.failed_job import FailedJob, make_failure
from tests.support.faulty_s3 import FaultyS3


class TestReadFailures:
    def test_the_wanted_failures_are_read_with_any_size_of_chunks(self, tmp_path: Path) -> None:
        failures = [make_failure(number, [{"x": "y" * number}]) for number in range(20)]
        store = Store(str(tmp_path))
        store.write("f", b"".join(orjson.dumps(item) + b"\n" for item in failures))
        for size in (1, 7, 400, 1_000_000):
            wanted = [item["batch_id"] for item in failures[::3]]
            assert list(read_failures(store, "f", wanted, chunk_size=size)) == failures[::3]


class TestFolder:
    def test_files_are_those_of_the_job_directory(self, tmp_path: Path) -> None:
        job = FailedJob(tmp_path, DeadLetterSettings(3, folder=str(tmp_path / "dead")))
        delivery = job.delivery()
        delivery.check()
        delivery.add(job.fail(0, range(3)))
        job.fail(7, range(3, 5))
        assert delivery.finish() == ""
        delivery.close()
        copies = {path.name: path.read_bytes() for path in (tmp_path / "dead/job-1").iterdir()}
        assert copies == {
            "000000-a.jsonl": job.directory.store.read("failures/000000-a.jsonl"),
            "000007-a.jsonl": job.directory.store.read("failures/000007-a.jsonl"),
        }

    def test_a_folder_that_cannot_be_written_is_found_before_the_first_batch(self, tmp_path: Path) -> None:
        (tmp_path / "dead").write_text("a file")
        job = FailedJob(tmp_path, DeadLetterSettings(3, folder=str(tmp_path / "dead")))
        with pytest.raises(SpecError, match=r"^dead_letter\.path: "):
            job.delivery().check()

    @pytest.mark.s3
    def test_a_store_that_fails_leaves_the_failures(self, tmp_path: Path, faulty_s3: FaultyS3) -> None:
        folder = f"{faulty_s3.bucket}/dead"
        job = FailedJob(tmp_path, DeadLetterSettings(3, folder=folder))
        job.fail(0, range(3))
        delivery = job.delivery()
        delivery.check()
        faulty_s3.fail(how="403 AccessDenied", count=None)
        problem = delivery.finish()
        delivery.close()
        assert delivery.undelivered == 3
        assert f"could not be delivered to the folder {folder}" in problem
        faulty_s3.heal()
        assert delivery.finish() == ""
        assert Store(folder).names() == ["job-1/000000-a.jsonl"]
