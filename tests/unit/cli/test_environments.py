"""``cortex-dask env``, in processes of its own: Dask reads its configuration when it is imported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


class TestEnvironments:
    @pytest.fixture
    def cli(self, tmp_path: Path):
        """Run the command line in processes of their own: Dask reads its configuration when it is imported."""

        def call(*arguments: str, code: int = 0, **variables: str) -> str:
            environment = {name: value for name, value in os.environ.items() if not name.startswith(("DASK_", "XDG_"))}
            environment |= {"HOME": str(tmp_path), "DASK_CONFIG": str(tmp_path / "dask"), **variables}
            done = subprocess.run(
                [sys.executable, "-m", "cortex_dask", *arguments],
                env=environment,
                capture_output=True,
                text=True,
                timeout=60,
            )
            assert done.returncode == code, done.stderr
            return done.stdout if code == 0 else done.stderr

        return call

    def test_the_life_of_an_environment(self, cli, tmp_path: Path, folder: Path) -> None:
        store = str(tmp_path / "aws")
        assert cli("env", "configure", "aws", "--operator-endpoint", store) == (
            f"configured aws: store {store}, cluster local\n"
        )
        assert cli("env", "default", "aws") == "the default environment is aws\n"
        assert cli("env", "default") == "aws\n"
        assert cli("deploy", "project", "--yes").splitlines()[-2].startswith("created tagger")
        assert (tmp_path / "aws/apis/tagger/api.json").exists()
        assert cli("env", "rename", "aws", "production") == "renamed aws to production (the default one)\n"
        listed = json.loads(cli("env", "list", "-o", "json"))
        assert [(item["name"], item["is_default"]) for item in listed] == [("local", False), ("production", True)]
        assert cli("env", "list").splitlines()[2].split() == ["*", "production", store, "local"]
        assert "tagger" in cli("get", "-e", "production")
        assert "No jobs in the environment local" in cli("get", "--env", "local")
        assert cli("env", "delete", "production").startswith("deleted production; its store is left as it is")
        assert (tmp_path / "aws/apis/tagger/api.json").exists()

    def test_variables_go_over_it(self, cli, tmp_path: Path) -> None:
        variables = {
            "DASK_CORTEX_DASK__DEFAULT": "ci",
            "DASK_CORTEX_DASK__ENVIRONMENTS__CI__STORE": "s3://user:hush@bucket/x",
        }
        shown = cli("env", "list", **variables)
        assert shown.splitlines()[2].split() == ["*", "ci", "s3://…@bucket/x", "local"]

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            (["env", "configure", "a", "--store", "x", "--cluster", "moon"], "cluster: 'moon' is no cluster"),
            (["env", "configure", "a b", "--store", "x"], "the environment's name 'a b' cannot be used"),
            (["env", "delete", "local"], "the environment local is always there"),
            (["env", "rename", "x", "y"], "the environment 'x' does not exist"),
            (["env", "configure", "a"], "Missing option '--store'"),
        ],
    )
    def test_mistakes_are_2(self, cli, arguments: list[str], words: str) -> None:
        assert words in cli(*arguments, code=2)
