"""``cortex-dask env``: where jobs are stored and where they run, by name."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import click

from cortex_dask.cli import options
from cortex_dask.cli.output import json_text
from cortex_dask.formatting import table

# Commands import our modules when they run, so that --help and completion start quickly.


@click.group()
def env() -> None:
    """Configure environments: a store for APIs and jobs, and the cluster that runs them.

    They are kept in Dask's configuration; variables such as DASK_CORTEX_DASK__DEFAULT go over it.
    """


@env.command()
@click.argument("name", metavar="NAME")
@click.option(
    "--store",
    "--operator-endpoint",
    "store",
    metavar="URL",
    required=True,
    help="The folder for APIs and jobs: a path, or any fsspec URL.",
)
@options.cluster
@click.option("--default", "is_default", is_flag=True, help="Make it the default one.")
def configure(name: str, store: str, cluster: str | None, cluster_option: tuple[str, ...], is_default: bool) -> None:
    """Make the environment NAME, or change it."""
    from cortex_dask import environments
    from cortex_dask.clusters import make_cluster

    if cluster is not None:
        make_cluster(cluster)  # refuses an unknown one
    made = environments.configure(name, store, cluster=cluster, cluster_options=options.cluster_options(cluster_option))
    if is_default:
        made = environments.set_default(made.name)
    store = _without_password(made.store)
    click.echo(f"configured {made.name}: store {store}, cluster {made.cluster}{_if_default(made.is_default)}")


@env.command(name="list")
@options.output_format
def list_(output_format: str) -> None:
    """List the environments."""
    from cortex_dask import environments

    found = environments.list_all()
    if output_format == "json":
        click.echo(json_text([_document(item) for item in found]))
        return
    rows = [["", "NAME", "STORE", "CLUSTER"]]
    rows += [["*" if item.is_default else "", item.name, _without_password(item.store), item.cluster] for item in found]
    click.echo(table(rows))


@env.command()
@click.argument("name", metavar="[NAME]", required=False)
def default(name: str | None) -> None:
    """Make NAME the default environment; without it, show which one that is."""
    from cortex_dask import environments

    if name is None:
        click.echo(environments.current().name)
        return
    click.echo(f"the default environment is {environments.set_default(name).name}")


@env.command()
@click.argument("old", metavar="OLD")
@click.argument("new", metavar="NEW")
def rename(old: str, new: str) -> None:
    """Give the environment OLD the name NEW."""
    from cortex_dask import environments

    made = environments.rename(old, new)
    click.echo(f"renamed {old} to {made.name}{_if_default(made.is_default)}")


@env.command()
@click.argument("name", metavar="NAME")
def delete(name: str) -> None:
    """Forget the environment NAME; its store is left as it is."""
    from cortex_dask import environments

    environments.delete(name)
    click.echo(f"deleted {name}; its store is left as it is, and the default environment is {_name_of_default()}")


def _without_password(store: str) -> str:
    """Return a store's URL without a password."""
    return re.sub(r"(?<=://)[^/@\s]*@", "…@", store)


def _document(item: Any) -> dict[str, Any]:
    return {**dataclasses.asdict(item), "store": _without_password(item.store)}


def _name_of_default() -> str:
    from cortex_dask import environments

    return environments.current().name


def _if_default(is_default: bool) -> str:
    return " (the default one)" if is_default else ""
