"""Jobs on clusters of a Dask Gateway: its restart, its limits, its options, and clusters that nobody ends."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import dask
import psutil
import pytest

from cortex_dask.clusters import records
from cortex_dask.clusters.gateway.server import GatewayApi
from tests.clusters.gateway import GatewayBackend
from tests.clusters.jobs import Call, ClusterJob, Submission, make_job
from tests.support.gateway_server import GatewayServer
from tests.support.waiting import until

NewJob = Callable[..., ClusterJob]


class Site(GatewayBackend):
    """The gateway of the test run, with the options of one test."""

    def __init__(self, folder: Path, server: GatewayServer, options: Mapping[str, Any]) -> None:
        super().__init__(folder)
        self._server = server
        self._options = options

    @property
    def options(self) -> Mapping[str, Any]:
        return {**super().options, **self._options}


@pytest.fixture
def new_job(gateway_server: GatewayServer, tmp_path: Path) -> Iterator[NewJob]:
    """Make jobs; when the test has passed, the gateway runs nothing any more."""
    jobs: list[ClusterJob] = []

    def make(api: dict[str, Any] | None = None, options: Mapping[str, Any] | None = None, **config: Any) -> ClusterJob:
        site = Site(tmp_path, gateway_server, options or {})
        jobs.append(make_job(site, tmp_path / f"job-{len(jobs)}", api=api, **config))
        return jobs[-1]

    try:
        yield make
        until(lambda: not gateway_server.clusters() and not gateway_server.processes(), "the clusters to end", 40)
    finally:
        for job in jobs:
            job.close()
        gateway_server.end_clusters()


def cluster_of(job: ClusterJob) -> str:
    record = records.find(job.url)
    assert record is not None
    return record.name


#: The first batch goes ahead, and settles the schema of the output; then all slots are filled.
AT_THE_GATE = {"gate": "open", "gate_from": 50}


def per_worker(job: ClusterJob, count: int) -> list[int]:
    """Wait until so many batches are at the gate, and return how many are there on each worker."""
    waiting: list[Call] = []

    def at_the_gate() -> bool:
        waiting[:] = [call for call in job.calls() if call.ids[-1] >= 50]
        return len(waiting) >= count

    until(at_the_gate, f"{count} batches at the gate", 60)
    return sorted(Counter(call.worker for call in waiting).values())


def ended(job: ClusterJob, command: Submission) -> None:
    assert command.wait(60) == 0, job.said()
    job.check()


# what dies ----------------------------------------------------------------------------------------------------------


def test_the_gateway_is_killed_and_comes_back(new_job: NewJob, gateway_server: GatewayServer) -> None:
    job = new_job(seconds=0.1)
    command = job.submit()
    until(lambda: job.segments() >= 1, "a commit", 60)
    cluster = cluster_of(job)

    gateway_server.kill()
    gateway_server.start()

    ended(job, command)
    assert len(gateway_server.log().split(f"Created cluster {cluster}")) == 2
    created = [line for line in gateway_server.log().splitlines() if "Created cluster" in line]
    assert cluster in created[-1], "it went on with the cluster that it had"


@pytest.mark.parametrize("names", [{}, {"env": None}], ids=["variables", "no variables"])
def test_a_killed_submitter_leaves_nothing(
    names: dict[str, Any], new_job: NewJob, gateway_server: GatewayServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DASK_CORTEX_DASK__GATEWAY", str({"options": names}))
    job = new_job(gate="open", options={"idle_timeout": 3})
    command = job.submit()
    job.until_calls()
    workers = gateway_server.workers(cluster_of(job))

    command.kill()

    gone, alive = psutil.wait_procs(workers, timeout=25)
    assert gone
    assert not alive


def test_a_job_that_is_resumed_soon_keeps_its_cluster(new_job: NewJob, gateway_server: GatewayServer) -> None:
    job = new_job(gate="open", options={"idle_timeout": 30})
    command = job.submit()
    job.until_calls()
    before = cluster_of(job)
    command.kill()

    again = job.submit()
    until(lambda: records.find(job.url) and job.status().get("coordinator", {}).get("pid") == again.pid, "it", 60)
    until(lambda: len(job.calls()) > 1, "its first split", 60)
    assert cluster_of(job) == before

    job.mark("open")
    ended(job, again)


def test_leftovers_are_found_and_ended(new_job: NewJob, gateway_server: GatewayServer) -> None:
    job = new_job(gate="open", options={"idle_timeout": 300})
    command = job.submit()
    job.until_calls()
    cluster = cluster_of(job)

    def listed(*arguments: str) -> list[dict[str, Any]]:
        asked = job.command("clusters", *arguments, "-o", "json")
        assert asked.wait(60) == 0, job.said()
        found: list[dict[str, Any]] = json.loads(asked.said())
        return found

    needed = listed("list")
    assert [(each["name"], each["job_id"], each["is_needed"]) for each in needed] == [(cluster, job.job_id, True)]
    assert listed("gc") == []

    command.kill()
    assert [each["name"] for each in listed("gc")] == [cluster]

    until(lambda: not gateway_server.processes(cluster), "its processes to end", 30)
    job.mark("open")
    ended(job, job.resume())


# what is asked for --------------------------------------------------------------------------------------------------


def test_options_reach_the_workers(new_job: NewJob, gateway_server: GatewayServer) -> None:
    # Two slots of two cores in each worker of four; more workers than the site allows.
    api = {
        "handler": {
            "type": "python",
            "path": "handler.py",
            "image": "site/torch:1",
            "env": {"COLOUR": "blue"},
        },
        "compute": {"cpu": 2, "mem": "512Mi"},
    }
    job = new_job(api, {"worker_cores": 4}, **AT_THE_GATE)
    command = job.submit(workers="4")

    assert per_worker(job, 4) == [2, 2]
    workers = gateway_server.workers(cluster_of(job))
    assert len(workers) == 2
    for worker in workers:
        line, variables = worker.cmdline(), worker.environ()
        assert line[line.index("--nthreads") + 1] == "4"
        assert line[line.index("--memory-limit") + 1] == str((2 * 512 + 256) << 20)
        assert variables["SITE_IMAGE"] == "site/torch:1"
        assert variables["COLOUR"] == "blue"
        assert variables["CORTEX_DASK_JOB"] == job.job_id
    job.mark("open")
    ended(job, command)


@pytest.mark.parametrize("declared", [True, False])
def test_gpus(declared: bool, new_job: NewJob, gateway_server: GatewayServer) -> None:
    # Whether the workers of a site say how many GPUs they have or not: as many slots as devices, on more threads.
    options = {"worker_cores": 4, "gpus": 2, "declare_gpus": declared}
    job = new_job({"compute": {"gpu": 1}}, options, **AT_THE_GATE)
    command = job.submit(workers="4")

    assert per_worker(job, 4) == [2, 2]
    assert len(gateway_server.workers(cluster_of(job))) == 2
    job.mark("open")
    ended(job, command)


def test_a_site_that_does_not_say_how_many_cores_a_worker_has(
    new_job: NewJob, gateway_server: GatewayServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DASK_CORTEX_DASK__GATEWAY", str({"options": {"cpu": None}}))
    job = new_job(options={"worker_cores": 2}, **AT_THE_GATE)
    command = job.submit(workers="4")

    assert per_worker(job, 4) == [2, 2]
    assert len(gateway_server.workers(cluster_of(job))) == 2
    job.mark("open")
    ended(job, command)


def test_more_workers_than_the_site_allows(new_job: NewJob, gateway_server: GatewayServer) -> None:
    job = new_job(**AT_THE_GATE)
    command = job.submit(workers="6")

    assert per_worker(job, 4) == [1, 1, 1, 1]
    assert len(gateway_server.workers(cluster_of(job))) == 4
    job.mark("open")
    ended(job, command)


# sizes --------------------------------------------------------------------------------------------------------------


def test_idle_workers_go_and_busy_ones_stay(gateway_server: GatewayServer, tmp_path: Path) -> None:
    from distributed import Client

    from cortex_dask.clusters.gateway import scheduler

    def wait_for(mark: str, worker: str) -> tuple[str, int]:
        """Wait for a file; returns the worker, and how often it was waited for there."""
        import pathlib
        import time

        from distributed import get_worker

        count = pathlib.Path(f"{mark} {worker.rsplit(':', 1)[1]}")
        count.write_text(count.read_text() + "." if count.exists() else ".")
        while not pathlib.Path(mark).exists():
            time.sleep(0.05)
        return get_worker().address, len(count.read_text())

    with dask.config.set(gateway_server.configuration()):
        api = GatewayApi()
        name = api.create({})
        until(lambda: (report := api.report(name)) and report.status.name == "RUNNING", "the cluster", 60)
        report = api.report(name)
        assert report is not None
        with Client(report.scheduler_address, security=report.security, set_as_default=False) as client:
            client.run_on_scheduler(scheduler.add_coordinator, client.id, 60, None)
            client.run_on_scheduler(scheduler.resize, 3)
            client.wait_for_workers(3, timeout=60)
            mark = tmp_path / "go on"
            busy = sorted(client.nthreads())[:2]
            tasks = [client.submit(wait_for, str(mark), worker, workers=[worker], pure=False) for worker in busy]
            until(lambda: sum(map(len, client.processing().values())) == 2, "the tasks to run", 30)

            client.run_on_scheduler(scheduler.resize, 1)

            until(lambda: sorted(client.nthreads()) == busy, "the idle worker to go", 30)
            mark.touch()
            assert client.gather(tasks) == [(worker, 1) for worker in busy], "each has run once, where it was"
            until(lambda: len(client.nthreads()) == 1, "one of the busy ones, idle by now, to go", 30)
        api.stop(name)
    until(lambda: not gateway_server.processes(name), "the cluster to end", 30)
