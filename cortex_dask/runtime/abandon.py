"""Giving a split up whose workers vanish again and again: each of its batches becomes a dead letter that says so."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator
from typing import Any

import orjson

from cortex_dask.io.job_directory import JobDirectory
from cortex_dask.io.records import BatchFailure, SplitRecord
from cortex_dask.io.settings import JobSettings
from cortex_dask.io.splits import Split, batch_id

__all__ = ["abandon_split"]


def abandon_split(
    job: JobDirectory, settings: JobSettings, split: Split, message: str, *, attempts: int
) -> SplitRecord:
    """Write a dead letter for every batch of a split, and return the record that says so.

    The batches are read again for their payloads (here, by the coordinator; the handler is not involved).

    Parameters
    ----------
    job : JobDirectory
        Where the dead letters are written.
    settings : JobSettings
        The job's.
    split : Split
        The split.
    message : str
        What happened, for people.
    attempts : int
        How often the split was sent.
    """
    attempt_id = uuid.uuid4().hex
    name = f"failures/{split.number:06d}-{attempt_id}.jsonl"
    lines: list[bytes] = []
    failures: list[BatchFailure] = []
    for index, rows, position, payload in _batches(job, split):
        identity = batch_id(settings.job_id, split.origin, index)
        failures.append(BatchFailure(index, identity, rows, attempts, "worker lost", message))
        letter = {
            "batch_id": identity,
            "split": split.origin,
            "batch": index,
            "position": position,
            "rows": rows,
            "attempts": attempts,
            "cause": "worker lost",
            "error": message,
            "traceback": None,
            "payload": payload,
        }
        lines.append(_dump(letter))
    if lines:
        job.store.write(name, b"\n".join(lines) + b"\n")
    return SplitRecord(
        split=split.number,
        attempt_id=attempt_id,
        part=None,
        batches=len(failures),
        succeeded=0,
        failures=tuple(failures),
        failures_file=name if lines else None,
        failed_attempts=attempts * len(failures),
        rows_in=sum(failure.rows for failure in failures),
        worker="coordinator",
        finished=time.time(),
    )


def _batches(job: JobDirectory, split: Split) -> Iterator[tuple[int, int, Any, Any]]:
    from cortex_dask.io.payload import to_records
    from cortex_dask.io.reading import Batch, UnreadableInput, read_split

    header = job.plan_header()
    assert header is not None
    try:
        for item in read_split(split, header):
            if isinstance(item, Batch):
                yield item.index, item.rows, [tuple(place) for place in _plain(item.position)], to_records(item.data)
    except UnreadableInput:
        # What cannot be read any more is still named: by index, as planned, without its payload.
        for index in split.only or range(split.batches or 1):
            yield index, 0, None, None


def _plain(position: Any) -> Any:
    from dataclasses import astuple

    return (astuple(place) for place in position)


def _dump(value: Any) -> bytes:
    try:
        return orjson.dumps(value)
    except TypeError:
        import json

        return json.dumps(value, default=str).encode()
