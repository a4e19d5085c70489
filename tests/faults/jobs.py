"""Small jobs with the faulty handler: input, job directory and output in one store, marks on the local disk."""

from __future__ import annotations

import io
import os
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import cloudpickle
import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from cortex_dask.errors import CortexDaskError
from cortex_dask.io.job.directory import JobDirectory
from cortex_dask.io.job.settings import (
    ClusterSettings,
    ComputeSettings,
    HandlerSettings,
    JobSettings,
    LimitSettings,
    OutputSettings,
)
from cortex_dask.io.job.splits import DatasetInput
from cortex_dask.io.store.store import Store
from cortex_dask.job import Job
from tests.faults.handlers import FaultyHandler
from tests.support.waiting import lives

__all__ = ["BATCH", "GROUP", "ROOT", "Call", "FaultJob", "make_input", "make_job"]

ROOT = str(Path(__file__).parents[2])
FILES, ROWS, GROUP, BATCH = 4, 500, 250, 50


def make_input(
    store: Store, *, format: Literal["parquet", "json"] = "parquet", files: int = FILES, start: int = 0
) -> dict[str, int]:
    """Write files with the ids from ``start`` on; returns the first id of each file, by URL."""
    firsts = {}
    for number in range(files):
        ids = range(start + number * ROWS, start + (number + 1) * ROWS)
        name = f"{number:02d}.{'parquet' if format == 'parquet' else 'jsonl'}"
        if format == "parquet":
            sink = io.BytesIO()
            table = pa.table({"id": ids, "text": [f"row {number}" for number in ids]})
            pq.write_table(table, sink, row_group_size=GROUP)
            data = sink.getvalue()
        else:
            data = b"".join(orjson.dumps({"id": number, "text": f"row {number}"}) + b"\n" for number in ids)
        store.write(name, data)
        firsts[f"{store.url}/{name}"] = ids[0]
    return firsts


@dataclass(frozen=True)
class Call:
    """A call of ``handle_batch``, as the handler noted it."""

    pid: int
    worker: int  # the parent's process id
    batch_id: str
    ids: tuple[int, ...]


@dataclass
class FaultJob:
    """A job, and what a check has to know of it."""

    url: str
    marks: Path
    firsts: dict[str, int]  # the first id of each input file
    rows: int = ROWS  # in each of them
    earlier: frozenset[int] = field(default_factory=frozenset)  # ids that the output had before
    cluster: Any = "local"

    @cached_property
    def directory(self) -> JobDirectory:
        return JobDirectory(self.url)

    @cached_property
    def settings(self) -> JobSettings:
        return self.directory.settings()

    @property
    def output(self) -> Store:
        assert self.settings.output is not None
        return Store(self.settings.output.url)

    @property
    def handle(self) -> Job:
        return Job(self.url, cluster=self.cluster)

    @property
    def ids(self) -> frozenset[int]:
        return frozenset(number for first in self.firsts.values() for number in range(first, first + self.rows))

    def run(self, **how: Any) -> dict[str, Any]:
        """Run the job in this process, or go on with it."""
        from cortex_dask.clusters import make_cluster
        from cortex_dask.runtime.coordinator.coordinator import run_job

        return run_job(self.url, make_cluster(how.pop("cluster", self.cluster)), **how)

    def try_to_run(self) -> dict[str, Any]:
        """Run the job, and return its status document even if the run ends with an error."""
        try:
            return self.run()
        except CortexDaskError:
            return self.status()

    def retry(self, **how: Any) -> dict[str, Any]:
        """Handle the dead letters again, in this process."""
        from cortex_dask.clusters import make_cluster
        from cortex_dask.runtime.coordinator.coordinator import retry_failed

        return retry_failed(self.url, make_cluster(how.pop("cluster", self.cluster)), **how)

    def status(self) -> dict[str, Any]:
        document: dict[str, Any] = self.directory.read_json("status.json")
        return document

    def calls(self) -> list[Call]:
        """Return the calls of ``handle_batch`` so far, in the order in which they began."""
        return [
            Call(int(pid), int(worker), batch_id, tuple(map(int, ids.split(","))))
            for pid, worker, batch_id, ids in (line.split(" ") for line in self._lines() if line != "complete")
        ]

    def completions(self) -> int:
        """Return how often ``on_job_complete`` was called."""
        return self._lines().count("complete")

    def _lines(self) -> list[str]:
        log = self.marks / "calls"
        text = log.read_text() if log.exists() else ""
        return text.split("\n")[:-1]  # a line counts when it is whole

    def mark(self, name: str) -> None:
        """Set a mark that the handler looks for."""
        (self.marks / name).touch()

    def segments(self) -> int:
        """Return how many segments the ledger has."""
        return len(self.directory.store.names("ledger/"))

    def handlers_gone(self) -> bool:
        """Whether no process that has handled a batch is left."""
        return not any(map(lives, {call.pid for call in self.calls()}))


def make_job(
    folder: str,
    marks: Path,
    *,
    source: Store | None = None,
    firsts: dict[str, int] | None = None,
    job_id: str | None = None,
    input_format: Literal["parquet", "json"] = "parquet",
    output_format: Literal["parquet", "json"] = "parquet",
    output: str | None = None,
    mode: Literal["error", "append", "overwrite"] = "error",
    files: int = FILES,
    start: int = 0,
    keep: bool | Sequence[str] = False,
    limits: LimitSettings | None = None,
    memory: int | None = None,
    gpu: float = 0.0,
    options: dict[str, Any] | None = None,
    workers: int = 2,
    batch_size: int = BATCH,
    earlier: frozenset[int] = frozenset(),
    cluster: Any = "local",
    **config: Any,
) -> FaultJob:
    """Make a job directory in a store's folder, with input beside it; further keywords are the handler's config."""
    job_id = job_id or f"job-{uuid.uuid4().hex[:8]}"
    marks.mkdir(parents=True, exist_ok=True)
    if source is None:
        source = Store(f"{folder}/in")
    if firsts is None:
        firsts = make_input(source, format=input_format, files=files, start=start)
    directory = JobDirectory(f"{folder}/jobs/faulty/{job_id}")
    settings = JobSettings(
        job_id=job_id,
        api_name="faulty",
        api_id="faulty-1",
        created_time="2026-01-31T12:00:00.000+00:00",
        handler=HandlerSettings("class", cwd=os.getcwd(), sys_path=(ROOT,)),
        dataset=DatasetInput((source.url,), batch_size=batch_size),
        batch_format="pyarrow" if input_format == "parquet" else "records",
        config={"marks": str(marks), **config},
        output=OutputSettings(
            output or f"{folder}/out",
            output_format,
            keep=tuple(keep) if isinstance(keep, (list, tuple)) else bool(keep),
            mode=mode,
        ),
        workers=workers,
        compute=ComputeSettings(memory=memory, gpu=gpu),
        cluster=ClusterSettings(cluster if isinstance(cluster, str) else "local", options or {}),
        limits=limits or LimitSettings(),
    )
    directory.store.write("handler.pkl", cloudpickle.dumps(FaultyHandler))
    directory.create(settings)
    return FaultJob(directory.url, marks, firsts, earlier=earlier, cluster=cluster)
