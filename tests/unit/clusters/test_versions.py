"""Which difference of versions breaks a job, and which is only told."""

from __future__ import annotations

import pytest

from cortex_dask.clusters.versions import Host, compare, here, needed_versions, own_mismatch, version_table
from cortex_dask.io.job.settings import HandlerSettings, JobSettings
from cortex_dask.io.job.splits import DatasetInput

OURS = {
    "python": "3.11.7",
    "dask": "2026.8.0",
    "distributed": "2026.8.0",
    "cortex_dask": "0.2.0",
    "cloudpickle": "3.1.2",
    "msgpack": "1.2.4",
}


def hosts(role: str, **changed: str | None) -> list[Host]:
    others = [Host(name, f"tcp://{name}:1", OURS) for name in ("scheduler", "worker") if name != role]
    return [Host("client", "laptop", OURS), *others, Host(role, f"tcp://{role}:2", {**OURS, **changed})]


@pytest.mark.parametrize("pickled_by", [None, "3.11"])
def test_nothing_is_said_where_all_are_alike(pickled_by: str | None) -> None:
    found = compare(hosts("worker"), pickled_by=pickled_by)
    assert (found.broken, found.different) == ((), ())


@pytest.mark.parametrize(
    ("role", "package", "version"),
    [
        ("worker", "cortex_dask", "0.1.0"),
        ("scheduler", "cortex_dask", "0.1.0"),
        ("worker", "cortex_dask", None),
        ("scheduler", "distributed", "2026.7.0"),
        ("worker", "distributed", "2025.8.0"),
        ("worker", "dask", "2026.7.1"),
        ("worker", "dask", None),
        ("scheduler", "msgpack", "0.6.2"),
    ],
)
def test_what_breaks_any_job(role: str, package: str, version: str | None) -> None:
    found = compare(hosts(role, **{package: version}))
    (clause,) = found.broken
    assert clause == (
        f"{package} is {OURS[package]} here and {version or 'missing'} on "
        f"{'workers' if role == 'worker' else 'the scheduler'}"
    )


@pytest.mark.parametrize(
    ("role", "package", "version"),
    [
        ("worker", "distributed", "2026.8.1"),
        ("worker", "msgpack", "1.0.5"),
        ("worker", "cloudpickle", "2.2.1"),
        ("worker", "python", "3.12.1"),
        ("scheduler", "python", "3.12.1"),
    ],
)
def test_what_is_only_told_of_a_project(role: str, package: str, version: str) -> None:
    found = compare(hosts(role, **{package: version}))
    assert found.broken == ()
    (clause,) = found.different
    assert clause.startswith(f"{package} is {OURS[package]} here and {version}")


@pytest.mark.parametrize(
    ("role", "package", "version", "breaks"),
    [
        ("worker", "python", "3.12.1", True),
        ("worker", "python", "3.11.2", False),
        ("scheduler", "python", "3.12.1", False),
        ("worker", "cloudpickle", "2.2.1", True),
        ("worker", "cloudpickle", "3.0.0", False),
        ("scheduler", "cloudpickle", "2.2.1", False),
    ],
)
def test_what_breaks_a_class_that_is_pickled_by_value(role: str, package: str, version: str, breaks: bool) -> None:
    found = compare(hosts(role, **{package: version}), pickled_by="3.11")
    assert bool(found.broken) == breaks


def test_who_has_pickled_the_class_counts_and_not_who_coordinates() -> None:
    found = compare(hosts("worker"), pickled_by="3.13")
    assert found.broken == ("the handler's class was pickled by Python 3.13, and it is 3.11.7 on workers",)


def test_patches_of_python_are_alike() -> None:
    assert compare(hosts("worker", python="3.11.2")).different == ()


def test_what_is_not_known_is_not_held_against_a_host() -> None:
    assert compare(hosts("worker", cortex_dask="")).broken == ()


def test_the_table_has_a_line_for_all_that_are_alike() -> None:
    workers = [Host("worker", f"tcp://10.0.0.{number}:1", OURS) for number in range(20)]
    odd = Host("worker", "tcp://10.0.0.99:1", {**OURS, "cortex_dask": None})

    lines = version_table([*hosts("scheduler"), *workers[1:], odd]).splitlines()

    assert len({len(line) for line in lines[1:3]}) == 1
    assert [line.split()[0] for line in lines[1:]] == ["client", "worker", "scheduler", "worker"]
    assert "and 19 more" in lines[2]
    assert "missing" in lines[4]


def settings(kind: str, python: str | None = None) -> JobSettings:
    handler = HandlerSettings(kind, python=python)  # type: ignore[arg-type]
    return JobSettings("job", "api", "api-1", "2026-01-31T12:00:00Z", handler, DatasetInput(("in",), batch_size=1))


def test_a_worker_like_this_process_is_fit() -> None:
    assert own_mismatch(needed_versions(settings("project"))) is None
    python = here()["python"]
    assert python is not None
    assert own_mismatch(needed_versions(settings("class", python=python.rpartition(".")[0]))) is None
    assert own_mismatch(needed_versions(settings("class"))) is None


@pytest.mark.parametrize(
    ("needed", "said"),
    [
        ({"cortex_dask": "99.0"}, "and the job needs 99.0"),
        ({"distributed": "2020.1.0"}, "has distributed 20"),
        (needed_versions(settings("class", python="2.7")), "has python 3."),
    ],
)
def test_a_worker_that_comes_later_says_why_it_does_not_fit(needed: dict[str, str | None], said: str) -> None:
    reason = own_mismatch(needed)
    assert reason is not None
    assert said in reason
    assert "can be resumed" in reason
