"""From what a job needs to the options of a gateway's site."""

from __future__ import annotations

from typing import Any

import pytest

from cortex_dask.clusters.gateway.options import Needs, SiteOption, choose_options
from cortex_dask.errors import SpecError

GIB = 1 << 30
ROOM = 0.25  # GiB that a worker's own process gets beside its handlers


def site(*options: SiteOption) -> dict[str, SiteOption]:
    return {option.name: option for option in options}


CORES = SiteOption("worker_cores", "int", 1, "Worker cores", 1, 4)
MEMORY = SiteOption("worker_memory", "float", 2.0, "Worker memory (GiB)", 0.25, 16)
GPUS = SiteOption("gpus", "int", 0, "GPUs", 0, 2)
IMAGE = SiteOption("image", "string", "site:1", "Image")
ENV = SiteOption("environment", "mapping", {}, "Environment")
USUAL = site(CORES, MEMORY, GPUS, IMAGE, ENV)


def test_a_job_without_needs_sets_no_option() -> None:
    choice = choose_options(USUAL, {}, Needs())

    assert choice.options == {}
    assert choice.slots == 1, "as many as the site's default has cores"
    assert choice.warnings == ()


def test_compute_and_handler_become_options() -> None:
    needs = Needs(cpu=2, memory=4 * GIB, gpu=1, image="mine:2", env={"A": "1"})

    choice = choose_options(USUAL, {}, needs)

    assert choice.options == {
        "worker_cores": 2,
        "worker_memory": 4 + ROOM,
        "gpus": 1,
        "image": "mine:2",
        "environment": {"A": "1"},
    }
    assert choice.slots == 1


@pytest.mark.parametrize(
    ("asked", "needs", "slots", "options"),
    [
        # what is asked for by the site's own name wins, and says how many slots there are
        ({"worker_cores": 4}, Needs(), 4, {"worker_cores": 4}),
        ({"worker_cores": 4}, Needs(cpu=2), 2, {"worker_cores": 4}),
        ({"worker_cores": 1}, Needs(cpu=2), 1, {"worker_cores": 1}),
        ({"worker_cores": 4}, Needs(memory=GIB), 4, {"worker_cores": 4, "worker_memory": 4 + ROOM}),
        ({}, Needs(cpu=0.5), 1, {"worker_cores": 1}),
        ({}, Needs(cpu=2.5), 1, {"worker_cores": 3}),
        # several slots share a device, or a slot has several
        ({}, Needs(gpu=0.5), 2, {"gpus": 1, "worker_cores": 2}),
        ({}, Needs(gpu=0.5, cpu=2), 2, {"gpus": 1, "worker_cores": 4}),
        ({}, Needs(gpu=2), 1, {"gpus": 2}),
        ({"gpus": 2}, Needs(gpu=1), 2, {"gpus": 2, "worker_cores": 2}),
        ({}, Needs(gpu=1 / 3), 3, {"gpus": 1, "worker_cores": 3}),
    ],
)
def test_slots(asked: dict[str, Any], needs: Needs, slots: int, options: dict[str, Any]) -> None:
    choice = choose_options(USUAL, asked, needs)

    assert (choice.slots, choice.options) == (slots, options)


def test_a_site_without_an_option_for_cores() -> None:
    assert choose_options({}, {}, Needs()).slots is None, "a worker tells, once it is there"
    assert choose_options({}, {}, Needs(cpu=2)).slots == 1


@pytest.mark.parametrize("name", ["worker_cores", "cores", "cpus", "num_cpus"])
def test_usual_names(name: str) -> None:
    assert choose_options(site(SiteOption(name, "int", 1, low=1, high=8)), {}, Needs(cpu=2)).options == {name: 2}


def test_a_usual_name_with_another_kind_is_not_used() -> None:
    # "environment" is the name of a conda environment at some sites
    offered = site(SiteOption("environment", "string", "base"), SiteOption("env_vars", "mapping", {}))

    assert choose_options(offered, {}, Needs(env={"A": "1"})).options == {"env_vars": {"A": "1"}}


def test_an_option_for_threads() -> None:
    offered = site(CORES, SiteOption("worker_threads", "int", 1, low=1))

    choice = choose_options(offered, {}, Needs(cpu=2))

    assert choice.options == {"worker_cores": 2, "worker_threads": 1}
    assert choice.slots == 1


