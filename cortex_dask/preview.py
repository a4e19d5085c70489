"""What a job would do: a dry run plans it and runs nothing; a sample runs its first batches here."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cortex_dask.display import SilentDisplay
from cortex_dask.errors import JobFailedError
from cortex_dask.formatting import align, count, duration, plural, rate, size
from cortex_dask.io.job.directory import JobDirectory
from cortex_dask.io.job.ledger import Ledger
from cortex_dask.io.job.settings import JobSettings, LimitSettings, OutputSettings
from cortex_dask.io.job.splits import Plan, Split
from cortex_dask.io.job.status import COMPLETE_STATUSES
from cortex_dask.io.store.store import Store
from cortex_dask.job import Job, create_directory
from cortex_dask.spec.resolution import ResolvedJob

if TYPE_CHECKING:
    import pyarrow as pa

_MOST_TABLE_ROWS = 20
_SAMPLE_ROWS = 5


@dataclass(frozen=True, slots=True)
class PlannedFile:
    """A file that would be read."""

    path: str
    rows: int | None  # that pass the filters; None: unknown until it is read
    bytes: int  # of the whole file


@dataclass(frozen=True, slots=True)
class DryRun:
    """What a job would read, in how many pieces, and what would travel to its workers."""

    api_name: str
    workers: int
    kind: str  # of the input: dataset, item_list, file_path_lister or delimited_files
    files: tuple[PlannedFile, ...]
    format: str
    splits: int
    batches: int
    batch_size: int
    rows: int
    exact: bool  # False: batches and rows are estimates
    bytes: int
    output: str | None
    project: tuple[tuple[str, int], ...]  # packed files and their sizes in bytes, the largest first
    warnings: tuple[str, ...]
    ignored: tuple[tuple[str, str], ...] = ()  # what is not packed, and why

    def to_json(self) -> dict[str, Any]:
        """Return the report as plain JSON values."""
        return asdict(self)

    def to_text(self) -> str:
        """Return the report as text."""
        about = "" if self.exact else "~"
        rows = "rows" if self.kind == "dataset" else "samples"
        source = f"{plural(len(self.files), 'file')}, {self.format}, {size(self.bytes)} to read"
        if self.kind != "dataset":
            source = self.kind if self.kind == "item_list" else f"{self.kind}, {plural(len(self.files), 'file')}"
        facts = [
            ("api", self.api_name),
            ("input", source),
            (rows, f"{about}{count(self.rows)}"),
            ("batches", f"{about}{count(self.batches)} of up to {count(self.batch_size)} {rows}"),
            ("splits", f"{count(self.splits)} for {plural(self.workers, 'worker')}"),
            ("output", self.output or "none"),
            ("project", f"{plural(len(self.project), 'file')}, {size(sum(length for _, length in self.project))}"),
        ]
        lines = [f"{name:<9}{value}" for name, value in facts]
        files = [(file.path, "?" if file.rows is None else count(file.rows), size(file.bytes)) for file in self.files]
        if files:
            lines += ["", f"input files (path, {rows}, size)", *_table(files)]
        if self.project:
            lines += [
                "",
                "project files (path, size)",
                *_table([(name, size(length)) for name, length in self.project]),
            ]
        if self.ignored:
            lines += ["", "left out of the project (path, reason)", *_table(self.ignored)]
        lines += [f"warning: {warning}" for warning in self.warnings]
        return "\n".join([*lines, "", "Nothing was run and nothing was written."])


@dataclass(frozen=True, slots=True)
class SampleReport:
    """The result of the first batches of a job, and a projection for all of them."""

    batches: int
    rows_in: int
    rows_out: int
    failures: tuple[str, ...]  # one line for each batch that failed
    traceback: str | None  # of the first of those
    schema: tuple[tuple[str, str], ...]  # columns of the output and their types
    first_rows: tuple[dict[str, Any], ...]
    seconds: float  # reading, handling and writing
    start_seconds: float  # everything else: starting the process and loading the handler
    rows_per_second: float  # of one worker
    projected_seconds: float | None  # for the whole job with its workers; None: nothing was measured
    total_rows: int
    exact: bool  # False: total_rows is an estimate
    workers: int

    def to_json(self) -> dict[str, Any]:
        """Return the report as plain JSON values."""
        return asdict(self)

    def to_text(self) -> str:
        """Return the report as text."""
        lines = [f"{count(self.batches)} batches: {count(self.rows_in)} rows in, {count(self.rows_out)} rows out"]
        lines += [f"failed: {line}" for line in self.failures]
        if self.traceback:
            lines += ["", self.traceback.rstrip()]
        if self.schema:
            lines += ["", "output schema", *_table([(name, kind) for name, kind in self.schema])]
            rows = [[_cell_text(row[name]) for name, _ in self.schema] for row in self.first_rows]
            lines += ["", "first rows", *_table([[name for name, _ in self.schema], *rows])]
        else:
            lines += ["", "the handler returned no rows"]
        lines += ["", f"{rate(self.rows_per_second)} with one worker, after {duration(self.start_seconds)} to start"]
        if self.projected_seconds is not None:
            about = "" if self.exact else "~"
            lines.append(
                f"about {duration(self.projected_seconds)} for all {about}{count(self.total_rows)} rows "
                f"with {plural(self.workers, 'worker')}"
            )
        return "\n".join([*lines, "Nothing was written to the output."])


def dry_run(resolved: ResolvedJob) -> DryRun:
    """Plan a job; nothing is run and nothing is written."""
    settings, archive = resolved.settings, resolved.archive
    report = _rows_report(settings) if settings.samples is None else _samples_report(settings)
    return replace(
        report,
        output=None if settings.output is None else settings.output.url,
        project=() if archive is None else tuple((file.shown, file.size) for file in archive.by_size),
        ignored=() if archive is None else tuple((entry.shown, entry.reason) for entry in archive.ignored),
        warnings=(*report.warnings, *_output_warnings(settings.output), *resolved.warnings),
    )


def _rows_report(settings: JobSettings) -> DryRun:
    """Return the report on a dataset."""
    planned = _planned(settings)
    header = planned.header
    return DryRun(
        api_name=settings.api_name,
        workers=settings.workers,
        kind="dataset",
        files=_input_files(planned),
        format=header.format,
        splits=header.splits,
        batches=header.batches,
        batch_size=header.batch_size,
        rows=header.rows,
        exact=header.batches_exact,
        bytes=header.bytes,
        output=None,
        project=(),
        warnings=header.warnings,
    )


def _samples_report(settings: JobSettings) -> DryRun:
    """Return the report on an input of samples."""
    from cortex_dask.io.planning.samples import survey  # imports pyarrow

    assert settings.samples is not None
    found = survey(settings)
    return DryRun(
        api_name=settings.api_name,
        workers=settings.workers,
        kind=settings.samples.kind,
        files=tuple(PlannedFile(file.path, samples, file.size) for file, samples in found.files),
        format="json",
        splits=found.splits,
        batches=found.batches,
        batch_size=settings.dataset.batch_size,
        rows=found.samples,
        exact=True,
        bytes=found.bytes,
        output=None,
        project=(),
        warnings=found.warnings,
    )


def _input_files(planned: Plan) -> tuple[PlannedFile, ...]:
    files: dict[str, PlannedFile] = {}
    for split in planned:
        for piece in split.pieces:
            known = files.get(piece.path, PlannedFile(piece.path, 0, piece.size))
            rows = None if known.rows is None or piece.rows is None else known.rows + piece.rows
            files[piece.path] = replace(known, rows=rows)
    return tuple(files.values())


def _output_warnings(output: OutputSettings | None) -> list[str]:
    if output is None or output.mode != "error" or not Store(output.url).names():
        return []
    return [f"the output {output.url} holds data already: the job would be refused without mode append or overwrite"]


def run_sample(resolved: ResolvedJob, batches: int) -> SampleReport:
    """Run the first batches of a job here, in one handler process, with a temporary output directory."""
    settings = resolved.settings
    planned = _planned(settings) if settings.samples is None else None
    with tempfile.TemporaryDirectory(prefix="cortex-dask-sample-") as folder:
        sample = replace(resolved, settings=_sample_settings(settings, Path(folder)))
        directory = JobDirectory(str(Path(folder) / "job"))
        create_directory(directory, sample)
        if planned is None:
            from cortex_dask.io.planning.samples import enqueue  # imports pyarrow

            planned = enqueue(directory.store, settings)
        chosen = first_batches(planned, batches)
        header = replace(planned.header, splits=len(chosen), batches=batches, batches_exact=False)
        directory.write_plan(header, chosen)
        started = time.perf_counter()
        job = Job(directory.url, cluster="local").start()
        job.watch(SilentDisplay())
        elapsed = time.perf_counter() - started
        document = job.describe()
        if document["status"] not in COMPLETE_STATUSES:
            # without the commands of other messages: the job directory is deleted
            reason = f"the sample ended with the status {document['status']!r}: {document['status_reason']}"
            raise JobFailedError(reason, status=document["status"])
        return _report(job, planned, elapsed, workers=settings.workers)


def _planned(settings: JobSettings) -> Plan:
    from cortex_dask.io.planning.plan import plan  # imports pyarrow

    return plan(settings.dataset, workers=settings.workers, keep=settings.kept)


def _sample_settings(settings: JobSettings, folder: Path) -> JobSettings:
    """Return the settings with an output in a folder, one worker, and no limits that would end the sample early."""
    output = None
    if settings.output is not None:
        output = replace(settings.output, url=str(folder / "output"), mode="error")
    return replace(settings, output=output, workers=1, limits=LimitSettings(max_attempts=1))


def first_batches(planned: Plan, batches: int) -> list[Split]:
    """Return splits with the first batches of a plan, numbered from 0."""
    chosen: list[Split] = []
    left = batches
    for split in planned:
        if left <= 0:
            break
        # A split of unknown length is asked for all that are left, and runs those that it has.
        count_here = left if split.batches is None else min(left, split.batches)
        chosen.append(replace(split, batches=count_here, only=tuple(range(count_here))))
        left -= count_here
    return chosen


def _report(job: Job, planned: Plan, elapsed: float, *, workers: int) -> SampleReport:
    records = list(Ledger(JobDirectory(job.url).store).records())
    rows_in = sum(record.rows_in for record in records)
    seconds = sum(record.seconds for record in records)
    speed = rows_in / seconds if seconds > 0 else 0.0
    start = max(elapsed - seconds, 0.0)
    total = planned.header.rows
    table: pa.Table | None = None if job.settings.output is None else job.to_arrow()
    failures = [failure for record in records for failure in record.failures]
    return SampleReport(
        batches=sum(record.batches for record in records),
        rows_in=rows_in,
        rows_out=sum(record.rows_out for record in records),
        failures=tuple(f"batch {failure.batch_id}: {failure.cause}: {failure.error}" for failure in failures),
        traceback=next((str(text) for text in job.failures()["traceback"].dropna()), None),
        schema=() if table is None else tuple((field.name, str(field.type)) for field in table.schema),
        first_rows=() if table is None else tuple(table.slice(0, _SAMPLE_ROWS).to_pylist()),
        seconds=seconds,
        start_seconds=start,
        rows_per_second=speed,
        projected_seconds=start + total / speed / workers if speed else None,
        total_rows=total,
        exact=planned.header.batches_exact,
        workers=workers,
    )


def _cell_text(value: Any) -> str:
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 40 else f"{text[:39]}…"


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return rows as indented lines; the end of a long table is left out."""
    lines = [f"  {'  '.join(cells).rstrip()}" for cells in align(rows[:_MOST_TABLE_ROWS])]
    return [*lines, f"  and {count(len(rows) - len(lines))} more"] if len(rows) > len(lines) else lines
