"""The quickstart notebook runs, and shows what it promises."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Any

import nbformat
import pytest

NOTEBOOK = Path(__file__).parents[2] / "notebooks" / "quickstart.ipynb"


def texts(cell: Any) -> str:
    """Return everything that a cell shows, as text and as HTML."""
    shown = []
    for output in cell.get("outputs", []):
        shown.append(output.get("text", ""))
        shown += output.get("data", {}).values()
    return "\n".join(map(str, shown))


@pytest.fixture(scope="module")
def executed(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The notebook after a run with this Python as its kernel."""
    from nbclient import NotebookClient

    folder = tmp_path_factory.mktemp("notebook")
    root = str(NOTEBOOK.parents[1])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DASK_CORTEX_DASK__STORE", str(folder / "store"))
        patch.setenv("PATH", str(Path(sys.executable).parent), prepend=os.pathsep)
        patch.setenv("PYTHONPATH", root, prepend=os.pathsep)
        patch.setenv("TMPDIR", str(folder))
        notebook = nbformat.read(NOTEBOOK, as_version=4)
        client = NotebookClient(notebook, timeout=120, kernel_name="python3", resources={"metadata": {"path": folder}})
        return client.execute()


def cell(notebook: Any, start: str) -> Any:
    """Return the one cell whose source holds this text."""
    (found,) = [item for item in notebook.cells if item.cell_type == "code" and start in item.source]
    return found


def test_outputs_are_cleared_in_the_repository() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    code = [item for item in notebook.cells if item.cell_type == "code"]
    assert [item for item in code if item.outputs or item.execution_count] == []


def test_job_is_shown_as_html(executed: Any) -> None:
    (last,) = cell(executed, "cx.run(").outputs[-1:]
    assert "text/html" in last.get("data", {})
    shown = next(item for item in executed.cells if item.source == "job")
    assert "succeeded" in shown.outputs[0].data["text/html"]


def test_predictions_are_right(executed: Any) -> None:
    match = re.search(r"1,797 predictions, accuracy (\d+\.\d)%", texts(cell(executed, "accuracy = ")))
    assert match
    assert float(match[1]) > 94


def test_failed_batch_is_named_and_retried(executed: Any) -> None:
    assert "cannot handle the image 777" in texts(cell(executed, "fragile.failures()[["))
    assert "this is where it goes wrong" in texts(cell(executed, "fragile.logs()"))
    assert "succeeded 1797 rows, 0 failures" in texts(cell(executed, "fragile.retry_failed()"))


def test_jobs_are_found_again(executed: Any) -> None:
    assert len(re.findall(r"<Job .*1,?797|<Job .*succeeded", texts(cell(executed, "list_jobs()")))) == 2
