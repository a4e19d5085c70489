"""What keeps the package easy to see: small folders, each name once, small constructors, typed messages."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.architecture.imports import MODULES, PACKAGE, ROOT, sources

TREES = {path: ast.parse(path.read_text(), str(path)) for path in sources()}
TESTS = [path for path in sorted((ROOT / "tests").rglob("*.py")) if not {"fixtures", "support"} & set(path.parts)]

#: Where a project of Cortex imports names, which are the contract's and not ours.
CONTRACT_NAMES = PACKAGE / "compat"
MOST_MODULES_AT_THE_TOP = 13
MOST_MODULES_IN_A_FOLDER = 14
MOST_LINES = 500
MOST_ARGUMENTS = 5


def modules_in(folder: Path) -> list[Path]:
    return [path for path in folder.glob("*.py") if path.name != "__init__.py"]


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_folders_are_small() -> None:
    assert len(modules_in(PACKAGE)) <= MOST_MODULES_AT_THE_TOP
    large = {name_of(folder): len(modules_in(folder)) for folder in {path.parent for path in TREES} - {PACKAGE}}
    assert {folder: count for folder, count in large.items() if count > MOST_MODULES_IN_A_FOLDER} == {}


def test_modules_are_of_a_comfortable_size() -> None:
    lines = {name_of(path): len(path.read_text().splitlines()) for path in TREES}
    assert {name: count for name, count in lines.items() if count > MOST_LINES} == {}


def test_every_package_says_what_it_is_for() -> None:
    """A package's ``__init__`` holds one docstring that names the module to read first, and imports nothing."""
    wrong = []
    for path, tree in TREES.items():
        folder = name_of(path.parent)
        if path.name != "__init__.py" or folder in ("cortex_dask", "cortex_dask/clusters", "cortex_dask/cli"):
            continue
        if CONTRACT_NAMES in path.parents:
            continue
        if len(tree.body) != 1 or not ast.get_docstring(tree):
            wrong.append(folder)
    assert wrong == []


def test_no_class_name_is_defined_twice() -> None:
    places = defaultdict(list)
    for path, tree in TREES.items():
        if CONTRACT_NAMES not in path.parents:
            for node in ast.walk(tree):
                if isinstance(node, ast.ClassDef):
                    places[node.name].append(name_of(path))
    assert {name: found for name, found in places.items() if len(found) > 1} == {}


def test_there_is_one_public_function_run() -> None:
    found = [
        name_of(path)
        for path, tree in TREES.items()
        for node in tree.body
        if isinstance(node, ast.FunctionDef) and node.name == "run"
    ]
    assert found == ["cortex_dask/client.py"]


def test_constructors_take_few_arguments() -> None:
    wrong = {}
    for path, tree in TREES.items():
        for node in ast.walk(tree):
            if not isinstance(node, ast.ClassDef):
                continue
            for method in node.body:
                if isinstance(method, ast.FunctionDef) and method.name == "__init__":
                    arguments = [*method.args.posonlyargs, *method.args.args, *method.args.kwonlyargs][1:]
                    if len(arguments) > MOST_ARGUMENTS:
                        wrong[f"{name_of(path)}: {node.name}"] = len(arguments)
    assert wrong == {}


def test_nothing_is_called_extra() -> None:
    """Facts that travel have a field each; ``extra=`` of the standard library's logging is another thing."""
    wrong = []
    for path, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.target.id == "extra":
                wrong.append(f"{name_of(path)}:{node.lineno}")
            if isinstance(node, ast.Attribute) and node.attr == "extra":
                wrong.append(f"{name_of(path)}:{node.lineno}")
    assert wrong == []


#: Where dicts with the key "type" are documents of others: JSON of a handler's settings, objects of Kubernetes.
DOCUMENTS = ("io/job/settings.py", "spec/", "clusters/kubernetes/", "cli/", "preview.py", "deployments.py", "project/")
#: Where they are what fsspec tells of files and folders.
LISTINGS = ("io/store/listing.py", "io/store/remote.py", "io/input/files.py", "tensorflow/models.py")


def test_messages_are_classes() -> None:
    """Commands and events between processes are dataclasses: no dict is told apart by a string under "type"."""
    wrong = []
    for path, tree in TREES.items():
        if str(path.relative_to(PACKAGE)).startswith((*DOCUMENTS, *LISTINGS)):
            continue
        for node in ast.walk(tree):
            keys = node.keys if isinstance(node, ast.Dict) else []
            index = node.slice if isinstance(node, ast.Subscript) else None
            if any(isinstance(key, ast.Constant) and key.value == "type" for key in (*keys, index)):
                wrong.append(f"{name_of(path)}:{node.lineno}")
    assert wrong == []


def test_internal_modules_name_no_exports() -> None:
    wrong = [
        name_of(path)
        for path, tree in TREES.items()
        if path not in (PACKAGE / "__init__.py",) and CONTRACT_NAMES not in path.parents
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
    ]
    assert wrong == []


def test_processes_are_started_by_name_and_imported_by_nobody() -> None:
    entries = {module for module in MODULES if module.endswith((".main", "_main"))}
    importers = []
    for path, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module:
                for name in (node.module, *(f"{node.module}.{alias.name}" for alias in node.names)):
                    if name in entries:
                        importers.append(f"{name_of(path)} imports {name}")
    assert importers == []


def private_attributes(tree: ast.AST) -> Iterator[ast.Attribute]:
    """Yield ``obj._name``, but not ``self._name``, which is the test's own."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and re.fullmatch(r"_[a-z]\w*[a-z0-9]", node.attr):
            owner = node.value
            if not (isinstance(owner, ast.Name) and owner.id in ("self", "cls")):
                yield node


@pytest.mark.parametrize("path", TESTS, ids=lambda path: str(path.relative_to(ROOT / "tests")))
def test_tests_look_at_results(path: Path) -> None:
    """No test reads an attribute that is private to an object of the package."""
    allowed = {"_cache", "_exit", "_register_command_ep"}  # of s3fs, of the standard library, of dask
    found = [node for node in private_attributes(ast.parse(path.read_text())) if node.attr not in allowed]
    assert [f"{path.name}:{node.lineno}: {ast.unparse(node)}" for node in found] == []
