"""Running ``on_job_complete``: on one worker, for as long as the job may take, while stops and timeouts are heeded."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable

from cortex_dask.io.job.directory import JobDirectory
from cortex_dask.io.job.records import Outcome
from cortex_dask.runtime.cluster import Cluster
from cortex_dask.runtime.coordinator.limits import STOP_CHECK, STOP_GRACE, Ended, Limits


def complete(job: JobDirectory, cluster: Cluster, limits: Limits, halt: Callable[[Exception], None]) -> bool:
    """Run ``on_job_complete`` once; a resumed job does not run it again after it has succeeded.

    Parameters
    ----------
    job : JobDirectory
        Where it is noted that it has succeeded.
    cluster : Cluster
        Where it runs.
    limits : Limits
        Is asked meanwhile whether the job has to end, or must be left alone.
    halt : callable
        Tells the cluster to stop, and why.

    Returns
    -------
    bool
        Whether it was run now.

    Raises
    ------
    Ended
        If it failed, or if the job had to end and it did not succeed in the last moment.
    Exception
        What ``limits`` raises otherwise; what the cluster raises.
    """
    if job.read_json("completed.json") is not None:
        return False
    outcome = _run(cluster, limits, halt)
    if outcome.kind == "storage":
        raise Ended("worker error", f"{outcome.message} (the job can be resumed)")
    if outcome.kind == "stopped":
        limits.expect_stop()
        limits.check_stop()
    if outcome.kind != "done":
        raise Ended(outcome.kind, outcome.message)
    # The worker has noted it, unless there was nothing to run or its store failed just then.
    if job.read_json("completed.json") is None:
        job.write_json("completed.json", {"time": time.time()})
    return True


def _run(cluster: Cluster, limits: Limits, halt: Callable[[Exception], None]) -> Outcome:
    if cluster.runs_inline:  # in the calling thread, as everything there
        return cluster.complete()
    answers: queue.SimpleQueue[Outcome | Exception] = queue.SimpleQueue()

    def run() -> None:
        try:
            answers.put(cluster.complete())
        except Exception as error:  # noqa: BLE001 - raised in the thread that waits
            answers.put(error)

    threading.Thread(target=run, name="cortex-dask-completion", daemon=True).start()
    while True:
        try:
            return _returned(answers.get(timeout=STOP_CHECK))
        except queue.Empty:
            pass
        try:
            limits.check_end()
        except Ended as ended:
            halt(ended)
            try:
                outcome = answers.get(timeout=STOP_GRACE)
            except queue.Empty:
                raise ended from None
            if isinstance(outcome, Exception) or outcome.kind != "done":
                raise
            return outcome


def _returned(outcome: Outcome | Exception) -> Outcome:
    if isinstance(outcome, Exception):
        raise outcome
    return outcome
