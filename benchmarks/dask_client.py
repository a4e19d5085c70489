"""Plain Dask, written by hand: ``client.map`` over files on a ``LocalCluster`` of single-threaded processes.

The model is kept per process; a task reads its file batch by batch and writes its own part.
"""

from __future__ import annotations

from pathlib import Path

import orjson
import pyarrow as pa
import pyarrow.parquet as pq
from distributed import Client, LocalCluster
from workloads import WORKLOADS, kept_model, run_of


def rows(path: Path, target: Path, workload: str, data: Path, marks: str | None) -> int:
    predict = kept_model(workload, data, marks)
    count, writer, held = 0, None, []
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(WORKLOADS[workload].batch_size, use_threads=False):
            held.append(pa.record_batch(predict({name: batch.column(name).to_numpy() for name in batch.schema.names})))
            count += len(batch)
            writer = writer or pq.ParquetWriter(target, held[0].schema)
            if sum(map(len, held)) >= 128 * 1024:
                writer.write_table(pa.Table.from_batches(held))
                held = []
    if held:
        writer.write_table(pa.Table.from_batches(held))
    if writer:
        writer.close()
    return count


def lines(path: Path, target: Path, workload: str, data: Path, marks: str | None) -> int:
    predict = kept_model(workload, data, marks)
    size = WORKLOADS[workload].batch_size
    records = [orjson.loads(line) for line in path.read_bytes().splitlines()]
    with target.open("wb") as file:
        for start in range(0, len(records), size):
            for row in predict(records[start : start + size]):
                file.write(orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE))
    return len(records)


def main() -> None:
    run = run_of("client.map of dask.distributed")
    function, suffix = (lines, ".jsonl") if run.workload.format == "json" else (rows, ".parquet")
    # the largest files first, as one would by hand
    files = sorted(run.files, key=lambda path: -path.stat().st_size)
    targets = [run.output / f"part-{number:06d}{suffix}" for number in range(len(files))]
    with LocalCluster(n_workers=run.workers, threads_per_worker=1) as cluster, Client(cluster) as client:
        futures = client.map(function, files, targets, workload=run.workload.name, data=run.data, marks=run.marks)
        print(sum(client.gather(futures)), "rows")


if __name__ == "__main__":
    main()
