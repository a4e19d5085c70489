"""What pods are made of, and what becomes of a job when they go; tests/clusters has what all backends survive."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import orjson

from cortex_dask.io.job.directory import JobDirectory
from cortex_dask.io.store.store import Store
from tests.clusters.jobs import ClusterJob
from tests.clusters.kubernetes import SECRET, KubernetesBackend
from tests.kubernetes.namespace import Namespace

NewJob = Callable[..., ClusterJob]


def name_of(pod: dict[str, Any]) -> str:
    name: str = pod["metadata"]["name"]
    return name


def in_pod(namespace: Namespace, pod: str, code: str) -> Any:
    """Run Python in a pod; it prints JSON."""
    return orjson.loads(namespace.kubectl("exec", pod, "--", "python", "-c", code))


def unscheduled(pods: list[dict[str, Any]]) -> str:
    """Return why pods have no node."""
    conditions = [item for pod in pods for item in pod["status"].get("conditions", ())]
    return "; ".join(item.get("message", "") for item in conditions if item["type"] == "PodScheduled")


def test_a_pod_has_what_the_api_says(namespace: Namespace, kubernetes: KubernetesBackend, new_job: NewJob) -> None:
    node = namespace.kubectl("get", "nodes", "--output=jsonpath={.items[0].metadata.name}")
    values = {"GREETING": "hello"}
    about = {
        "handler": {"type": "python", "path": "handler.py", "env": {"FROM_HANDLER": "yes"}, "shm_size": "128Mi"},
        "compute": {"cpu": 1, "mem": "512Mi", "node_groups": [f"group-{namespace.name}"]},
        "kubernetes": {
            "env": values,
            "env_from": [{"secret": SECRET}],
            "labels": {"example.com/team": "ml"},
            "pod": {
                "metadata": {"annotations": {"example.com/note": "a note"}},
                "spec": {"tolerations": [{"key": "spot", "operator": "Exists"}], "terminationGracePeriodSeconds": 5},
            },
        },
    }
    job = new_job(gate="open", api=about)
    command = job.submit(workers="1")
    namespace.wait_for(lambda: kubernetes.pods_of(job, "worker"), "a worker's pod", 120)
    # before any node is of the group
    namespace.wait_for(lambda: "didn't match" in unscheduled(kubernetes.pods_of(job, "worker")), "a pod without a node")
    namespace.run("label", "node", node, f"cortex-dask/node-group=group-{namespace.name}")
    try:
        (call,) = job.until_calls()
    finally:
        namespace.run("label", "node", node, "cortex-dask/node-group-")

    (pod,) = kubernetes.pods_of(job, "worker")
    (container,) = pod["spec"]["containers"]
    assert container["resources"]["requests"] == {"cpu": "1", "memory": "1152Mi"}
    assert pod["metadata"]["annotations"]["example.com/note"] == "a note"
    assert {"key": "spot", "operator": "Exists"} in pod["spec"]["tolerations"]
    assert pod["spec"]["terminationGracePeriodSeconds"] == 5
    assert not [mount for mount in container["volumeMounts"] if "serviceaccount" in mount["mountPath"]]

    environ = f"dict(item.split('=', 1) for item in open('/proc/{call.pid}/environ').read().split(chr(0)) if item)"
    found = in_pod(namespace, name_of(pod), f"import json; print(json.dumps({environ}))")
    assert found["FROM_HANDLER"] == "yes"
    assert found["GREETING"] == "hello"
    assert found["AWS_SECRET_ACCESS_KEY"] == kubernetes.environment["AWS_SECRET_ACCESS_KEY"]
    size = in_pod(namespace, name_of(pod), "import shutil; print(shutil.disk_usage('/dev/shm').total)")
    # Before 1.22 a memory-backed volume has half of the node's memory, and a pod that fills more is evicted.
    assert size == 128 << 20 if namespace.server_version() >= (1, 22) else size > 128 << 20
    (shm,) = [volume for volume in pod["spec"]["volumes"] if volume["name"] == "shm"]
    assert shm["emptyDir"] == {"medium": "Memory", "sizeLimit": "128Mi"}

    (scheduler,) = kubernetes.pods_of(job, "scheduler")
    assert "affinity" not in scheduler["spec"]
    (cluster,) = namespace.items("daskclusters", f"cortex-dask/job={job.job_id}")
    assert cluster["metadata"]["labels"]["example.com/team"] == "ml"
    job.mark("open")
    assert command.wait(kubernetes.seconds) == 0, job.said()
    job.check()


def test_no_secret_is_in_a_manifest(namespace: Namespace, kubernetes: KubernetesBackend, new_job: NewJob) -> None:
    # a value that nothing else can contain
    namespace.apply_all(
        {
            "apiVersion": "v1",
            "kind": "Secret",
            "metadata": {"name": "more"},
            "stringData": {"VAULT_TOKEN": "hunter2-in-the-vault"},
        }
    )
    job = new_job(gate="open", api={"kubernetes": {"env_from": [{"secret": SECRET}, {"secret": "more"}]}})
    assert job.submit("--detach", workers="1").wait(kubernetes.seconds) == 0, job.said()
    (call,) = job.until_calls()

    kinds = "daskclusters,daskworkergroups,deployments,pods,jobs,configmaps,services,events"
    made = namespace.kubectl("get", kinds, "--output=yaml")
    (worker,) = kubernetes.pods_of(job, "worker")
    seen = in_pod(
        namespace, name_of(worker), f"import json; print(json.dumps(open('/proc/{call.pid}/environ').read()))"
    )
    job.mark("open")
    job.until_final()

    assert call.host in made
    assert "hunter2-in-the-vault" in seen
    assert "hunter2-in-the-vault" not in made
    store = Store(job.url)
    assert not [name for name in store.names() if b"hunter2" in store.read(name)]
    job.check()


def test_the_operator_replaces_lost_pods_and_the_job_continues(
    namespace: Namespace, kubernetes: KubernetesBackend, new_job: NewJob
) -> None:
    job = new_job(seconds=0.3)
    command = job.submit("--detach")
    assert command.wait(kubernetes.seconds) == 0, job.said()
    namespace.wait_for(lambda: job.segments() >= 1, "a commit", kubernetes.seconds)
    (scheduler,) = kubernetes.pods_of(job, "scheduler")
    (runner,) = kubernetes.pods_of(job, "runner")
    workers = {name_of(pod) for pod in kubernetes.pods_of(job, "worker")}

    for name in [name_of(scheduler), name_of(runner), *sorted(workers)]:
        namespace.kill_pod(name)
    document = job.until_final()

    assert document["batch_metrics"]["failed"] == 0
    result = job.check()
    assert sum(record.failed_attempts for record in result.records.values()) == 0
    assert {call.host for call in job.calls()} - workers, "others have gone on"


def test_a_node_is_drained(namespace: Namespace, kubernetes: KubernetesBackend, new_job: NewJob) -> None:
    job = new_job(gate="open", gate_from=50)
    command = job.submit()
    namespace.wait_for(lambda: len({call.host for call in job.calls()}) == 2, "two workers at work", 120)

    # with notice, as for a spot node that is reclaimed: the pods are told to end, and killed after some seconds
    for pod in kubernetes.pods_of(job, "worker"):
        namespace.kubectl("delete", "pod", name_of(pod), "--grace-period=3", "--wait=false")
    job.mark("open")

    assert command.wait(kubernetes.seconds) == 0, job.said()
    result = job.check()
    assert result.status["batch_metrics"]["failed"] == 0
    assert sum(record.failed_attempts for record in result.records.values()) == 0


def test_workers_come_when_there_is_work_and_go_when_there_is_none(
    namespace: Namespace, kubernetes: KubernetesBackend, new_job: NewJob
) -> None:
    job = new_job(gate="open", gate_from=50, files=6)
    command = job.submit(workers="0-3")
    namespace.wait_for(lambda: len({call.host for call in job.calls()}) == 3, "three workers at work", 120)

    most = len(kubernetes.pods_of(job, "worker"))
    job.mark("open")
    code = command.wait(kubernetes.seconds)

    assert code == 0, job.said()
    assert most == 3
    job.check()


def test_a_killed_submitter_leaves_nothing_for_longer_than_the_timeout(
    namespace: Namespace, kubernetes: KubernetesBackend, new_job: NewJob
) -> None:
    job = new_job(gate="never", gate_from=50)
    command = job.submit(workers="2")
    namespace.wait_for(lambda: len({call.host for call in job.calls()}) == 2, "two workers at work", 120)

    command.kill()
    began = time.monotonic()
    namespace.wait_for(
        lambda: not kubernetes.leftovers(job), "the cluster to go", kubernetes.options["idle_timeout"] + 60
    )
    took = time.monotonic() - began

    # A gap of a few seconds in the connection must not cost the cluster its life.
    assert took > kubernetes.options["idle_timeout"] / 2, took
    # It is forgotten when somebody looks.
    JobDirectory(job.url).store.delete("cluster.json")


def test_a_job_without_any_option_runs_in_the_namespace_of_the_kubeconfig(
    namespace: Namespace, kubernetes: KubernetesBackend, new_job: NewJob
) -> None:
    job = new_job(api={"handler": {"type": "python", "path": "handler.py", "image": kubernetes.options["image"]}})
    project = str(job.folder / "project")
    command = job.command(
        *("submit", project, "--input", f"{job.store.url}/in", "--output", f"{job.store.url}/out"),
        *("--job-id", job.job_id, "--batch-size", "50", "--batch-format", "pyarrow", "--cluster", "kubernetes"),
        *("--config", f"marks={job.signals.url}"),
    )
    assert command.wait(kubernetes.seconds) == 0, job.said()
    job.check()
    hosts = {call.host for call in job.calls()}
    assert len(hosts) == 1, "nothing costs money unasked"
