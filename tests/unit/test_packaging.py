"""What holds for the project as a whole: its dependencies, and which way its imports point."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "cortex_dask"

#: Where conda-forge's name differs: ``dask`` without extras is its ``dask-core``.
CONDA_NAMES = {"dask": "dask-core"}


def pyproject() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


# Dependencies --------------------------------------------------------------------------------------------------------


def requirement(text: str) -> tuple[str, str]:
    """Split a requirement into its normalised name and its version, without extras and conditions."""
    match = re.fullmatch(r"([A-Za-z0-9._-]+)(?:\[[^\]]*\])?\s*([^;]*)(?:;.*)?", text.strip())
    assert match, text
    name = re.sub(r"[._-]+", "-", match[1]).lower()
    return name, match[2].replace(" ", "")


def test_environment_yml_names_the_same_packages_as_pyproject() -> None:
    project = pyproject()["project"]
    extras = project["optional-dependencies"]
    wanted = {
        CONDA_NAMES.get(name, name): version
        for name, version in map(requirement, [*project["dependencies"], *extras["test"], *extras["dev"]])
    }
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    conda = dict(requirement(item) for item in environment["dependencies"] if isinstance(item, str))
    (by_pip,) = (item["pip"] for item in environment["dependencies"] if isinstance(item, dict))
    conda |= dict(requirement(item) for item in by_pip if not item.startswith("-"))
    assert conda.pop("pip") == ""
    assert conda.pop("python") == project["requires-python"]
    assert conda == wanted


def test_extras_are_those_that_users_are_told_of() -> None:
    extras = pyproject()["project"]["optional-dependencies"]
    assert set(extras) == {"kubernetes", "gateway", "tensorflow", "polars", "notebook", "test", "dev", "all"}
    everything = re.fullmatch(r"cortex-dask\[(.*)\]", extras["all"][0])
    assert everything
    assert set(everything[1].split(",")) <= set(extras)


def test_every_import_of_the_package_is_declared() -> None:
    """A module that is imported but not a dependency works only where something else happens to install it."""
    project = pyproject()["project"]
    declared = {requirement(item)[0] for item in project["dependencies"]}
    extras = {name: items for name, items in project["optional-dependencies"].items() if name not in ("test", "dev")}
    declared |= {requirement(item)[0] for items in extras.values() for item in items}
    distributions = {
        "yaml": "pyyaml",
        "dotenv": "python-dotenv",
        "pythonjsonlogger": "python-json-logger",
        "sklearn": "scikit-learn",
        "IPython": "ipykernel",
        # brought along by a declared dependency, and of no use without it
        "numpy": "pandas",
        "aiobotocore": "s3fs",
        "botocore": "s3fs",
        "tornado": "distributed",
        "aiohttp": "dask-gateway",
    }
    ours = {"cortex_dask", "cortex", "cortex_internal"}
    missing = {}
    for path in sources():
        local = {sibling.stem for sibling in path.parent.glob("*.py")} if "template" in path.parts else set()
        for name in {module.split(".")[0] for module in imported(path)} - set(sys.stdlib_module_names) - ours - local:
            distribution = re.sub(r"[._-]+", "-", distributions.get(name, name)).lower()
            if distribution not in declared:
                missing[str(path.relative_to(ROOT))] = name
    # the first exists only for type checkers; without the second, as without it in distributed, metrics are not served
    assert {path: name for path, name in missing.items() if name not in ("_typeshed", "prometheus_client")} == {}


def test_every_file_of_the_package_is_installed() -> None:
    """A template or page that no pattern names works in a checkout and is missing after ``pip install``."""
    patterns = pyproject()["tool"]["setuptools"]["package-data"]["cortex_dask"]
    installed = {path for pattern in patterns for path in PACKAGE.glob(pattern)}
    files = {path for path in PACKAGE.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc", ".pyo")}
    assert files - installed == set()
    folders = {path.parent for path in sources() if "template" not in path.parts}
    assert [folder for folder in folders if not (folder / "__init__.py").exists()] == []


def test_no_file_names_a_registry_and_no_lock_file_pins_one() -> None:
    """Where packages come from is the reader's to configure."""
    texts = [(ROOT / name).read_text() for name in ("pyproject.toml", "environment.yml", "Makefile", ".ci/run")]
    assert not re.findall(r"://[^\s\"']*(?:pypi|pythonhosted|anaconda)[^\s\"']*", "\n".join(texts))
    assert not [name for name in ("uv.lock", "poetry.lock", "conda-lock.yml", "Pipfile.lock") if (ROOT / name).exists()]


# Imports -------------------------------------------------------------------------------------------------------------

