"""``cortex-dask get``, ``logs``, ``stop``, ``resume``, ``retry``: jobs that exist, from any machine."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from cortex_dask.cli import options
from cortex_dask.cli.apis import api_summary, api_table, mask_env
from cortex_dask.cli.exit_codes import FAILED, interruptible
from cortex_dask.cli.output import finish_job, job_table, json_text, progress_display

if TYPE_CHECKING:
    from cortex_dask.client import Client
    from cortex_dask.job import Job

# Commands import our modules when they run, so that --help and completion start quickly.

_WATCH_SECONDS = 2.0


@click.command()
@click.argument("api", metavar="[API]", required=False)
@click.argument("job_id", metavar="[JOB]", required=False)
@click.option(
    "-w", "--watch", is_flag=True, help="Show again when something changes: one job until it ends, a list until Ctrl-C."
)
@click.option("-v", "--verbose", is_flag=True, help="Show configurations too; with -o json, APIs instead of jobs.")
@options.environment
@options.output_format
def get(api: str | None, job_id: str | None, watch: bool, verbose: bool, env: str | None, output_format: str) -> None:
    """Show all APIs and jobs, an API and its jobs, or one job.

    JOB is a job's id, the beginning of one, or "latest". With -o json: the status documents of jobs.
    """
    from cortex_dask.client import Client

    client = Client(env)
    if api is not None and job_id is not None:
        job = client.get_job(api, job_id)
        if watch:
            _watch_job(job, env, output_format)
        else:
            _show_job(client, job, env, output_format, verbose)
    elif watch:
        _repeat(lambda: _list(client, api, output_format, verbose))
    else:
        click.echo(_list(client, api, output_format, verbose))


def _list(client: Client, api: str | None, output_format: str, verbose: bool) -> str:
    if api is not None and client.deployments.is_deployed(api):
        return _list_api(client, api, output_format, verbose)
    if output_format == "json" and verbose and api is None:
        return json_text([mask_env(document) for document in client.list_apis()])
    documents = client.describe_jobs(api)
    if output_format == "json":
        return json_text([] if verbose else documents)
    deployed = client.deployments.list_apis() if api is None else []
    if not documents and not deployed:
        return f"No jobs in the environment {client.environment.name}. Submit one with: cortex-dask submit TARGET"
    tables = ([api_table(deployed, documents)] if deployed else []) + ([job_table(documents)] if documents else [])
    return "\n\n".join(tables)


def _list_api(client: Client, api: str, output_format: str, verbose: bool) -> str:
    document = client.get_api(api)
    jobs = document["batch_job_statuses"]
    if output_format == "json":
        return json_text([mask_env(document)] if verbose else jobs)
    flag = "" if client.environment.is_default else f" -e {client.environment.name}"
    hint = f"No jobs yet. Submit one with: cortex-dask submit {api}{flag} --input URL --output URL"
    return f"{api_summary(document, verbose=verbose)}\n\n{job_table(jobs) if jobs else hint}"


def _show_job(client: Client, job: Job, env: str | None, output_format: str, verbose: bool) -> None:
    from cortex_dask.display import summary

    document = job.describe()
    if not verbose:
        click.echo(json_text(document) if output_format == "json" else summary(document, environment=env))
        return
    spec = mask_env({"spec": client.deployments.spec(job.api_name, job.settings.api_id)})["spec"]
    if output_format == "json":
        click.echo(json_text({"api_spec": spec, "job_status": document, "endpoint": job.url}))
        return
    import yaml

    settings = {"config": job.settings.config, "limits": job.settings.to_json()["limits"], "api": spec}
    click.echo(f"{summary(document, environment=env)}\n")
    click.echo(yaml.safe_dump(settings, sort_keys=False, allow_unicode=True).rstrip())


def _watch_job(job: Job, env: str | None, output_format: str) -> None:
    with interruptible():
        document = job.watch(progress_display(output_format, env))
    if output_format == "json":
        click.echo(json_text(document))


def _repeat(text: Callable[[], str]) -> None:
    shown = None
    with interruptible():
        while True:
            now = text()
            if now != shown:
                click.clear()  # does nothing where the output is not a terminal
                click.echo(now)
                shown = now
            time.sleep(_WATCH_SECONDS)


@click.command()
@options.api_argument
@click.argument("job_id", metavar="[JOB]", default="latest")
@click.option("-f", "--follow", is_flag=True, help="Go on until the job has ended.")
@click.option("--level", metavar="LEVEL", help="The least important level: debug, info, warning, error or critical.")
@click.option("--batch", metavar="ID", help="Only this batch: its id, or the beginning of it.")
@click.option("--worker", metavar="ID", help="Only this worker: its id, or the beginning of it.")
@click.option("--since", metavar="WHEN", help="Nothing older: 90s, 10m, 2h, 1d, or a time.")
@options.environment
@options.output_format
def logs(
    api: str,
    job_id: str,
    follow: bool,
    level: str | None,
    batch: str | None,
    worker: str | None,
    since: str | None,
    env: str | None,
    output_format: str,
) -> None:
    """Show what a job's handlers have logged and printed; with -o json, one JSON object a line.

    Ends with exit code 1 when no line matches --level, --batch, --worker and --since, as grep does.
    """
    import orjson

    from cortex_dask.client import Client
    from cortex_dask.io.job.logs import to_text

    job = Client(env).get_job(api, job_id)
    wanted = {"level": level, "batch": batch, "worker": worker, "since": since}
    shown = False
    with interruptible():
        for line in job.log_lines(**wanted, follow=follow):
            click.echo(orjson.dumps(line).decode() if output_format == "json" else to_text(line))
            shown = True
    if not shown:
        _report_no_lines(job.job_id, {name: text for name, text in wanted.items() if text is not None})


def _report_no_lines(job_id: str, wanted: dict[str, str]) -> None:
    if not wanted:
        click.echo(f"The log of the job {job_id} is empty.", err=True)
        return
    flags = " ".join(f"--{name} {text}" for name, text in wanted.items())
    them = "it" if len(wanted) == 1 else "them"
    click.echo(f"No line in the log of the job {job_id} matches {flags}; without {them} all lines are shown.", err=True)
    click.get_current_context().exit(FAILED)


@click.command()
@options.api_argument
@options.job_argument
@options.environment
def stop(api: str, job_id: str, env: str | None) -> None:
    """Stop a job, whichever process runs it; it can be resumed."""
    from cortex_dask.client import Client
    from cortex_dask.display import summary

    job = Client(env).get_job(api, job_id)
    before = job.status
    job.stop()
    document = job.describe()
    if document["status"] == before:
        click.echo(f"The job has ended already: {before}.", err=True)
    click.echo(summary(document, environment=env))


_detach = click.option(
    "-d/-w",
    "--detach/--wait",
    "detach",
    default=False,
    help="Return at once; the job goes on by itself, or wait for it.",
)


@click.command()
@options.api_argument
@options.job_argument
@options.cluster
@_detach
@options.environment
@options.output_format
def resume(api: str, job_id: str, **how: Any) -> None:
    """Go on with a job that was stopped or that failed, and wait for it.

    Splits that are committed are not handled again.
    """
    _restart(api, job_id, **how, is_retry=False)


@click.command()
@options.api_argument
@options.job_argument
@click.option("--failed", is_flag=True, required=True, help="The batches that failed for good, exactly those.")
@options.cluster
@_detach
@options.environment
@options.output_format
def retry(api: str, job_id: str, *, failed: bool, **how: Any) -> None:
    """Handle the failed batches of a job again, add their rows to its output, and wait for it."""
    _restart(api, job_id, **how, is_retry=True)


def _restart(
    api: str,
    job_id: str,
    *,
    cluster: str | None,
    cluster_option: tuple[str, ...],
    detach: bool,
    env: str | None,
    output_format: str,
    is_retry: bool,
) -> None:
    from cortex_dask.client import Client
    from cortex_dask.display import next_commands
    from cortex_dask.errors import JobRunningError

    client = Client(env)
    job = client.get_job(api, job_id)
    if cluster is not None or cluster_option:
        client.move(job, cluster=cluster, options=options.cluster_options(cluster_option))
    if detach:
        before = job.describe()
        if "coordinator" in before and job.is_live(before):
            raise JobRunningError(f"the job {job.job_id} is running: wait for it or stop it first")
        job.start_detached(retry=is_retry)
        look = dict(next_commands(before, environment=env))["logs"].replace(" logs ", " get ", 1)
        click.echo(
            json_text(before) if output_format == "json" else f"The job goes on by itself; look at it with: {look}"
        )
        return
    display = progress_display(output_format, env)
    with interruptible():
        job.start(cluster=cluster, retry=is_retry, display=display)
        finish_job(job, display, output_format)
