"""The public names are complete, lazy and cheap."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import cortex_dask
from cortex_dask import errors

HEAVY = (
    "click",
    "dask",
    "distributed",
    "fsspec",
    "jinja2",
    "numpy",
    "orjson",
    "pandas",
    "pyarrow",
    "pydantic",
    "rich",
    "yaml",
)


def run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    return done.stdout.strip()


def test_importing_the_package_imports_nothing_heavy():
    code = f"import sys, cortex_dask; print(sorted(name for name in {HEAVY!r} if name in sys.modules))"

    assert run_python(code) == "[]"


def test_importing_the_package_imports_no_module_of_it():
    code = "import sys, cortex_dask; print([name for name in sys.modules if name.startswith('cortex_dask.')])"

    assert run_python(code) == "[]"


def test_every_error_is_exported():
    assert {name for name in vars(errors) if name.endswith("Error")} <= set(cortex_dask.__all__)


@pytest.mark.parametrize("name", cortex_dask.__all__)
def test_every_name_can_be_had_and_is_listed(name):
    assert getattr(cortex_dask, name) is not None
    assert name in dir(cortex_dask)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'runn'"):
        _ = cortex_dask.runn


def test_the_version_is_the_one_that_packaging_reads():
    settings = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["tool"]["setuptools"]

    assert settings["dynamic"]["version"] == {"attr": "cortex_dask.__version__"}
    assert re.fullmatch(r"\d+\.\d+\.\d+(\.dev\d+|rc\d+)?", cortex_dask.__version__)


def test_the_handler_process_gets_its_logger_without_dask():
    heavy = ("dask", "pandas", "pydantic", "click")
    code = f"import sys; from cortex_dask import logger; print([name for name in {heavy!r} if name in sys.modules])"

    assert run_python(code) == "[]"
