"""``kubernetes:`` in cortex.yaml and the options of the command line: what is understood, and what is not."""

from __future__ import annotations

from typing import Any

import pytest

from cortex_dask.clusters.kubernetes.options import NAMESPACE_VARIABLE, KubernetesOptions
from cortex_dask.errors import SpecError
from cortex_dask.io.job.settings import ClusterSettings, HandlerSettings, JobSettings
from cortex_dask.io.job.splits import DatasetInput
from cortex_dask.spec.api import parse_api

API = {"name": "demo", "kind": "BatchAPI", "handler": {"path": "handler.py"}}


def said(**kubernetes: Any) -> dict[str, Any]:
    spec = parse_api({**API, "kubernetes": kubernetes}).kubernetes
    assert spec is not None
    return spec.plain()


def complaint(**kubernetes: Any) -> str:
    with pytest.raises(SpecError) as caught:
        said(**kubernetes)
    return str(caught.value)


def options(
    kubernetes: dict[str, Any] | None = None, of_api: str | None = "image:1", **given: Any
) -> KubernetesOptions:
    handler = HandlerSettings("project", image=of_api)
    cluster = ClusterSettings("kubernetes", options=given, kubernetes=kubernetes or {})
    dataset = DatasetInput(("s3://in",))
    return KubernetesOptions.from_settings(JobSettings("j", "demo", "a", "2026", handler, dataset, cluster=cluster))


# cortex.yaml ----------------------------------------------------------------------------------------------------------


def test_everything_that_can_be_said() -> None:
    given: dict[str, Any] = {
        "namespace": "ml",
        "labels": {"example.com/team": "vision", "cost": ""},
        "annotations": {"example.com/note": "anything at all, even äöü"},
        "service_account": "s3-reader",
        "image_pull_policy": "Always",
        "image_pull_secrets": ["registry"],
        "env": {"AWS_REGION": "eu-west-1", "AWS_ACCESS_KEY_ID": "AKIA", "TOKENIZERS_PARALLELISM": "false"},
        "env_from": [{"secret": "aws"}, {"config_map": "settings"}],
        "node_group_label": "cloud.google.com/gke-nodepool",
        "pod": {"metadata": {"annotations": {"a": "b"}}, "spec": {"tolerations": [{"key": "a"}]}},
        "worker": {"spec": {"containers": [{"env": [{"name": "API_TOKEN", "valueFrom": {"secretKeyRef": {}}}]}]}},
        "scheduler": {"spec": {"priorityClassName": "high"}},
        "runner": {"spec": {"priorityClassName": "high"}},
    }

    assert said(**given) == given


def test_nothing_said_is_nothing() -> None:
    assert said() == {}
    assert parse_api(API).kubernetes is None


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"namespaces": "a"}, "kubernetes.namespaces: unknown key; did you mean namespace?"),
        ({"namespace": "Team A"}, "kubernetes.namespace: found 'Team A'"),
        ({"labels": {"team": "vision & sound"}}, "kubernetes.labels: found 'vision & sound' for team"),
        ({"labels": {"a b": "c"}}, "kubernetes.labels: found the key 'a b'"),
        ({"annotations": {"a/b/c": "d"}}, "kubernetes.annotations: found the key 'a/b/c'"),
        ({"env": {"DB_PASSWORD": "hunter2"}}, "found a value for DB_PASSWORD, which looks like a secret"),
        ({"env": {"AWS_SECRET_ACCESS_KEY": "hunter2"}}, "kubernetes.env_from"),
        ({"env": {"N": 1}}, "kubernetes.env.N: found a value of type int"),
        ({"env_from": [{"secret": "a", "config_map": "b"}]}, "exactly one of secret and config_map"),
        ({"env_from": [{}]}, "exactly one of secret and config_map"),
        ({"image_pull_policy": "always"}, "kubernetes.image_pull_policy: found 'always'; allowed is Always"),
        ({"pod": {"tolerations": []}}, "kubernetes.pod: found the key 'tolerations'; allowed is a pod template"),
        ({"pod": {"metadata": {"name": "a"}}}, "found the key metadata.name"),
        ({"pod": {"spec": []}}, "for spec; allowed is a mapping"),
        ({"worker": {"spec": {"containers": {"image": "a"}}}}, "for spec.containers; allowed is a list"),
        (
            {"worker": {"spec": {"containers": [{"env": [{"name": "HF_TOKEN", "value": "hunter2"}]}]}}},
            "found a value for HF_TOKEN",
        ),
    ],
)
def test_what_cannot_be(given: dict[str, Any], words: str) -> None:
    message = complaint(**given)

    assert words in message
    assert "hunter2" not in message


