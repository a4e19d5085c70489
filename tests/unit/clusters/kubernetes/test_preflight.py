"""Fields that an API server does not know, and paths that pods do not have."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from cortex_dask.clusters.kubernetes.manifests import make_dask_cluster
from cortex_dask.clusters.kubernetes.options import KubernetesOptions
from cortex_dask.clusters.kubernetes.preflight import check_paths, dropped_fields
from cortex_dask.errors import SpecError
from cortex_dask.io.job.settings import ClusterSettings, HandlerSettings, JobSettings, OutputSettings
from cortex_dask.io.job.splits import DatasetInput

SETTINGS = JobSettings(
    "j",
    "demo",
    "a",
    "2026",
    HandlerSettings("project", image="image:1"),
    DatasetInput(("s3://bucket/in",)),
    output=OutputSettings("s3://bucket/out"),
    cluster=ClusterSettings("kubernetes"),
)


@pytest.mark.parametrize(
    ("sent", "made", "paths"),
    [
        ({"a": {"b": 1}}, {"a": {"b": "1", "c": 2}}, []),
        ({"a": {"x": 1}}, {"a": {}}, ["a.x"]),
        ({"a": 1}, {}, ["a"]),
        ({"a": None, "b": "", "c": {}, "d": [], "e": 0, "f": False}, {}, []),
        ({"a": [{"name": "x", "y": 1}]}, {"a": [{"name": "added"}, {"name": "x"}]}, ["a[x].y"]),
        ({"a": [{"key": 1, "y": 1}]}, {"a": [{"key": 1}, {"key": 2}]}, ["a[0].y"]),
        ({"a": [1, 2]}, {"a": [1, 2]}, []),
        ({"a": [{"name": "x", "b": {"c": 1}}]}, {"a": [{"name": "x", "b": {}}]}, ["a[x].b.c"]),
    ],
)
def test_fields_that_a_server_dropped(sent: Any, made: Any, paths: list[str]) -> None:
    assert list(dropped_fields(sent, made)) == paths


def manifest(settings: JobSettings) -> dict[str, Any]:
    return make_dask_cluster("s3://bucket/jobs/j", settings, KubernetesOptions.from_settings(settings))


def test_paths_of_this_machine_are_refused() -> None:
    check_paths("s3://bucket/jobs/j", SETTINGS, manifest(SETTINGS))
    output = dataclasses.replace(SETTINGS, output=OutputSettings("/home/me/out"))
    given = dataclasses.replace(SETTINGS, dataset=DatasetInput(("s3://bucket/in", "file:///home/me/in")))

    for job_url, settings, words in (
        ("/home/me/jobs/j", SETTINGS, "the job directory /home/me/jobs/j is a path of this machine"),
        ("s3://bucket/jobs/j", output, "the output /home/me/out is a path of this machine"),
        ("s3://bucket/jobs/j", given, "the input file:///home/me/in is a path of this machine"),
    ):
        with pytest.raises(SpecError) as caught:
            check_paths(job_url, settings, manifest(settings))
        assert words in str(caught.value)


def test_a_volume_makes_a_path_one_that_pods_have() -> None:
    pod = {"spec": {"containers": [{"volumeMounts": [{"name": "nfs", "mountPath": "/data/"}]}]}}
    settings = dataclasses.replace(
        SETTINGS,
        dataset=DatasetInput(("/data/in",)),
        output=OutputSettings("/data/out"),
        cluster=ClusterSettings("kubernetes", kubernetes={"pod": pod}),
    )

    check_paths("/data/jobs/j", settings, manifest(settings))
    with pytest.raises(SpecError, match="/database/jobs/j"):
        check_paths("/database/jobs/j", settings, manifest(settings))
