"""A new project is whole, small, and runs as it is."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from cortex_dask.cli import project as cli_project
from cortex_dask.errors import ProjectError
from cortex_dask.spec.resolution import resolve

TEMPLATE = Path(cli_project.__file__).parents[1] / "project" / "template"


def test_what_a_new_project_holds(tmp_path: Path) -> None:
    project = cli_project.create_project(tmp_path / "digits")
    assert {path.name for path in project.iterdir()} == {
        "cortex.yaml", "handler.py", "README.md", "data", "model.npz", ".cortexignore",
    }  # fmt: skip
    assert len(list((project / "data").glob("*.parquet"))) == 8
    table = pq.read_table(project / "data")
    assert table.num_rows == 1797
    assert table.column("id").to_pylist() == list(range(1797))
    assert sum(path.stat().st_size for path in project.rglob("*") if path.is_file()) < 200_000
    assert "my-classifier" not in (project / "cortex.yaml").read_text() + (project / "README.md").read_text()
    assert os.access(project, os.R_OK | os.X_OK)
    assert [path.name for path in tmp_path.iterdir()] == ["digits"]


def test_it_can_be_submitted_with_nothing_more(tmp_path: Path) -> None:
    project = cli_project.create_project(tmp_path / "digits")
    resolved = resolve(project / "cortex.yaml")
    settings = resolved.settings
    assert settings.api_name == "digits"
    assert settings.dataset.paths == (f"{project}/data/",)
    assert settings.output is not None
    assert settings.output.url == f"{project}/predictions/"
    assert resolved.archive is not None
    assert [file.name for file in resolved.archive.files] == ["handler.py", "model.npz"]
    assert resolved.warnings == ()


def test_the_handler_recognises_digits(tmp_path: Path) -> None:
    """On rows that the model was not trained on, in the project's own directory, as a worker runs it."""
    project = cli_project.create_project(tmp_path / "digits")
    code = (
        "import pandas as pd, yaml; from cortex_dask.project.contract import check_class\n"
        "from cortex_dask.project.loader import load_file\n"
        "cls = load_file('handler.py'); check_class(cls)\n"
        "handler = cls(yaml.safe_load(open('cortex.yaml'))[0]['handler']['config'])\n"
        "rows = pd.read_parquet('data'); rows = rows[rows['id'] % 2 == 1]\n"
        "result = handler.handle_batch(rows, 'batch')\n"
        "assert list(result.columns) == ['id', 'digit', 'confidence'] and len(result) == len(rows)\n"
        "assert result['confidence'].between(0.1, 1).all()\n"
        "assert (result['id'].to_numpy() == rows['id'].to_numpy()).all()\n"
        "print((result['digit'].to_numpy() == rows['target'].to_numpy()).mean())"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=project, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.splitlines()[-1]) > 0.94


def test_an_empty_directory_may_exist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty").mkdir()
    assert (cli_project.create_project(tmp_path / "empty") / "data" / "digits-0.parquet").exists()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert (cli_project.create_project(".") / "cortex.yaml").read_text().startswith("- name: here\n")
    assert cli_project.create_project("sub/other") == Path("sub/other")


def test_refuses(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    with pytest.raises(ProjectError, match=r"full is not empty; choose another name"):
        cli_project.create_project(tmp_path / "full")
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["mine.txt"]
    (tmp_path / "file").touch()
    with pytest.raises(ProjectError, match="file exists and is no directory"):
        cli_project.create_project(tmp_path / "file")
    with pytest.raises(ProjectError, match=r"name cannot be used: found 'My_Project'; allowed .* my-project would do"):
        cli_project.create_project(tmp_path / "My_Project")
    with pytest.raises(ProjectError, match=r"project cannot be made: "):
        cli_project.create_project(tmp_path / "file" / "project")
    (tmp_path / "link").symlink_to("gone")
    with pytest.raises(ProjectError, match="leads nowhere"):
        cli_project.create_project(tmp_path / "link")


def test_the_tool_writes_what_the_template_holds(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    tool = Path(__file__).parents[3] / "tools" / "make_digits.py"
    subprocess.run([sys.executable, str(tool), "--folder", str(tmp_path)], check=True, timeout=120, capture_output=True)
    for file in sorted((TEMPLATE / "data").glob("*.parquet")):
        assert pq.read_table(tmp_path / "data" / file.name).equals(pq.read_table(file)), file.name
    assert (tmp_path / "model.npz").stat().st_size == (TEMPLATE / "model.npz").stat().st_size
