"""The command line as a whole: help, usage, completion, and the entry point of Dask's command line."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path

import click
import dask.cli
import pytest
from click.testing import CliRunner

import cortex_dask
from cortex_dask.cli import main


def run(*arguments, **keywords):
    return CliRunner().invoke(main, arguments, **keywords)


class TestHelp:
    def test_every_command_is_listed_with_what_it_does(self):
        shown = run("--help").output

        for name in ("init", "submit", "get", "logs", "stop", "resume", "retry", "version", "completion"):
            assert re.search(rf"^  {name} +[A-Z]", shown, re.MULTILINE), name
        assert "124 timed out" in shown

    def test_help_imports_nothing_heavy(self):
        heavy = ("dask", "distributed", "pandas", "pyarrow", "pydantic", "rich", "orjson", "fsspec", "jinja2", "yaml")
        code = (
            "import sys; from cortex_dask.cli import main\n"
            "try: main(['submit', '--help'])\n"
            f"finally: print([name for name in {heavy!r} if name in sys.modules])"
        )

        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)

        assert done.stdout.strip().splitlines()[-1] == "[]"

    def test_version(self):
        assert run("version").output == f"cortex-dask {cortex_dask.__version__}\n"

    @pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
    def test_completion_names_the_command(self, shell, monkeypatch):
        shown = run("completion", shell)

        assert shown.exit_code == 0, shown.output
        assert "_CORTEX_DASK_COMPLETE" in shown.output


@pytest.mark.parametrize(
    "arguments",
    [("sumbit",), ("submit",), ("submit", ".", "--workers", "many"), ("retry", "api", "job"), ("get", "-o", "xml")],
)
def test_wrong_usage_is_2(arguments):
    found = run(*arguments)

    assert found.exit_code == 2
    assert "Error: " in found.stderr


def test_completion_completes_commands_and_options() -> None:
    def complete(words: str, position: int) -> str:
        environment = {**os.environ, "_CORTEX_DASK_COMPLETE": "bash_complete", "COMP_WORDS": words}
        code = "from cortex_dask.cli import main; main(prog_name='cortex-dask')"
        done = subprocess.run(
            [sys.executable, "-c", code],
            env={**environment, "COMP_CWORD": str(position)},
            capture_output=True,
            text=True,
            timeout=60,
        )
        return done.stdout

    assert set(complete("cortex-dask de", 1).split()) == {"plain,deploy", "plain,delete"}
    names = ("configure", "list", "default", "rename", "delete")
    assert set(complete("cortex-dask env ", 2).split()) == {f"plain,{name}" for name in names}
    assert "plain,--yes" in complete("cortex-dask deploy --", 2).split()


def test_dask_finds_the_command_line() -> None:
    """``dask cortex …``: the entry point names a click group, and Dask's own command line takes it."""
    written = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text())["project"]["entry-points"]
    (name,) = written["dask_cli"]
    entry = EntryPoint(name, written["dask_cli"][name], "dask_cli")
    group = click.Group("dask")
    dask.cli._register_command_ep(group, entry)

    done = CliRunner().invoke(group, ["cortex", "version"])
    assert (done.exit_code, done.output.split()[0]) == (0, "cortex-dask")
