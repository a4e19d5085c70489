"""A cluster of the operator is created, taken over, diagnosed, resized and removed; the API server is a dictionary."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import pytest

from cortex_dask.clusters.kubernetes.api import RefusedError
from cortex_dask.clusters.kubernetes.operator import OperatorCluster
from cortex_dask.errors import ClusterError

Item = dict[str, Any]
Make = Callable[..., OperatorCluster]


class FakeApi:
    """The objects of a namespace; labels are not looked at, only the component that a label names."""

    namespace = "ml"

    def __init__(self) -> None:
        self.items: dict[tuple[str, str], Item] = {}
        self.events: list[Item] = []
        self.created = 0

    def add(self, kind: str, name: str, component: str = "", **fields: Any) -> Item:
        self.created += 1
        metadata = {
            "name": name,
            "uid": f"uid-{self.created}",
            "creationTimestamp": f"2026-01-01T00:00:{self.created:02d}Z",
            "labels": {"dask.org/component": component},
            **fields.pop("metadata", {}),
        }
        self.items[kind, name] = {"kind": kind, "metadata": metadata, **fields}
        return self.items[kind, name]

    def get(self, kind: str, name: str) -> Item | None:
        return self.items.get((kind, name))

    def list(self, kind: str, *, labels: Mapping[str, str]) -> list[Item]:
        component = labels.get("dask.org/component")
        found = [item for (of, _), item in self.items.items() if of == kind]
        return [item for item in found if component in (None, item["metadata"]["labels"]["dask.org/component"])]

    def warnings(self) -> list[Item]:
        return self.events

    def create(self, manifest: Item) -> Item:
        metadata = dict(manifest["metadata"])
        return self.add(manifest["kind"], metadata["name"], metadata=metadata)

    def patch(self, kind: str, name: str, body: Item) -> None:
        item = self.items[kind, name]
        for key, value in body.items():
            item[key] = {**item.get(key, {}), **value}

    def delete(self, kind: str, name: str, *, uid: str | None = None) -> bool:
        found = self.items.get((kind, name))
        if found is None or uid not in (None, found["metadata"]["uid"]):
            return False
        del self.items[kind, name]
        return True

    def log(self, pod: str, *, container: str, lines: int = 20, previous: bool = False) -> str:
        return f"the last line of {pod}\n"


def manifest(fingerprint: str = "f", job_url: str = "s3://b/jobs/j") -> Item:
    annotations = {"cortex-dask/fingerprint": fingerprint, "cortex-dask/job-url": job_url}
    return {"kind": "DaskCluster", "metadata": {"name": "demo", "annotations": annotations}}


@pytest.fixture
def api() -> FakeApi:
    return FakeApi()


@pytest.fixture
def make(api: FakeApi) -> Make:
    def make_cluster(owner: str = "me", **changes: str) -> OperatorCluster:
        return OperatorCluster(api, manifest(**changes), owner, threading.Event())

    return make_cluster


def owner_of(api: FakeApi) -> str:
    owner: str = api.items["DaskCluster", "demo"]["metadata"]["annotations"]["cortex-dask/coordinator"]
    return owner


def soon() -> float:
    return time.monotonic() + 10


def test_a_cluster_is_created_and_taken_over_by_the_next_coordinator(api: FakeApi, make: Make) -> None:
    make("first").claim(soon())
    assert owner_of(api) == "first"
    uid = api.items["DaskCluster", "demo"]["metadata"]["uid"]

    make("second").claim(soon())

    assert (owner_of(api), api.items["DaskCluster", "demo"]["metadata"]["uid"]) == ("second", uid)


def test_a_cluster_that_was_made_differently_is_replaced(api: FakeApi, make: Make) -> None:
    make("first", fingerprint="old").claim(soon())
    uid = api.items["DaskCluster", "demo"]["metadata"]["uid"]

    make("second", fingerprint="new").claim(soon())

    assert owner_of(api) == "second"
    assert api.items["DaskCluster", "demo"]["metadata"]["uid"] != uid


def test_a_cluster_of_another_job_is_left_alone(api: FakeApi, make: Make) -> None:
    make("first", job_url="s3://b/jobs/other").claim(soon())

    with pytest.raises(ClusterError, match="is there already and was not made for this job"):
        make("second").claim(soon())

    assert owner_of(api) == "first"


def test_a_refusal_to_create_it_is_raised(api: FakeApi, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: Item) -> Item:
        raise RefusedError("not allowed", 403)

    monkeypatch.setattr(api, "create", refuse)
    with pytest.raises(RefusedError, match="not allowed"):
        make().claim(soon())


def test_only_its_own_coordinator_removes_it(api: FakeApi, make: Make) -> None:
    first, second = make("first"), make("second")
    first.claim(soon())
    second.claim(soon())

    assert first.remove() is None
    assert second.exists()
    assert second.remove() is None
    assert not second.exists()


def test_a_ready_scheduler_is_waited_for(api: FakeApi, make: Make) -> None:
    cluster = make()
    cluster.claim(soon())
    ready = {"conditions": [{"type": "Ready", "status": "True"}]}
    api.add("Pod", "demo-scheduler", "scheduler", status=ready, spec={"containers": []})

    assert cluster.wait_for_scheduler(soon())["metadata"]["name"] == "demo-scheduler"


def test_a_scheduler_that_never_will_run_ends_the_wait_with_its_log(api: FakeApi, make: Make) -> None:
    cluster = make()
    cluster.claim(soon())
    waiting = {"waiting": {"reason": "CrashLoopBackOff"}}
    ended = {"terminated": {"exitCode": 3, "reason": "Error", "message": "no such file"}}
    container = {"name": "scheduler", "image": "i:1", "state": waiting, "lastState": ended, "restartCount": 5}
    api.add("Pod", "demo-scheduler", "scheduler", status={"containerStatuses": [container]}, spec={"containers": []})

    with pytest.raises(
        ClusterError,
        match=r"does not come up: its scheduler's pod demo-scheduler: it starts and ends again: exit code 3, no such "
        r"file; the end of its log:\n  the last line of demo-scheduler",
    ):
        cluster.wait_for_scheduler(soon())


def test_a_cluster_that_is_removed_while_it_comes_up(api: FakeApi, make: Make) -> None:
    with pytest.raises(ClusterError, match="the DaskCluster demo in the namespace ml was removed while it came up"):
        make().wait_for_scheduler(soon())


def workers(api: FakeApi, requested: int, *names: str) -> None:
    api.add("DaskWorkerGroup", "demo-default", spec={"worker": {"replicas": requested}})
    for name in names:
        api.add("Deployment", name, "worker", status={})


def test_it_has_all_workers_when_the_operator_has_made_as_many_as_requested(api: FakeApi, make: Make) -> None:
    workers(api, 2, "w1")
    assert not make().has_all_workers()
    workers(api, 2, "w1", "w2")
    assert make().has_all_workers()
    assert make().workers() == ["w1", "w2"]


def test_scaling_up_never_lowers_the_number(api: FakeApi, make: Make) -> None:
    workers(api, 2)
    for requested, expected in ((1, 2), (3, 3)):
        make().scale_up(requested)
        assert api.items["DaskWorkerGroup", "demo-default"]["spec"]["worker"]["replicas"] == expected


def test_removed_workers_are_deleted_before_the_number_is_lowered(api: FakeApi, make: Make) -> None:
    workers(api, 3, "w1", "w2", "w3")

    make().remove_workers(["w3", "w1", "gone"])

    assert make().workers() == ["w2"]
    assert api.items["DaskWorkerGroup", "demo-default"]["spec"]["worker"]["replicas"] == 1


def test_the_most_frequent_problem_of_its_workers_is_reported(api: FakeApi, make: Make) -> None:
    workers(api, 3, "w1", "w2", "w3")
    for name, message in (("w1", "no GPU"), ("w2", "no GPU"), ("w3", "no CPU")):
        condition = {"type": "PodScheduled", "status": "False", "message": message}
        api.add("Pod", name, "worker", status={"conditions": [condition]}, spec={"containers": []})

    assert make().diagnose_workers() == "all 3 of its workers' pods cannot run: no node takes it: no GPU"


def test_workers_that_the_operator_has_not_made(api: FakeApi, make: Make) -> None:
    workers(api, 2, "w1")
    involved = {"kind": "DaskWorkerGroup", "name": "demo-default"}
    api.events = [{"metadata": {}, "message": "quota exceeded", "involvedObject": involved, "lastTimestamp": "1"}]

    assert make().diagnose_workers() == (
        "only 1 of the 2 workers that were asked for were made: the Dask operator says: quota exceeded"
    )


def test_workers_that_start_and_workers_that_run(api: FakeApi, make: Make) -> None:
    workers(api, 1, "w1")
    pod = api.add("Pod", "w1", "worker", status={}, spec={"containers": []})
    assert make().diagnose_workers() == "its worker's pod is starting"

    pod["status"] = {"conditions": [{"type": "Ready", "status": "True"}]}
    assert make().diagnose_workers() is None


def test_a_worker_group_that_comes_after_the_scheduler_is_waited_for(api: FakeApi, make: Make) -> None:
    cluster = make()
    asked = threading.Event()
    get = api.get

    def get_and_tell(kind: str, name: str) -> Item | None:
        found = get(kind, name)
        if kind == "DaskWorkerGroup":
            asked.set()
        return found

    api.get = get_and_tell  # type: ignore[method-assign]
    scaling = threading.Thread(target=cluster.scale_up, args=(3,))
    scaling.start()
    assert asked.wait(10)
    api.add("DaskWorkerGroup", "demo-default", spec={"worker": {"replicas": 0}})
    scaling.join(10)

    assert api.items["DaskWorkerGroup", "demo-default"]["spec"]["worker"]["replicas"] == 3


def test_a_worker_group_is_not_waited_for_when_the_cluster_is_closed(api: FakeApi) -> None:
    closing = threading.Event()
    closing.set()

    with pytest.raises(ClusterError, match="no worker group yet: the Dask operator has done nothing about it"):
        OperatorCluster(api, manifest(), "me", closing).scale_up(3)