# names that are configured ------------------------------------------------------------------------------------------


def test_configured_names() -> None:
    offered = site(SiteOption("kerne", "int", 1, low=1, high=8), SiteOption("bild", "string", ""))

    choice = choose_options(offered, {}, Needs(cpu=2, image="mine:2"), {"cpu": "kerne", "image": "bild"})

    assert choice.options == {"kerne": 2, "bild": "mine:2"}


def test_null_switches_a_need_off() -> None:
    choice = choose_options(USUAL, {}, Needs(cpu=2, memory=GIB), {"cpu": None, "memory": None})

    assert choice.options == {}
    assert len(choice.warnings) == 1
    assert "compute.mem" in choice.warnings[0]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ({"cpus": "worker_cores"}, "did you mean cpu?"),
        ({"cpu": "workercores"}, r"gateway\.options\.cpu: .* did you mean worker_cores\?"),
        ({"cpu": 3}, r"gateway\.options\.cpu: found 3"),
        ({"cpu": "environment"}, "a mapping, which cannot say the cpu"),
        ({"memory": {"option": "worker_memory", "unit": "barrels"}}, "found the unit 'barrels'"),
        ({"memory": {"name": "worker_memory"}}, "found a mapping"),
    ],
)
def test_mistakes_in_the_configured_names(names: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        choose_options(USUAL, {}, Needs(cpu=1, memory=GIB), names)


def test_gpus_that_a_site_has_no_option_for() -> None:
    # Splits wait for workers that say that they have some, unless the environment says that all of them do.
    assert not choose_options(site(CORES), {}, Needs(gpu=1)).has_gpus
    assert choose_options(USUAL, {}, Needs(gpu=1)).has_gpus
    trusted = choose_options(site(CORES), {}, Needs(gpu=0.5), {"gpu": None})
    assert (trusted.has_gpus, trusted.slots, trusted.warnings) == (True, 2, ())
    assert not choose_options(USUAL, {}, Needs()).has_gpus


# units --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "unit", "value"),
    [
        (MEMORY, None, 3.25),
        (SiteOption("memory", "int", 2, "GiB of memory"), None, 4),
        (SiteOption("memory", "float", 2.0), None, 3.25),  # a small default counts GiB
        (SiteOption("memory", "int", 2 * GIB), None, 3 * GIB + GIB // 4),  # a large one bytes
        (SiteOption("memory", "int", 2048, "Memory (MiB)"), None, 3328),
        (SiteOption("memory", "int", 2048), "MiB", 3328),
        (SiteOption("memory", "float", 2, "Memory (GB)"), None, round(3.25 * GIB / 1e9, 6)),
        (SiteOption("memory", "string", "2 G"), None, "3.49G"),
        (SiteOption("memory", "string", "2Gi"), None, "3.25Gi"),
        (SiteOption("memory", "string", "2GiB"), None, "3.25GiB"),
        (SiteOption("memory", "string", ""), None, "3.25Gi"),
        (SiteOption("memory", "string", str(2 * GIB)), None, str(3 * GIB + GIB // 4)),
        (SiteOption("memory", "select", "2GB", choices=("2GB", "4GB", "16GB", "huge")), None, "4GB"),
        (SiteOption("memory", "float", 2.0, high=3.1), None, 3.1),  # the room is a courtesy
        (SiteOption("memory", "float", 8.0, low=8), None, 8.0),
    ],
)
def test_memory(option: SiteOption, unit: str | None, value: Any) -> None:
    names = {} if unit is None else {"memory": {"option": option.name, "unit": unit}}

    assert choose_options(site(option), {}, Needs(memory=3 * GIB), names).options == {option.name: value}


def test_a_unit_that_cannot_be_recognised_must_be_configured() -> None:
    offered = site(SiteOption("memory", "int", 2048))

    with pytest.raises(SpecError, match="does not say its unit, and its default 2048 is neither GiB nor bytes"):
        choose_options(offered, {}, Needs(memory=GIB))


@pytest.mark.parametrize(
    ("option", "value"),
    [
        (SiteOption("idle_timeout", "float", 0.0), 90.0),
        (SiteOption("idle_timeout", "int", 5, "Idle timeout (minutes)"), 2),
        (SiteOption("idle_timeout", "int", 5, low=300), 300),
        (SiteOption("idle_timeout", "float", 5, high=60), 60.0),
    ],
)
def test_idle_timeout(option: SiteOption, value: float) -> None:
    assert choose_options(site(option), {}, Needs(idle_timeout=90)).options == {"idle_timeout": value}


def test_gpus_as_a_switch_or_a_choice() -> None:
    assert choose_options(site(SiteOption("gpu", "bool", default=False)), {}, Needs(gpu=1)).options == {"gpu": True}
    offered = site(SiteOption("gpu", "select", "0", choices=("0", "1", "4")))
    assert choose_options(offered, {}, Needs(gpu=2)).options == {"gpu": "4"}


# what is asked for by name ------------------------------------------------------------------------------------------


def test_values_of_the_command_line_are_json_where_they_can_be() -> None:
    offered = site(
        SiteOption("profile", "string", ""),
        SiteOption("size", "select", "1", choices=("1", "2")),
        SiteOption("spot", "bool", default=False),
        MEMORY,
        CORES,
    )

    asked = {"profile": 7, "size": 2, "spot": "true", "worker_memory": "8", "worker_cores": 2.0}
    options = choose_options(offered, asked, Needs()).options

    assert options == {"profile": "7", "size": "2", "spot": True, "worker_memory": 8.0, "worker_cores": 2}


def test_a_quantity_of_memory() -> None:
    assert choose_options(USUAL, {"worker_memory": "8Gi"}, Needs()).options == {"worker_memory": 8.0}


def test_requested_variables_override_those_of_the_handler() -> None:
    asked = {"environment": {"A": "asked"}}

    assert choose_options(USUAL, asked, Needs(env={"A": "follows", "B": "2"})).options == {
        "environment": {"A": "asked", "B": "2"}
    }


def test_variables_that_the_site_sets_by_default_are_kept() -> None:
    offered = site(SiteOption("environment", "mapping", {"SITE": "1"}))

    assert choose_options(offered, {}, Needs(env={"B": "2"})).options == {"environment": {"SITE": "1", "B": "2"}}


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (
            {"worker_core": 2},
            r"no option worker_core; did you mean worker_cores\? It has worker_cores \(a whole number",
        ),
        ({"queue": "fast"}, r"no option queue; it has worker_cores .*; worker_memory \(a number from 0.25 to 16\)"),
        ({"worker_cores": 9}, "found 9, but the gateway's option worker_cores allows a whole number from 1 to 4"),
        ({"worker_cores": 1.5}, "found 1.5, but .* a whole number"),
        ({"worker_cores": True}, "found true, but .* a whole number"),
        ({"worker_memory": "lots"}, "found 'lots', but .* a number from 0.25 to 16"),
        ({"environment": "A=1"}, "found 'A=1', but .* a mapping"),
        ({"image": ["a"]}, "but .* text"),
    ],
)
def test_mistakes_in_requested_options(asked: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        choose_options(USUAL, asked, Needs())


@pytest.mark.parametrize(
    ("needs", "message"),
    [
        (Needs(cpu=9), "compute.cpu: found 9, but the gateway's option worker_cores allows a whole number from 1 to 4"),
        (Needs(memory=99 * GIB), "compute.mem: .* worker_memory allows a number from 0.25 to 16"),
        (Needs(gpu=4), "compute.gpu: found 4, but the gateway's option gpus allows a whole number from 0 to 2"),
    ],
)
def test_needs_that_the_site_refuses(needs: Needs, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        choose_options(USUAL, {}, needs)


def test_an_image_that_is_none_of_the_choices() -> None:
    offered = site(SiteOption("image", "select", "a", choices=("a", "b")))

    with pytest.raises(SpecError, match=r"handler\.image: found 'mine:2', but .* allows one of a, b"):
        choose_options(offered, {}, Needs(image="mine:2"))


def test_a_need_without_an_option_is_a_warning() -> None:
    choice = choose_options(site(CORES), {}, Needs(cpu=1, memory=GIB, gpu=1, image="mine:2", env={"A": "1"}))

    assert choice.options == {"worker_cores": 1}
    assert [warning.split(" is")[0] for warning in choice.warnings] == ["compute.mem", "compute.gpu", "handler.image"]
    assert "it has worker_cores (a whole number from 1 to 4)" in choice.warnings[0]


def test_a_site_without_options() -> None:
    with pytest.raises(SpecError, match="no option worker_cores; it has no options at all"):
        choose_options({}, {"worker_cores": 1}, Needs())
