"""``cortex-dask init``, ``version`` and ``completion``: what needs no job."""

from __future__ import annotations

import click

__all__ = ["completion", "init", "version"]


@click.command()
@click.argument("name", metavar="NAME")
def init(name: str) -> None:
    """Make a project that runs as it is, in the new directory NAME."""
    from cortex_dask import scaffold

    directory = scaffold.create(name)
    click.echo(f"Made {directory}. Run it with: cortex-dask submit {directory}")


@click.command()
def version() -> None:
    """Show the version."""
    from cortex_dask import __version__

    click.echo(f"cortex-dask {__version__}")


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion(ctx: click.Context, shell: str) -> None:
    """Print what makes SHELL complete commands and options.

    For bash, put this into ~/.bashrc: eval "$(cortex-dask completion bash)"
    """
    from click.shell_completion import get_completion_class

    made = get_completion_class(shell)
    assert made is not None
    click.echo(made(ctx.find_root().command, {}, "cortex-dask", "_CORTEX_DASK_COMPLETE").source())
