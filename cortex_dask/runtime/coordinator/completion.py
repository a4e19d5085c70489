"""``on_job_complete``, run once: on one worker, for as long as the job may take."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable

from cortex_dask.io.job.directory import JobDirectory
from cortex_dask.io.job.records import Outcome
from cortex_dask.runtime.cluster import Cluster
from cortex_dask.runtime.coordinator.limits import STOP_GRACE, Ended, Limits
from cortex_dask.runtime.timeout import BackgroundCall


def complete(job: JobDirectory, cluster: Cluster, limits: Limits, stop: Callable[[Exception], None]) -> bool:
    """Run ``on_job_complete`` unless it has succeeded before, and return whether it was run now.

    Raises :class:`Ended` if it failed, or if the job had to end (for which ``stop`` is called with the reason) and it
    did not succeed in the last moment.
    """
    if job.read_json("completed.json") is not None:
        return False
    outcome = _call_complete(cluster, limits, stop)
    if outcome.kind == "storage":
        raise Ended("worker error", f"{outcome.message} (the job can be resumed)")
    if outcome.kind == "stopped":
        limits.expect_stop()
        limits.check_stop()
    if outcome.kind != "done":
        raise Ended(outcome.kind, outcome.message)
    # The worker has written it, unless there was nothing to run or its store failed just then.
    if job.read_json("completed.json") is None:
        job.write_json("completed.json", {"time": time.time()})
    return True


def _call_complete(cluster: Cluster, limits: Limits, stop: Callable[[Exception], None]) -> Outcome:
    if cluster.runs_inline:
        return cluster.complete()
    call = BackgroundCall(cluster.complete)
    try:
        return call.result(check=limits.check_end)
    except Ended as ended:
        stop(ended)
        with contextlib.suppress(Exception):
            outcome = call.result(STOP_GRACE)
            if outcome.kind == "done":
                return outcome
        raise
