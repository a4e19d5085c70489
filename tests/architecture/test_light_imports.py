"""What importing the package costs: the modules that each program loads, counted and not timed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.architecture.imports import PACKAGE, ROOT

HEAVY = ("dask", "distributed", "pydantic", "click", "rich")
#: Too slow to import before they are needed.
LAZY = ("pandas", "polars", "s3fs", "pyarrow.dataset", "jinja2", "IPython")


#: The light modules beside those of ``io``.
LIGHT = ("errors.py", "project/contract.py", "project/loader.py", "__init__.py")


def light_modules() -> list[str]:
    paths = [
        *(PACKAGE / "io").rglob("*.py"),
        *map(PACKAGE.joinpath, LIGHT),
    ]
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in sorted(paths)]
    return [*names, "cortex_dask.runtime.handler_process.main"]


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


@pytest.mark.parametrize("module", ["cortex_dask.cli", "cortex_dask.client", "cortex_dask.spec.resolution"])
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
