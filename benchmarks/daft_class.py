"""Daft: a class UDF with a batch method, its documentation's way to keep a model, on the native runner."""

from __future__ import annotations

from pathlib import Path

import daft
from daft import DataType
from workloads import WORKLOADS, mark, run_of


def columns_class(workload: str, data: Path, marks: str | None, names: list[str], workers: int):
    shape = WORKLOADS[workload]

    @daft.cls(max_concurrency=workers)
    class Predict:
        def __init__(self):
            mark(marks)
            self.model = shape.model(data)

        @daft.method.batch(return_dtype=DataType.from_numpy_dtype(shape.prediction), batch_size=shape.batch_size)
        def predict(self, *columns: daft.Series):
            arrays = [column.to_arrow().to_numpy() for column in columns]
            return self.model(dict(zip(names, arrays, strict=True)))["prediction"]

    return Predict()


def records_class(workload: str, data: Path, marks: str | None, workers: int):
    shape = WORKLOADS[workload]
    result = DataType.struct({"name": DataType.string(), "prediction": DataType.float64()})

    @daft.cls(max_concurrency=workers)
    class Transform:
        def __init__(self):
            mark(marks)
            self.model = shape.model(data)

        @daft.method.batch(return_dtype=result, unnest=True, batch_size=shape.batch_size)
        def transform(self, ids: daft.Series, names: daft.Series, values: daft.Series, tags: daft.Series):
            columns = (ids.to_pylist(), names.to_pylist(), values.to_pylist(), tags.to_pylist())
            keys = ("id", "name", "value", "tags")
            rows = self.model([dict(zip(keys, row, strict=True)) for row in zip(*columns, strict=True)])
            return [{"name": row["name"], "prediction": row["prediction"]} for row in rows]

    return Transform()


def main() -> None:
    run = run_of("Daft")
    daft.set_runner_native()
    name = run.workload.name
    if run.workload.format == "json":
        frame = daft.read_json(str(run.data / "input" / "*.jsonl"))
        work = records_class(name, run.data, run.marks, run.workers)
        frame = frame.select(frame["id"], work.transform(*(frame[key] for key in ("id", "name", "value", "tags"))))
        frame.write_json(str(run.output))
    else:
        frame = daft.read_parquet(str(run.data / "input" / "*.parquet"))
        names = frame.column_names
        work = columns_class(name, run.data, run.marks, names, run.workers)
        result = work.predict(*(frame[key] for key in names)).alias("prediction")
        frame.select(frame["id"], result).write_parquet(str(run.output))


if __name__ == "__main__":
    main()
