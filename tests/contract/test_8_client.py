"""CONTRACT 8, the Python client: in handlers, where it points at the job's own environment, and outside."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import dask.config
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import cortex_dask as cx
from tests.support.waiting import lives, until

FIRST = """\
import json
import os
import sys

import cortex


class Handler:
    def __init__(self, config, job_spec):
        self.config = config
        assert "dask" not in sys.modules
        assert "cortex_dask.client" not in sys.modules
        os.environ["SET_BY_THE_HANDLER"] = "1"

    def handle_batch(self, payload):
        return payload

    def on_job_complete(self):
        client = cortex.client()
        result = client.deploy(
            {
                "name": "second",
                "kind": "BatchAPI",
                "handler": {
                    "type": "python",
                    "path": "handler.py",
                    "config": {"factor": 3, "release": self.config["release"]},
                },
            },
            project_dir="second",
        )
        job = client.submit("second", self.config["input"], self.config["output"], workers=2, batch_size=10)
        report = {
            "environments": cortex.env_list(),
            "env_name": client.env_name,
            "deployed": result,
            "job": job,
            "apis": [api["spec"]["name"] for api in client.list_apis()],
            "pid": os.getpid(),
        }
        with open(self.config["report"], "w") as file:
            json.dump(report, file)
"""

SECOND = """\
import os
import time


class Handler:
    def __init__(self, config):
        self.config = config
        self.leaked = [name for name in ("SET_BY_THE_HANDLER", "SET_BY_DOTENV", "SET_BY_YAML") if name in os.environ]

    def handle_batch(self, payload):
        while not os.path.exists(self.config["release"]):  # until the first job has ended
            time.sleep(0.05)
        return payload.assign(y=payload["x"] * self.config["factor"], leaked=",".join(self.leaked))
"""

PLAIN = """\
class Handler:
    def __init__(self, config):
        self.config = config

    def handle_batch(self, payload):
        return [{"x": row["x"], "tag": self.config.get("tag")} for row in payload]
"""

SLOW = """\
import time
from pathlib import Path


class Handler:
    def __init__(self, config):
        Path(config["started"]).touch()

    def handle_batch(self, payload):
        time.sleep(60)
"""


def write_project(folder: Path, handler: str, files: dict[str, str] | None = None) -> Path:
    for name, text in {"handler.py": handler, **(files or {})}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def spec(name: str, **handler: Any) -> dict[str, Any]:
    return {"name": name, "kind": "BatchAPI", "handler": {"type": "python", "path": "handler.py", **handler}}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with an input of 100 rows, whose ``store`` is that of the default environment."""
    pq.write_table(pa.table({"x": range(100)}), tmp_path / "in.parquet")
    monkeypatch.setenv("DASK_CORTEX_DASK__STORE", str(tmp_path / "nobody's"))  # of those who do not know better
    with dask.config.set({"cortex-dask.store": str(tmp_path / "store")}):
        yield tmp_path


@pytest.fixture(params=["this machine", "a Dask cluster"])
def cluster(request: pytest.FixtureRequest) -> Iterator[str]:
    """Where both jobs run: the environment's cluster, and that of another process."""
    if request.param == "this machine":
        yield "local"
        return
    from distributed import LocalCluster

    # Its pages are served in any case: None would mean port 8787, which may be taken.
    with LocalCluster(n_workers=1, threads_per_worker=2, dashboard_address="127.0.0.1:0", host="127.0.0.1") as made:
        yield made.scheduler_address


