"""Planning, listing and finding at scale: seconds, requests and memory, for more and more of everything.

    python benchmarks/scale_planning.py                          # all of it, smaller: a few minutes
    python benchmarks/scale_planning.py --files 100000 --s3      # Parquet files of 10 rows on S3: 1,000, 10,000 …
    python benchmarks/scale_planning.py --files 100000 --local   # the same on the local disk
    python benchmarks/scale_planning.py --lines 100              # count the lines of one file of 100 GiB
    python benchmarks/scale_planning.py --one-file 50            # plan one Parquet file of 50 GiB
    python benchmarks/scale_planning.py --items 1000000          # an item_list
    python benchmarks/scale_planning.py --jobs 2000              # find jobs among 2,000, locally and on S3

S3 is ``s3_server.py`` in a process of its own, which counts requests and answers each after ``--latency`` seconds. A
Parquet file of 50 GiB is a real footer behind a hole, a file of 100 GiB of lines is made up while it is read. Every
measurement is taken in a process of its own.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from s3_server import S3Process

HERE = Path(__file__).resolve().parent
MIB, GIB = 1 << 20, 1 << 30
ROWS = 10  # of a tiny file
BATCH = 1000
WORKERS = 16
LINE = b'{"id": 12345678, "text": "a line of about a hundred bytes, as logs and labelled samples have", "x": 0.125}\n'

Answer = dict[str, Any]


# what is measured, each in a process of its own -----------------------------------------------------------------------


def plan_files(url: str, folder: str) -> Answer:
    """Plan a dataset, and write the plan."""
    from cortex_dask.io.input.files import list_files
    from cortex_dask.io.job.directory import JobDirectory
    from cortex_dask.io.job.splits import DatasetInput
    from cortex_dask.io.planning import parquet  # noqa: F401 - imported before the clock starts
    from cortex_dask.io.planning.plan import plan

    connect(url)
    before = peak_memory()
    began, cpu = time.perf_counter(), time.process_time()
    list_files([url])
    listed, listed_cpu = time.perf_counter() - began, time.process_time() - cpu
    began, cpu = time.perf_counter(), time.process_time()
    job = JobDirectory(folder)
    writer = job.plan_writer()
    made = plan(DatasetInput((url,), batch_size=BATCH), workers=WORKERS, sink=writer.add)  # as the coordinator does
    writer.finish(made.header)
    planned, planned_cpu = time.perf_counter() - began, time.process_time() - cpu
    peak = peak_memory()
    return {
        "seconds": {"list": listed, "list (CPU)": listed_cpu, "plan": planned, "plan (CPU)": planned_cpu},
        "splits": made.header.splits,
        "most files in a split": max(len(split.pieces) for split in job.splits()),
        "files": made.header.files,
        "memory": {"before": before, "peak": peak},
    }


def read_files(url: str, folder: str) -> Answer:
    """Read the first split of a dataset."""
    from cortex_dask.io.job.directory import JobDirectory
    from cortex_dask.io.reading import read_split

    job = JobDirectory(folder)
    header = job.plan_header()
    assert header is not None
    split = next(job.splits())
    connect(url)
    began, cpu = time.perf_counter(), time.process_time()
    rows = sum(batch.rows for batch in read_split(split, header) if hasattr(batch, "rows"))
    assert rows == split.rows, (rows, split.rows)
    return {
        "seconds": {"read": time.perf_counter() - began},
        "cpu": time.process_time() - cpu,
        "files": len({piece.path for piece in split.pieces}),
        "memory": {"peak": peak_memory()},
    }


def count_lines(gib: int) -> Answer:
    """Enqueue a job over one file of lines, which is made up while it is read."""
    from fsspec.implementations.local import LocalFileSystem  # noqa: F401 - part of what any job imports

    from cortex_dask.io.job.settings import HandlerSettings, JobSettings, SampleInput
    from cortex_dask.io.job.splits import DatasetInput
    from cortex_dask.io.planning.samples import enqueue
    from cortex_dask.io.store.store import Store

    register_lines(gib * GIB)
    settings = JobSettings(
        job_id="20260101-000000-5ca1ab",
        api_name="scale",
        api_id="scale-1",
        created_time="2026-01-01T00:00:00.000+00:00",
        handler=HandlerSettings("class"),
        dataset=DatasetInput(("madeup://all.jsonl",), batch_size=BATCH),
        samples=SampleInput("delimited_files"),
        workers=WORKERS,
    )
    before = peak_memory()
    began, cpu = time.perf_counter(), time.process_time()
    made = enqueue(Store(tempfile.gettempdir()), settings)
    assert made.header.rows == gib * GIB // len(LINE) + 1, made.header.rows
    return {
        "seconds": {"count": time.perf_counter() - began},
        "cpu": time.process_time() - cpu,
        "samples": made.header.rows,
        "splits": len(made.splits),
        "memory": {"before": before, "peak": peak_memory()},
    }


def plan_one_file(path: str) -> Answer:
    """Plan one large Parquet file."""
    import pyarrow.parquet  # noqa: F401 - imported before the clock starts

    from cortex_dask.io.job.splits import DatasetInput
    from cortex_dask.io.parquet import footer as parquet_footer  # noqa: F401
    from cortex_dask.io.planning.plan import plan

    before = peak_memory()
    began = time.perf_counter()
    made = plan(DatasetInput((path,), batch_size=BATCH), workers=WORKERS)
    sizes = sorted(split.bytes for split in made)
    return {
        "seconds": {"plan": time.perf_counter() - began},
        "splits": len(sizes),
        "MiB of a split, least, median, most": [round(sizes[at] / MIB, 1) for at in (0, len(sizes) // 2, -1)],
        "memory": {"before": before, "peak": peak_memory()},
    }


def encode_list(items: int) -> Answer:
    """Encode an item_list, write it, and plan it."""
    from cortex_dask.io.job.settings import HandlerSettings, JobSettings, SampleInput
    from cortex_dask.io.job.splits import DatasetInput
    from cortex_dask.io.planning.items import encode_items
    from cortex_dask.io.planning.samples import enqueue
    from cortex_dask.io.store.store import Store

    given = [{"id": number, "url": f"s3://bucket/images/{number:09d}.jpg"} for number in range(items)]
    before = peak_memory()
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="cortex-dask-scale-") as folder:
        store = Store(folder)
        encoded = encode_items(given, BATCH)
        encoded.write(store)
        written = time.perf_counter() - began
        settings = JobSettings(
            job_id="20260101-000000-5ca1ab",
            api_name="scale",
            api_id="scale-1",
            created_time="2026-01-01T00:00:00.000+00:00",
            handler=HandlerSettings("class"),
            dataset=DatasetInput((), batch_size=BATCH),
            samples=SampleInput("item_list", items=encoded.count, digest=encoded.digest, size=encoded.size),
            workers=WORKERS,
        )
        made = enqueue(store, settings)
    assert made.header.rows == items
    return {
        "seconds": {"encode and write": written, "plan": time.perf_counter() - began - written},
        "MiB": round(encoded.size / MIB),
        "splits": len(made.splits),
        "memory": {"before": before, "peak": peak_memory()},
    }


def make_jobs(url: str, count: int) -> Answer:
    """Write the directories of so many jobs that have ended."""
    from concurrent.futures import ThreadPoolExecutor
    from datetime import UTC, datetime, timedelta

    from cortex_dask.io.job.directory import JobDirectory
    from cortex_dask.io.job.settings import HandlerSettings, JobSettings
    from cortex_dask.io.job.splits import DatasetInput
    from cortex_dask.runtime.coordinator.status_board import StatusBoard

    def make(number: int) -> None:
        created = datetime(2026, 1, 1, tzinfo=UTC) + timedelta(minutes=number)
        job_id = f"{created:%Y%m%d-%H%M%S}-{number:06x}"
        settings = JobSettings(
            job_id=job_id,
            api_name="scale",
            api_id="scale-1",
            created_time=created.isoformat(timespec="milliseconds"),
            handler=HandlerSettings("class"),
            dataset=DatasetInput(("s3://bucket/in/",), batch_size=BATCH),
        )
        directory = JobDirectory(f"{url}/jobs/scale/{job_id}")
        directory.create(settings)
        board = StatusBoard(settings)
        board.end("succeeded")
        directory.write_json("status.json", board.document())

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(make, range(count)))
    return {}


def find_jobs(url: str, what: str) -> Answer:
    """Find jobs as users do."""
    import cortex_dask
    from cortex_dask.client import Client
    from cortex_dask.environments import Environment

    client = Client(Environment("scale", store=url))
    connect(url)
    calls: dict[str, Callable[[], Any]] = {
        "latest": lambda: client.get_job("scale", "latest").job_id,
        "prefix": lambda: client.get_job("scale", "20260101-000500").job_id,
        "whole id": lambda: client.get_job("scale", "20260101-000500-000005").job_id,
        "list": lambda: len(client.list_jobs("scale")),
        "describe": lambda: len(client.describe_jobs()),
    }
    assert cortex_dask.Client is Client
    began, cpu = time.perf_counter(), time.process_time()
    found = calls[what]()
    return {
        "seconds": {what: time.perf_counter() - began},
        "cpu": time.process_time() - cpu,
        "found": found,
        "memory": {"peak": peak_memory()},
    }


def make_giant(path: str, gib: int) -> Answer:
    """Write the footer of a Parquet file of so many GiB, behind a hole."""
    import io

    import pyarrow as pa
    import pyarrow.parquet as pq

    buffer = io.BytesIO()
    table = pa.table({"x": pa.nulls(1 << 20, pa.int64()).fill_null(0)})
    pq.write_table(table, buffer, use_dictionary=False, compression="zstd", row_group_size=1 << 20)
    buffer.seek(0)
    one, whole = pq.read_metadata(buffer), pq.read_metadata(buffer)
    for _ in range(gib * GIB // one.row_group(0).total_byte_size - 1):
        whole.append_row_groups(one)
    footer = io.BytesIO()
    whole.write_metadata_file(footer)
    with open(path, "wb") as file:
        file.write(b"PAR1")
        file.seek(gib * GIB)
        file.write(footer.getvalue()[4:])
    return {}


TASKS: dict[str, Callable[..., Answer]] = {
    function.__name__: function
    for function in (
        plan_files,
        read_files,
        count_lines,
        make_giant,
        plan_one_file,
        encode_list,
        make_jobs,
        find_jobs,
    )
}


def peak_memory() -> int:
    """Return the most memory that this process ever had, in MiB."""
    status = Path("/proc/self/status")
    if status.exists():  # what getrusage tells includes the process that this one was forked from
        return int(status.read_text().partition("VmHWM:")[2].split()[0]) // 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // MIB


def connect(url: str) -> None:
    """Import and connect what a URL needs, before the clock starts."""
    if "://" in url:
        from fsspec.core import url_to_fs

        fs, _ = url_to_fs(url)
        fs.exists(f"{url.split('/')[2]}/nothing")
        import pandas  # noqa: F401 - pyarrow imports it at its leisure
        import pyarrow.parquet  # noqa: F401


def register_lines(size: int) -> None:
    """Teach fsspec a file system of one file: the same line again and again, made when it is asked for."""
    import fsspec
    from fsspec.spec import AbstractBufferedFile, AbstractFileSystem

    block = LINE * (16 * MIB // len(LINE) + 2)

    class MadeUp(AbstractFileSystem):  # type: ignore[misc]  # fsspec has no types
        protocol = "madeup"
        cachable = True

        def info(self, path: str, **_: Any) -> dict[str, Any]:
            name = self._strip_protocol(path)
            if name in ("", "/"):
                return {"name": "", "size": 0, "type": "directory"}
            return {"name": name, "size": size, "type": "file", "ETag": "1"}

        def ls(self, path: str, detail: bool = True, **_: Any) -> list[Any]:
            entry = self.info("all.jsonl")
            return [entry] if detail else [entry["name"]]

        def _open(self, path: str, mode: str = "rb", **options: Any) -> Any:
            return MadeUpFile(self, path, mode, size=size, **options)

        def cat_file(self, path: str, start: int | None = None, end: int | None = None, **_: Any) -> bytes:
            return made_up(start or 0, size if end is None else end)

    class MadeUpFile(AbstractBufferedFile):  # type: ignore[misc]
        def _fetch_range(self, start: int, end: int) -> bytes:
            return made_up(start, end)

    def made_up(start: int, stop: int) -> bytes:
        at, count = start % len(LINE), min(stop, size) - start
        if at + count <= len(block):
            return block[at : at + count]
        return (LINE * (count // len(LINE) + 2))[at : at + count]

    fsspec.register_implementation("madeup", MadeUp)


# the parent -----------------------------------------------------------------------------------------------------------


def measured(task: str, *arguments: Any, environment: dict[str, str] | None = None) -> Answer:
    """Run a task in a process of its own."""
    paths = [str(HERE.parent), os.environ.get("PYTHONPATH", "")]
    variables = {**os.environ, **(environment or {}), "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    command = [sys.executable, __file__, "--child", task, json.dumps(arguments)]
    done = subprocess.run(command, env=variables, stdout=subprocess.PIPE, check=True)
    answer: Answer = json.loads(done.stdout)
    return answer


def show(label: str, answer: Answer, **more: Any) -> None:
    seconds = ", ".join(f"{name} {value:.2f} s" for name, value in answer.pop("seconds").items())
    memory = ", ".join(f"{name} {value} MiB" for name, value in answer.pop("memory").items())
    cpu = f"CPU {answer.pop('cpu'):.1f} s; " if "cpu" in answer else ""
    rest = "; ".join(f"{name}: {value}" for name, value in {**answer, **more}.items())
    print(f"{label}: {seconds}; {cpu}memory {memory}; {rest}", flush=True)


def files_on_s3(counts: list[int], latency: float) -> None:
    """Plan more and more files on S3, and read one split of them."""
    with S3Process(latency) as server:
        for count in counts:
            url = f"s3://bucket/files-{count}/"
            server.copy(url + "part-{:06d}.parquet", count, tiny_file())
            with tempfile.TemporaryDirectory(prefix="cortex-dask-scale-") as folder:
                server.counts()
                answer = measured("plan_files", url, folder, environment=server.environment)
                show(f"S3, {count:,} files", answer, requests=server.counts(), note="listed twice, connected once")
                answer = measured("read_files", url, folder, environment=server.environment)
                show(f"S3, one split of {count:,} files", answer, requests=server.counts())


def files_on_disk(counts: list[int]) -> None:
    """Plan more and more local files."""
    with tempfile.TemporaryDirectory(prefix="cortex-dask-scale-") as folder:
        for count in counts:
            place = Path(folder, f"files-{count}")
            place.mkdir()
            data = tiny_file()
            for number in range(count):
                (place / f"part-{number:06d}.parquet").write_bytes(data)
            plan = f"{folder}/plan-{count}"
            show(f"local, {count:,} files", measured("plan_files", str(place), plan))
            show(f"local, one split of {count:,} files", measured("read_files", str(place), plan))


def jobs(count: int, latency: float) -> None:
    """Find jobs among many, locally and on S3."""
    with tempfile.TemporaryDirectory(prefix="cortex-dask-scale-") as folder, S3Process(latency) as server:
        for label, url in (("local", folder), ("S3", "s3://bucket/store")):
            measured("make_jobs", url, count, environment=server.environment)
            for what in ("latest", "prefix", "whole id", "list", "describe"):
                server.counts()
                answer = measured("find_jobs", url, what, environment=server.environment)
                show(
                    f"{label}, {what} of {count:,} jobs",
                    answer,
                    **({"requests": server.counts()} if label == "S3" else {}),
                )


def one_file(gib: int) -> None:
    """Plan one Parquet file of so many GiB, in row groups of 8 MiB: a real footer behind a hole."""
    with tempfile.TemporaryDirectory(prefix="cortex-dask-scale-") as folder:
        path = Path(folder, "giant.parquet")
        path.write_bytes(b"")
        measured("make_giant", str(path), gib)
        show(f"one Parquet file of {path.stat().st_size / GIB:.0f} GiB", measured("plan_one_file", str(path)))


def tiny_file() -> bytes:
    """Return a Parquet file of a few rows, made elsewhere: this process stays small."""
    make = (
        "import io, sys, pyarrow as pa, pyarrow.parquet as pq; b = io.BytesIO(); n = int(sys.argv[1]);"
        "pq.write_table(pa.table({'id': range(n), 'x': [0.5] * n, 'text': ['some text'] * n}), b);"
        "sys.stdout.buffer.write(b.getvalue())"
    )
    return subprocess.run([sys.executable, "-c", make, str(ROWS)], stdout=subprocess.PIPE, check=True).stdout


def sizes(most: int) -> Iterator[int]:
    """Yield 1,000, 10,000 … up to what was asked for."""
    at = 1000
    while at < most:
        yield at
        at *= 10
    yield most


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, metavar="N", help="Parquet files")
    parser.add_argument("--s3", action="store_true", help="only on S3")
    parser.add_argument("--local", action="store_true", help="only on the local disk")
    parser.add_argument("--lines", type=int, metavar="GIB", help="size of a delimited file")
    parser.add_argument("--one-file", type=int, metavar="GIB", help="size of a Parquet file")
    parser.add_argument("--items", type=int, metavar="N", help="items of an item_list")
    parser.add_argument("--jobs", type=int, metavar="N", help="jobs to find one among")
    parser.add_argument("--latency", type=float, default=0.02, metavar="SECONDS", help="of a request to S3")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        task, arguments = given.child
        with contextlib.redirect_stdout(sys.stderr):
            answer = TASKS[task](*json.loads(arguments))
        print(json.dumps(answer))
        return 0
    if not any((given.files, given.lines, given.one_file, given.items, given.jobs)):
        given.files, given.lines, given.one_file, given.items, given.jobs = 10_000, 4, 50, 100_000, 500
    if given.files and (given.s3 or not given.local):
        files_on_s3(list(sizes(given.files)), given.latency)
    if given.files and (given.local or not given.s3):
        files_on_disk(list(sizes(given.files)))
    if given.lines:
        show(f"one file of lines, {given.lines} GiB", measured("count_lines", given.lines))
    if given.one_file:
        one_file(given.one_file)
    if given.items:
        show(f"item_list of {given.items:,}", measured("encode_list", given.items))
    if given.jobs:
        jobs(given.jobs, given.latency)
    return 0


if __name__ == "__main__":
    sys.exit(main())
