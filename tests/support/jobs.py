"""Jobs without a coordinator: a planned job directory whose splits a test runs itself."""

from __future__ import annotations

import uuid
from dataclasses import dataclass, field
from pathlib import Path
from textwrap import dedent
from typing import Any

import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from cortex_dask.io.job.directory import JobDirectory
from cortex_dask.io.job.logs import JobLogs
from cortex_dask.io.job.records import Outcome, SchemaProposed, SplitEvent, SplitRecord, SplitTask
from cortex_dask.io.job.settings import ComputeSettings, HandlerSettings, JobSettings, LimitSettings, OutputSettings
from cortex_dask.io.job.splits import DatasetInput, Split
from cortex_dask.io.planning.plan import plan
from cortex_dask.project.archive import pack
from cortex_dask.runtime.handler_process import inline
from cortex_dask.runtime.worker import slots, supervisor

HEADER = "from __future__ import annotations\nimport os, signal, sys, time\n"


@dataclass
class TestJob:
    """A planned job, and what its splits reported."""

    __test__ = False

    url: str
    directory: JobDirectory
    settings: JobSettings
    splits: list[Split]
    events: list[SplitEvent] = field(default_factory=list)

    def report(self, event: SplitEvent) -> None:
        """Take an event as a coordinator does: the first proposal settles the schema."""
        self.events.append(event)
        if isinstance(event, SchemaProposed):
            self.directory.settle_schema(event.schema)

    def run(self, number: int = 0, *, in_line: bool = False, schema: str | None = None) -> Outcome:
        """Run one split."""
        task = SplitTask(self.url, self.splits[number], 1, schema or self.directory.schema())
        return (inline if in_line else supervisor).run_split(task, self.report)

    def record(self, number: int = 0, **options: Any) -> SplitRecord:
        """Run one split that has to come to its end."""
        outcome = self.run(number, **options)
        assert outcome.kind == "done", outcome
        assert outcome.record is not None
        return outcome.record

    def rows(self, record: SplitRecord) -> list[dict[str, Any]]:
        """Return the rows of a record's part."""
        if record.part is None:
            return []
        assert self.settings.output is not None
        table = pq.read_table(Path(self.settings.output.url, record.part.staged))
        assert (table.num_rows, Path(self.settings.output.url, record.part.staged).stat().st_size) == (
            record.part.rows,
            record.part.bytes,
        )
        return table.to_pylist()

    def letters(self, record: SplitRecord) -> list[dict[str, Any]]:
        """Return the dead letters of a record."""
        if record.failures_file is None:
            return []
        return [orjson.loads(line) for line in self.directory.store.read(record.failures_file).splitlines()]

    def logs(self) -> list[dict[str, Any]]:
        """Return the log lines, once the job is closed."""
        return JobLogs(self.directory.store).lines()

    def staged(self) -> list[str]:
        """Return what lies in the output directory, hidden files as well."""
        assert self.settings.output is not None
        root = Path(self.settings.output.url)
        return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())

    def close(self) -> None:
        """End its processes."""
        slots.close_job(self.url)
        inline.close_job(self.url)


def make_job(
    folder: Path,
    handler: str | type,
    *,
    table: pa.Table | None = None,
    lines: bytes | None = None,
    rows: int = 100,
    batch_size: int = 10,
    batch_format: str = "records",
    output: dict[str, Any] | None = None,
    has_output: bool = True,
    limits: dict[str, Any] | None = None,
    compute: dict[str, Any] | None = None,
    files: dict[str, str] | None = None,
    where: dict[str, Any] | None = None,
    **settings: Any,
) -> TestJob:
    """Write an input and a job directory, and plan it as one split.

    Parameters
    ----------
    folder : Path
        Where everything goes.
    handler : str or type
        The body of ``class Handler`` (and what stands before it), or a class.
    table, lines
        The input; by default a table with the column ``n`` that counts ``rows`` rows.
    files : dict
        Further files of the project.
    where : dict
        Further settings of the handler's process.
    """
    folder = folder / f"job-{uuid.uuid4().hex[:6]}"
    (folder / "in").mkdir(parents=True)
    (folder / "out").mkdir()
    if lines is not None:
        (folder / "in" / "data.jsonl").write_bytes(lines)
    else:
        pq.write_table(table if table is not None else pa.table({"n": range(rows)}), folder / "in" / "data.parquet")
    directory = JobDirectory(str(folder / "job"))
    if isinstance(handler, str):
        project = folder / "project"
        project.mkdir()
        (project / "cortex.yaml").write_text("")
        (project / "handler.py").write_text(HEADER + dedent(handler))
        for name, text in (files or {}).items():
            (project / name).write_text(text)
        archive = pack(str(project), "cortex.yaml")
        directory.store.write(f"project/{archive.hash}.tar.gz", archive.data)
        source = HandlerSettings("project", path="handler.py", project=archive.hash, **(where or {}))
    else:
        import cloudpickle

        directory.store.write("handler.pkl", cloudpickle.dumps(handler))
        source = HandlerSettings("class", **(where or {}))
    dataset = DatasetInput((str(folder / "in"),), batch_size=batch_size)
    job_settings = JobSettings(
        job_id=folder.name,
        api_name="test",
        api_id="test-1",
        created_time="2026-01-01T00:00:00Z",
        handler=source,
        dataset=dataset,
        batch_format=batch_format,  # type: ignore[arg-type]
        output=OutputSettings(str(folder / "out"), **(output or {})) if has_output else None,
        limits=LimitSettings(**(limits or {})),
        compute=ComputeSettings(**(compute or {})),
        **settings,
    )
    directory.create(job_settings)
    planned = plan(dataset, workers=1)
    directory.write_plan(planned.header, planned)
    return TestJob(directory.url, directory, job_settings, [_joined(list(planned), batch_size)])


def _joined(splits: list[Split], batch_size: int) -> Split:
    """Make one split of all, however small pieces the planner makes of a small input."""
    pieces = tuple(piece for split in splits for piece in split.pieces)
    size = sum(split.bytes for split in splits)
    if any(split.rows is None for split in splits):
        return Split(0, pieces, None, None, size)
    rows = sum(split.rows or 0 for split in splits)
    return Split(0, pieces, rows, -(-rows // batch_size), size)