def test_a_handler_deploys_an_api_and_submits_a_job_that_outlives_it(folder: Path, cluster: str) -> None:
    project = write_project(folder / "project", FIRST, {"second/handler.py": SECOND, ".env": "SET_BY_DOTENV=1\n"})
    config = {
        "input": str(folder / "in.parquet"),
        "output": str(folder / "second-out"),
        "report": str(folder / "report.json"),
        "release": str(folder / "release"),
    }
    (project / "cortex.yaml").write_text(json.dumps([spec("first", config=config, env={"SET_BY_YAML": "1"})]))

    source, options = folder / "in.parquet", {"workers": 1, "batch_size": 50, "progress": False}
    first = cx.run(project, source, folder / "first-out", cluster=cluster, **options)

    report = json.loads((folder / "report.json").read_text())
    assert first.status == "succeeded"
    second = cx.Client().get_job("second", report["job"]["job_id"])
    until(lambda: not lives(report["pid"]), "the first handler process to end")
    assert second.describe()["end_time"] is None
    (folder / "release").touch()
    second.wait(60)
    assert second.status == "succeeded"
    coordinator = second.describe()["coordinator"]["pid"]
    assert coordinator not in (os.getpid(), report["pid"])
    table = second.to_arrow()
    assert sorted(table["y"].to_pylist()) == [3 * x for x in range(100)]
    assert set(table["leaked"].to_pylist()) == {""}
    assert pq.read_table(folder / "second-out").num_rows == 100
    until(lambda: not lives(coordinator), "the second coordinator to leave")

    assert report["deployed"]["message"] == "created second (BatchAPI)"
    assert report["apis"] == ["second"]
    assert report["env_name"] == "local"
    assert report["environments"][0]["operator_endpoint"] == str(folder / "store")
    assert not (folder / "nobody's").exists()
    assert second.settings.api_id == report["deployed"]["api"]["spec"]["id"]
    assert second.settings.environment == {"name": "local", "cluster": cluster}


class Doubler:
    """A handler as a class."""

    def __init__(self, config):
        self.factor = config["factor"]

    def handle_batch(self, payload):
        return payload.assign(y=payload["x"] * self.factor)


