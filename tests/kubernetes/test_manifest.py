"""``cortex-dask manifest``: what it prints is valid, holds no secret, and runs the job when somebody applies it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import yaml

from tests.clusters.jobs import ClusterJob
from tests.clusters.kubernetes import ACCOUNT, KubernetesBackend
from tests.kubernetes.namespace import Item, Namespace

NewJob = Callable[..., ClusterJob]

EVERYTHING: dict[str, Any] = {
    "compute": {"cpu": 1.5, "mem": "2Gi", "gpu": 1, "inf": 1, "node_groups": ["gpu", "spot"]},
    "handler": {"type": "python", "path": "handler.py", "env": {"A": "b"}, "shm_size": "1Gi"},
    "kubernetes": {
        "labels": {"example.com/team": "ml"},
        "annotations": {"example.com/note": "a: note"},
        "service_account": "cortex-dask",
        "image_pull_policy": "IfNotPresent",
        "image_pull_secrets": ["registry"],
        "env": {"LEVEL": "1"},
        "env_from": [{"secret": "store-credentials"}, {"config_map": "settings"}],
        "node_group_label": "example.com/pool",
        "pod": {
            "metadata": {"labels": {"example.com/pod": "yes"}, "annotations": {"example.com/pod": "yes"}},
            "spec": {
                "tolerations": [{"key": "spot", "operator": "Exists", "effect": "NoSchedule"}],
                "volumes": [{"name": "models", "persistentVolumeClaim": {"claimName": "models"}}],
                "containers": [{"volumeMounts": [{"name": "models", "mountPath": "/models"}]}],
            },
        },
        "worker": {"spec": {"terminationGracePeriodSeconds": 60, "nodeSelector": {"kubernetes.io/arch": "amd64"}}},
        "scheduler": {"spec": {"containers": [{"resources": {"limits": {"memory": "2Gi"}}}]}},
        "runner": {"spec": {"containers": [{"resources": {"limits": {"memory": "1Gi"}}}]}},
    },
}


def manifest_of(job: ClusterJob, *options: str) -> str:
    """Return what is printed on standard output for the submission of a job."""
    where = ("--input", f"{job.store.url}/in", "--output", f"{job.store.url}/out", "--job-id", job.job_id)
    pairs = (word for name, value in job.backend.options.items() for word in ("--cluster-option", f"{name}={value}"))
    how = ("--batch-size", "50", "--batch-format", "pyarrow", "--workers", "2", "--config", f"marks={job.signals.url}")
    command = job.command("manifest", str(job.folder / "project"), *where, *how, *pairs, *options)
    assert command.wait(60) == 0, command.said()
    return command.said()


def pods_of(documents: list[Item]) -> list[Item]:
    """Return the pods that will be made of the objects."""
    templates = [
        template
        for item in documents
        for template in (
            [item["spec"]["template"]] if item["kind"] == "Job" else [item["spec"]["scheduler"], item["spec"]["worker"]]
        )
    ]
    return [
        {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": f"pod-{number}"}, "spec": template["spec"]}
        for number, template in enumerate(templates)
    ]


@pytest.mark.parametrize("api", [{}, EVERYTHING], ids=["nothing said", "everything said"])
def test_it_is_valid(api: dict[str, Any], namespace: Namespace, new_job: NewJob) -> None:
    import kubernetes_validate  # only `make test-kubernetes` installs it

    job = new_job(api=api)

    text = manifest_of(job)
    documents = list(yaml.safe_load_all(text))

    assert [item["kind"] for item in documents] == ["Job", "DaskCluster"]
    # as this server sees it, and as the oldest and newest published schemas do that still get fixes
    answer = namespace.kubectl("apply", "--dry-run=server", "--filename=-", given=text, as_account=ACCOUNT)
    assert answer.count("(server dry run)") == 2
    for item in [documents[0], *pods_of(documents)]:
        for version in ("1.30", kubernetes_validate.latest_version()):
            kubernetes_validate.validate(item, version, strict=True)
    assert not namespace.items("jobs,daskclusters", f"cortex-dask/job={job.job_id}"), "nothing was made"
    assert not job.store.children("jobs"), "nor written"


def test_it_is_the_same_each_time(namespace: Namespace, new_job: NewJob) -> None:
    job = new_job(api=EVERYTHING)
    assert manifest_of(job) == manifest_of(job)


def test_applying_it_runs_the_job(namespace: Namespace, kubernetes: KubernetesBackend, new_job: NewJob) -> None:
    job = new_job()
    text = manifest_of(job, "--create")

    namespace.kubectl("apply", "--filename=-", given=text, as_account=ACCOUNT)
    job.until_final()

    job.check()
    namespace.wait_for(lambda: not kubernetes.leftovers(job), "the cluster to go", 60)
    # A controller that applies it again finds a job that has ended, and nothing runs a second time.
    calls = len(job.calls())
    namespace.kubectl("apply", "--filename=-", given=text, as_account=ACCOUNT)
    namespace.wait_for(lambda: not kubernetes.leftovers(job), "what was applied again to go", 90)
    assert len(job.calls()) == calls
    assert job.completions() == 1


def test_applying_the_runner_is_enough(namespace: Namespace, kubernetes: KubernetesBackend, new_job: NewJob) -> None:
    job = new_job()
    text = manifest_of(job, "--create", "--runner-only")

    assert [item["kind"] for item in yaml.safe_load_all(text)] == ["Job"]
    namespace.kubectl("apply", "--filename=-", given=text, as_account=ACCOUNT)
    job.until_final()

    job.check()
    namespace.wait_for(lambda: not kubernetes.leftovers(job), "the cluster to go", 60)


def test_no_secret_is_in_it(new_job: NewJob) -> None:
    job = new_job()
    (job.folder / "project" / ".env").write_text("VAULT_TOKEN=hunter2-in-the-vault\n")

    text = manifest_of(job)

    assert "store-credentials" in text
    assert "AWS_SECRET_ACCESS_KEY" not in text
    assert "hunter2" not in text
