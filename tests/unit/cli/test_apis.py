"""``cortex-dask deploy``, ``delete``, and what ``get`` shows of deployed APIs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result

from cortex_dask.cli import main
from tests.support.projects import HANDLER, api_document


def command(*arguments: object, **keywords: Any) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments], **keywords)


class TestDeployCommand:
    def test_it_shows_what_is_packed_and_what_is_not(self, folder: Path) -> None:
        done = command("deploy", "project/cortex.yaml")

        assert done.exit_code == 0, done.output
        lines = done.stdout.splitlines()
        assert lines[0].startswith(f"project {folder}/project: 2 files, ")
        assert lines[1].split() == ["2.0", "KiB", "large.bin"]
        assert [line.split(maxsplit=1)[0] for line in lines if "*.tmp" in line] == ["left.tmp"]
        assert any("cortex.yaml" in line and "the API configuration" in line for line in lines)
        assert lines[-2].startswith("created tagger (BatchAPI), version ")
        assert lines[-1] == "Submit a job with: cortex-dask submit tagger --input URL --output URL"
        assert command("deploy", "project").stdout.splitlines()[-2].startswith("tagger (BatchAPI) is up to date")

    def test_as_json(self, folder: Path) -> None:
        (done,) = json.loads(command("deploy", "project", "-o", "json").stdout)
        assert (done["message"], done["error"]) == ("created tagger (BatchAPI)", "")
        assert done["project"]["files"] == 2
        assert {entry["name"] for entry in done["project"]["ignored"]} == {".cortexignore", "cortex.yaml", "left.tmp"}

    def test_a_dry_run_deploys_nothing(self, folder: Path) -> None:
        done = command("deploy", "project", "--dry-run")
        assert (done.exit_code, "large.bin" in done.stdout) == (0, True)
        assert not (folder / "store").exists()

    def test_all_apis_of_a_file(self, folder: Path) -> None:
        (folder / "project/cortex.yaml").write_text(yaml.safe_dump([api_document("a"), api_document("b")]))
        assert command("deploy", "project").exit_code == 0
        assert [line.split()[0] for line in command("get").stdout.splitlines()] == ["API", "a", "b"]

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            (["deploy", "nowhere"], "the target nowhere does not exist"),
            (["deploy", "store"], "does not exist"),
            (["delete", "tagger"], "no API 'tagger' is deployed in"),
            (["get", "tagger"], "there are no jobs of an API 'tagger'"),
            (["submit", "tagger"], "the name of a deployed API is needed"),
            (["deploy", "project", "-e", "nowhere"], "the environment 'nowhere' does not exist"),
        ],
    )
    def test_mistakes_are_one_sentence_and_2(self, folder: Path, arguments: list[str], words: str) -> None:
        done = command(*arguments)
        assert done.exit_code == 2
        assert words in done.stderr
        assert done.stderr.startswith("Error: ")
        assert len(done.stderr.splitlines()) == 1

    def test_submit_get_and_delete_by_name(self, folder: Path) -> None:
        command("deploy", "project")
        shown = command("get", "tagger").stdout
        assert "No jobs yet. Submit one with: cortex-dask submit tagger" in shown
        assert json.loads(command("get", "tagger", "-o", "json").stdout) == []

        done = command("submit", "tagger", "--input", "in.parquet", "--batch-size", 5, "--cluster", "inline")

        assert done.exit_code == 0, done.output
        (api,) = json.loads(command("get", "tagger", "-v", "-o", "json").stdout)
        (job,) = api["batch_job_statuses"]
        assert (job["status"], job["api_id"]) == ("succeeded", api["spec"]["id"])
        table = command("get").stdout.split("\n\n")
        assert [line.split() for line in table[0].splitlines()][1][-2:] == ["1", "0"]
        assert job["job_id"] in table[1]
        assert f"version   {api['spec']['id']}" in command("get", "tagger").stdout
        verbose = command("get", "tagger", "latest", "-v").stdout
        assert "path: handler.py" in verbose
        for arguments in (["tagger", "-v"], ["tagger", "-v", "-o", "json"], ["tagger", "latest", "-v"]):
            shown = command("get", *arguments).stdout
            assert "TOKEN" in shown
            assert "hush" not in shown

        assert command("delete", "tagger", "-y").stdout == "deleted tagger\n"
        assert job["job_id"] in command("get", "tagger").stdout
        assert command("delete", "tagger", job["job_id"]).stdout.endswith(": succeeded\n")

    def test_jobs_that_run_are_stopped_only_if_that_is_meant(self, folder: Path) -> None:
        (folder / "project/handler.py").write_text(HANDLER.replace("return payload", "import time; time.sleep(60)"))
        command("deploy", "project")
        begun = command("submit", "tagger", "--input", "in.parquet", "--batch-size", 5, "--workers", 1, "--detach")
        assert begun.exit_code == 0, begun.output

        refused = command("delete", "tagger")

        assert refused.exit_code == 2
        assert "1 job of it is running and is to be stopped by that; say --yes" in refused.stderr
        assert command("delete", "tagger", "--yes").stdout == "deleted tagger, and stopped 1 job\n"
        (job,) = json.loads(command("get", "tagger", "-o", "json").stdout)
        assert (job["status"], job["status_reason"]) == ("stopped", "its API was deleted")