# the command line over it ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("amount", ["1", "500m", "4Gi", "0.5", "1e3", "2E", 1, 2.5, None])
def test_a_quantity(amount: object) -> None:
    assert said(worker={"spec": {"containers": [{"resources": {"limits": {"memory": amount}}}]}})


@pytest.mark.parametrize("amount", ["half", "1gb", "4 Gi", "", True])
def test_what_is_no_quantity(amount: object) -> None:
    words = complaint(pod={"spec": {"containers": [{"resources": {"requests": {"cpu": amount}}}]}})
    assert "kubernetes.pod" in words
    assert "resources.requests.cpu" in words
    assert "4Gi" in words


def test_options_go_over_the_api() -> None:
    api = {"namespace": "ml", "service_account": "a", "image_pull_policy": "Never", "env_from": [{"secret": "aws"}]}

    assert options(api).namespace == "ml"
    made = options(api, namespace="dev", service_account="b", image="image:2", image_pull_policy="Always")
    assert (made.namespace, made.service_account, made.image, made.image_pull_policy) == (
        "dev",
        "b",
        "image:2",
        "Always",
    )
    assert made.runner_account == "b"
    assert made.env_from == ({"secret": "aws"},)
    assert (options().runner_account, options().start_timeout, options().idle_timeout) == ("cortex-dask", 600, 600)


def test_options_of_another_kind_of_cluster_are_not_for_us() -> None:
    settings = JobSettings(
        "j",
        "demo",
        "a",
        "2026",
        HandlerSettings("project", image="image:1"),
        DatasetInput(("s3://in",)),
        cluster=ClusterSettings("gateway", options={"worker_cores": 2}),
    )

    assert KubernetesOptions.from_settings(settings).image == "image:1"


def test_an_image_is_needed() -> None:
    with pytest.raises(SpecError, match=r"no image is named.*handler\.image.*--cluster-option image=NAME"):
        options(of_api=None)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"namespac": "a"}, "cluster option namespac: unknown for kubernetes; did you mean namespace?"),
        ({"image": 3}, "cluster option image: found 3; allowed is text"),
        ({"start_timeout": 0}, "cluster option start_timeout: found 0"),
        ({"idle_timeout": "10m"}, "cluster option idle_timeout: found '10m'"),
        ({"idle_timeout": True}, "cluster option idle_timeout: found true"),
        ({"image_pull_policy": "Sometimes"}, "found 'Sometimes'; allowed is Always, IfNotPresent, Never"),
    ],
)
def test_options_that_cannot_be(given: dict[str, Any], words: str) -> None:
    with pytest.raises(SpecError) as caught:
        options(**given)

    assert words in str(caught.value)


def test_a_runner_speaks_to_the_kubernetes_that_it_is_in(monkeypatch: pytest.MonkeyPatch) -> None:
    given = {"kubeconfig": "/home/me/config", "context": "prod", "namespace": "dev"}
    assert options(**given).kubeconfig == "/home/me/config"

    monkeypatch.setenv(NAMESPACE_VARIABLE, "there")

    made = options(**given)
    assert (made.kubeconfig, made.context) == (None, None)
