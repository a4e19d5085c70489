"""The Kubernetes objects of a job: what pods ask for, whose they are, and what never stands in them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

import pytest

from cortex_dask.clusters.kubernetes.manifests import (
    cluster_name,
    label_value,
    make_dask_cluster,
    make_pod,
    make_runner_job,
    scheduler_address,
    slots_per_worker,
    worker_resources,
)
from cortex_dask.clusters.kubernetes.options import KubernetesOptions
from cortex_dask.errors import SpecError
from cortex_dask.io.job.settings import ClusterSettings, ComputeSettings, HandlerSettings, JobSettings
from cortex_dask.io.job.splits import DatasetInput

URL = "s3://bucket/store/jobs/demo/job-1"
GI = 1 << 30


def settings(**said: Any) -> JobSettings:
    """Return a job's settings; ``kubernetes`` and ``options`` are those of its cluster."""
    cluster = ClusterSettings("kubernetes", options=said.pop("options", {}), kubernetes=said.pop("kubernetes", {}))
    given: dict[str, Any] = {
        "job_id": "job-1",
        "api_name": "demo",
        "api_id": "a",
        "created_time": "2026-11-23T00:00:00.000+00:00",
        "handler": HandlerSettings("project", image="registry.example.com/demo:1"),
        "dataset": DatasetInput(("s3://bucket/in",)),
        "workers": 4,
        "cluster": cluster,
        **said,
    }
    return JobSettings(**given)


def cluster_of(job: JobSettings) -> dict[str, Any]:
    return make_dask_cluster(URL, job, KubernetesOptions.from_settings(job))


def container_of(manifest: Mapping[str, Any], kind: str) -> dict[str, Any]:
    spec = manifest["spec"]
    pod = spec["template"] if kind == "runner" else spec[kind]
    (container,) = pod["spec"]["containers"]
    found: dict[str, Any] = container
    return found


def flag(args: list[str], name: str) -> str:
    return args[args.index(name) + 1]


# what a worker asks for -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("compute", "requests", "limits"),
    [
        (ComputeSettings(), {"cpu": "200m", "memory": "512Mi"}, {}),
        (ComputeSettings(cpu=1.5), {"cpu": "1500m", "memory": "512Mi"}, {"cpu": "2500m"}),
        (ComputeSettings(memory=2 * GI), {"cpu": "200m", "memory": "2560Mi"}, {"memory": "2560Mi"}),
        (ComputeSettings(memory=2 * GI, shm=GI), {"cpu": "200m", "memory": "3584Mi"}, {"memory": "3584Mi"}),
        (ComputeSettings(memory=1000), {"cpu": "200m", "memory": "536871912"}, {"memory": "536871912"}),
        (ComputeSettings(gpu=2), {"cpu": "200m", "memory": "512Mi"}, {"nvidia.com/gpu": "2"}),
        (ComputeSettings(inf=3), {"cpu": "200m", "memory": "512Mi"}, {"aws.amazon.com/neuron": "3"}),
        (
            ComputeSettings(cpu=1, memory=GI, gpu=0.5),
            {"cpu": "2000m", "memory": "2560Mi"},
            {"cpu": "3000m", "memory": "2560Mi", "nvidia.com/gpu": "1"},
        ),
    ],
)
def test_what_a_worker_asks_for(compute: ComputeSettings, requests: dict[str, str], limits: dict[str, str]) -> None:
    resources = worker_resources(compute)

    assert resources["requests"] == requests
    assert resources.get("limits", {}) == limits


@pytest.mark.parametrize(("gpu", "slots"), [(0, 1), (1, 1), (4, 1), (0.5, 2), (1 / 3, 3), (0.3, 3), (0.1, 10)])
def test_slots_of_a_pod(gpu: float, slots: int) -> None:
    assert slots_per_worker(ComputeSettings(gpu=gpu)) == slots


def test_a_worker_says_what_it_has() -> None:
    args = container_of(cluster_of(settings(compute=ComputeSettings(gpu=0.5))), "worker")["args"]

    assert args[:2] == ["dask", "worker"]
    assert flag(args, "--nthreads") == "2"
    assert flag(args, "--memory-limit") == "0"
    assert flag(args, "--resources") == "GPU=1"
    assert flag(args, "--name") == "$(DASK_WORKER_NAME)"


def test_without_gpus_nobody_speaks_of_them() -> None:
    text = json.dumps(cluster_of(settings()))

    assert "GPU" not in text
    assert "nvidia" not in text


def test_the_scheduler_asks_for_no_gpu() -> None:
    job = settings(
        compute=ComputeSettings(gpu=1, inf=1),
        kubernetes={"pod": {"spec": {"containers": [{"resources": {"limits": {"nvidia.com/gpu": 4}}}]}}},
    )
    manifest = cluster_of(job)

    assert container_of(manifest, "worker")["resources"]["limits"]["nvidia.com/gpu"] == 4
    for container in (
        container_of(manifest, "scheduler"),
        container_of(make_runner_job(URL, job, KubernetesOptions.from_settings(job)), "runner"),
    ):
        assert "limits" not in container["resources"]
        assert set(container["resources"]["requests"]) == {"cpu", "memory"}


