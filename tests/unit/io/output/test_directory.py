"""The output directory: reservation, publication, manifest."""

from __future__ import annotations

import contextlib
import threading
import tracemalloc
from concurrent.futures import ThreadPoolExecutor

import pytest

from cortex_dask.errors import OutputError
from cortex_dask.io.job.records import Part
from cortex_dask.io.job.settings import OutputSettings
from cortex_dask.io.job.splits import part_name
from cortex_dask.io.output.directory import MANIFEST, OutputDirectory, staging_prefix


def directory(url: str, job_id: str = "job-1", mode: str = "error") -> OutputDirectory:
    return OutputDirectory(OutputSettings(url, mode=mode), job_id)  # type: ignore[arg-type]


def staged(output: OutputDirectory, job_id: str, split: int, data: bytes) -> Part:
    name = f"{staging_prefix(job_id)}/{split:06d}-a"
    output.store.write(name, data)
    return Part(part_name(job_id, split, ".parquet"), name, 3, len(data))


def test_a_part_is_invisible_until_it_is_published_and_publishing_twice_is_harmless(store_url):
    output = directory(store_url)
    assert output.reserve() == []
    part = staged(output, "job-1", 0, b"rows")
    assert output.published() == {}
    for _ in range(2):
        output.publish(part)
        assert output.published() == {part.name: 4}
    output.write_manifest([part], "schema", "succeeded", [])
    output.seal()
    output.clean()
    assert output.store.children() == ["_SUCCESS", "_manifest.json", part.name]
    assert output.manifest()["rows"] == 3


def test_a_directory_with_data_is_refused_unless_the_mode_says_otherwise(store_url):
    output = directory(store_url)
    output.store.write("old.parquet", b"old")
    with pytest.raises(OutputError, match=r"holds 1 file already \(for example old.parquet\).*append.*overwrite"):
        output.reserve()
    assert output.store.names() == ["old.parquet"]
    for mode in ("append", "overwrite"):
        assert directory(store_url, f"job-{mode}", mode).reserve() == ["old.parquet"]
        directory(store_url, f"job-{mode}", mode).clean()


def test_a_finished_empty_result_is_data_too(store_url):
    output = directory(store_url)
    output.seal()
    with pytest.raises(OutputError, match="_SUCCESS"):
        directory(store_url, "job-2").reserve()


def test_a_job_that_was_left_unfinished_is_named(store_url):
    directory(store_url, "job-1").reserve()
    with pytest.raises(OutputError, match="job-1 is writing to"):
        directory(store_url, "job-2").reserve()
    assert directory(store_url, "job-1").reserve() == []


def test_overwrite_removes_the_old_only_with_the_new_manifest(store_url):
    first = directory(store_url)
    first.reserve()
    old = staged(first, "job-1", 0, b"old")
    first.publish(old)
    first.write_manifest([old], None, "succeeded", [])
    first.seal()
    first.clean()

    second = directory(store_url, "job-2", "overwrite")
    replaced = second.reserve()
    assert replaced == [old.name]
    new = staged(second, "job-2", 0, b"newer")
    assert old.name in second.store.names()
    second.unseal()
    second.publish(new)
    assert {old.name, new.name} <= set(second.store.names())
    second.write_manifest([new], None, "succeeded", replaced)
    second.seal()
    second.clean()
    assert second.store.children() == ["_SUCCESS", "_manifest.json", new.name]


def test_append_lists_the_parts_of_both_jobs(store_url):
    manifests = []
    for number, mode in enumerate(("error", "append", "append")):
        output = directory(store_url, f"job-{number}", mode)
        output.reserve()
        part = staged(output, f"job-{number}", 0, b"x" * (number + 1))
        output.publish(part)
        output.write_manifest([part], None, "succeeded", [])
        output.write_manifest([part], None, "succeeded", [])  # a resumed job writes it again
        output.clean()
        manifests.append([item["bytes"] for item in output.manifest()["parts"]])
    assert manifests == [[1], [1, 2], [1, 2, 3]]


def test_what_is_missing_is_found_whatever_the_number_of_the_split(store_url):
    output = directory(store_url)
    parts = [
        staged(output, "job-1", number, b"x" * (1 + number % 7)) for number in (0, 9_999, 10_000, 99_999, 1_000_000)
    ]
    for part in parts:
        output.publish(part)
    other = directory(store_url, "job-2")
    other.publish(staged(other, "job-2", 10_000, b"xyz"))
    output.store.write(parts[1].name, b"cut short by a power failure")
    output.store.write("part-00-of-somebody-else", b"")
    absent = Part(part_name("job-1", 20_000, ".parquet"), "_temporary/x", 1, 3)

    assert list(output.missing([*parts, absent], 1_000_001)) == [parts[1], absent]


def test_a_job_under_an_old_job_id_replaces_what_the_old_one_left(store_url):
    output = directory(store_url, mode="overwrite")
    old = [staged(output, "job-1", number, b"old") for number in range(2)]
    for part in old:
        output.publish(part)
    new = staged(output, "job-1", 0, b"new rows")
    output.publish(new)
    output.write_manifest([new], None, "succeeded", [part.name for part in old])

    assert list(output.published()) == [new.name]


def test_the_manifest_of_very_many_parts_takes_little_more_memory_than_its_text(tmp_path):
    output = directory(str(tmp_path))
    count = 50_000
    parts = (Part(part_name("job-1", number, ".parquet"), "", 2, 10) for number in range(count))
    tracemalloc.start()
    output.write_manifest(parts, "schema", "succeeded", [])
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()

    manifest = output.manifest()
    assert (manifest["rows"], manifest["bytes"], len(manifest["parts"])) == (2 * count, 10 * count, count)
    assert manifest["parts"][-1] == {"name": part_name("job-1", count - 1, ".parquet"), "rows": 2, "bytes": 10}
    assert peak < 4 * output.store.size(MANIFEST)


@pytest.mark.parametrize("mode", ["error", "append"])
def test_of_two_jobs_that_reserve_at_the_same_moment_at_most_one_goes_on(store_url, mode):
    for attempt in range(5):
        jobs = [directory(f"{store_url}/{attempt}", f"job-{number}", mode) for number in range(2)]
        together = threading.Barrier(len(jobs))

        def reserve(output, together=together):
            output.store.exists()  # connected
            together.wait(10)
            with contextlib.suppress(OutputError):
                output.reserve()
                return True
            return False

        with ThreadPoolExecutor(len(jobs)) as pool:
            reserved = list(pool.map(reserve, jobs))
        assert sum(reserved) <= 1
        assert [output.is_reserved() for output in jobs] == reserved
