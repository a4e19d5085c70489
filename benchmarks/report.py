"""The table and the plot: medians of runs, and ratios of paired runs."""

from __future__ import annotations

import math
import os
import platform
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

import psutil
from engines import ENGINES
from goals import goals
from workloads import WORKLOADS

__all__ = ["write_report"]


def write_report(document: dict[str, Any], page: Path | None) -> str:
    """Return the tables; write a page of them as well, with a plot beside it, when there is a path for it."""
    runs: dict[str, dict[str, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for result in document["results"]:
        runs[result["workload"]][result["engine"]].append(result)
    tables = "\n".join(_table(workload, engines) for workload, engines in runs.items())
    if page:
        plot = page.with_suffix(".svg")
        plot.write_text(_plot(runs))
        page.write_text(_page(document, tables, plot.name))
    return tables


def _table(workload: str, engines: dict[str, list[dict[str, Any]]]) -> str:
    lines = [
        f"### {workload} {WORKLOADS[workload].title}",
        "",
        "| engine | runs | wall s (min to max) | to floor | steady s | to floor | CPU s | peak MiB | rows/s |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    floor = engines.get("floor", [])
    for name in ENGINES:
        if name not in engines:
            continue
        good = [run for run in engines[name] if not run["error"]]
        if not good:
            lines.append(f"| {ENGINES[name].title} | {len(engines[name])} | {engines[name][0]['error']} | | | | | | |")
            continue
        wall = [run["wall"] for run in good]
        steady = [run["steady"] for run in good if run["steady"] is not None]
        cells = [
            ENGINES[name].title,
            f"{len(engines[name])}",
            f"{statistics.median(wall):.2f} ({min(wall):.2f} to {max(wall):.2f})",
            _ratio(engines[name], floor, "wall"),
            f"{statistics.median(steady):.2f}" if steady else "",
            _ratio(engines[name], floor, "steady"),
            f"{statistics.median(run['cpu'] for run in good):.1f}",
            f"{statistics.median(run['memory'] for run in good) / 2**20:.0f}",
            f"{statistics.median(run['rows'] / run['wall'] for run in good):,.0f}",
        ]
        if len(good) < len(engines[name]):
            cells[0] += f" ({len(engines[name]) - len(good)} of {len(engines[name])} runs failed)"
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _ratio(runs: Sequence[dict[str, Any]], floor: Sequence[dict[str, Any]], key: str) -> str:
    """Return the median of the ratios within each round: what disturbs a round disturbs both its runs."""
    pairs = zip(runs, floor, strict=False)
    ratios = [run[key] / base[key] for run, base in pairs if not run["error"] and base[key] and run[key] is not None]
    return f"{statistics.median(ratios):.2f}" if ratios else ""


def _page(document: dict[str, Any], tables: str, plot: str) -> str:
    options = document["options"]
    versions = "\n".join(
        f"| {ENGINES[name].title} | {', '.join(f'{package} {version}' for package, version in found.items())} |"
        for name, found in document["versions"].items()
    )
    absent = "".join(
        f"\n{ENGINES[name].title} is missing: it {reason}.\n" for name, reason in document["absent"].items()
    )
    return f"""# Results of the benchmark

Written by `make bench` on {time.strftime("%Y-%m-%d")}: interleaved runs with {options["workers"]} workers at scale
{options["scale"]:g}, each a whole process from start to exit. A run counts only when its output has the right rows, ids
and predictions. Ratios are medians of the ratios within each round. *Steady* is the time from the last worker's first
batch to the last output written. Memory is the process tree's, each shared page counted once (Linux), sampled every 50
ms. What the workloads are: `workloads.py`; where the seconds go: `docs/performance.md`.

Machine: {machine()}; `import distributed` takes {document["distributed"]:.2f} s on it.

{goals(document["results"], min(options["workers"], os.cpu_count() or 1), document["distributed"])}
![Wall time of each engine as a multiple of the floor's]({plot})

{tables}
{absent}
| engine | versions |
| --- | --- |
{versions}
"""


def machine() -> str:
    """Return the machine in words."""
    model = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), model)
    except FileNotFoundError:
        pass  # not Linux
    memory = psutil.virtual_memory().total / 2**30
    system = f"{platform.system()} {platform.release()}"
    return f"{model}, {os.cpu_count()} cores, {memory:.0f} GiB, {system}, Python {sys.version.split()[0]}"


def _plot(runs: dict[str, dict[str, list[dict[str, Any]]]]) -> str:
    """Draw a bar for each engine and workload: median wall time over the floor's, on a logarithmic scale."""
    bars: list[tuple[str, str, float, float]] = []
    for workload, engines in runs.items():
        medians = {
            name: statistics.median(good)
            for name in ENGINES
            if name in engines and (good := [run["wall"] for run in engines[name] if not run["error"]])
        }
        base = medians.get("floor")
        if base:
            bars += [(workload, name, value / base, value) for name, value in medians.items()]
    colours = ["#9aa0a6", "#0b6e4f", "#f4a259", "#bc4b51", "#5b8e7d", "#8cb369", "#5f4bb6"]
    left, height, gap, width = 190, 16, 18, 520
    most = max((ratio for *_, ratio, _ in bars), default=1.0)
    unit = width / max(math.log10(max(most, 1.0)) + 0.3, 0.5)
    y, shapes, last = 30, [], ""
    for workload, name, ratio, value in bars:
        if workload != last:
            y += gap if last else 0
            shapes.append(f'<text x="8" y="{y + 12}" font-weight="bold">{workload}</text>')
            last = workload
        length = max(2.0, (math.log10(max(ratio, 0.5)) + 0.3) * unit)
        colour = colours[list(ENGINES).index(name) % len(colours)]
        shapes.append(f'<text x="{left - 8}" y="{y + 12}" text-anchor="end">{escape(ENGINES[name].title)}</text>')
        shapes.append(f'<rect x="{left}" y="{y + 2}" width="{length:.1f}" height="{height - 4}" fill="{colour}"/>')
        shapes.append(f'<text x="{left + length + 6:.1f}" y="{y + 12}">{ratio:.2f} x, {value:.2f} s</text>')
        y += height
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{left + width + 140}" height="{y + 20}" '
        'font-family="sans-serif" font-size="12">\n<rect width="100%" height="100%" fill="white"/>\n'
        '<text x="8" y="18">Whole process, as a multiple of the floor (logarithmic), and seconds</text>\n'
        + "\n".join(shapes)
        + "\n</svg>\n"
    )
