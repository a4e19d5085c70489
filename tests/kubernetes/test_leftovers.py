"""``cortex-dask clusters``: what is left over is found, and goes when it is told to."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable

import orjson
import pytest

from cortex_dask.io.job.directory import JobDirectory
from cortex_dask.job import Job
from tests.clusters.jobs import ClusterJob, Submission
from tests.clusters.kubernetes import KubernetesBackend
from tests.kubernetes.namespace import Namespace

NewJob = Callable[..., ClusterJob]


def result(command: Submission) -> str:
    assert command.wait(60) == 0, command.said()
    return command.said()


def test_a_cluster_whose_submitter_was_killed(
    namespace: Namespace, kubernetes: KubernetesBackend, new_job: NewJob
) -> None:
    job = new_job(gate="open")
    command = job.submit("--cluster-option", "idle_timeout=3600")
    job.until_calls()

    (running,) = orjson.loads(result(job.command("clusters", "list", "-o", "json")))
    assert (running["backend"], running["job_id"], running["is_needed"]) == ("kubernetes", job.job_id, True)
    assert running["where"] == namespace.name
    assert "0 ended; 1 runs" in result(job.command("clusters", "gc"))
    assert kubernetes.workers(job) == 2

    command.kill()
    assert "without a coordinator" in result(job.command("clusters", "list"))
    assert "1 would be ended" in result(job.command("clusters", "gc", "--dry-run"))
    assert kubernetes.workers(job) == 2
    assert "1 ended" in result(job.command("clusters", "gc"))
    namespace.wait_for(lambda: not kubernetes.leftovers(job), "the cluster to go", 60)
    assert "No clusters run" in result(job.command("clusters", "list"))

    job.mark("open")
    assert job.resume().wait(kubernetes.seconds) == 0, job.said()
    job.check()


def test_a_runner_that_has_ended(namespace: Namespace, kubernetes: KubernetesBackend, new_job: NewJob) -> None:
    job = new_job()
    assert job.submit("--detach").wait(kubernetes.seconds) == 0, job.said()
    job.until_final()
    namespace.wait_for(lambda: not kubernetes.leftovers(job), "the runner to end", 60)

    (pod,) = kubernetes.pods_of(job, "runner")
    assert "succeeded" in namespace.kubectl("logs", pod["metadata"]["name"])
    assert "1 ended" in result(job.command("clusters", "gc"))

    namespace.wait_for(lambda: not kubernetes.pods_of(job, "runner"), "the runner's pod to go", 60)
    assert not namespace.items("jobs", f"cortex-dask/job={job.job_id}")
    assert JobDirectory(job.url).read_json("cluster.json") is None
    assert "0 ended" in result(job.command("clusters", "gc"))
    job.check()


@pytest.mark.parametrize("how", ["--wait", "--detach"])
def test_a_job_that_is_stopped_leaves_nothing(
    how: str, namespace: Namespace, kubernetes: KubernetesBackend, new_job: NewJob
) -> None:
    job = new_job(gate="never")
    command = job.submit(how, "--cluster-option", "idle_timeout=3600")
    job.until_calls()

    assert job.stop().wait(60) == 0, job.said()
    command.wait(60)

    namespace.wait_for(lambda: not job.leftovers(), "nothing to be left", 60)


def test_a_command_that_is_interrupted_before_its_cluster_is_up(
    namespace: Namespace, kubernetes: KubernetesBackend, new_job: NewJob
) -> None:
    job = new_job(api={"compute": {"mem": "9000Gi"}})
    command = job.submit("--cluster-option", "idle_timeout=3600")
    namespace.wait_for(lambda: kubernetes.pods_of(job, "scheduler"), "the scheduler's pod")

    os.kill(command.pid, signal.SIGINT)

    assert command.wait(60) == 130, job.said()
    namespace.wait_for(lambda: not job.leftovers(), "nothing to be left", 60)


def test_a_detached_job_that_is_deleted_takes_its_cluster_along(
    namespace: Namespace, kubernetes: KubernetesBackend, new_job: NewJob
) -> None:
    job = new_job(gate="open")
    assert job.submit("--detach", "--cluster-option", "idle_timeout=3600").wait(kubernetes.seconds) == 0, job.said()
    job.until_calls()

    namespace.kubectl("delete", "jobs", f"--selector=cortex-dask/job={job.job_id}", "--wait=false")

    namespace.wait_for(lambda: not kubernetes.leftovers(job), "nothing to be left", 60)
    namespace.wait_for(lambda: not Job(job.url).is_live(), "its coordinator to be taken for dead", 120)
    job.mark("open")
    assert job.resume().wait(kubernetes.seconds) == 0, job.said()
    job.check()
