"""``docs/architecture.md`` matches the tree that it describes."""

from __future__ import annotations

import ast
import re

from tests.architecture.imports import PACKAGE, ROOT, sources

PAGE = (ROOT / "docs" / "architecture.md").read_text()
PICTURE = PAGE.partition("```mermaid")[2].partition("```")[0]
MOST_WORDS = 25


def table(heading: str) -> list[list[str]]:
    """Return the cells of the first table after a heading, without its head."""
    section = PAGE.partition(f"## {heading}\n")[2].partition("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows[2:]]


def test_what_it_names_exists() -> None:
    named = set(re.findall(r"`((?:[\w]+/)*[\w]+\.py|(?:[\w]+/)+)`", PAGE)) - {"_temporary/", "failures/", "delivered/"}
    missing = [name for name in named if not (PACKAGE / name).exists() and not (ROOT / name).exists()]
    assert missing == []


def test_the_picture_shows_every_package() -> None:
    shown = set(re.findall(r"[\w/]+(?:/|\.py)", " ".join(re.findall(r'\["([^"]+)"\]', PICTURE))))
    folders = {str(path.parent.relative_to(PACKAGE)) + "/" for path in sources() if path.parent != PACKAGE}
    containers = {"io/", "runtime/"}
    assert {name for name in shown if not (PACKAGE / name).exists()} == set()
    assert {name for name in folders - containers if not name.startswith("compat/")} - shown == set()


def test_the_first_functions_are_where_it_says() -> None:
    rows = table("The five files")
    assert len(rows) == 5
    for file, function, _ in rows:
        tree = ast.parse((PACKAGE / file.strip("`")).read_text())
        public = [node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name[0] != "_"]
        assert function.strip("`") in public, file


def test_the_glossary_is_short_and_in_order() -> None:
    words = [word for word, _ in table("Glossary")]
    assert len(words) <= MOST_WORDS
    assert words == sorted(words)
