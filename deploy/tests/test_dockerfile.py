"""The Dockerfile, as far as it can be checked without a container engine; ``make test-kubernetes`` runs its parts."""

from __future__ import annotations

import fnmatch
import re
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def instructions() -> list[tuple[str, str]]:
    """Return the instructions, their continued lines joined."""
    text = "\n".join(line for line in (ROOT / "Dockerfile").read_text().splitlines() if not line.startswith("#"))
    lines = [line for line in re.sub(r"\\\n\s*", "", text).splitlines() if line.strip()]
    return [(name, rest) for name, _, rest in (line.partition(" ") for line in lines)]


def test_it_has_only_instructions_that_every_builder_knows() -> None:
    known = {"FROM", "ARG", "ENV", "RUN", "COPY", "USER", "WORKDIR", "ENTRYPOINT", "CMD"}
    assert {name for name, _ in instructions()} <= known
    assert not any("--mount" in rest for name, rest in instructions() if name == "RUN")


def test_every_variable_is_defined() -> None:
    defined = {"PATH"} | {rest.partition("=")[0] for name, rest in instructions() if name == "ARG"}
    used = {match for name, rest in instructions() if name != "CMD" for match in re.findall(r"\$\{?(\w+)", rest)}
    assert used <= defined


def test_what_it_copies_is_there_and_not_ignored() -> None:
    ignore = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    sources = [
        source
        for name, rest in instructions()
        if name == "COPY" and not rest.startswith("--from")
        for source in rest.split()[:-1]
    ]
    assert sources
    for source in sources:
        assert (ROOT / source).exists()
        verdicts = [not rule.startswith("!") for rule in ignore if fnmatch.fnmatch(source, rule.lstrip("!"))]
        assert verdicts
        assert not verdicts[-1], source


def test_the_wheel_gets_all_that_it_is_made_of() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    copied = {word for name, rest in instructions() if name == "COPY" for word in rest.split()}
    needed = {"pyproject.toml", project["project"]["readme"], *project["project"]["license-files"]}
    needed |= {pattern.rstrip("*") for pattern in project["tool"]["setuptools"]["packages"]["find"]["include"]}
    assert needed <= copied


def test_the_extras_exist() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    (wanted,) = [rest.partition("=")[2] for name, rest in instructions() if rest.startswith("EXTRAS=")]
    assert set(wanted.split(",")) <= set(extras)


def test_it_does_not_run_as_root() -> None:
    users = [rest for name, rest in instructions() if name == "USER"]
    assert re.fullmatch(r"[1-9][0-9]*:[1-9][0-9]*", users[-1]), "a number, or runAsNonRoot cannot be checked"
    names = [name for name, _ in instructions()]
    assert "RUN" not in names[names.index("USER") :]


@pytest.mark.parametrize("command", [rest for name, rest in instructions() if name == "RUN"])
def test_its_commands_are_a_shells(command: str) -> None:
    ended = subprocess.run(["sh", "-n", "-c", command], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
