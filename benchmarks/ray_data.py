"""Ray Data: ``map_batches`` with a callable class on a pool of actors of a fixed size."""

from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # read on import

import ray
from workloads import WORKLOADS, mark, run_of


class Predict:
    def __init__(self, workload: str, data: Path, marks: str | None):
        self.model = WORKLOADS[workload].model(data)
        self.marks = marks

    def __call__(self, batch):
        mark(self.marks)
        self.marks = None
        if "tags" not in batch:
            return self.model(batch)
        names = ("id", "name", "value", "tags")
        columns = (batch[name].tolist() for name in names)
        rows = self.model([dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)])
        return {name: [row[name] for row in rows] for name in ("id", "name", "prediction")}


def main() -> None:
    run = run_of("Ray Data")
    # nothing listens beyond this machine
    ray.init(num_cpus=run.workers, include_dashboard=False, _node_ip_address="127.0.0.1")
    source = str(run.data / "input")
    data = ray.data.read_json(source, lines=True) if run.workload.format == "json" else ray.data.read_parquet(source)
    data = data.map_batches(
        Predict,
        fn_constructor_args=(run.workload.name, run.data, run.marks),
        batch_size=run.workload.batch_size,
        batch_format="numpy",
        num_cpus=0.5,  # or the actors take every core and nothing is left to read with
        compute=ray.data.ActorPoolStrategy(size=run.workers),
    )
    (data.write_json if run.workload.format == "json" else data.write_parquet)(str(run.output))
    ray.shutdown()


if __name__ == "__main__":
    main()
