"""``examples/scheduled``: the nightly script on a real gateway: again, twice at once, and while that restarts."""

from __future__ import annotations

import datetime
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml

from cortex_dask.io.job.directory import JobDirectory
from cortex_dask.spec.api import load_apis
from tests.faults.jobs import ROOT
from tests.support.gateway_server import GatewayServer
from tests.support.waiting import until

EXAMPLE = Path(ROOT, "examples", "scheduled")
DAY = "2026-11-22"
ROWS = 4_000

pytestmark = pytest.mark.skipif(shutil.which("sh") is None, reason="the script is one for a shell")


class Night:
    """The folders of one night, and the processes that work on it."""

    def __init__(self, folder: Path, server: GatewayServer, seconds: float) -> None:
        self.folder = folder
        self.job = JobDirectory(str(folder / "store" / "jobs" / "revenue" / f"nightly-{DAY}"))
        (folder / "orders" / DAY).mkdir(parents=True)
        for part in range(4):
            ids = range(part * ROWS // 4, (part + 1) * ROWS // 4)
            orders = pd.DataFrame(
                {"id": ids, "price": [n % 7 + 1.0 for n in ids], "quantity": [n % 3 + 1 for n in ids]}
            )
            orders.to_parquet(folder / "orders" / DAY / f"{part}.parquet", row_group_size=250)
        project = folder / "project"
        shutil.copytree(EXAMPLE / "project", project)
        handler = project / "handler.py"
        slow = f"        __import__('time').sleep({seconds})\n        return "
        handler.write_text(handler.read_text().replace("        return ", slow))
        self._environment = {
            **os.environ,
            **server.variables(),
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": ROOT,
            "DASK_CORTEX_DASK__CACHE": str(folder / "cache"),
            "INPUT": str(folder / "orders"),
            "OUTPUT": str(folder / "revenue"),
            "STORE": str(folder / "store"),
            "PROJECT": str(project),
            "PAUSE": "1",
        }
        self._started: list[subprocess.Popen[str]] = []

    def start(self, *arguments: str, **variables: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            ["sh", str(EXAMPLE / "nightly.sh"), *(arguments or (DAY,))],
            env={**self._environment, **variables},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self._started.append(process)
        return process

    def run(self, *arguments: str, **variables: str) -> tuple[int, str]:
        return ended(self.start(*arguments, **variables))

    def segments(self) -> int:
        return len(self.job.store.names("ledger/"))

    def coordinator(self) -> Any:
        return (self.job.read_json("status.json") or {}).get("coordinator")

    def check(self) -> None:
        """Each order is there once, with its revenue."""
        assert (self.folder / "revenue" / DAY / "_SUCCESS").exists()
        found = pd.read_parquet(self.folder / "revenue" / DAY).sort_values("id")
        assert found["id"].tolist() == list(range(ROWS))
        assert (found["revenue"] == found["price"] * found["quantity"]).all()

    def close(self) -> None:
        for process in self._started:
            process.kill()
            process.wait()
            assert process.stdout is not None
            process.stdout.close()


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    said, _ = process.communicate(timeout=120)
    return process.returncode, said


@pytest.fixture
def night(gateway_server: GatewayServer, tmp_path: Path) -> Iterator[Callable[..., Night]]:
    nights: list[Night] = []

    def make(seconds: float = 0.0) -> Night:
        nights.append(Night(tmp_path, gateway_server, seconds))
        return nights[-1]

    try:
        yield make
        until(lambda: not gateway_server.clusters() and not gateway_server.processes(), "the clusters to end", 40)
    finally:
        for each in nights:
            each.close()
        gateway_server.end_clusters()


def test_once_a_night_however_often_it_is_run(night: Callable[..., Night]) -> None:
    tonight = night()

    assert tonight.run()[0] == 0
    tonight.check()
    first = tonight.coordinator()
    again = tonight.run()

    assert again[0] == 0, again[1]
    assert tonight.coordinator() == first, "nothing was run again"


def test_two_at_once_wait_for_the_same_job(night: Callable[..., Night]) -> None:
    tonight = night(seconds=0.2)
    one = tonight.start()
    until(tonight.segments, "a commit", 60)

    other = tonight.run()

    assert other[0] == 0, other[1]
    assert ended(one)[0] == 0
    tonight.check()
    status = tonight.job.read_json("status.json")
    assert status["batch_metrics"] == {**status["batch_metrics"], "succeeded": status["total_batch_count"], "failed": 0}


def test_the_gateway_restarts_in_the_middle(night: Callable[..., Night], gateway_server: GatewayServer) -> None:
    tonight = night(seconds=0.2)
    script = tonight.start()
    until(tonight.segments, "a commit", 60)

    gateway_server.kill()
    gateway_server.start()

    code, said = ended(script)
    assert code == 0, said
    tonight.check()


def test_the_gateway_is_down_when_it_begins(night: Callable[..., Night], gateway_server: GatewayServer) -> None:
    tonight = night()
    gateway_server.kill()
    try:
        script = tonight.start(TRIES="60")
        assert script.stdout is not None
        said = iter(script.stdout.readline, "")
        assert any("attempt 2" in line for line in said), "it says that it tries again"
    finally:
        gateway_server.start()

    code, rest = ended(script)
    assert code == 0, rest
    tonight.check()


def test_exit_codes(night: Callable[..., Night], gateway_server: GatewayServer) -> None:
    tonight = night()

    code, said = tonight.run("2026-11-21")
    assert code == 2, said  # there is no such day in the input
    assert "2026-11-21" in said
    assert tonight.run(INPUT="")[0] == 2
    gateway_server.kill()
    try:
        code, said = tonight.run(TRIES="2")
    finally:
        gateway_server.start()
    assert code == 1, said
    assert said.count("cannot be reached") == 2
    code, said = tonight.run(DASK_GATEWAY__AUTH__KWARGS__PASSWORD="guessed", TRIES="1")
    assert code == 1, said
    assert "password" in said


def test_a_batch_that_fails_for_good(night: Callable[..., Night]) -> None:
    tonight = night()
    handler = tonight.folder / "project" / "handler.py"
    fault = "        if payload['id'].min() == 0:\n            raise ValueError(payload)\n        return "
    handler.write_text(handler.read_text().replace("        return ", fault))

    code, said = tonight.run()

    assert code == 3, said


def test_the_project_is_one() -> None:
    (api,) = load_apis(str(EXAMPLE / "project" / "cortex.yaml"))

    assert api.name == "revenue"


def test_the_cronjob() -> None:
    (manifest,) = yaml.safe_load_all((EXAMPLE / "cronjob.yaml").read_text())
    pod = manifest["spec"]["jobTemplate"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]

    assert manifest["kind"] == "CronJob"
    (rule,) = manifest["spec"]["jobTemplate"]["spec"]["podFailurePolicy"]["rules"]
    assert rule["onExitCodes"]["containerName"] == container["name"]
    assert pod["restartPolicy"] == "Never"  # a failure policy needs it
    for variable in container["env"]:
        assert "PASSWORD" not in variable["name"] or "secretKeyRef" in variable["valueFrom"]
        assert "SECRET" not in variable["name"] or "secretKeyRef" in variable["valueFrom"]


def test_the_cronjob_is_valid() -> None:
    kubernetes_validate = pytest.importorskip("kubernetes_validate")
    (manifest,) = yaml.safe_load_all((EXAMPLE / "cronjob.yaml").read_text())

    kubernetes_validate.validate(manifest, kubernetes_validate.latest_version(), strict=True)


@pytest.mark.skipif(sys.platform != "linux", reason="the image has the date of GNU")
def test_the_day_of_the_cronjob(tmp_path: Path) -> None:
    # Kubernetes names the Job of a schedule after the minute that it was scheduled for.
    (manifest,) = yaml.safe_load_all((EXAMPLE / "cronjob.yaml").read_text())
    (container,) = manifest["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"]
    fake = tmp_path / "cortex-dask"
    fake.write_text('#!/bin/sh\necho "$@"\n')
    fake.chmod(0o755)
    scheduled = datetime.datetime(2026, 11, 23, 2, 15, tzinfo=datetime.UTC)
    name = f"nightly-{int(scheduled.timestamp() // 60)}"

    said = subprocess.run(
        [*container["command"], *container["args"]],
        env={"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", "JOB_NAME": name},
        capture_output=True,
        text=True,
        check=True,
    ).stdout

    assert f"--job-id nightly-{DAY} " in said
    assert f"--input s3://orders/{DAY} --output s3://revenue/{DAY}" in said
