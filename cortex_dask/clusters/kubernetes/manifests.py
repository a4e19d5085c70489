"""The Kubernetes objects of a job, made of its settings, without any request.

Two objects make a job run: a ``DaskCluster`` of the Dask operator, and, for a job that outlives its submitter, a
``Job`` with one pod, the *runner*, which is the coordinator and owns the cluster.

The resources of a worker's pod:

- CPU: ``cpu`` for each slot as request, and one more as limit, for the Dask worker and for reading and writing beside
  the handler; 200m as request, and no limit, where the API has no ``cpu``.
- Memory: ``mem`` for each slot, plus ``shm_size``, which the kernel counts as memory of the pod, plus 512 MiB for the
  Dask worker itself, as request and as limit. The handler process is held to ``mem`` by its supervisor before the
  kernel would kill the pod. Where the API has no ``mem``, 512 MiB as request, and no limit.
- ``gpu`` as ``nvidia.com/gpu``, ``inf`` as ``aws.amazon.com/neuron``.
- One pod is one Dask worker with one slot; with ``gpu: 0.5`` it has one GPU and two slots.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from typing import Any

from cortex_dask.clusters.kubernetes.options import NAMESPACE_VARIABLE, KubernetesOptions
from cortex_dask.clusters.kubernetes.pod_template import merge_template, with_node_groups, without_machine_requirements
from cortex_dask.errors import SpecError
from cortex_dask.io.job.settings import ComputeSettings, JobSettings

#: Labels and annotations of all objects of a job.
MANAGED = {"app.kubernetes.io/managed-by": "cortex-dask"}
API_LABEL = "cortex-dask/api"
JOB_LABEL = "cortex-dask/job"
COMPONENT_LABEL = "cortex-dask/component"
#: Set in a runner's pod: its own name, by which it finds the ``Job`` that it belongs to.
POD_VARIABLE = "CORTEX_DASK_POD"

_CPU_REQUEST = "200m"  # Cortex' default
_WORKER_MEMORY = 512 << 20  # bytes for the Dask worker beside its handler processes: it takes about 250 MB
_WORKER_MILLICORES = 1000  # as limit, for the Dask worker: with less, it takes half a minute to import its packages
_SCHEDULER_REQUESTS = {"cpu": "200m", "memory": "512Mi"}
_RUNNER_REQUESTS = {"cpu": "200m", "memory": "512Mi"}
_MAX_NAME_LENGTH = 53  # the operator appends "-scheduler", and a Service's name has at most 63 characters
_RUNNER_RETRIES = 20  # restarts of a runner whose node was lost, or that crashed
_RUNNER_TTL = 3600  # seconds; from Kubernetes 1.23 on, a finished runner is removed after this time
_COMM_PORT, _HTTP_PORT = 8786, 8787
_PREFIX = re.compile(r"[^a-z0-9]+")

#: The operator asks the scheduler over HTTP how long it has been idle, which is independent of versions; without this
#: route it falls back to Dask's own protocol, which works only where its Dask is like the image's.
_ROUTES = [
    "distributed.http.scheduler.api",
    "distributed.http.scheduler.prometheus",
    "distributed.http.scheduler.info",
    "distributed.http.scheduler.json",
    "distributed.http.health",
    "distributed.http.proxy",
    "distributed.http.statics",
]


def cluster_name(job_url: str, settings: JobSettings) -> str:
    """Return the name of a job's cluster and of its runner, always the same for a job directory."""
    digest = _digest(job_url)
    words = _PREFIX.sub("-", f"{settings.api_name[:24]}-{settings.job_id.lower()}").strip("-")
    name = f"{words[: _MAX_NAME_LENGTH - 9].rstrip('-')}-{digest}"
    return name if name[0].isalnum() else f"job-{digest}"


def scheduler_address(name: str, namespace: str) -> str:
    """Return the scheduler's address for pods."""
    return f"tcp://{name}-scheduler.{namespace}.svc.cluster.local:{_COMM_PORT}"


