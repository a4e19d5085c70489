"""``cortex-dask manifest``: the Kubernetes objects of a job as YAML, for those who apply such things by other means."""

from __future__ import annotations

from typing import Any

import click

from cortex_dask.cli.output import warning
from cortex_dask.cli.submit import submission, submit

# Commands import our modules when they run, so that --help and completion start quickly.

#: Options of ``submit`` that are about waiting for a job or previewing it.
_RUN_OPTIONS = ("detach", "dry_run", "sample", "output_format")
_HELP = """\
Print the Kubernetes objects that submit --detach would make.

Takes what submit takes. Nothing is written, and no Kubernetes is asked. With the same --job-id and the same options
the output is the same, so that it can be kept under version control.

The first object is the runner, a Job that coordinates; the second is the DaskCluster that the runner makes, or takes
over if it is there. The runner reads the job directory, which has to be there when it starts: --create makes it.
"""


def _manifest(
    target: str,
    inputs: tuple[str, ...],
    output: str | None,
    cluster: str | None,
    env: str | None,
    create: bool,
    runner_only: bool,
    **parameters: Any,
) -> None:
    if cluster not in (None, "kubernetes"):
        raise click.BadParameter(f"found {cluster!r}; only kubernetes has manifests", param_hint="--cluster")
    names = submission.__annotations__
    special = {name: parameters.pop(name) for name in list(parameters) if name in names}
    given = {**parameters, **submission(**special)}

    from cortex_dask.client import Client

    client = Client(env)
    resolved = client.resolve(target, list(inputs) or None, output, given)  # type: ignore[arg-type]  # click has made the keys
    for text in resolved.warnings:
        warning(text)
    resolved, job = client.place(resolved, cluster="kubernetes")
    text = _text(job.url, resolved.settings, runner_only=runner_only, created=create)
    if create:
        client.create(resolved, cluster="kubernetes")
    click.echo(text, nl=False)


def _text(job_url: str, settings: Any, *, runner_only: bool, created: bool) -> str:
    import yaml

    from cortex_dask.clusters.kubernetes.manifests import make_dask_cluster, make_runner_job
    from cortex_dask.clusters.kubernetes.options import KubernetesOptions
    from cortex_dask.clusters.kubernetes.preflight import check_paths

    options = KubernetesOptions.from_settings(settings)
    cluster = make_dask_cluster(job_url, settings, options)
    check_paths(job_url, settings, cluster)
    documents = [make_runner_job(job_url, settings, options), *([] if runner_only else [cluster])]
    head = f"# The job {settings.job_id} of {settings.api_name}; its directory is {job_url}.\n"
    if not created:
        head += "# That has to be there when this is applied: say --create as well, and it is made.\n"

    class WithoutAliases(yaml.SafeDumper):
        """Writes values that occur in several places out in each, without YAML aliases."""

        def ignore_aliases(self, data: object) -> bool:
            return True

    return head + yaml.dump_all(documents, Dumper=WithoutAliases, sort_keys=False, explicit_start=True, width=120)


manifest = click.Command(
    "manifest",
    callback=_manifest,
    help=_HELP,
    short_help="Print the Kubernetes objects of a job.",
    params=[
        *(item for item in submit.params if item.name not in _RUN_OPTIONS),
        click.Option(
            ["--create"], is_flag=True, help="Make the job directory, so that applying the YAML runs the job."
        ),
        click.Option(
            ["--runner-only"],
            is_flag=True,
            help="Leave out the DaskCluster, which the runner makes and removes: for controllers that would make it "
            "again when it is gone.",
        ),
    ],
)
