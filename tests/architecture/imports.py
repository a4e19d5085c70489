"""The imports of the package's modules, read from their source: also those inside functions and for annotations."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "cortex_dask"


class Import(NamedTuple):
    """One imported name, the line it is on, and whether it is inside a function."""

    name: str
    line: int
    inside_function: bool


def sources() -> list[Path]:
    """Return the files of the package, without those of the project template."""
    return [path for path in sorted(PACKAGE.rglob("*.py")) if "template" not in path.parts]


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_name(path): path for path in sources()}


def imports(path: Path) -> Iterator[Import]:
    """Yield what a file imports, as absolute names; ``from a import b`` is ``a.b``."""
    package = path.relative_to(ROOT).parent.parts

    def visit(node: ast.AST, inside: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                yield from (Import(alias.name, child.lineno, inside) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                base = child.module or ""
                if child.level:
                    base = ".".join([*package[: len(package) - child.level + 1], *([base] if base else [])])
                yield from (Import(f"{base}.{alias.name}", child.lineno, inside) for alias in child.names)
            else:
                yield from visit(child, inside or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef))

    yield from visit(ast.parse(path.read_text(), str(path)), False)


def own_module(name: str) -> str | None:
    """Return the module of ours that an imported name lives in; None for a module of others."""
    while name not in MODULES:
        name, _, last = name.rpartition(".")
        if not last:
            return None
    return name
