"""Templates laid over each other, and node groups."""

from __future__ import annotations

from typing import Any

import pytest

from cortex_dask.clusters.kubernetes.pod_template import merge_template, with_node_groups, without_machine_requirements

TERMS = ("affinity", "nodeAffinity", "requiredDuringSchedulingIgnoredDuringExecution", "nodeSelectorTerms")


def terms(spec: dict[str, Any]) -> list[dict[str, Any]]:
    there: Any = spec
    for key in TERMS:
        there = there[key]
    found: list[dict[str, Any]] = there
    return found


@pytest.mark.parametrize(
    ("base", "over", "merged"),
    [
        pytest.param({"a": {"b": 1, "c": 2}}, {"a": {"b": 3}}, {"a": {"b": 3, "c": 2}}, id="mappings are merged"),
        pytest.param({"a": 1, "b": 2}, {"a": None}, {"b": 2}, id="null takes away"),
        pytest.param({"args": ["a", "b"]}, {"args": ["c"]}, {"args": ["c"]}, id="plain lists are replaced"),
        pytest.param(
            {"containers": [{"name": "worker", "image": "a"}]},
            {"containers": [{"name": "worker", "tty": True}, {"name": "proxy", "image": "b"}]},
            {"containers": [{"name": "worker", "image": "a", "tty": True}, {"name": "proxy", "image": "b"}]},
            id="containers by name",
        ),
        pytest.param(
            {"containers": [{"name": "worker"}]},
            {"containers": [{"tty": True}]},
            {"containers": [{"name": "worker", "tty": True}]},
            id="a container without a name is the main one",
        ),
        pytest.param(
            {"containers": [{"name": "worker", "env": [{"name": "A", "value": "1"}, {"name": "B", "value": "2"}]}]},
            {"containers": [{"env": [{"name": "A", "valueFrom": {"fieldRef": {}}}]}]},
            {
                "containers": [
                    {
                        "name": "worker",
                        "env": [{"name": "A", "valueFrom": {"fieldRef": {}}}, {"name": "B", "value": "2"}],
                    }
                ]
            },
            id="a variable takes the other's place as a whole",
        ),
        pytest.param(
            {"volumes": [{"name": "shm", "emptyDir": {"medium": "Memory"}}]},
            {"volumes": [{"name": "shm", "hostPath": {"path": "/dev/shm"}}]},
            {"volumes": [{"name": "shm", "hostPath": {"path": "/dev/shm"}}]},
            id="a volume has one source",
        ),
        pytest.param(
            {"tolerations": [{"key": "a"}]},
            {"tolerations": [{"key": "a"}, {"key": "b"}]},
            {"tolerations": [{"key": "a"}, {"key": "b"}]},
            id="tolerations are added",
        ),
        pytest.param({}, {"tolerations": [{"key": "a"}]}, {"tolerations": [{"key": "a"}]}, id="where nothing was"),
        pytest.param(
            {},
            {"containers": [{"image": "a"}]},
            {"containers": [{"name": "worker", "image": "a"}]},
            id="a container where nothing was",
        ),
    ],
)
def test_templates_are_laid_over_each_other(base: Any, over: Any, merged: Any) -> None:
    assert merge_template(base, over, main="worker") == merged


def test_neither_template_is_changed() -> None:
    base: dict[str, Any] = {"containers": [{"name": "worker", "env": [{"name": "A", "value": "1"}]}]}
    over: dict[str, Any] = {"containers": [{"env": [{"name": "B", "value": "2"}]}], "volumes": [{"name": "v"}]}

    merged = merge_template(base, over, main="worker")
    merged["containers"][0]["env"].clear()
    merged["volumes"][0]["name"] = "w"

    assert base == {"containers": [{"name": "worker", "env": [{"name": "A", "value": "1"}]}]}
    assert over == {"containers": [{"env": [{"name": "B", "value": "2"}]}], "volumes": [{"name": "v"}]}


def test_what_concerns_machines_is_left_out() -> None:
    container = {"name": "main", "env": [], "resources": {"limits": {"nvidia.com/gpu": 1}}}
    template = {
        "metadata": {"labels": {"a": "b"}},
        "spec": {"nodeSelector": {"gpu": "yes"}, "tolerations": [{"key": "gpu"}], "containers": [container]},
    }

    assert without_machine_requirements(template) == {
        "metadata": {"labels": {"a": "b"}},
        "spec": {"tolerations": [{"key": "gpu"}], "containers": [{"name": "main", "env": []}]},
    }
    assert "resources" in container


def test_a_node_group_is_known_by_the_labels_of_every_cloud() -> None:
    spec = with_node_groups({"containers": []}, ("gpu-a", "gpu-b"), None)

    found = {term["matchExpressions"][0]["key"]: term["matchExpressions"][0]["values"] for term in terms(spec)}
    assert found["eks.amazonaws.com/nodegroup"] == ["gpu-a", "gpu-b"]
    assert {"cloud.google.com/gke-nodepool", "kubernetes.azure.com/agentpool", "karpenter.sh/nodepool"} <= set(found)
    assert all(len(term["matchExpressions"]) == 1 for term in terms(spec)), "one label is enough"


def test_a_node_group_is_known_by_the_label_that_is_named() -> None:
    spec = with_node_groups({}, ("gpu",), "example.com/pool")

    assert terms(spec) == [{"matchExpressions": [{"key": "example.com/pool", "operator": "In", "values": ["gpu"]}]}]


def test_a_node_group_goes_with_what_else_is_required() -> None:
    zone = [{"key": "zone", "operator": "In", "values": ["a"]}]
    spec: Any = {"affinity": {"nodeAffinity": {TERMS[2]: {TERMS[3]: [{"matchExpressions": zone}]}}, "podAffinity": {}}}

    made = with_node_groups(spec, ("gpu",), "pool")

    assert terms(made) == [{"matchExpressions": [*zone, {"key": "pool", "operator": "In", "values": ["gpu"]}]}]
    assert "podAffinity" in made["affinity"]
    assert terms(spec) == [{"matchExpressions": zone}]
