"""What runs on a Dask worker for a job: its splits and its completion, and what ends them."""

from __future__ import annotations

import asyncio
from typing import Any

import orjson

from cortex_dask.clusters import versions
from cortex_dask.clusters.outcomes import outcome_event
from cortex_dask.io.job.records import Outcome, SplitTask
from cortex_dask.runtime.frames import encode


def run_split(data: bytes, needed: dict[str, str | None]) -> bytes:
    """Run one split on a Dask worker (the task that the scheduler sees); task and outcome are JSON."""
    from distributed import get_worker

    task = SplitTask.from_json(orjson.loads(data))
    if needed and (mismatch := versions.own_mismatch(needed)) is not None:
        return orjson.dumps(Outcome("worker error", task.split.number, message=mismatch))
    from cortex_dask.runtime.worker.supervisor import run_split as supervise  # which no client needs

    worker = get_worker()
    events = topic(task.job_url)
    outcome = orjson.dumps(supervise(task, lambda event: worker.log_event(events, {"event": encode(event)})))
    key = worker.get_current_task()
    token = str(key[-1]) if isinstance(key, tuple) else ""
    if (event := outcome_event((token, task.split.number, task.attempt), outcome)) is not None:
        worker.log_event(events, event)
    return outcome


def run_completion(job_url: str) -> dict[str, Any]:
    """Run ``on_job_complete`` on a Dask worker."""
    from distributed import get_worker

    from cortex_dask.runtime.worker.supervisor import run_completion as supervise  # which no client needs

    worker = get_worker()
    events = topic(job_url)
    return supervise(job_url, lambda event: worker.log_event(events, {"event": encode(event)})).to_json()


def stop_job(job_url: str, reason: str) -> None:
    """End the job's splits that run on this worker."""
    from cortex_dask.runtime.worker import slots  # which no client needs

    slots.stop_job(job_url, reason)


def cancel_split(job_url: str, split: int) -> None:
    """End the attempts at a split that run on this worker."""
    from cortex_dask.runtime.worker import slots  # which no client needs

    slots.cancel_split(job_url, split)


async def close_job(job_url: str) -> None:
    """End the job's handler processes on this worker."""
    from cortex_dask.runtime.worker import slots  # which no client needs

    # It waits for handler processes, and must not do so on the event loop: other jobs are on the worker as well.
    await asyncio.to_thread(slots.close_job, job_url)


def topic(job_url: str) -> str:
    """Return the topic of the events of a job's splits."""
    return f"cortex-dask {job_url}"
