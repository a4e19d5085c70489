"""What Kubernetes says about pods that do not run, as sentences; the objects are as a real one writes them."""

from __future__ import annotations

from typing import Any

import pytest

from cortex_dask.clusters.kubernetes.diagnosis import (
    diagnose_by_operator_events,
    diagnose_by_warnings,
    diagnose_deployment,
    diagnose_pod,
    is_being_deleted,
    is_ready,
)

GPU = {"limits": {"nvidia.com/gpu": "5", "memory": "768Mi"}, "requests": {"cpu": "200m", "memory": "768Mi"}}


def pod(
    *containers: dict[str, Any], phase: str = "Pending", spec: dict[str, Any] | None = None, **status: Any
) -> dict[str, Any]:
    return {
        "metadata": {"name": "demo-worker", "uid": "pod-1"},
        "spec": {"containers": [{"name": "worker", "resources": GPU}], **(spec or {})},
        "status": {"phase": phase, "containerStatuses": list(containers), **status},
    }


def container(state: dict[str, Any], last: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    return {"name": "worker", "image": "localhost/nope:1", "state": state, "lastState": last or {}, **more}


def event(message: str, reason: str = "Failed", uid: str = "pod-1", at: str = "2026-11-24T00:00:00Z") -> dict[str, Any]:
    involved = {"kind": "Pod", "name": "demo-worker", "uid": uid}
    return {
        "metadata": {"creationTimestamp": at},
        "type": "Warning",
        "reason": reason,
        "message": message,
        "involvedObject": involved,
        "lastTimestamp": at,
    }


def unschedulable(message: str, **spec: Any) -> dict[str, Any]:
    condition = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": message}
    return pod(conditions=[condition], spec=spec)


def test_no_room() -> None:
    found = diagnose_pod(unschedulable("0/1 nodes are available: 1 Insufficient nvidia.com/gpu."))

    assert found is not None
    assert found.reason == (
        "no node takes it: 0/1 nodes are available: 1 Insufficient nvidia.com/gpu (it asks for cpu 200m, memory 768Mi, "
        "nvidia.com/gpu 5)"
    )
    assert (found.is_permanent, found.is_lack_of_room) == (False, True)


def test_no_node_of_the_group() -> None:
    terms = [{"matchExpressions": [{"key": key, "operator": "In", "values": ["a", "b"]}]} for key in ("x", "y")]
    required = {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": terms}}}

    found = diagnose_pod(unschedulable("0/1 nodes are available", affinity=required))

    assert found is not None
    assert found.reason.endswith("nvidia.com/gpu 5, nodes of a or b)")


@pytest.mark.parametrize(
    ("reason", "message", "events", "words", "is_permanent"),
    [
        (
            "ImagePullBackOff",
            'Back-off pulling image "localhost/nope:1"',
            [event('Failed to pull image "localhost/nope:1": connection refused'), event("Error: ImagePullBackOff")],
            'the image localhost/nope:1 cannot be had: Failed to pull image "localhost/nope:1": connection refused',
            False,
        ),
        (
            "ErrImagePull",
            "rpc error: code = NotFound desc = no such manifest: not found",
            [],
            "cannot be had: rpc error: code = NotFound",
            True,
        ),
        ("InvalidImageName", 'Failed to apply default image tag "Bad Name"', [], "default image tag", True),
        ("CreateContainerConfigError", 'secret "nope" not found', [], 'cannot be made: secret "nope" not found', False),
    ],
)
def test_a_container_that_waits(reason: str, message: str, events: list[Any], words: str, is_permanent: bool) -> None:
    found = diagnose_pod(pod(container({"waiting": {"reason": reason, "message": message}})), events)

    assert found is not None
    assert words in found.reason
    assert found.is_permanent is is_permanent


@pytest.mark.parametrize(("restarts", "is_permanent"), [(1, False), (3, True)])
def test_a_container_that_crashes(restarts: int, is_permanent: bool) -> None:
    waiting = {"waiting": {"reason": "CrashLoopBackOff", "message": "back-off 20s restarting failed container"}}
    ended = {"terminated": {"exitCode": 3, "reason": "Error"}}

    found = diagnose_pod(pod(container(waiting, ended, restartCount=restarts), phase="Running"))

    assert found is not None
    assert found.reason == "it starts and ends again: exit code 3"
    assert (found.is_permanent, found.container) == (is_permanent, "worker")


def test_a_container_that_took_too_much_memory() -> None:
    ended = {"terminated": {"exitCode": 137, "reason": "OOMKilled"}}

    found = diagnose_pod(pod(container(ended, restartCount=0), phase="Running"))

    assert found is not None
    assert "took more memory than its limit" in found.reason


def test_a_problem_that_only_events_report() -> None:
    waiting = container({"waiting": {"reason": "ContainerCreating"}})
    mount = event('MountVolume.SetUp failed for volume "x" : configmap "x" not found', "FailedMount")
    others = [event("not ours", uid="pod-2"), event("not yet", "Unhealthy", at="2026-11-24T00:09:00Z")]

    found = diagnose_pod(pod(waiting), [mount, *others])

    assert found is not None
    assert found.reason.startswith("FailedMount: MountVolume.SetUp failed")


def test_a_pod_that_starts_is_no_problem() -> None:
    assert diagnose_pod(pod(container({"waiting": {"reason": "ContainerCreating"}}))) is None
    assert (
        diagnose_pod(pod(container({"running": {}}, ready=False), phase="Running"), [event("?", "Unhealthy")]) is None
    )
    # a container that was started again, and runs
    ended = {"terminated": {"exitCode": 1, "reason": "Error"}}
    assert diagnose_pod(pod(container({"running": {}}, ended, ready=True), phase="Running")) is None


def test_a_pod_that_was_evicted() -> None:
    found = diagnose_pod(pod(phase="Failed", reason="Evicted", message="The node was low on resource: memory. "))

    assert found is not None
    assert found.reason == "it failed: Evicted The node was low on resource: memory"


def test_a_deployment_that_cannot_make_its_pod() -> None:
    message = 'pods "demo" is forbidden: exceeded quota: q'
    conditions = [
        {"type": "Progressing", "status": "True"},
        {"type": "ReplicaFailure", "status": "True", "reason": "FailedCreate", "message": message},
    ]

    found = diagnose_deployment({"metadata": {}, "status": {"conditions": conditions}})

    assert found is not None
    assert found.reason == f"its pod cannot be made: {message}"
    assert diagnose_deployment({"metadata": {}, "status": {"conditions": conditions[:1]}}) is None
    assert diagnose_deployment({"metadata": {}}) is None


def test_errors_of_the_operator() -> None:
    def told(kind: str, name: str, message: str, at: str) -> dict[str, Any]:
        involved = {"kind": kind, "name": name}
        return {"metadata": {}, "type": "Error", "message": message, "involvedObject": involved, "lastTimestamp": at}

    events = [
        told("DaskWorkerGroup", "demo-default", "Handler failed:\n  newest.", "2026-11-24T00:00:02Z"),
        told("DaskCluster", "demo", "older", "2026-11-24T00:00:01Z"),
        told("DaskCluster", "other", "another one's", "2026-11-24T00:00:03Z"),
        told("Pod", "demo", "a pod's", "2026-11-24T00:00:04Z"),
    ]

    found = diagnose_by_operator_events(["demo", "demo-default"], events)

    assert found is not None
    assert found.reason == "the Dask operator says: Handler failed: newest"
    assert diagnose_by_operator_events(["demo-2"], events) is None


def test_a_job_that_cannot_make_its_pod() -> None:
    job = {"metadata": {"uid": "job-1"}}

    found = diagnose_by_warnings(job, [event("pods is forbidden: exceeded quota", uid="job-1"), event("not ours")])

    assert found is not None
    assert found.reason == "its pod cannot be made: pods is forbidden: exceeded quota"
    assert diagnose_by_warnings(job, [event("not ours")]) is None


def test_long_messages_are_cut() -> None:
    found = diagnose_pod(unschedulable("x" * 10_000))

    assert found is not None
    assert len(found.reason) < 600


def test_a_pod_that_is_being_deleted_is_not_ready() -> None:
    ready = pod(conditions=[{"type": "Ready", "status": "True"}], phase="Running")
    assert is_ready(ready)
    assert not is_ready(pod(conditions=[{"type": "Ready", "status": "False"}]))

    ready["metadata"]["deletionTimestamp"] = "2026-11-24T00:00:00Z"

    assert is_being_deleted(ready)
    assert not is_ready(ready)
