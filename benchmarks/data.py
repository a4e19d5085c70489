"""Make a workload's input, the same bytes of values every time, with the result that a right engine must give.

::

    python benchmarks/data.py W1 --data build/benchmarks/data --scale 0.1
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from workloads import WORKLOADS, Columns, Workload

__all__ = ["Checksum", "expected", "folder", "make"]


@dataclass(frozen=True, slots=True)
class Checksum:
    """What is compared: nothing missing, nothing twice, nothing wrong, and every prediction beside its own id."""

    rows: int = 0
    ids: int = 0
    predictions: float = 0.0
    pairs: float = 0.0

    def __add__(self, other: Checksum) -> Checksum:
        return Checksum(*(mine + its for mine, its in zip(asdict(self).values(), asdict(other).values(), strict=True)))

    @classmethod
    def of(cls, ids: np.ndarray, predictions: np.ndarray) -> Checksum:
        predictions = predictions.astype(np.float64)
        weights = (ids % 1009 + 1).astype(np.float64)
        return cls(len(ids), int(ids.sum()), float(predictions.sum()), float((weights * predictions).sum()))

    def matches(self, other: Checksum) -> bool:
        exact = (self.rows, self.ids) == (other.rows, other.ids)
        return exact and bool(np.allclose((self.predictions, self.pairs), (other.predictions, other.pairs), rtol=1e-6))


def folder(data: Path, workload: Workload, scale: float) -> Path:
    """Return where a workload's input lies: ``input/``, ``expected.json`` and, for W2, ``model.joblib``."""
    return data / f"{workload.name}-{scale:g}"


def make(workload: Workload, data: Path, scale: float) -> Path:
    """Make the input unless it is there already."""
    target = folder(data, workload, scale)
    if (target / "expected.json").exists():
        return target
    print(f"making {workload.name} at scale {scale:g} in {target}", file=sys.stderr)
    shutil.rmtree(target, ignore_errors=True)
    (target / "input").mkdir(parents=True)
    if workload.name == "W2":
        _train(workload, target)
    sizes = workload.sizes(scale)
    starts = np.cumsum([0, *sizes[:-1]]).tolist()
    jobs = [(workload.name, target, number, *bounds) for number, bounds in enumerate(zip(starts, sizes, strict=True))]
    with multiprocessing.get_context("spawn").Pool(min(8, os.cpu_count() or 2)) as pool:
        total = sum(pool.starmap(_make_file, jobs, chunksize=1), Checksum())
    (target / "expected.json").write_text(json.dumps(asdict(total)))
    return target


def expected(target: Path) -> Checksum:
    """Read what a right engine gives."""
    return Checksum(**json.loads((target / "expected.json").read_text()))


def _columns(workload: Workload, start: int, rows: int) -> Columns:
    random = np.random.default_rng([int(workload.name[1:]), start])
    columns: Columns = {"id": np.arange(start, start + rows, dtype=np.int64)}
    for number in range(workload.features):
        columns[f"f{number}"] = random.standard_normal(rows, dtype=np.float32)
    return columns


def _make_file(name: str, target: Path, number: int, start: int, rows: int) -> Checksum:
    workload = WORKLOADS[name]
    model = workload.model(target)
    if workload.format == "json":
        records = [
            {
                "id": row,
                "name": f"item-{row:08d}",
                "value": row * 7919 % 1000 / 8,
                "tags": ["red", "green", "blue"][: row % 4],
            }
            for row in range(start, start + rows)
        ]
        text = "".join(json.dumps(record, separators=(",", ":")) + "\n" for record in records)
        (target / "input" / f"{number:03d}.jsonl").write_text(text)
        predicted = model.predict(records)
        return Checksum.of(*(np.array([row[key] for row in predicted]) for key in ("id", "prediction")))
    columns = _columns(workload, start, rows)
    pq.write_table(pa.table(columns), target / "input" / f"{number:03d}.parquet", row_group_size=1 << 20)
    total = Checksum()
    for first in range(0, rows, 65536):
        predicted = model.predict({key: values[first : first + 65536] for key, values in columns.items()})
        total += Checksum.of(predicted["id"], predicted["prediction"])
    return total


def _train(workload: Workload, target: Path) -> None:
    import joblib
    from sklearn.ensemble import RandomForestClassifier

    random = np.random.default_rng(2)
    features = random.standard_normal((30_000, workload.features), dtype=np.float32)
    # noisy labels make deep trees, hence a model of the size that people have
    labels = features[:, 0] * features[:, 1] + np.sin(features[:, 2]) + random.standard_normal(30_000) > 0
    forest = RandomForestClassifier(n_estimators=100, n_jobs=-1, random_state=2).fit(features, labels)
    joblib.dump(forest, target / "model.joblib")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("workloads", nargs="+", choices=WORKLOADS)
    parser.add_argument("--data", type=Path, default=Path("build/benchmarks/data"))
    parser.add_argument("--scale", type=float, default=1.0)
    options = parser.parse_args()
    for name in options.workloads:
        print(make(WORKLOADS[name], options.data, options.scale))


if __name__ == "__main__":
    main()
