"""``cortex-dask init``, ``version``, ``completion``: a new project from the template, and the tool itself."""

from __future__ import annotations

import shutil
import tempfile
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path

import click

from cortex_dask.errors import ProjectError

#: The API's name in the template, which is replaced in these files.
_TEMPLATE_NAME = "my-classifier"
_FILES_WITH_NAME = ("cortex.yaml", "README.md")
#: Files that are hidden in a project, but not in the template: packaging would leave them out.
_HIDDEN = {"cortexignore": ".cortexignore"}

# Commands import our modules when they run, so that --help and completion start quickly.


def create_project(path: str | Path) -> Path:
    """Make a project in a new or empty directory, whose name becomes the API's name, and return the directory."""
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
        # Made in a folder beside it and moved, so that there is a whole project or none.
        with tempfile.TemporaryDirectory(prefix=f".{name}.", dir=target.resolve().parent) as folder:
            made = Path(folder) / name
            _copy(resources.files("cortex_dask.project") / "template", made, name)
            if target.exists():
                for entry in made.iterdir():
                    shutil.move(entry, target / entry.name)
            else:
                made.rename(target)
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
        elif entry.name in _FILES_WITH_NAME:
            place.write_text(entry.read_text(encoding="utf-8").replace(_TEMPLATE_NAME, name), encoding="utf-8")
        else:
            place.write_bytes(entry.read_bytes())


@click.command()
@click.argument("name", metavar="NAME")
def init(name: str) -> None:
    """Make a project that runs as it is, in the new directory NAME."""
    directory = create_project(name)
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

    completion_class = get_completion_class(shell)
    assert completion_class is not None
    click.echo(completion_class(ctx.find_root().command, {}, "cortex-dask", "_CORTEX_DASK_COMPLETE").source())
