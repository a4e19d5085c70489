"""Plain Dask by its collections: ``dask.dataframe.map_partitions`` for Parquet, ``dask.bag`` for JSON lines."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
from distributed import Client, LocalCluster
from workloads import WORKLOADS, kept_model, run_of


def frames(frame: pd.DataFrame, workload: str, data: Path, marks: str | None) -> pd.DataFrame:
    predict = kept_model(workload, data, marks)
    size = WORKLOADS[workload].batch_size
    results = []
    for start in range(0, len(frame), size):
        batch = frame.iloc[start : start + size]
        results.append(pd.DataFrame(predict({name: batch[name].to_numpy() for name in batch.columns})))
    return pd.concat(results, ignore_index=True)


def records(part, workload: str, data: Path, marks: str | None) -> list[dict]:
    predict = kept_model(workload, data, marks)
    size = WORKLOADS[workload].batch_size
    rows = list(part)
    return [result for start in range(0, len(rows), size) for result in predict(rows[start : start + size])]


def main() -> None:
    run = run_of("dask.dataframe or dask.bag")
    known = {"workload": run.workload.name, "data": run.data, "marks": run.marks}
    with LocalCluster(n_workers=run.workers, threads_per_worker=1) as cluster, Client(cluster):
        if run.workload.format == "json":
            import dask.bag as db

            bag = db.read_text([str(path) for path in run.files]).map(json.loads)
            bag.map_partitions(records, **known).map(json.dumps).to_textfiles(str(run.output / "part-*.jsonl"))
        else:
            import dask.dataframe as dd

            meta = {"id": np.int64, "prediction": run.workload.prediction}
            frame = dd.read_parquet(str(run.data / "input"))
            frame.map_partitions(frames, **known, meta=meta).to_parquet(str(run.output), write_index=False)


if __name__ == "__main__":
    main()
