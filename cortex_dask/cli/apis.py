"""``cortex-dask deploy`` and ``delete``: APIs that jobs can be submitted to by name."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from cortex_dask.cli import options
from cortex_dask.cli.output import json_text, warning
from cortex_dask.formatting import moment, plural, table

if TYPE_CHECKING:
    from cortex_dask.deployments import DeployedApi
    from cortex_dask.project.archive import Archive

# Commands import our modules when they run, so that --help and completion start quickly.

_yes = click.option("-y", "--yes", is_flag=True, help="Do not ask.")


@click.command()
@click.argument("file", metavar="[FILE]", default=".")
@click.option("--dry-run", is_flag=True, help="Check and pack everything, show what is packed, deploy nothing.")
@_yes
@options.environment
@options.output_format
def deploy(file: str, dry_run: bool, yes: bool, env: str | None, output_format: str) -> None:
    """Deploy the APIs of FILE, a cortex.yaml or the directory of one; the same again changes nothing.

    Shows what is packed: how many files and bytes, the largest files, and what is left out and why. Jobs are submitted
    to a deployed API by its name, from any machine that reaches the environment's store.
    """
    from cortex_dask.client import Client
    from cortex_dask.spec.target import find_apis, from_spec

    client = Client(env)
    path, apis = find_apis(file)
    targets = [(api, from_spec(api, path.parent, config_file=path.name)) for api in apis]
    archive = targets[0][1].archive  # the APIs of one file have one project
    assert archive is not None
    if output_format == "pretty":
        click.echo(archive.listing())
    for text in dict.fromkeys(text for _, target in targets for text in target.warnings):
        if text not in archive.warnings:  # the listing has those
            warning(text)
    if dry_run:
        if output_format == "json":
            click.echo(json_text({"project": _archive_document(archive), "apis": [api.name for api in apis]}))
        return
    if archive.warnings and not yes and sys.stdin.isatty():
        click.confirm("Deploy it all the same?", abort=True, err=True)
    results = [client.deployments.deploy_target(api, target) for api, target in targets]
    if output_format == "json":
        click.echo(json_text([{**mask_env(result), "project": _archive_document(archive)} for result in results]))
        return
    flag = f" -e {env}" if env else ""
    for result in results:
        spec = result["api"]["spec"]
        click.echo(f"{result['message']}, version {spec['id']}")
        click.echo(f"Submit a job with: cortex-dask submit {spec['name']}{flag} --input URL --output URL")


def _archive_document(archive: Archive) -> dict[str, Any]:
    return {
        "hash": archive.hash,
        "files": len(archive.files),
        "bytes": archive.size,
        "packed_bytes": len(archive.data),
        "largest": [{"name": file.name, "bytes": file.size} for file in archive.largest],
        "ignored": [{"name": entry.name, "reason": entry.reason} for entry in archive.ignored],
        "warnings": list(archive.warnings),
    }


@click.command()
@options.api_argument
@click.argument("job_id", metavar="[JOB]", required=False)
@click.option("--keep-cache", is_flag=True, help="Keep the packed versions in the store.")
@_yes
@options.environment
def delete(api: str, job_id: str | None, keep_cache: bool, yes: bool, env: str | None) -> None:
    """Delete a deployed API and stop its jobs; with JOB, only stop that job.

    Jobs that have ended stay, with their logs and their output.
    """
    from cortex_dask.client import Client

    client = Client(env)
    if job_id is not None:
        job = client.get_job(api, job_id)
        job.stop()
        click.echo(f"The job {job.job_id} of {api}: {job.status}")
        return
    client.get_api(api)
    running = client.deployments.running_jobs(api)
    if running and not yes:
        _confirm(api, len(running))
    client.delete(api, keep_cache)
    stopped = f", and stopped {plural(len(running), 'job')}" if running else ""
    click.echo(f"deleted {api}{stopped}")


def _confirm(api: str, count: int) -> None:
    what = "1 job of it is running and is" if count == 1 else f"{count} jobs of it are running and are"
    if not sys.stdin.isatty():
        raise click.UsageError(f"{api} is not deleted: {what} to be stopped by that; say --yes if that is meant")
    click.confirm(f"{what[0].upper()}{what[1:]} stopped by that. Delete {api}?", abort=True, err=True)


def mask_env(document: dict[str, Any]) -> dict[str, Any]:
    """Return a document of an API without the values of ``handler.env``, which may be secrets."""
    if "api" in document:
        return {**document, "api": mask_env(document["api"])}
    handler = document["spec"].get("handler", {})
    if not handler.get("env"):
        return document
    hidden = {**handler, "env": dict.fromkeys(handler["env"], "…")}
    return {**document, "spec": {**document["spec"], "handler": hidden}}


def api_table(apis: Sequence[DeployedApi], jobs: Sequence[dict[str, Any]]) -> str:
    """Return one line for each deployed API, with the numbers of its jobs from all status documents."""
    from cortex_dask.io.job.status import FINAL_STATUSES

    rows = [["API", "VERSION", "UPDATED", "JOBS", "RUNNING"]]
    for api in apis:
        statuses = [job["status"] for job in jobs if job["api_name"] == api.name]
        running = sum(status not in FINAL_STATUSES for status in statuses)
        rows.append([api.name, api.api_id, moment(api.updated_time), str(len(statuses)), str(running)])
    return table(rows)


def api_summary(document: dict[str, Any], *, verbose: bool) -> str:
    """Return the facts about one deployed API, without its jobs."""
    spec = mask_env(document)["spec"]
    versions = document["api_versions"]
    lines = [
        f"api       {spec['name']} ({spec['kind']})",
        f"version   {spec['id']}, deployed {moment(document['updated_time'])}",
        f"place     {document['endpoint']}",
    ]
    shown = versions[1:] if verbose else versions[1:4]
    lines += [f"before    {version['api_id']}, deployed {moment(version['last_updated'])}" for version in shown]
    if len(versions) > 1 + len(shown):
        lines.append(f"          and {len(versions) - 1 - len(shown)} older versions (-v shows them)")
    if verbose:
        import yaml

        lines += ["", yaml.safe_dump(spec, sort_keys=False, allow_unicode=True).rstrip()]
    return "\n".join(lines)