class TestClient:
    def test_deploy_get_list(self, folder: Path) -> None:
        client = cx.Client()
        project = write_project(folder / "project", PLAIN)

        created = client.deploy(spec("tagger", config={"tag": 1}), str(project), force=True, wait=False)
        again = client.deploy(spec("tagger", config={"tag": 1}), str(project))

        assert (created["message"], again["message"]) == (
            "created tagger (BatchAPI)",
            "tagger (BatchAPI) is up to date",
        )
        assert created["error"] == ""
        api = client.get_api("tagger")
        assert again["api"] == created["api"] == api
        assert set(api) >= {"spec", "endpoint", "api_versions", "batch_job_statuses"}
        assert api["spec"]["handler"]["config"] == {"tag": 1}
        assert api["api_versions"][0]["api_id"] == api["spec"]["id"]
        assert client.list_apis() == [api]

    def test_a_job_keeps_the_version_that_it_was_submitted_with(self, folder: Path) -> None:
        client = cx.Client()
        project = write_project(folder / "project", PLAIN)
        one = client.deploy(spec("tagger", config={"tag": 1}), project)
        source = folder / "in.parquet"
        options = {"workers": 1, "batch_size": 50, "batch_format": "records"}
        before = client.submit("tagger", source, folder / "out-1", **options)
        two = client.deploy(spec("tagger", config={"tag": 2}), project)
        after = client.submit("tagger", source, folder / "out-2", **options)
        before.wait(60)
        after.wait(60)

        assert two["message"] == "updated tagger (BatchAPI)"
        assert set(before.to_pandas()["tag"]) == {1}
        assert set(after.to_pandas()["tag"]) == {2}
        ids = [one["api"]["spec"]["id"], two["api"]["spec"]["id"]]
        assert [before.settings.api_id, after.settings.api_id] == ids
        api = client.get_api("tagger")
        assert [version["api_id"] for version in api["api_versions"]] == ids[::-1]
        assert [status["job_id"] for status in api["batch_job_statuses"]] == [after.job_id, before.job_id]

    def test_deploy_batch_api_with_a_class(self, folder: Path) -> None:
        client = cx.Client()
        api_spec = {"name": "doubler", "kind": "BatchAPI", "handler": {"config": {"factor": 2}}}

        client.deploy_batch_api(api_spec, Doubler)
        job = client.run("doubler", folder / "in.parquet", folder / "out", workers=1, batch_size=50, progress=False)

        assert sorted(job.to_pandas()["y"]) == [2 * x for x in range(100)]
        api_spec["handler"] = {"config": {"factor": 5}}
        assert client.patch(api_spec)["message"] == "updated doubler (BatchAPI)"
        job = client.run("doubler", folder / "in.parquet", folder / "more", workers=1, batch_size=50, progress=False)
        assert sorted(job.to_pandas()["y"]) == [5 * x for x in range(100)]

    def test_patch_keeps_the_project(self, folder: Path) -> None:
        client = cx.Client()
        project = write_project(folder / "project", PLAIN, {"values.json": "{}"})
        before = client.deploy(spec("tagger", config={"tag": 1}), project)["api"]
        for path in project.iterdir():
            path.unlink()

        after = client.patch(spec("tagger", config={"tag": 7}))

        assert after["api"]["spec"]["handler"]["config"] == {"tag": 7}
        assert after["api"]["spec"]["id"] != before["spec"]["id"]
        assert client.patch(spec("tagger", config={"tag": 1}))["api"]["spec"]["id"] == before["spec"]["id"]
        with pytest.raises(cx.SpecError, match=r"handler\.path: there is no file other\.py"):
            client.patch({**spec("tagger"), "handler": {"path": "other.py"}})

    def test_delete_stops_the_jobs(self, folder: Path) -> None:
        client = cx.Client()
        project = write_project(folder / "project", SLOW)
        client.deploy(spec("slow", config={"started": str(folder / "started")}), project)
        job = client.detach("slow", folder / "in.parquet", workers=1, batch_size=100)
        until((folder / "started").exists, "the handler to start")

        client.delete("slow", keep_cache=True)

        document = client.get_job("slow", job.job_id).describe()
        assert (document["status"], document["status_reason"]) == ("stopped", "its API was deleted")
        assert client.list_apis() == []
        assert list((folder / "store/apis/slow").glob("*/project.tar.gz"))
        with pytest.raises(cx.JobNotFoundError, match="no API 'slow' is deployed"):
            client.get_api("slow")
        client.deploy(spec("slow", config={"started": "x"}), project)
        client.delete("slow")
        assert not list(folder.glob("store/apis/slow/**/*.*"))

    def test_stop_job_and_stream_job_logs(self, folder: Path) -> None:
        client = cx.Client()
        project = write_project(folder / "project", SLOW.replace("time.sleep(60)", 'print("seen"); time.sleep(60)'))
        client.deploy(spec("slow", config={"started": str(folder / "started")}), project)
        job = client.detach("slow", folder / "in.parquet", workers=1, batch_size=100)

        lines = client.stream_job_logs("slow", job.job_id)
        assert next(line for line in lines if "seen" in line)
        client.stop_job("slow", job.job_id)

        assert job.status == "stopped"
        assert list(lines) is not None


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda client, folder: client.get_api("x"), "no API 'x' is deployed in"),
        (lambda client, folder: client.delete("x"), "no API 'x' is deployed in"),
        (lambda client, folder: client.patch(spec("x")), "no API 'x' is deployed in"),
        (lambda client, folder: client.deploy(spec("x")), "project_dir: is missing"),
        (lambda client, folder: client.deploy(spec("x"), folder), "there is no file handler.py in"),
        (lambda client, folder: client.deploy(spec("No name"), folder), "name"),
        (lambda client, folder: client.deploy({**spec("x"), "hander": 1}, folder), "did you mean handler"),
        (lambda client, folder: client.deploy_batch_api({"name": "x", "kind": "BatchAPI"}, "Handler"), "a class is"),
        (lambda client, folder: client.submit("x"), "x does not exist"),
        (lambda client, folder: client.detach(Doubler, folder / "in.parquet", cluster="inline"), "inline is"),
    ],
)
def test_mistakes_are_one_sentence(folder: Path, call: Callable[[cx.Client, Path], Any], message: str) -> None:
    with pytest.raises((cx.InputError, cx.JobNotFoundError)) as raised:
        call(cx.Client(), folder)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


# in the words of Cortex ---------------------------------------------------------------------------------------------

AS_CORTEX = """\
import json
import os
import sys

import cortex
from cortex.exceptions import NotFound


class Handler:
    def __init__(self, config):
        self.config = config

    def handle_batch(self, payload):
        pass

    def on_job_complete(self):
        before = [environment["name"] for environment in cortex.env_list()]
        other = cortex.new_client("other", self.config["other"])
        other.deploy_batch_api({"name": "doubler", "kind": "BatchAPI", "handler": {"config": {"factor": 2}}}, Doubler)
        job = other.submit("doubler", self.config["input"], self.config["output"], workers=1, batch_size=50)
        other.stream_job_logs("doubler", job["job_id"])
        cortex.client("other").stop_job("doubler", job["job_id"])  # it has ended, and stays as it is
        found = other.get_job("doubler", job["job_id"])
        other.patch({"name": "doubler", "kind": "BatchAPI", "handler": {"config": {"factor": 3}}})
        versions = len(other.get_api("doubler")["api_versions"])
        other.delete("doubler")
        cortex.env_delete("other")
        try:
            other.get_api("doubler")
        except NotFound as error:
            print("not found", error)
        after = [environment["name"] for environment in cortex.env_list()]
        report = {"before": before, "after": after, "found": found, "apis": other.list_apis(), "versions": versions}
        with open(self.config["report"], "w") as file:
            json.dump(report, file)


class Doubler:
    def __init__(self, config):
        self.factor = config["factor"]

    def handle_batch(self, payload):
        print("doubling")
        return payload.assign(y=payload["x"] * self.factor)
"""


