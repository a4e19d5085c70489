"""Run the workloads with every engine, interleaved, as whole processes, and write the table.

::

    make bench                     # everything; writes RESULTS.md and RESULTS.svg beside this file
    make bench BENCH="--workloads W1 W5 --repeats 3"
    python benchmarks/run.py --scale 0.1 --no-report
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from data import Checksum, expected, make
from engines import ENGINES, Engine
from measure import measure
from report import write_report
from workloads import WORKLOADS, Workload

__all__ = ["Result"]


_LONG = 40.0  # seconds after which a peer is not run again


@dataclass(frozen=True, slots=True)
class Result:
    """One run of one engine."""

    workload: str
    engine: str
    wall: float
    steady: float | None  # seconds from the last worker's first batch to the last output written
    cpu: float
    memory: int
    rows: int
    error: str


def main() -> None:
    options = _options()
    versions: dict[str, dict[str, str]] = {}
    pythons: dict[str, str] = {}
    absent: dict[str, str] = {}
    for name in options.engines:
        try:
            pythons[name] = ENGINES[name].python(options.work / "environments")
            versions[name] = ENGINES[name].installed(pythons[name])
        except subprocess.CalledProcessError as error:
            absent[name] = f"does not install here: {(error.stderr or '').strip().splitlines()[-1:]}"
            print(f"{name}: {absent[name]}", file=sys.stderr)
    document = {
        "options": {"scale": options.scale, "workers": options.workers},
        "distributed": _import_seconds("distributed"),
        "versions": versions,
        "absent": absent,
    }
    saved = options.work / "results.json"
    results = _kept(saved, options) if options.keep else []
    for result in _runs(pythons, options):
        results.append(result)
        # after each run, so that what took an hour is not lost with what follows
        saved.write_text(json.dumps({**document, "results": [asdict(run) for run in results]}, indent=1))
        print(_line(result), flush=True)
    results.sort(key=lambda run: list(WORKLOADS).index(run.workload))
    table = write_report(
        {**document, "results": [asdict(run) for run in results]}, None if options.no_report else options.report
    )
    print("\n" + table)
    if any(result.error for result in results if result.engine in ("floor", "ours")):
        raise SystemExit("a run failed or its output was wrong: see the table")


def _kept(saved: Path, options: argparse.Namespace) -> list[Result]:
    """Return what an earlier call has measured of other workloads."""
    document = json.loads(saved.read_text()) if saved.exists() else {"results": []}
    if document["results"] and document["options"] != {"scale": options.scale, "workers": options.workers}:
        raise SystemExit(f"{saved} is of another scale or number of workers: leave --keep out, or say the same")
    return [Result(**run) for run in document["results"] if run["workload"] not in options.workloads]


def _runs(pythons: dict[str, str], options: argparse.Namespace) -> Iterator[Result]:
    """Run everything."""
    for name in options.workloads:
        workload = WORKLOADS[name]
        # five seconds of work are no benchmark of a cold start: the tiny one stays tiny
        target = make(workload, options.work / "data", 1.0 if name == "W5" else options.scale)
        truth = expected(target)
        for path in (target / "input").iterdir():
            path.read_bytes()  # into the page cache: nobody's first run pays for the disk
        results: list[Result] = []
        for repeat in range(options.repeats):
            # turn the order every time, so that no engine always runs in the wake of the same other
            order = list(pythons)
            order = order[repeat % len(order) :] + order[: repeat % len(order)]
            for engine in order:
                if ENGINES[engine].is_peer and (repeat >= options.peer_repeats or _is_slow(results, engine)):
                    continue
                results.append(_one(workload, ENGINES[engine], pythons[engine], target, truth, options))
                yield results[-1]


def _is_slow(results: list[Result], engine: str) -> bool:
    """Return whether an engine took so long that once is enough."""
    return any(run.wall > _LONG for run in results if run.engine == engine)


def _one(
    workload: Workload, engine: Engine, python: str, target: Path, truth: Checksum, options: argparse.Namespace
) -> Result:
    scratch = options.work / "run"
    shutil.rmtree(scratch, ignore_errors=True)
    output, marks, home = scratch / "output", scratch / "marks", scratch / "home"
    for folder in (marks, home):
        folder.mkdir(parents=True)
    command = [*engine.command(python), workload.name, "--data", str(target), "--output", str(output)]
    command += ["--workers", str(options.workers), "--marks", str(marks)]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    # one thread a worker: the engines share the cores between processes, as each advises for this kind of work
    environment |= {f"{library}_NUM_THREADS": "1" for library in ("OMP", "OPENBLAS", "MKL")}
    # several engines' worker processes import ``workloads`` by its name
    path = [str(Path(__file__).parent), *filter(None, [environment.get("PYTHONPATH")])]
    environment |= {"PYTHONPATH": os.pathsep.join(path)}
    environment |= {"XDG_DATA_HOME": str(home)}  # where cortex_dask keeps jobs, unless it is told otherwise
    measured = measure(command, scratch / "log.txt", environment=environment, limit=options.limit)
    error = measured.error
    rows = 0
    if not error:
        found = checksum(output)
        rows = found.rows
        if not found.matches(truth):
            error = f"wrong output: {found}, expected {truth}"
    steady = None
    begun = [float(path.read_text()) for path in marks.iterdir()]
    if begun and not error:
        written = max(path.stat().st_mtime for path in parts(output))
        steady = max(0.0, written - max(begun))
    shutil.rmtree(output, ignore_errors=True)
    return Result(workload.name, engine.name, measured.wall, steady, measured.cpu, measured.memory, rows, error)


def parts(output: Path) -> list[Path]:
    """Return the files that a reader of the output directory would read."""
    found = (path for path in output.rglob("*") if path.is_file())
    return sorted(path for path in found if not any(part[0] in "_." for part in path.relative_to(output).parts))


def checksum(output: Path) -> Checksum:
    """Read an engine's whole output."""
    import orjson
    import pyarrow.parquet as pq

    total = Checksum()
    for path in parts(output):
        if path.suffix == ".parquet":
            table = pq.ParquetFile(path).read(["id", "prediction"])
            total += Checksum.of(table["id"].to_numpy(), table["prediction"].to_numpy())
        elif rows := [orjson.loads(line) for line in path.read_bytes().splitlines()]:
            total += Checksum.of(*(np.array([row[key] for row in rows]) for key in ("id", "prediction")))
    return total


