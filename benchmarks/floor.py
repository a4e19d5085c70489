"""The floor: plain processes that pull units of work off a queue, read, compute and write.

No framework, no commit, no log. A unit is a file, a row group, or some rows of one (the skewed workload). Every process
loads its model once, decodes with one thread, and gathers rows into row groups of about 128 k, as a careful engineer
would by hand.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from multiprocessing.queues import SimpleQueue
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from workloads import Run, mark, run_of

ROW_GROUP = 128 * 1024

Unit = tuple[int, Path, int, int, int]  # number, file, row group, first row, end


def units(run: Run) -> Iterator[Unit]:
    number = 0
    for path in run.files:
        if run.workload.format == "json":
            yield number, path, 0, 0, 0
            number += 1
            continue
        footer = pq.read_metadata(path)
        for group in range(footer.num_row_groups):
            rows = footer.row_group(group).num_rows
            step = run.workload.unit or rows
            for start in range(0, rows, step):
                yield number, path, group, start, min(rows, start + step)
                number += 1


def work(run: Run, queue: SimpleQueue) -> None:
    pa.set_cpu_count(1)
    pa.set_io_thread_count(1)
    model = run.workload.model(run.data)
    one = lines if run.workload.format == "json" else rows
    marked = False
    while (unit := queue.get()) is not None:
        if not marked:
            mark(run.marks)
            marked = True
        one(run, model, unit)


def rows(run: Run, model, unit: Unit) -> None:
    number, path, group, start, stop = unit
    size = run.workload.batch_size
    # batches of the file do not end where a unit begins: read a multiple of the batch and slice
    position, writer, held = 0, None, []
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(size, row_groups=[group], use_threads=False):
            position += len(batch)
            if position <= start:
                continue
            result = model({name: batch.column(name).to_numpy() for name in batch.schema.names})
            held.append(pa.record_batch(result))
            # a file a unit: whoever is killed leaves it truncated, which is why an engine does more than this
            writer = writer or pq.ParquetWriter(run.output / f"part-{number:06d}.parquet", held[0].schema)
            if sum(map(len, held)) >= ROW_GROUP:
                writer.write_table(pa.Table.from_batches(held))
                held = []
            if position >= stop:
                break
    if held:
        writer.write_table(pa.Table.from_batches(held))
    if writer:
        writer.close()


def lines(run: Run, model, unit: Unit) -> None:
    import orjson

    number, path, *_ = unit
    size = run.workload.batch_size
    with path.open("rb") as source, (run.output / f"part-{number:06d}.jsonl").open("wb") as target:
        batch = []
        for line in source:
            batch.append(orjson.loads(line))
            if len(batch) == size:
                target.write(b"".join(orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE) for row in model(batch)))
                batch = []
        if batch:
            target.write(b"".join(orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE) for row in model(batch)))


def main() -> None:
    run = run_of("plain processes")
    context = multiprocessing.get_context()
    queue = context.SimpleQueue()
    processes = [context.Process(target=work, args=(run, queue)) for _ in range(run.workers)]
    for process in processes:
        process.start()
    # the longest first, so that none is left to the end alone
    for unit in sorted(units(run), key=lambda unit: -(unit[4] - unit[3])):
        queue.put(unit)
    for _ in processes:
        queue.put(None)
    for process in processes:
        process.join()
    if any(process.exitcode for process in processes):
        raise SystemExit(f"a process failed: {[process.exitcode for process in processes]}")


if __name__ == "__main__":
    main()