def test_all_that_cortex_offered(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DASK_CONFIG", str(folder / "dask"))
    keys = {"other": "other-store", "input": "in.parquet", "output": "out", "report": "report.json"}
    config = {key: str(folder / name) for key, name in keys.items()}
    project = write_project(folder / "project", AS_CORTEX, {"cortex.yaml": json.dumps([spec("first", config=config)])})

    job = cx.run(project, folder / "in.parquet", workers=1, batch_size=50, progress=False)

    report = json.loads((folder / "report.json").read_text())
    assert (report["before"], report["after"]) == (["local"], ["local"])
    found = report["found"]
    assert found["job_status"]["status"] == "succeeded"
    assert found["api_spec"]["handler"]["config"] == {"factor": 2}
    assert found["endpoint"].startswith(str(folder / "other-store/jobs/doubler"))
    assert (report["apis"], report["versions"]) == ([], 2)
    messages = [line["message"] for line in job.log_lines()]
    assert sum("doubling" in message for message in messages) == 2, "the log of the other job was streamed"
    assert any(message.startswith("not found no API 'doubler' is deployed") for message in messages)
    assert sorted(pq.read_table(folder / "out")["y"].to_pylist()) == [2 * x for x in range(100)]


class WithPackages:
    def __init__(self, config):
        import tinypkg

        self.config = {**config, "version": tinypkg.VERSION}

    def handle_batch(self, payload):
        return payload.assign(version=self.config["version"], prefix=sys.prefix)

    def on_job_complete(self):
        import cortex

        cortex.client().submit("plain", self.config["input"], self.config["output"], workers=1, job_id="after")


class Plain:
    def __init__(self, config):
        pass

    def handle_batch(self, payload):
        return payload.assign(prefix=sys.prefix, variable=os.environ.get("VIRTUAL_ENV", ""))


def test_a_class_with_requirements_of_its_own(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.support.packages import write_wheel

    monkeypatch.setenv("DASK_CORTEX_DASK__CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("VIRTUAL_ENV", raising=False)
    write_wheel(tmp_path / "wheels", "tinypkg", "2.0")
    client = cx.Client()
    client.deploy_batch_api({"name": "plain", "kind": "BatchAPI"}, Plain)
    config = {"input": str(folder / "in.parquet"), "output": str(folder / "after")}
    api_spec = {"name": "first", "kind": "BatchAPI", "handler": {"config": config}}
    requirements = ["--no-index", f"--find-links {tmp_path / 'wheels'}", "tinypkg==2.0"]
    client.deploy_batch_api(api_spec, WithPackages, requirements=requirements)

    job = client.run("first", folder / "in.parquet", folder / "out", workers=1, batch_size=50, progress=False)

    made = job.to_pandas()
    assert set(made["version"]) == {"2.0"}
    assert set(made["prefix"]) != {sys.prefix}, "it runs in an interpreter of its own"
    after = client.get_job("plain", "after").wait(60).to_pandas()
    assert (set(after["prefix"]), set(after["variable"])) == ({sys.prefix}, {""}), "and what it submits does not"
    assert len(after) == 100


def test_a_job_in_the_calling_thread_has_its_client_too(folder: Path) -> None:
    class Handler:
        def __init__(self, config):
            pass

        def handle_batch(self, payload):
            import cortex

            return [{"store": cortex.client().env["operator_endpoint"]}] * len(payload)

    with dask.config.set({"cortex-dask.environments": {"other": {"store": str(folder / "other")}}}):
        options = {"cluster": "inline", "env": "other", "workers": 1, "batch_size": 50, "progress": False}
        job = cx.run(Handler, folder / "in.parquet", folder / "out", batch_format="records", **options)

    assert set(job.to_pandas()["store"]) == {str(folder / "other")}


def test_the_names_are_those_of_the_handler_process_only() -> None:
    done = subprocess.run([sys.executable, "-c", "import cortex"], capture_output=True, text=True, timeout=60)
    assert "No module named 'cortex'" in done.stderr
