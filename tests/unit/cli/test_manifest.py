"""``cortex-dask manifest``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dask
import pytest
import yaml
from click.testing import CliRunner, Result

from cortex_dask.cli import main
from cortex_dask.io.job.directory import JobDirectory

HANDLER = "class Handler:\n    def __init__(self, config): ...\n    def handle_batch(self, payload): ...\n"


@pytest.fixture
def project(tmp_path: Path) -> Iterator[Path]:
    """A project, and an environment whose store pods reach as well."""
    folder = tmp_path / "project"
    folder.mkdir()
    (folder / "handler.py").write_text(HANDLER)
    api = {
        "name": "demo",
        "kind": "BatchAPI",
        "handler": {"path": "handler.py", "image": "registry.example.com/demo:1", "env": {"PASSWORD": "hunter2"}},
        "compute": {"gpu": 1},
        "kubernetes": {"env_from": [{"secret": "aws"}]},
    }
    (folder / "cortex.yaml").write_text(yaml.safe_dump([api]))
    (folder / ".env").write_text("TOKEN=hunter3\n")
    with dask.config.set({"cortex-dask.environments": {"prod": {"store": "memory://store"}}}):
        yield folder


def call(project: Path, *more: str) -> Result:
    given = ["manifest", str(project), "--input", "s3://bucket/in", "--output", "s3://bucket/out", "-e", "prod"]
    return CliRunner().invoke(main, [*given, *more])


def documents(result: Result) -> list[Any]:
    assert result.exit_code == 0, result.output
    return list(yaml.safe_load_all(result.stdout))


def test_it_prints_the_runner_and_the_cluster(project: Path) -> None:
    job, cluster = documents(call(project, "--job-id", "nightly"))

    assert (job["kind"], cluster["kind"]) == ("Job", "DaskCluster")
    assert job["metadata"]["name"] == cluster["metadata"]["name"]
    (runner,) = job["spec"]["template"]["spec"]["containers"]
    assert runner["args"][-1] == "memory://store/jobs/demo/nightly"
    assert runner["image"] == "registry.example.com/demo:1"


def test_it_is_the_same_each_time_and_holds_no_secret(project: Path) -> None:
    first, second = (call(project, "--job-id", "nightly").stdout for _ in range(2))

    assert first == second
    assert "hunter" not in first
    assert "&id" not in first, "no anchors: people read it"


def test_it_writes_nothing_unless_told_to(project: Path) -> None:
    text = call(project, "--job-id", "nightly").stdout
    directory = JobDirectory("memory://store/jobs/demo/nightly")
    assert "--create" in text
    assert not directory.store.exists("job.json")

    again = call(project, "--job-id", "nightly", "--create").stdout

    assert directory.settings().cluster.name == "kubernetes"
    assert list(yaml.safe_load_all(again)) == list(yaml.safe_load_all(text))
    assert "--create" not in again


def test_options_are_those_of_a_submission(project: Path) -> None:
    more = ["--workers", "2-5", "--config", "a=1", "--cluster-option", "namespace=ml", "--cluster-option", "image=b:2"]
    (job,) = documents(call(project, "--job-id", "j2", "--create", "--runner-only", *more))

    assert job["metadata"]["namespace"] == "ml"
    assert job["spec"]["template"]["spec"]["containers"][0]["image"] == "b:2"
    settings = JobDirectory("memory://store/jobs/demo/j2").settings()
    assert (settings.min_workers, settings.workers, settings.config) == (2, 5, {"a": 1})


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--cluster", "local"], "only kubernetes has manifests"),
        (["--cluster-option", "namespac=a"], "did you mean namespace?"),
        (["--output", "/home/me/out"], "is a path of this machine, which pods do not have"),
    ],
)
def test_what_cannot_be(project: Path, more: list[str], words: str) -> None:
    result = call(project, *more)

    assert result.exit_code == 2
    assert words in " ".join(result.output.split())
