"""``cortex-dask submit``: run a job, or preview what it would do."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from cortex_dask.cli import options
from cortex_dask.cli.exit_codes import interruptible
from cortex_dask.cli.output import finish_job, json_text, progress_display, warning

if TYPE_CHECKING:
    from cortex_dask.spec.resolution import ResolvedJob

# Commands import our modules when they run, so that --help and completion start quickly.

_BATCH_FORMATS = click.Choice(["pandas", "pyarrow", "polars", "numpy", "records"])
_MODES = click.Choice(["error", "append", "overwrite"])
_FORMATS = click.Choice(["auto", "parquet", "json"])


@click.command()
@click.argument("target", metavar="TARGET")
@click.option(
    "--input", "inputs", multiple=True, metavar="URL", help="A file, directory or glob; may be given several times."
)
@click.option("--output", metavar="URL", help="The output directory.")
@click.option(
    "--job", metavar="FILE", help="A submission in JSON or YAML, - for standard input; other options go over it."
)
@click.option(
    "--workers",
    metavar="N|MIN-MAX",
    help="Handler processes that run at the same time; 0-20: as there is work for them.",
)
@click.option("--batch-size", type=int, metavar="N", help="Rows in a batch.")
@click.option("--batch-format", type=_BATCH_FORMATS, help="What the handler gets; pandas by default.")
@click.option("--columns", metavar="A,B", help="Read only these columns.")
@click.option(
    "--filter",
    "comparisons",
    multiple=True,
    metavar="TEXT",
    help='Read only matching rows, e.g. "x > 5"; all must hold.',
)
@click.option("--keep", metavar="all|A,B", help="Input columns that are written beside the returned ones.")
@click.option("--mode", type=_MODES, help="What to do when the output holds data already; error by default.")
@click.option(
    "--config", "configs", multiple=True, metavar="KEY=VALUE", help="Overrides handler.config; also JSON, or @file."
)
@click.option("--timeout", type=float, metavar="SECONDS", help="For the whole job.")
@click.option("--batch-timeout", type=float, metavar="SECONDS", help="For one batch.")
@click.option("--stall-timeout", type=float, metavar="SECONDS", help="For a split without any progress.")
@click.option("--max-attempts", type=int, metavar="N", help="How often a batch is tried.")
@click.option("--max-failed-batches", metavar="N|P%", help="Stop early when more batches fail for good.")
@options.cluster
@click.option("--job-id", metavar="ID", help="The same id again attaches to the job, resumes it, or shows it.")
@click.option("--api", metavar="NAME", help="Which API, when TARGET has several.")
@click.option("--format", "input_format", type=_FORMATS, help="The input's format; by its names by default.")
@options.environment
@options.output_format
@click.option(
    "-d/-w",
    "--detach/--wait",
    "detach",
    default=False,
    help="Return at once, and let the job run by itself, on the cluster's scheduler; or wait for it (the default).",
)
@click.option("--dry-run", is_flag=True, help="List files, splits, batches and bytes; run and write nothing.")
@click.option(
    "--sample", type=click.IntRange(min=1), metavar="N", help="Run N batches here, show what comes out, write nothing."
)
def submit(
    target: str,
    inputs: tuple[str, ...],
    output: str | None,
    columns: str | None,
    comparisons: tuple[str, ...],
    keep: str | None,
    configs: tuple[str, ...],
    max_failed_batches: str | None,
    cluster: str | None,
    cluster_option: tuple[str, ...],
    input_format: str | None,
    env: str | None,
    output_format: str,
    detach: bool,
    dry_run: bool,
    sample: int | None,
    **unparsed: Any,
) -> None:
    """Run a job and wait for it.

    TARGET is a project directory, its cortex.yaml, or the name of a deployed API (a project directory of that name in
    the working directory comes first). The input is --input, or in the file of --job one of
    dataset, item_list, file_path_lister and delimited_files.

    Ctrl-C (or SIGTERM) stops the job in good order: what is finished is kept, and the job can be resumed. A second one
    kills it.
    """
    given = {
        **unparsed,
        **submission(
            columns=columns,
            comparisons=comparisons,
            keep=keep,
            configs=configs,
            max_failed_batches=max_failed_batches,
            input_format=input_format,
            cluster_option=cluster_option,
        ),
    }
    if dry_run and sample is not None:
        raise click.UsageError(
            "--dry-run and --sample exclude each other: the first runs nothing, the second runs some batches"
        )
    from cortex_dask.client import Client
    from cortex_dask.display import SilentDisplay, summary

    client = Client(env)
    resolved = client.resolve(target, list(inputs) or None, output, given)  # type: ignore[arg-type]  # click made the keys
    if sample is not None or dry_run or resolved.dry_run:
        _preview(resolved, sample, output_format)
        return
    if detach:
        job = client.start(resolved, cluster=cluster, display=SilentDisplay(), warn=warning, detach=True)
        document = job.describe()
        click.echo(json_text(document) if output_format == "json" else summary(document, environment=env))
        return
    display = progress_display(output_format, env)
    with interruptible():
        job = client.start(resolved, cluster=cluster, display=display, warn=warning)
        finish_job(job, display, output_format)


def submission(
    *,
    columns: str | None,
    comparisons: tuple[str, ...],
    keep: str | None,
    configs: tuple[str, ...],
    max_failed_batches: str | None,
    input_format: str | None,
    cluster_option: tuple[str, ...],
) -> dict[str, Any]:
    """Return the keys of a submission whose options have texts to parse."""
    return {
        "columns": options.columns(columns),
        "filters": options.filters(comparisons),
        "keep": options.keep(keep),
        "config": options.config(configs),
        "max_failed_batches": options.max_failed(max_failed_batches),
        "format": input_format,
        "cluster_options": options.cluster_options(cluster_option),
    }


def _preview(resolved: ResolvedJob, count: int | None, output_format: str) -> None:
    from cortex_dask import preview

    report = preview.dry_run(resolved) if count is None else preview.run_sample(resolved, count)
    click.echo(json_text(report.to_json()) if output_format == "json" else report.to_text())
