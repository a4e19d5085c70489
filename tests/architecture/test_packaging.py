"""What the project declares: its dependencies, its extras and the files that are installed."""

from __future__ import annotations

import re
import sys
import tomllib

import yaml

from tests.architecture.imports import PACKAGE, ROOT, imports

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
    stores, backends = {"s3", "gcs", "azure"}, {"kubernetes", "gateway"}
    assert set(extras) == {*stores, *backends, "tensorflow", "polars", "notebook", "test", "dev", "all"}
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
    for path in PACKAGE.rglob("*.py"):
        local = {sibling.stem for sibling in path.parent.glob("*.py")} if "template" in path.parts else set()
        for name in {found.name.split(".")[0] for found in imports(path)} - set(sys.stdlib_module_names) - ours - local:
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
    folders = {path.parent for path in PACKAGE.rglob("*.py") if "template" not in path.parts}
    assert [folder for folder in folders if not (folder / "__init__.py").exists()] == []


def test_no_file_names_a_registry_and_no_lock_file_pins_one() -> None:
    """Where packages come from is the reader's to configure."""
    texts = [(ROOT / name).read_text() for name in ("pyproject.toml", "environment.yml", "Makefile", ".ci/run")]
    assert not re.findall(r"://[^\s\"']*(?:pypi|pythonhosted|anaconda)[^\s\"']*", "\n".join(texts))
    assert not [name for name in ("uv.lock", "poetry.lock", "conda-lock.yml", "Pipfile.lock") if (ROOT / name).exists()]
