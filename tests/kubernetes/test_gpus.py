"""GPUs that are counted, and not there: who gets them, and what is said when there are not enough."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.clusters.jobs import ClusterJob
from tests.clusters.kubernetes import KubernetesBackend
from tests.kubernetes.namespace import Item, Namespace

NewJob = Callable[..., ClusterJob]

_GPU = "nvidia.com/gpu"

#: There are only two of them, for all tests.
pytestmark = pytest.mark.xdist_group("gpus")


@pytest.fixture(autouse=True)
def two_gpus(namespace: Namespace) -> None:
    text = namespace.kubectl("get", "nodes", r"--output=jsonpath={.items[*].status.allocatable.nvidia\.com/gpu}")
    if sum(map(int, text.split())) != 2:
        pytest.skip(
            f"needs exactly 2 {_GPU} in the cluster, found {text or 'none'}; a node of a test cluster can be told to "
            "have some: docs/kubernetes.md says how"
        )


def gpus_of(pod: Item) -> list[str]:
    return [
        container["resources"]["limits"][_GPU]
        for container in pod["spec"]["containers"]
        if _GPU in container["resources"].get("limits", {})
    ]


def test_splits_run_where_a_gpu_is(namespace: Namespace, kubernetes: KubernetesBackend, new_job: NewJob) -> None:
    job = new_job(gate="open", gate_from=50, api={"compute": {"gpu": 1}})
    command = job.submit(workers="2")
    namespace.wait_for(lambda: len({(call.host, call.pid) for call in job.calls()}) == 2, "two handlers at work", 120)
    calls = job.calls()

    workers, (scheduler,) = kubernetes.pods_of(job, "worker"), kubernetes.pods_of(job, "scheduler")
    job.mark("open")

    assert [gpus_of(pod) for pod in workers] == [["1"], ["1"]]
    assert gpus_of(scheduler) == []
    assert {call.host for call in calls} == {pod["metadata"]["name"] for pod in workers}
    assert command.wait(kubernetes.seconds) == 0, job.said()
    job.check()


def test_two_handlers_share_a_gpu(namespace: Namespace, kubernetes: KubernetesBackend, new_job: NewJob) -> None:
    job = new_job(gate="open", gate_from=50, api={"compute": {"gpu": 0.5}})
    command = job.submit(workers="2")
    namespace.wait_for(lambda: len({(call.host, call.pid) for call in job.calls()}) == 2, "two handlers at work", 120)
    calls = job.calls()

    workers = kubernetes.pods_of(job, "worker")
    job.mark("open")

    assert [gpus_of(pod) for pod in workers] == [["1"]]
    assert len({call.host for call in calls}) == 1
    assert len({call.pid for call in calls}) == 2
    assert command.wait(kubernetes.seconds) == 0, job.said()
    job.check()


def test_a_gpu_comes_from_nothing_when_there_is_work(kubernetes: KubernetesBackend, new_job: NewJob) -> None:
    job = new_job(api={"compute": {"gpu": 1}})

    assert job.submit("--detach", workers="0-2").wait(kubernetes.seconds) == 0, job.said()
    job.until_final()

    job.check()


def test_more_gpus_than_any_node_has(kubernetes: KubernetesBackend, new_job: NewJob) -> None:
    job = new_job(api={"compute": {"gpu": 3}})

    command = job.submit("--cluster-option", "start_timeout=20", workers="1")

    assert command.wait(90) == 1, job.said()
    said = " ".join(command.said().split())
    assert "Insufficient nvidia.com/gpu" in said
    assert "nvidia.com/gpu 3" in said, "what it asks for"
    assert "20 s" in said
    assert "Traceback" not in said