def slots_per_worker(compute: ComputeSettings) -> int:
    """Return how many slots a worker's pod has: one, or as many as share a GPU.

    >>> [slots_per_worker(ComputeSettings(gpu=gpu)) for gpu in (0, 2, 0.5)]
    [1, 1, 2]
    """
    return int(1 / compute.gpu + 1e-9) if 0 < compute.gpu < 1 else 1


def worker_resources(compute: ComputeSettings) -> dict[str, dict[str, str]]:
    """Return ``requests`` and ``limits`` of a worker's container."""
    slots = slots_per_worker(compute)
    requests = {"cpu": _CPU_REQUEST, "memory": _bytes(_WORKER_MEMORY)}
    limits = {}
    if compute.cpu is not None:
        requests["cpu"] = f"{math.ceil(compute.cpu * slots * 1000)}m"
        limits["cpu"] = f"{math.ceil(compute.cpu * slots * 1000) + _WORKER_MILLICORES}m"
    if compute.memory is not None:
        requests["memory"] = limits["memory"] = _bytes((compute.memory + (compute.shm or 0)) * slots + _WORKER_MEMORY)
    # Only as limits: Kubernetes copies the requests of devices from them, and knows no fractions of devices.
    if compute.gpu:
        limits["nvidia.com/gpu"] = str(math.ceil(compute.gpu))
    if compute.inf:
        limits["aws.amazon.com/neuron"] = str(compute.inf * slots)
    return {"requests": requests, **({"limits": limits} if limits else {})}


# objects --------------------------------------------------------------------------------------------------------------


def make_dask_cluster(
    job_url: str, settings: JobSettings, options: KubernetesOptions, *, owner: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Return the ``DaskCluster`` of a job, with an ``ownerReferences`` entry for what it is removed with.

    It has no workers at first: the operator removes only clusters whose scheduler reports that it is idle, so workers
    that wait for a scheduler that never runs would stay, and cost money.
    """
    name = cluster_name(job_url, settings)
    worker, scheduler = _worker_template(settings, options), _scheduler_template(options)
    selector = {"dask.org/cluster-name": name, "dask.org/component": "scheduler"}
    ports = [
        {"name": "tcp-comm", "protocol": "TCP", "port": _COMM_PORT, "targetPort": "tcp-comm"},
        {"name": "http-dashboard", "protocol": "TCP", "port": _HTTP_PORT, "targetPort": "http-dashboard"},
    ]
    metadata = _metadata(name, job_url, settings, options)
    if owner is not None:
        metadata["ownerReferences"] = [dict(owner)]
    spec = {
        "idleTimeout": math.ceil(options.idle_timeout),
        "scheduler": {**scheduler, "service": {"type": "ClusterIP", "selector": selector, "ports": ports}},
        "worker": {"replicas": 0, **worker},
    }
    # By this a coordinator compares the cluster of an earlier one with what it would create.
    metadata["annotations"]["cortex-dask/fingerprint"] = _digest(json.dumps(spec, sort_keys=True))
    return {"apiVersion": "kubernetes.dask.org/v1", "kind": "DaskCluster", "metadata": metadata, "spec": spec}


def make_runner_job(
    job_url: str, settings: JobSettings, options: KubernetesOptions, *, retry: bool = False
) -> dict[str, Any]:
    """Return the ``Job`` whose pod runs the coordinator, and is restarted when it dies."""
    name = cluster_name(job_url, settings)
    metadata = _metadata(name, job_url, settings, options)
    template = _runner_template(job_url, options, retry=retry)
    labels = {**metadata["labels"], COMPONENT_LABEL: "runner", "sidecar.istio.io/inject": "false"}
    template_metadata = {
        "labels": {**template.get("metadata", {}).get("labels", {}), **labels},
        "annotations": {**metadata["annotations"], **template.get("metadata", {}).get("annotations", {})},
    }
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": metadata,
        "spec": {
            "backoffLimit": _RUNNER_RETRIES,
            "ttlSecondsAfterFinished": _RUNNER_TTL,
            "template": {"metadata": template_metadata, "spec": template["spec"]},
        },
    }


def make_pod(template: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return a ``Pod`` made of a template, for the API server to check."""
    metadata = {"generateName": f"{name[:40].rstrip('-')}-check-", **template.get("metadata", {})}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": template["spec"]}


# templates ------------------------------------------------------------------------------------------------------------


def _worker_template(settings: JobSettings, options: KubernetesOptions) -> dict[str, Any]:
    compute = settings.compute
    args = ["dask", "worker", "--name", "$(DASK_WORKER_NAME)"]
    args += ["--nthreads", str(slots_per_worker(compute)), "--no-nanny"]
    args += ["--memory-limit", "0"]  # supervisors watch the memory of handler processes, which hold the rows
    args += ["--no-dashboard", "--dashboard-address", ":8788"]
    if compute.gpu:
        args += ["--resources", f"GPU={math.ceil(compute.gpu)}"]
    container: dict[str, Any] = {
        **_container("worker", options, args),
        "resources": worker_resources(compute),
        "ports": [{"name": "http-dashboard", "containerPort": 8788, "protocol": "TCP"}],
        **_environment(options),
    }
    spec: dict[str, Any] = {"containers": [container], "automountServiceAccountToken": False, **_pod_defaults(options)}
    if options.service_account:
        spec["serviceAccountName"] = options.service_account
    if compute.shm:
        size = _bytes(compute.shm * slots_per_worker(compute))
        spec["volumes"] = [{"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": size}}]
        container["volumeMounts"] = [{"name": "shm", "mountPath": "/dev/shm"}]  # noqa: S108 - a mount, no temporary file
    template = _with_templates({"spec": spec}, options, "worker")
    if compute.node_groups:
        template["spec"] = with_node_groups(template["spec"], compute.node_groups, options.node_group_label)
    return template