def test_a_device_for_the_scheduler_is_refused() -> None:
    scheduler = {"spec": {"containers": [{"resources": {"limits": {"nvidia.com/gpu": 1}}}]}}

    with pytest.raises(SpecError, match=r"kubernetes\.scheduler: found nvidia\.com/gpu"):
        cluster_of(settings(kubernetes={"scheduler": scheduler}))


def test_shared_memory_is_a_volume() -> None:
    manifest = cluster_of(settings(compute=ComputeSettings(gpu=0.5, shm=64 << 20)))

    assert manifest["spec"]["worker"]["spec"]["volumes"] == [
        {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": "128Mi"}}
    ]
    assert container_of(manifest, "worker")["volumeMounts"] == [{"name": "shm", "mountPath": "/dev/shm"}]
    assert "volumes" not in manifest["spec"]["scheduler"]["spec"]


def test_node_groups_are_for_workers() -> None:
    job = settings(compute=ComputeSettings(node_groups=("gpus",)), kubernetes={"node_group_label": "pool"})
    manifest = cluster_of(job)

    assert '"key": "pool", "operator": "In", "values": ["gpus"]' in json.dumps(manifest["spec"]["worker"])
    assert "affinity" not in manifest["spec"]["scheduler"]["spec"]


# the cluster ----------------------------------------------------------------------------------------------------------


def test_workers_come_when_there_is_a_scheduler() -> None:
    manifest = cluster_of(settings(workers=50, options={"idle_timeout": 90.5}))

    assert manifest["spec"]["worker"]["replicas"] == 0
    assert manifest["spec"]["idleTimeout"] == 91


def test_the_operator_finds_what_it_needs() -> None:
    manifest = cluster_of(settings())
    scheduler = manifest["spec"]["scheduler"]

    assert {port["name"]: port["port"] for port in scheduler["service"]["ports"]} == {
        "tcp-comm": 8786,
        "http-dashboard": 8787,
    }
    assert scheduler["service"]["selector"]["dask.org/cluster-name"] == manifest["metadata"]["name"]
    variables = {item["name"]: item["value"] for item in container_of(manifest, "scheduler")["env"]}
    routes = variables["DASK_DISTRIBUTED__SCHEDULER__HTTP__ROUTES"]
    assert variables["DASK_DISTRIBUTED__ADMIN__LOW_LEVEL_LOG_LENGTH"] == "20"
    assert "distributed.http.scheduler.api" in routes, "the operator asks there how long it has been idle"
    assert "distributed.http.health" in routes, "the probes ask there"
    assert scheduler_address("a", "b") == "tcp://a-scheduler.b.svc.cluster.local:8786"


def test_whose_a_cluster_is() -> None:
    metadata = cluster_of(settings(job_id="Nightly_2026.11", kubernetes={"labels": {"team": "x"}}))["metadata"]

    assert metadata["labels"] == {
        "team": "x",
        "app.kubernetes.io/managed-by": "cortex-dask",
        "cortex-dask/api": "demo",
        "cortex-dask/job": "Nightly_2026.11",
    }
    assert metadata["annotations"]["cortex-dask/job-url"] == URL
    assert "ownerReferences" not in metadata
    owner = {"apiVersion": "batch/v1", "kind": "Job", "name": "a", "uid": "u"}
    job = settings()
    assert make_dask_cluster(URL, job, KubernetesOptions.from_settings(job), owner=owner)["metadata"][
        "ownerReferences"
    ] == [owner]


@pytest.mark.parametrize(
    "job_id", ["job-1", "x" * 80, "Nightly_2026-11-23", "..", "20261123-235054-2ebfad", "ä", "a-" * 40, "-"]
)
@pytest.mark.parametrize("api_name", ["demo", "a" * 63, "0-0"])
def test_names_are_what_the_operator_takes(job_id: str, api_name: str) -> None:
    name = cluster_name(f"{URL}/{job_id}", settings(job_id=job_id, api_name=api_name))

    assert re.fullmatch(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?", name)
    assert len(name) <= 53
    assert re.fullmatch(r"([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9]|", label_value(job_id))


def test_names_differ_where_job_directories_do() -> None:
    job = settings(job_id="x" * 80)

    assert cluster_name(URL, job) == cluster_name(URL, job)
    assert cluster_name(URL, job) != cluster_name(f"{URL}2", job)


def test_a_cluster_that_would_be_made_differently_is_told_apart() -> None:
    prints = [
        cluster_of(settings(**said))["metadata"]["annotations"]["cortex-dask/fingerprint"]
        for said in ({}, {"workers": 9}, {"compute": ComputeSettings(cpu=1)}, {"options": {"image": "other:2"}})
    ]

    assert prints[0] == prints[1], "its size is nothing that it is made with"
    assert len(set(prints)) == 3


# secrets and variables ------------------------------------------------------------------------------------------------


def test_secrets_are_named_and_no_value_of_the_handler_is_there() -> None:
    job = settings(
        handler=HandlerSettings("project", env={"API_TOKEN": "hunter2"}, image="a:1"),
        config={"password": "hunter3"},
        kubernetes={"env_from": [{"secret": "aws"}, {"config_map": "plain"}], "env": {"REGION": "eu-west-1"}},
    )
    options = KubernetesOptions.from_settings(job)
    cluster, runner = make_dask_cluster(URL, job, options), make_runner_job(URL, job, options)

    assert "hunter" not in json.dumps([cluster, runner])
    for container in (container_of(cluster, "worker"), container_of(runner, "runner")):
        assert container["envFrom"] == [{"secretRef": {"name": "aws"}}, {"configMapRef": {"name": "plain"}}]
        assert {"name": "REGION", "value": "eu-west-1"} in container["env"]
    assert "envFrom" not in container_of(cluster, "scheduler")


def test_handlers_get_no_token_of_the_api_server() -> None:
    manifest = cluster_of(settings(options={"service_account": "s3-reader"}))

    assert manifest["spec"]["worker"]["spec"]["serviceAccountName"] == "s3-reader"
    assert manifest["spec"]["worker"]["spec"]["automountServiceAccountToken"] is False
    assert "serviceAccountName" not in manifest["spec"]["scheduler"]["spec"]


# templates ------------------------------------------------------------------------------------------------------------


def test_templates_are_laid_over_the_pods() -> None:
    job = settings(
        kubernetes={
            "pod": {
                "metadata": {"annotations": {"a": "everywhere"}},
                "spec": {"tolerations": [{"key": "spot"}], "nodeSelector": {"gpu": "yes"}},
            },
            "worker": {"spec": {"containers": [{"resources": {"limits": {"memory": "9Gi"}}}]}},
            "runner": {"metadata": {"labels": {"b": "runner"}}, "spec": {"priorityClassName": "high"}},
        }
    )
    options = KubernetesOptions.from_settings(job)
    cluster, runner = make_dask_cluster(URL, job, options), make_runner_job(URL, job, options)
    worker, scheduler, template = cluster["spec"]["worker"], cluster["spec"]["scheduler"], runner["spec"]["template"]

    for pod in (worker, scheduler, template):
        assert pod["metadata"]["annotations"]["a"] == "everywhere"
        assert pod["spec"]["tolerations"] == [{"key": "spot"}]
    assert worker["spec"]["nodeSelector"] == {"gpu": "yes"}
    assert "nodeSelector" not in scheduler["spec"]
    assert "nodeSelector" not in template["spec"]
    assert container_of(cluster, "worker")["resources"]["limits"]["memory"] == "9Gi"
    assert template["spec"]["priorityClassName"] == "high"
    assert template["metadata"]["labels"]["b"] == "runner"
    assert template["metadata"]["labels"]["cortex-dask/component"] == "runner"


# the runner -----------------------------------------------------------------------------------------------------------


def test_a_runner_is_started_again() -> None:
    job = settings()
    manifest = make_runner_job(URL, job, KubernetesOptions.from_settings(job), retry=True)
    pod = manifest["spec"]["template"]["spec"]

    assert manifest["metadata"]["name"] == cluster_of(job)["metadata"]["name"]
    assert pod["restartPolicy"] == "OnFailure"
    assert manifest["spec"]["backoffLimit"] > 5
    assert manifest["spec"]["ttlSecondsAfterFinished"]
    assert pod["serviceAccountName"] == "cortex-dask"
    assert container_of(manifest, "runner")["args"][-2:] == [URL, "--retry"]


# the published schemas ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", ["1.28", "1.35"])
def test_the_published_schemas_take_the_runner_and_all_pods(version: str) -> None:
    kubernetes_validate = pytest.importorskip("kubernetes_validate")
    job = settings(
        compute=ComputeSettings(cpu=1, memory=GI, gpu=0.5, inf=1, shm=GI, node_groups=("a",)),
        kubernetes={
            "namespace": "ml",
            "service_account": "runner",
            "image_pull_secrets": ["registry"],
            "env_from": [{"secret": "aws"}],
            "env": {"A": "b"},
            "pod": {"spec": {"tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists"}]}},
        },
        options={"image_pull_policy": "Always"},
    )
    options = KubernetesOptions.from_settings(job)
    cluster, runner = make_dask_cluster(URL, job, options), make_runner_job(URL, job, options)
    pods = [make_pod(template, "x") for template in (cluster["spec"]["worker"], cluster["spec"]["scheduler"])]

    for manifest in (runner, *pods):
        kubernetes_validate.validate(manifest, version, strict=True)
    broken = json.loads(json.dumps(runner))
    broken["spec"]["template"]["spec"]["containers"][0]["resorces"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(broken, version, strict=True)
