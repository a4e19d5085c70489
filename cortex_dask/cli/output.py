"""Documents, tables and displays on the terminal: results on standard output, all else on standard error."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import click

from cortex_dask.cli.exit_codes import exit_code
from cortex_dask.formatting import align, count, duration, moment

if TYPE_CHECKING:
    from cortex_dask.display import Display
    from cortex_dask.job import Job

# Commands import our modules when they run, so that --help and completion start quickly.

_COLOURS = {
    "succeeded": "green",
    "completed with failures": "yellow",
    "running": "blue",
    "enqueuing": "blue",
    "stopped": None,
}


def json_text(value: Any) -> str:
    """Return a value as indented JSON."""
    import orjson

    return orjson.dumps(value, option=orjson.OPT_INDENT_2 | orjson.OPT_NON_STR_KEYS, default=str).decode()


def warning(text: str) -> None:
    """Show a warning."""
    click.echo(f"Warning: {text}", err=True)


def progress_display(output_format: str, environment: str | None) -> Display:
    """Return a command's display: progress on standard error; the summary on standard output unless JSON goes there."""
    from cortex_dask.display import choose

    return choose(sys.stderr, final=sys.stderr if output_format == "json" else sys.stdout, environment=environment)


def finish_job(job: Job, display: Display, output_format: str) -> NoReturn:
    """Show a job until it has ended, and exit with the code for its status."""
    from cortex_dask.client import watch_job
    from cortex_dask.io.job.status import FINAL_STATUSES

    def announce_stop() -> None:
        click.echo("Stopping the job; interrupt again to kill it.", err=True)

    try:
        document = watch_job(job, display, on_interrupt=announce_stop)
    except KeyboardInterrupt:
        document = job.describe()
        if document["status"] not in FINAL_STATUSES:
            stop = f"cortex-dask stop {job.api_name} {job.job_id}"
            click.echo(f"Another process runs the job, and it goes on. Stop it with: {stop}", err=True)
            raise
        display.finish(document)
    if output_format == "json":
        click.echo(json_text(document))
    click.get_current_context().exit(exit_code(str(document["status"])))


def job_table(documents: Sequence[dict[str, Any]]) -> str:
    """Return one line for each job: API, job, status, batches, failed, rows, started, took."""
    from cortex_dask.io.job.status import Progress

    rows = [["API", "JOB", "STATUS", "BATCHES", "FAILED", "ROWS", "STARTED", "TOOK"]]
    for document in documents:
        progress = Progress.from_status(document)
        rows.append(
            [
                str(document["api_name"]),
                str(document["job_id"]),
                f"{progress.status} (no coordinator)" if document.get("abandoned") else progress.status,
                progress.batches_words().removesuffix(" batches"),
                count(progress.failed_batches),
                count(progress.rows_in),
                moment(document.get("start_time")),
                duration(progress.seconds),
            ]
        )
    heading, *lines = align(rows)
    for cells in lines:
        cells[2] = click.style(cells[2], fg=_COLOURS.get(cells[2].rstrip(), "red"))
    return "\n".join("  ".join(cells).rstrip() for cells in (heading, *lines))