def _import_seconds(module: str) -> float:
    """Return how long an import takes in a process of its own: a measure of the machine that others can compare."""
    program = f"import time; began = time.perf_counter(); import {module}; print(time.perf_counter() - began)"
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    command = [sys.executable, "-c", program]
    runs = [subprocess.run(command, check=True, capture_output=True, env=environment).stdout for _ in range(5)]
    return sorted(map(float, runs))[2]


def _line(result: Result) -> str:
    steady = "" if result.steady is None else f"steady {result.steady:6.2f} s  "
    return (
        f"{result.workload}  {result.engine:<15} {result.wall:6.2f} s  {steady}CPU {result.cpu:6.1f} s  "
        f"{result.memory / 2**20:6.0f} MiB  {result.rows / result.wall:12,.0f} rows/s  {result.error}"
    )


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--scale", type=float, default=1.0, help="share of the rows; 1 is the table's")
    parser.add_argument("--repeats", type=int, default=5, help="runs of cortex_dask and of the floor")
    parser.add_argument("--peer-repeats", type=int, default=3, help="runs of each peer (one, if it takes 40 s)")
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--limit", type=float, default=600, help="seconds after which a run is killed")
    parser.add_argument("--work", type=Path, default=Path("build/benchmarks"), help="data, outputs, environments")
    parser.add_argument(
        "--keep", action="store_true", help="show what an earlier call has measured of other workloads as well"
    )
    page = Path(__file__).with_name("RESULTS.md")
    parser.add_argument("--report", type=Path, default=page, help="the page to write; its plot lies beside it")
    parser.add_argument("--no-report", action="store_true", help="print the table, do not write a page")
    options = parser.parse_args()
    options.work = options.work.absolute()
    return options


if __name__ == "__main__":
    main()
