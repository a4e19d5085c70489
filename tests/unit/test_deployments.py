"""Deployed APIs in a store, and what the command line does with them and with environments."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import click
import dask.cli
import dask.config
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from click.testing import CliRunner, Result

from cortex_dask.cli import main
from cortex_dask.deployments import ApiVersions, pack_dependencies
from cortex_dask.errors import JobNotFoundError
from cortex_dask.io.store.store import Store
from cortex_dask.spec import resolution
from cortex_dask.spec.api import parse_api
from cortex_dask.spec.target import from_archive, from_class_spec, from_spec

HANDLER = """\
class Handler:
    def __init__(self, config):
        self.config = config

    def handle_batch(self, payload):
        return payload
"""


class ByClass:
    def __init__(self, config):
        self.config = config

    def handle_batch(self, payload):
        return payload


def document(name: str = "tagger", **keys: Any) -> dict[str, Any]:
    handler = {"type": "python", "path": "handler.py", **keys.pop("handler", {})}
    return {"name": name, "kind": "BatchAPI", "handler": handler, **keys}


@pytest.fixture
def project(tmp_path: Path) -> Path:
    folder = tmp_path / "project"
    folder.mkdir()
    (folder / "handler.py").write_text(HANDLER)
    (folder / "large.bin").write_bytes(os.urandom(2048))
    (folder / ".cortexignore").write_text("*.tmp\n")
    (folder / "left.tmp").write_text("")
    return folder


def deploy(apis: ApiVersions, project: Path, **keys: Any) -> tuple[Any, str]:
    api = parse_api(document(**keys))
    return apis.add(api, from_spec(api, project))


class TestStore:
    def test_an_api_is_found_again_from_anywhere(self, store_url: str, project: Path) -> None:
        keys = {
            "handler": {"config": {"a": {"b": [1, "ü"]}}, "env": {"A": "1"}},
            "compute": {"cpu": "200m", "mem": "1Gi"},
        }
        job = {"input": "data/in", "batch_size": 7, "output": "out", "filters": [["x", ">", 5]], "workers": 3}
        made, change = deploy(ApiVersions(Store(store_url)), project, **keys, job=job)

        apis = ApiVersions(Store(store_url))
        assert (change, apis.names()) == ("created", ["tagger"])
        assert apis.get("tagger") == made
        found = apis.target("tagger")
        api = parse_api(document(**keys, job=job))
        packed = from_spec(api, project)
        assert (found.handler, found.config, found.compute) == (packed.handler, packed.config, packed.compute)
        assert (found.api_id, found.folder) == (packed.api_id, project)
        assert found.archive is not None
        assert packed.archive is not None
        assert (found.archive.hash, found.archive.data) == (packed.archive.hash, packed.archive.data)
        before, after = resolution.resolve(packed, job_id="j").settings, resolution.resolve(found, job_id="j").settings
        assert {**before.to_json(), "created_time": ""} == {**after.to_json(), "created_time": ""}
        assert after.dataset.paths == (str(project / "data/in"),)

    def test_the_same_again_changes_nothing(self, store_url: str, project: Path) -> None:
        store = Store(store_url)
        apis = ApiVersions(store)
        first, _ = deploy(apis, project)
        stored = {name: store.read(name) for name in store.names()}
        os.utime(project / "handler.py", (0, 0))

        again, change = deploy(apis, project)

        assert (again, change) == (first, "unchanged")
        assert {name: store.read(name) for name in store.names()} == stored

    def test_another_content_is_another_version(self, tmp_path: Path, project: Path) -> None:
        apis = ApiVersions(Store(str(tmp_path / "store")))
        first, _ = deploy(apis, project)
        (project / "handler.py").write_text(HANDLER + "\n")
        second, change = deploy(apis, project)
        third, _ = deploy(apis, project, handler={"config": {"a": 1}})
        (project / "handler.py").write_text(HANDLER)
        back, _ = deploy(apis, project)

        assert change == "updated"
        assert len({first.api_id, second.api_id, third.api_id}) == 3
        assert back.api_id == first.api_id
        assert [version["api_id"] for version in back.versions] == [first.api_id, third.api_id, second.api_id]
        assert back.created_time == first.created_time < back.updated_time
        assert apis.spec("tagger", third.api_id) is not None
        assert apis.spec("tagger", "0" * 16) is None

    def test_other_defaults_for_submissions_are_an_update_too(self, tmp_path: Path, project: Path) -> None:
        apis = ApiVersions(Store(str(tmp_path / "store")))
        deploy(apis, project, job={"input": "a"})
        _, change = deploy(apis, project, job={"input": "b"})

        assert change == "updated"
        assert resolution.resolve(apis.target("tagger")).settings.dataset.paths == (str(project / "b"),)

    def test_a_class_and_what_it_needs(self, store_url: str) -> None:
        apis = ApiVersions(Store(store_url))
        api = parse_api(document(handler={"env": {"A": "1"}, "log_level": "debug"}))
        made = from_class_spec(ByClass, api, pack_dependencies(["numpy<3"], ["conda-forge::zlib=1"]))
        apis.add(api, made)

        found = apis.target("tagger")
        assert (found.handler, found.pickled) == (made.handler, made.pickled)
        assert found.handler.kind == "class"
        assert found.handler.extra["dependencies"] == {"pip": "requirements.txt", "conda": "conda-packages.txt"}
        assert (found.handler.env, found.handler.log_level) == ({"A": "1"}, "debug")
        other = parse_api(document(handler={"log_level": "error"}))
        patched = from_archive(other, found)
        assert patched.handler.log_level == "error"
        assert patched.handler.extra == found.handler.extra
        assert (patched.pickled, patched.archive) == (found.pickled, found.archive)
        assert patched.api_id != found.api_id

    def test_a_patched_project_is_the_same_archive(self, tmp_path: Path, project: Path) -> None:
        (project / ".env").write_text("A=1\n")
        (project / "link.py").symlink_to("handler.py")
        apis = ApiVersions(Store(str(tmp_path / "store")))
        deploy(apis, project)
        before = apis.target("tagger")

        after = from_archive(parse_api(document(handler={"config": {"a": 1}})), before)

        assert after.handler.project == before.handler.project
        assert after.api_id != before.api_id

    @pytest.mark.parametrize("keep_cache", [False, True])
    def test_delete(self, store_url: str, project: Path, keep_cache: bool) -> None:
        store = Store(store_url)
        apis = ApiVersions(store)
        made, _ = deploy(apis, project)
        deploy(apis, project, name="other")

        apis.remove("tagger", keep_cache=keep_cache)

        assert apis.names() == ["other"]
        assert apis.find("tagger") is None
        assert store.exists(f"apis/tagger/{made.api_id}/project.tar.gz") is keep_cache

    def test_an_unknown_name_names_the_known_ones(self, tmp_path: Path, project: Path) -> None:
        apis = ApiVersions(Store(str(tmp_path / "store")))
        with pytest.raises(JobNotFoundError, match=r"no API 'x' is deployed in .*/store; deployed there: none"):
            apis.get("x")
        deploy(apis, project)
        with pytest.raises(JobNotFoundError, match="did you mean tagger"):
            apis.target("tager")

    def test_a_damaged_api_says_what_to_do(self, tmp_path: Path, project: Path) -> None:
        apis = ApiVersions(Store(str(tmp_path / "store")))
        made, _ = deploy(apis, project)
        (tmp_path / "store/apis/tagger" / made.api_id / "version.json").unlink()
        with pytest.raises(JobNotFoundError, match=r"version\.json is missing; deploy it again"):
            apis.get("tagger")


# the command line ---------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path, project: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    (project / "cortex.yaml").write_text(yaml.safe_dump([document(handler={"env": {"TOKEN": "hush"}})]))
    pq.write_table(pa.table({"x": range(10)}), tmp_path / "in.parquet")
    monkeypatch.chdir(tmp_path)
    with dask.config.set({"cortex-dask.store": str(tmp_path / "store")}):
        yield tmp_path


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
        (folder / "project/cortex.yaml").write_text(yaml.safe_dump([document("a"), document("b")]))
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


def test_completion_completes_commands_and_options() -> None:
    def complete(words: str, position: int) -> str:
        environment = {**os.environ, "_CORTEX_DASK_COMPLETE": "bash_complete", "COMP_WORDS": words}
        code = "from cortex_dask.cli import main; main(prog_name='cortex-dask')"
        done = subprocess.run(
            [sys.executable, "-c", code],
            env={**environment, "COMP_CWORD": str(position)},
            capture_output=True,
            text=True,
            timeout=60,
        )
        return done.stdout

    assert set(complete("cortex-dask de", 1).split()) == {"plain,deploy", "plain,delete"}
    names = ("configure", "list", "default", "rename", "delete")
    assert set(complete("cortex-dask env ", 2).split()) == {f"plain,{name}" for name in names}
    assert "plain,--yes" in complete("cortex-dask deploy --", 2).split()


def test_dask_finds_the_command_line() -> None:
    """``dask cortex …``: the entry point names a click group, and Dask's own command line takes it."""
    written = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]["entry-points"]
    (name,) = written["dask_cli"]
    entry = EntryPoint(name, written["dask_cli"][name], "dask_cli")
    group = click.Group("dask")
    dask.cli._register_command_ep(group, entry)

    done = CliRunner().invoke(group, ["cortex", "version"])
    assert (done.exit_code, done.output.split()[0]) == (0, "cortex-dask")