def _scheduler_template(options: KubernetesOptions) -> dict[str, Any]:
    args = ["dask", "scheduler", "--host", "0.0.0.0", "--port", str(_COMM_PORT)]  # noqa: S104 - of its own pod
    args += ["--dashboard-address", f":{_HTTP_PORT}"]
    health = {"httpGet": {"port": "http-dashboard", "path": "/health"}}
    container = {
        **_container("scheduler", options, args),
        "env": [
            {"name": "DASK_DISTRIBUTED__SCHEDULER__HTTP__ROUTES", "value": repr(_ROUTES)},
            # The log of messages and transitions is for Dask's developers, and takes a hundred megabytes by default.
            {"name": "DASK_DISTRIBUTED__ADMIN__LOW_LEVEL_LOG_LENGTH", "value": "20"},
        ],
        "resources": {"requests": dict(_SCHEDULER_REQUESTS)},
        "ports": [
            {"name": "tcp-comm", "containerPort": _COMM_PORT, "protocol": "TCP"},
            {"name": "http-dashboard", "containerPort": _HTTP_PORT, "protocol": "TCP"},
        ],
        "readinessProbe": {**health, "periodSeconds": 1, "timeoutSeconds": 10},
        "livenessProbe": {**health, "periodSeconds": 20, "timeoutSeconds": 10, "failureThreshold": 6},
    }
    spec = {"containers": [container], "automountServiceAccountToken": False, **_pod_defaults(options)}
    return _with_templates({"spec": spec}, options, "scheduler")


