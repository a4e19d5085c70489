"""``cortex-dask clusters``: list the clusters that were started for jobs, and end those that no job needs."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from cortex_dask.cli import options
from cortex_dask.cli.output import json_text, warning
from cortex_dask.formatting import duration, table

if TYPE_CHECKING:
    from cortex_dask.clusters.records import RunningCluster


# Commands import our modules when they run, so that --help and completion start quickly.


@click.group()
def clusters() -> None:
    """Show the clusters that were started for jobs, and end those that no job needs."""


@clusters.command(name="list")
@options.environment
@options.output_format
def list_(env: str | None, output_format: str) -> None:
    """List the clusters that run for the jobs of an environment."""
    from cortex_dask import environments
    from cortex_dask.clusters import inventory

    environment = environments.current(env)
    found, problems = inventory.find_clusters(environment)
    for problem in problems:
        warning(problem)
    if output_format == "json":
        click.echo(json_text([cluster.to_json() for cluster in found]))
        return
    click.echo(_table(found) if found else f"No clusters run for jobs of the environment {environment.name}.")


@clusters.command()
@click.option("--dry-run", is_flag=True, help="Only show what would be ended.")
@options.environment
@options.output_format
def gc(dry_run: bool, env: str | None, output_format: str) -> None:
    """End the clusters whose jobs have ended, or have no coordinator any more.

    Such a job can be resumed, on a new cluster.
    """
    from cortex_dask import environments
    from cortex_dask.clusters import inventory

    environment = environments.current(env)
    found, problems = inventory.find_clusters(environment)
    for problem in problems:
        warning(problem)
    idle = [cluster for cluster in found if not cluster.is_needed]
    ended = idle if dry_run else inventory.end_clusters(environment, idle)
    if output_format == "json":
        click.echo(json_text([cluster.to_json() for cluster in ended]))
        return
    word = "would be ended" if dry_run else "ended"
    click.echo(f"{_table(ended)}\n" if ended else "", nl=False)
    kept = len(found) - len(ended)
    click.echo(f"{len(ended)} {word}; {kept} {'runs' if kept == 1 else 'run'} for jobs that go on.")


def _table(found: Sequence[RunningCluster]) -> str:
    rows = [("CLUSTER", "BACKEND", "WHERE", "API", "JOB", "STATUS", "AGE")]
    for cluster in found:
        age = "-" if cluster.created_time is None else duration(max(time.time() - cluster.created_time, 0))
        job = (cluster.api_name or "-", cluster.job_id or "-", cluster.status or "unknown here")
        rows.append((cluster.name, cluster.backend, cluster.where, *job, age))
    return table(rows)
