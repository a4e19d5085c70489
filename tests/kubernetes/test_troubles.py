"""A cluster that does not come up: the reason is said, as a sentence, within the deadline, and nothing is left."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.clusters.jobs import ClusterJob, Submission, make_job
from tests.clusters.kubernetes import KubernetesBackend
from tests.kubernetes.namespace import Namespace

NewJob = Callable[..., ClusterJob]

DEADLINE = 20
LIMIT = 90.0  # seconds until the command has to end, the deadline and the end of what has been made among it


def option(name: str, value: Any) -> tuple[str, str]:
    return "--cluster-option", f"{name}={value}"


def one_sentence(command: Submission, *parts: str, code: int = 1) -> str:
    """Wait for the command's end; what it said must have these parts and none of a traceback."""
    assert command.wait(LIMIT) == code, command.said()
    said = " ".join(command.said().split())
    assert "Traceback" not in said
    for part in parts:
        assert part in said, said
    return said


def made(namespace: Namespace, job: ClusterJob) -> list[Any]:
    return namespace.items("daskclusters,jobs", f"cortex-dask/job={job.job_id}")


@pytest.fixture(scope="module")
def another(tmp_path_factory: pytest.TempPathFactory) -> Iterator[KubernetesBackend]:
    """Another namespace, to be spoilt."""
    backend = KubernetesBackend(tmp_path_factory.mktemp("another"))
    try:
        backend.up()
        yield backend
    finally:
        backend.down()


def spoilt_job(backend: KubernetesBackend, folder: Path, monkeypatch: pytest.MonkeyPatch, **how: Any) -> ClusterJob:
    from tests.conftest import follow_environment

    for name, value in backend.environment.items():
        monkeypatch.setenv(name, value)
    follow_environment()
    return make_job(backend, folder / "job", **how)


# the image ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["--wait", "--detach"])
def test_an_image_that_does_not_exist(how: str, namespace: Namespace, new_job: NewJob) -> None:
    job = new_job()
    image = "localhost/nobody/has-made-this:1"

    command = job.submit(how, *option("image", image), *option("start_timeout", DEADLINE))

    one_sentence(command, image, "cannot be had")


def test_an_image_without_cortex_dask(namespace: Namespace, kubernetes: KubernetesBackend, new_job: NewJob) -> None:
    # the image is right, but its Python finds no package
    spoilt = {"spec": {"containers": [{"env": [{"name": "PYTHONHOME", "value": "/nonexistent"}]}]}}
    job = new_job(api={"kubernetes": {"scheduler": spoilt}})

    command = job.submit(*option("start_timeout", 60))

    one_sentence(command, "scheduler", "starts and ends again")


# what is asked for ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["--wait", "--detach"])
def test_a_bad_quantity_in_a_template(how: str, namespace: Namespace, new_job: NewJob) -> None:
    spec = {"containers": [{"name": "worker", "resources": {"limits": {"memory": "half"}}}]}
    job = new_job(api={"kubernetes": {"worker": {"spec": spec}}})

    command = job.submit(how)

    one_sentence(command, "kubernetes.worker", "'half' for resources.limits.memory", "quantities such as", code=2)
    assert not made(namespace, job)


@pytest.mark.parametrize("how", ["--wait", "--detach"])
def test_a_pod_that_the_server_refuses(how: str, namespace: Namespace, new_job: NewJob) -> None:
    resources = {"requests": {"memory": "2Gi"}, "limits": {"memory": "1Gi"}}
    job = new_job(api={"kubernetes": {"worker": {"spec": {"containers": [{"resources": resources}]}}}})
    began = time.monotonic()

    command = job.submit(how)

    one_sentence(command, "the worker's pod", "must be less than or equal to memory limit")
    assert time.monotonic() - began < 45
    assert not made(namespace, job), "before anything is applied"


def test_an_unknown_field_in_a_template(namespace: Namespace, new_job: NewJob) -> None:
    spec = {"containers": [{"name": "worker", "resorces": {"limits": {"memory": "1Gi"}}}]}
    job = new_job(api={"kubernetes": {"worker": {"spec": spec}}})

    command = job.submit()

    one_sentence(command, "resorces")
    assert not made(namespace, job)