def _runner_template(job_url: str, options: KubernetesOptions, *, retry: bool) -> dict[str, Any]:
    args = ["python", "-m", "cortex_dask.clusters.kubernetes.runner_main", job_url, *(["--retry"] if retry else [])]
    identity = [
        {"name": NAMESPACE_VARIABLE, "valueFrom": {"fieldRef": {"fieldPath": "metadata.namespace"}}},
        {"name": POD_VARIABLE, "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}},
    ]
    variables = _environment(options)
    container = {
        **_container("runner", options, args),
        "resources": {"requests": dict(_RUNNER_REQUESTS)},
        **variables,
        "env": [*variables.get("env", []), *identity],
    }
    spec = {
        "containers": [container],
        "restartPolicy": "OnFailure",
        "serviceAccountName": options.runner_account,
        **_pod_defaults(options),
    }
    return _with_templates({"spec": spec}, options, "runner")


def _container(name: str, options: KubernetesOptions, args: list[str]) -> dict[str, Any]:
    policy = {"imagePullPolicy": options.image_pull_policy} if options.image_pull_policy else {}
    return {"name": name, "image": options.image, **policy, "args": args}


def _pod_defaults(options: KubernetesOptions) -> dict[str, Any]:
    secrets = [{"name": name} for name in options.image_pull_secrets]
    # Variables for each Service of the namespace slow the start down, and may clash with names that the handler reads.
    return {"enableServiceLinks": False, **({"imagePullSecrets": secrets} if secrets else {})}


def _environment(options: KubernetesOptions) -> dict[str, Any]:
    sources: list[dict[str, Any]] = [
        {"secretRef": {"name": source["secret"]}}
        if "secret" in source
        else {"configMapRef": {"name": source["config_map"]}}
        for source in options.env_from
    ]
    values = [{"name": name, "value": value} for name, value in options.env.items()]
    return {**({"env": values} if values else {}), **({"envFrom": sources} if sources else {})}


def _with_templates(template: dict[str, Any], options: KubernetesOptions, kind: str) -> dict[str, Any]:
    """Merge the user's templates over ours."""
    for_all_pods = options.templates.get("pod", {})
    if kind != "worker":
        for_all_pods = without_machine_requirements(for_all_pods)
    for over in (for_all_pods, options.templates.get(kind, {})):
        template = merge_template(template, over, main=kind)
    if kind == "scheduler" and (devices := _devices(template)):
        raise SpecError(
            f"kubernetes.scheduler: found {devices}; the scheduler has no use for a device: name it under "
            "kubernetes.worker, or in compute"
        )
    return template


def _devices(template: Mapping[str, Any]) -> str:
    """Return the names of requested devices, which are the resources whose name has a domain."""
    requested = [
        name
        for container in template["spec"]["containers"]
        for kind in ("requests", "limits")
        for name in (container.get("resources") or {}).get(kind) or {}
        if "/" in name
    ]
    return ", ".join(sorted(set(requested)))


def _metadata(name: str, job_url: str, settings: JobSettings, options: KubernetesOptions) -> dict[str, Any]:
    labels = {
        **options.labels,
        **MANAGED,
        API_LABEL: label_value(settings.api_name),
        JOB_LABEL: label_value(settings.job_id),
    }
    annotations = {
        **options.annotations,
        "cortex-dask/api-name": settings.api_name,
        "cortex-dask/job-id": settings.job_id,
        "cortex-dask/job-url": job_url,
    }
    return {
        "name": name,
        **({"namespace": options.namespace} if options.namespace else {}),
        "labels": labels,
        "annotations": annotations,
    }


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def label_value(text: str) -> str:
    """Return a text as a label's value: at most 63 letters, digits, dashes, underscores and dots."""
    return re.sub(r"[^A-Za-z0-9_.-]", "-", text)[:63].strip("-_.")


def _bytes(count: int) -> str:
    """Return bytes as Kubernetes writes them, in the largest unit that holds them exactly."""
    for power, unit in ((3, "Gi"), (2, "Mi"), (1, "Ki")):
        if count % (1 << 10 * power) == 0:
            return f"{count >> 10 * power}{unit}"
    return str(count)