#: A module may import from its own layer and from those before it.
LAYERS = [
    # the vocabulary: exceptions, and words and files that need nothing of ours but those
    {
        "errors",
        "wording",
        "mistakes",
        "quantities",
        "yaml_file",
        "dotenv_file",
        "ignore",
        "configuration_files",
        "cache",
        "pickling",
        "cores",
        "beginning",
    },
    # storage and data
    {"io"},
    # what users give: the handler, cortex.yaml, submissions, projects, environments
    {
        "handler",
        "project",
        "kubernetes_spec",
        "api_spec",
        "submission",
        "submission_file",
        "submission_options",
        "target",
        "spec",
        "apis",
        "environments",
        "scaffold",
    },
    # the engine, and what is read from a job directory
    {
        "runtime",
        "clusters",
        "detached",
        "job_index",
        "job_logs",
        "job_output",
        "json_parts",
        "dead_letters",
        "progress",
    },
    # the handle on a job
    {"background", "display", "final_status", "job"},
    # one environment's APIs and jobs; looking at a job before it is run
    {"api_client", "client", "jobs", "resubmission", "sample"},
    # what users import or type
    {"__init__", "__main__", "cli", "testing", "compat"},
]


def sources() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def imported(path: Path) -> Iterator[str]:
    """Yield the modules that a file imports anywhere, also inside functions, as absolute names."""
    package = ".".join(path.relative_to(ROOT).parent.parts)
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")
                base = ".".join(parents[: len(parents) - node.level + 1] + ([base] if base else []))
            yield from (f"{base}.{alias.name}" for alias in node.names)


def layer(module: str) -> int | None:
    parts = module.split(".")
    if parts[0] != "cortex_dask":
        return None
    if parts[1:] == ["__version__"]:
        return 0
    name = parts[1] if len(parts) > 1 else "__init__"
    for number, names in enumerate(LAYERS):
        if name in names:
            return number
    # ``from cortex_dask import run``: a name of the package itself
    return len(LAYERS) - 1


def test_every_module_has_a_layer() -> None:
    tops = {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in sources()}
    known = set().union(*LAYERS)
    assert tops - known - {"template"} == set(), "add the new module to LAYERS, and to the picture in the docs"


def test_imports_point_one_way() -> None:
    wrong = []
    for path in sources():
        if "template" in path.parts:
            continue
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        own = layer(module)
        assert own is not None
        for name in imported(path):
            other = layer(name)
            if other is not None and other > own:
                wrong.append(f"{module} imports {name}")
    assert wrong == []


HEAVY = ("dask", "distributed", "pydantic", "click", "rich")
#: Too slow to import before they are needed.
LAZY = ("pandas", "polars", "s3fs", "pyarrow.dataset", "jinja2", "IPython")


def light_modules() -> list[str]:
    paths = [*(PACKAGE / "io").rglob("*.py"), *(PACKAGE / name for name in ("errors.py", "handler.py", "__init__.py"))]
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in sorted(paths)]
    return [*names, "cortex_dask.runtime.process"]


def test_io_handler_and_handler_process_import_nothing_heavy() -> None:
    """The handler process starts once per worker of every job; an import of dask alone costs more than a small job."""
    program = f"""
import importlib, sys
for name in {light_modules()!r}:
    importlib.import_module(name)
    found = [heavy for heavy in {HEAVY + LAZY!r} if heavy in sys.modules]
    if found:
        sys.exit(f"importing {{name}} imports {{', '.join(found)}}")
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, cwd=ROOT, env=clean_environment()
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("module", ["cortex_dask.cli", "cortex_dask.client", "cortex_dask.spec"])
def test_front_end_starts_without_the_data_libraries(module: str) -> None:
    """``--help``, ``get`` and ``env`` answer at once: what a job needs is imported when a job runs."""
    program = f"""
import importlib, sys
importlib.import_module({module!r})
found = [heavy for heavy in {("distributed", "pandas", "polars", "s3fs")!r} if heavy in sys.modules]
if found:
    sys.exit("it imports " + ", ".join(found))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, cwd=ROOT, env=clean_environment()
    )
    assert done.returncode == 0, done.stderr


def test_a_job_on_this_machine_needs_no_dask(tmp_path: Path) -> None:
    """The coordinator's threads are the workers there; to import Dask takes longer than many a job."""
    script = tmp_path / "job.py"
    script.write_text("""
import sys
import cortex_dask as cx

class Handler:
    def __init__(self, config):
        pass

    def handle_batch(self, payload):
        return [{"id": row["id"]} for row in payload]

if __name__ == "__main__":
    with open("in.jsonl", "w") as file:
        file.writelines(f'{{"id": {number}}}\\n' for number in range(10))
    job = cx.run(Handler, "in.jsonl", "out", batch_size=2, workers=2, progress=False, batch_format="records")
    assert job.status == "succeeded"
    found = [name for name in ("dask", "distributed", "pandas", "jinja2", "rich") if name in sys.modules]
    if found:
        sys.exit("it imports " + ", ".join(found))
""")
    environment = {name: value for name, value in clean_environment().items() if not name.startswith("DASK_")}
    environment |= dict.fromkeys(("HOME", "XDG_DATA_HOME", "DASK_ROOT_CONFIG"), str(tmp_path))
    done = subprocess.run(
        [sys.executable, "job.py"], capture_output=True, text=True, timeout=60, cwd=tmp_path, env=environment
    )
    assert done.returncode == 0, done.stderr


def clean_environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT)}
