"""The six workloads: their shape, and the work itself, in plain numpy and Python, the same for every engine.

A workload's *model* is what an engine keeps per worker: built once from the data folder, then called with batches. It
takes and returns columns (``dict`` of numpy arrays) or, for JSON lines, records (``list`` of ``dict``). Every model
returns ``id`` and ``prediction``.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

__all__ = [
    "WORKLOADS",
    "Burn",
    "Cheap",
    "Model",
    "Run",
    "Transform",
    "Wait",
    "Workload",
    "kept_model",
    "mark",
    "run_of",
]

Columns = dict[str, np.ndarray]


class Cheap:
    """A logistic regression over seven columns."""

    weights = np.array([0.3, -0.2, 0.7, 0.1, -0.5, 0.25, -0.65], dtype=np.float32)

    def __init__(self, data: Path) -> None:
        pass

    def predict(self, columns: Columns) -> Columns:
        logits = columns["f0"] * self.weights[0]
        for number in range(1, 7):
            logits += columns[f"f{number}"] * self.weights[number]
        np.negative(logits, out=logits)
        np.exp(logits, out=logits)
        logits += 1
        np.reciprocal(logits, out=logits)
        return {"id": columns["id"], "prediction": logits}

    __call__ = predict


class Model:
    """A random forest of 50 to 100 MB, as it comes from a training job."""

    def __init__(self, data: Path) -> None:
        import joblib

        self.forest = joblib.load(data / "model.joblib")
        self.forest.n_jobs = 1

    def predict(self, columns: Columns) -> Columns:
        features = np.column_stack([columns[f"f{number}"] for number in range(10)])
        return {"id": columns["id"], "prediction": self.forest.predict_proba(features)[:, 1]}

    __call__ = predict


class Transform:
    """A few dictionary operations a record."""

    def __init__(self, data: Path) -> None:
        pass

    def predict(self, records: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [
            {
                "id": record["id"],
                "name": record["name"].upper(),
                "prediction": record["value"] * 2 + len(record["tags"]),
            }
            for record in records
        ]

    __call__ = predict


class Wait:
    """A handler that waits, as for a remote model."""

    seconds = 0.020

    def __init__(self, data: Path) -> None:
        pass

    def predict(self, columns: Columns) -> Columns:
        return {"id": columns["id"], "prediction": columns["f0"] * 2}

    def __call__(self, columns: Columns) -> Columns:
        time.sleep(self.seconds)
        return self.predict(columns)


class Burn(Wait):
    """50 µs of CPU a row, by the thread's clock, so the work is the same on any machine and under any load."""

    seconds = 50e-6

    def __call__(self, columns: Columns) -> Columns:
        until = time.thread_time() + self.seconds * len(columns["id"])
        while time.thread_time() < until:
            pass
        return self.predict(columns)


@dataclass(frozen=True, slots=True)
class Workload:
    """One workload at full scale."""

    name: str
    title: str
    rows: int
    files: int
    batch_size: int
    model: Callable[[Path], Any]
    #: Kind of input and of output.
    format: str = "parquet"
    features: int = 7
    #: Shares of the rows that the first files hold; the others share the rest equally.
    shares: tuple[float, ...] = ()
    #: Rows a unit of work of the floor; None: a row group.
    unit: int | None = None

    @property
    def prediction(self) -> type[np.floating]:
        """The type of the predictions, for engines that must know it beforehand."""
        return np.float32 if self.name in ("W1", "W4", "W5", "W6") else np.float64

    def sizes(self, scale: float) -> list[int]:
        """Return the rows of each file at this scale."""
        rows = max(self.files, round(self.rows * scale))
        sizes = [round(rows * share) for share in self.shares]
        rest, count = rows - sum(sizes), self.files - len(sizes)
        # whole batches where there are enough of them, so that no file ends with a short one
        step = self.batch_size if rest >= self.batch_size * count else 1
        sizes += [(rest // step // count + (number < rest // step % count)) * step for number in range(count)]
        sizes[-1] += rows - sum(sizes)
        return sizes


WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload("W1", "cheap: 20 M rows, numpy sigmoid, batch 8192", 20_000_000, 64, 8192, Cheap),
        Workload("W2", "model: 4 M rows, random forest, batch 8192", 4_000_000, 32, 8192, Model, features=10),
        Workload("W3", "many small batches: 1 M JSON lines, batch 32", 1_000_000, 100, 32, Transform, format="json"),
        Workload("W4", "latency: 2,000 batches that wait 20 ms", 200_000, 64, 100, Wait, features=1),
        Workload("W5", "tiny: 1,000 rows, cold", 1_000, 4, 250, Cheap),
        Workload(
            "W6",
            "skew: 4 of 64 files hold 80 %, 50 µs of CPU a row",
            1_000_000,
            64,
            1024,
            Burn,
            features=1,
            shares=(0.40, 0.20, 0.12, 0.08),
            unit=8192,
        ),
    )
}


def mark(folder: str | None) -> None:
    """Note that this process is about to handle its first batch: steady state begins when the last one is."""
    if folder:
        (Path(folder) / f"{os.getpid()}-{time.monotonic_ns()}").write_text(repr(time.time()))


@cache
def kept_model(workload: str, data: Path, marks: str | None) -> Any:
    """Return this process's model, loaded once: for engines whose tasks are functions."""
    mark(marks)
    return WORKLOADS[workload].model(data)


@dataclass(frozen=True, slots=True)
class Run:
    """What an engine is asked to do."""

    workload: Workload
    data: Path  # holds ``input/`` and what the model needs
    output: Path  # an empty folder
    workers: int
    marks: str | None

    @property
    def files(self) -> list[Path]:
        return sorted((self.data / "input").iterdir())


def run_of(engine: str) -> Run:
    """Read an engine's command line; all engines have the same one."""
    parser = argparse.ArgumentParser(description=f"Run one workload with {engine}.")
    parser.add_argument("workload", choices=WORKLOADS)
    parser.add_argument("--data", type=Path, required=True, help="the workload's folder, as data.py prints it")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--marks", help="folder for the times at which workers begin")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    return Run(
        WORKLOADS[options.workload],
        options.data.absolute(),
        options.output.absolute(),
        options.workers,
        options.marks,
    )