def test_more_than_any_node_has(new_job: NewJob) -> None:
    job = new_job(api={"compute": {"mem": "9000Gi"}})

    command = job.submit(*option("start_timeout", DEADLINE))

    one_sentence(command, "Insufficient memory", "no node takes it")


def test_a_node_group_that_is_not_there(new_job: NewJob) -> None:
    job = new_job(api={"compute": {"node_groups": ["nowhere"]}})

    command = job.submit(*option("start_timeout", DEADLINE))

    one_sentence(command, "nowhere")


def test_a_secret_that_is_not_there(new_job: NewJob) -> None:
    job = new_job(api={"kubernetes": {"env_from": [{"secret": "not-made-yet"}]}})

    command = job.submit(*option("start_timeout", DEADLINE))

    one_sentence(command, "not-made-yet")


# the namespace --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["--wait", "--detach"])
def test_a_quota_that_is_exceeded(
    how: str, another: KubernetesBackend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quota = {
        "apiVersion": "v1",
        "kind": "ResourceQuota",
        "metadata": {"name": "small"},
        "spec": {"hard": {"requests.memory": "100Mi"}},
    }
    job = spoilt_job(another, tmp_path, monkeypatch)
    another.namespace.apply_all(quota)
    try:
        another.namespace.wait_for(
            lambda: (another.namespace.find("resourcequota", "small") or {}).get("status", {}).get("hard"),
            "the quota to hold",
        )
        command = job.submit(how, *option("start_timeout", DEADLINE))
        one_sentence(command, "exceeded quota: small", "requests.memory")
        another.namespace.wait_for(lambda: not job.leftovers(), "nothing to be left", 60)
    finally:
        another.namespace.kubectl("delete", "resourcequota", "small")
        job.close()


def test_an_account_that_may_nothing(
    another: KubernetesBackend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = spoilt_job(another, tmp_path, monkeypatch)
    another.namespace.kubectl("create", "serviceaccount", "nobody", check=False)

    command = job.submit(*option("kubeconfig", another.namespace.kubeconfig("nobody")))

    said = one_sentence(command, "does not allow", ":nobody to create", another.namespace.name)
    assert "docs/kubernetes.md" in said
    job.close()


def test_a_namespace_that_the_account_may_not_use(new_job: NewJob) -> None:
    job = new_job()

    command = job.submit(*option("namespace", "default"))

    one_sentence(command, "does not allow", "in the namespace default")


def test_a_detached_job_without_the_runners_account(namespace: Namespace, new_job: NewJob) -> None:
    job = new_job()

    command = job.submit("--detach", *option("service_account", "nobody-at-all"), *option("start_timeout", DEADLINE))

    one_sentence(command, "nobody-at-all")


# the API server -------------------------------------------------------------------------------------------------------


def test_an_api_server_that_does_not_answer(namespace: Namespace, new_job: NewJob, tmp_path: Path) -> None:
    text = namespace.kubeconfig("cortex-dask").read_text()
    here = tmp_path / "kubeconfig"
    here.write_text("".join(f"{line}\n" for line in text.splitlines() if "server:" not in line))
    server = next(line for line in text.splitlines() if "server:" in line)
    here.write_text(text.replace(server.strip(), "server: https://127.0.0.1:9"))
    job = new_job()

    command = job.submit(*option("kubeconfig", here))

    one_sentence(command, "https://127.0.0.1:9", "cannot be reached")


def test_a_kubeconfig_that_is_not_there(new_job: NewJob) -> None:
    job = new_job()
    one_sentence(job.submit(*option("kubeconfig", "/nonexistent/config")), "/nonexistent/config")


def test_a_context_that_is_not_there(new_job: NewJob) -> None:
    job = new_job()
    one_sentence(job.submit(*option("context", "the-other-one")), "the-other-one")


def test_no_image_at_all(new_job: NewJob) -> None:
    job = new_job()
    project = str(job.folder / "project")
    where = ("--input", f"{job.store.url}/in", "--output", f"{job.store.url}/out", "--job-id", job.job_id)
    command = job.command("submit", project, *where, "--cluster", "kubernetes")
    one_sentence(command, "no image is named", "handler.image", code=2)
