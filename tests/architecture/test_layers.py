"""Imports point one way: from the layers above to those below, counted also inside functions and for annotations."""

from __future__ import annotations

from tests.architecture.imports import MODULES, imports, own_module

#: From the ground up. A module imports from its own group and from groups of earlier rows; groups of one row do not
#: import each other.
LAYERS = [
    ["errors", "formatting", "dask_config"],
    ["io.store"],
    ["io.job"],
    ["io.arrow"],
    ["io.batch"],
    ["io.input"],
    ["io.json", "io.parquet"],
    ["io.rows"],
    ["io.output"],
    ["io.planning"],
    ["io.reading", "io.cache"],
    ["project"],
    ["spec"],
    ["environments", "display", "tensorflow"],
    [  # what both sides of the pipe share, and the port to the machines
        "runtime.cluster",
        "runtime.timeout",
        "runtime.progress_cell",
        "runtime.log_line",
        "runtime.failures",
        "runtime.metrics",
        "runtime.job_context",
    ],
    ["runtime.history"],
    ["runtime.frames"],
    ["runtime.handler_process"],
    ["runtime.worker"],
    ["runtime.dead_letters"],
    ["runtime.coordinator"],
    ["clusters"],
    ["job"],
    ["catalog", "testing", "preview"],
    ["deployments"],
    ["client"],
    ["__init__"],
    ["cli", "compat"],
    ["__main__"],
]

#: Packages that hold groups, and nothing but one paragraph themselves.
CONTAINERS = {"cortex_dask.io", "cortex_dask.runtime"}


def group(module: str) -> tuple[int, str]:
    """Return the row and the name of a module's group."""
    name = module.removeprefix("cortex_dask").removeprefix(".") or "__init__"
    for row, groups in enumerate(LAYERS):
        for found in groups:
            if name == found or name.startswith(found + "."):
                return row, found
    raise AssertionError(
        f"{module} is in no group: add its group to LAYERS, and to the picture in docs/architecture.md"
    )


def test_every_module_is_in_a_group() -> None:
    for module in MODULES.keys() - CONTAINERS:
        group(module)


def test_every_group_exists() -> None:
    found = {group(module)[1] for module in MODULES.keys() - CONTAINERS}
    assert {name for groups in LAYERS for name in groups} - found == set()


def test_imports_point_down() -> None:
    wrong = []
    for module, path in MODULES.items():
        if module in CONTAINERS:
            continue
        row, own = group(module)
        for name, line, _ in imports(path):
            target = own_module(name)
            if target is None or name == "cortex_dask.__version__" or target in CONTAINERS:
                continue
            other_row, other = group(target)
            if other_row > row or (other_row == row and other != own):
                wrong.append(f"{path.name}:{line}: {module} imports {target}")
    assert wrong == []


def test_no_module_imports_itself_in_a_circle() -> None:
    graph = {
        module: {target for name, _, _ in imports(path) if (target := own_module(name)) not in (None, module)}
        for module, path in MODULES.items()
        if module != "cortex_dask"  # whose names are imported on first use
    }
    while removable := [module for module, targets in graph.items() if not targets & graph.keys()]:
        for module in removable:
            del graph[module]
    # what is left imports a circle or is in one; those that nothing left imports only lead to it
    while leaves := [module for module in graph if not any(module in targets for targets in graph.values())]:
        for module in leaves:
            del graph[module]
    assert {module: sorted(targets & graph.keys()) for module, targets in graph.items()} == {}
