"""Splits that repeat failed batches: ``plan/retry-0000.jsonl`` …, one file for each retry of a job."""

from __future__ import annotations

from collections.abc import Mapping

import orjson

from cortex_dask.io.job.directory import JobDirectory
from cortex_dask.io.job.ledger import Ledger
from cortex_dask.io.job.splits import PlanHeader, Split
from cortex_dask.runtime.coordinator.totals import JobTotals


def read_retries(job: JobDirectory) -> dict[int, Split]:
    """Return the splits that were planned to repeat failed batches, by number."""
    lines = (line for name in _files(job) for line in job.store.read(name).splitlines())
    return {split.number: split for split in (Split.from_json(orjson.loads(line)) for line in lines)}


def plan_retries(
    job: JobDirectory, header: PlanHeader, totals: JobTotals, ledger: Ledger, retries: Mapping[int, Split]
) -> dict[int, Split]:
    """Plan and store one split for each split with failed batches, of exactly those; return the new splits by number.

    Batches that one of the earlier ``retries`` is still to repeat are left to it.
    """
    failed = totals.retryable()
    waiting = {
        (split.origin, index) for number, split in retries.items() if number not in ledger for index in split.only or ()
    }
    number = header.splits + len(retries)
    added: list[Split] = []
    for split in job.splits():
        only = tuple(index for index in failed.get(split.number, ()) if (split.number, index) not in waiting)
        if only:
            added.append(_repeat(split, number + len(added), only, header.batch_size))
    if added:
        name = f"plan/retry-{len(_files(job)):04d}.jsonl"
        job.store.create(name, b"\n".join(orjson.dumps(split.to_json()) for split in added))
    return {split.number: split for split in added}


def _files(job: JobDirectory) -> list[str]:
    return job.store.names("plan/retry-")


def _repeat(split: Split, number: int, only: tuple[int, ...], batch_size: int) -> Split:
    rows = None if split.rows is None else sum(min(batch_size, split.rows - index * batch_size) for index in only)
    return Split(number, split.pieces, rows, len(only), split.bytes, base=split.number, only=only)
