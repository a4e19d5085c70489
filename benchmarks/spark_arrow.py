"""Spark: ``mapInArrow`` in ``local[N]``, the model kept by each reused Python worker."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pyarrow as pa
from pyspark.sql import SparkSession
from workloads import WORKLOADS, kept_model, run_of


def function(workload: str, data: Path, marks: str | None):
    lines = WORKLOADS[workload].format == "json"

    def predict(batches):
        model = kept_model(workload, data, marks)
        for batch in batches:
            if lines:
                yield pa.RecordBatch.from_pylist(model(batch.to_pylist()))
            else:
                result = model({name: batch.column(name).to_numpy() for name in batch.schema.names})
                yield pa.record_batch(result)

    return predict


def main() -> None:
    run = run_of("Spark")
    os.environ |= {"PYSPARK_PYTHON": sys.executable, "SPARK_LOCAL_IP": "127.0.0.1"}
    spark = (
        SparkSession.builder.master(f"local[{run.workers}]")
        .config("spark.driver.memory", "4g")
        .config("spark.driver.bindAddress", "127.0.0.1")
        .config("spark.driver.host", "127.0.0.1")
        .config("spark.ui.enabled", "false")
        .config("spark.sql.execution.arrow.maxRecordsPerBatch", run.workload.batch_size)
        .config("spark.sql.warehouse.dir", str(run.output / "_warehouse"))
        .getOrCreate()
    )
    source, target = str(run.data / "input"), str(run.output / "rows")
    predict = function(run.workload.name, run.data, run.marks)
    if run.workload.format == "json":
        frame = spark.read.schema("id long, name string, value double, tags array<string>").json(source)
        frame.mapInArrow(predict, "id long, name string, prediction double").write.json(target)
    else:
        kind = {"float32": "float", "float64": "double"}[run.workload.prediction.__name__]
        frame = spark.read.parquet(source)
        frame.mapInArrow(predict, f"id long, prediction {kind}").write.parquet(target)
    spark.stop()


if __name__ == "__main__":
    main()
