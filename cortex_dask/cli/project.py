"""New projects, made from the template that the package holds: ``cortex-dask init my-classifier``."""

from __future__ import annotations

import shutil
import tempfile
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path

import click

from cortex_dask.errors import ProjectError

#: The name that the template's files call the API by.
_PLACEHOLDER = "my-classifier"
#: Files in which it stands.
_NAMING = ("cortex.yaml", "README.md")
#: Files that are hidden in a project; packages leave hidden files out.
_HIDDEN = {"cortexignore": ".cortexignore"}


def create(path: str | Path) -> Path:
    """Make a project that runs as it is: configuration, handler, data and a trained model.

    Parameters
    ----------
    path : str or Path
        The directory to make; its name becomes the API's name, so it must be a DNS label. It may exist if it is empty.

    Returns
    -------
    Path
        The project directory, as given.

    Raises
    ------
    ProjectError
        If the name is no DNS label, the directory holds something already, or it cannot be written.
    """
    from cortex_dask.spec.api import check_name

    target = Path(path).expanduser()
    try:
        name = check_name(target.resolve().name)
    except ValueError as error:
        raise ProjectError(f"the project's name cannot be used: {error}") from None
    if target.is_symlink() and not target.exists():
        raise ProjectError(f"{target} is a link that leads nowhere; remove it, or choose another name")
    if target.exists() and not target.is_dir():
        raise ProjectError(f"{target} exists and is no directory; choose another name")
    try:
        if target.exists() and any(target.iterdir()):
            raise ProjectError(f"the directory {target} is not empty; choose another name, or empty it first")
        target.parent.mkdir(parents=True, exist_ok=True)
        # Made beside its place and moved there, so that a project is there as a whole or not at all.
        with tempfile.TemporaryDirectory(prefix=f".{name}.", dir=target.resolve().parent) as folder:
            fresh = Path(folder) / name
            _copy(resources.files("cortex_dask.project") / "template", fresh, name)
            if target.exists():
                for entry in fresh.iterdir():
                    shutil.move(entry, target / entry.name)
            else:
                fresh.rename(target)
    except OSError as error:
        raise ProjectError(f"the project {target} cannot be made: {error.strerror or error}") from None
    return target


def _copy(source: Traversable, target: Path, name: str) -> None:
    target.mkdir()
    for entry in source.iterdir():
        if entry.name == "__pycache__":
            continue
        place = target / _HIDDEN.get(entry.name, entry.name)
        if entry.is_dir():
            _copy(entry, place, name)
        elif entry.name in _NAMING:
            place.write_text(entry.read_text(encoding="utf-8").replace(_PLACEHOLDER, name), encoding="utf-8")
        else:
            place.write_bytes(entry.read_bytes())


@click.command()
@click.argument("name", metavar="NAME")
def init(name: str) -> None:
    """Make a project that runs as it is, in the new directory NAME."""
    directory = create(name)
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
