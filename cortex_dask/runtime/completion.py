"""Running ``on_job_complete``: on one worker, for as long as the job may take, while stops and timeouts are heeded."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable

from cortex_dask.clusters.base import Cluster
from cortex_dask.io.records import Outcome

__all__ = ["complete"]


def complete(
    cluster: Cluster,
    *,
    check: Callable[[], None],
    ends: type[Exception],
    halt: Callable[[Exception], None],
    every: float,
    grace: float,
) -> Outcome:
    """Run ``on_job_complete`` and return how it ended.

    Parameters
    ----------
    cluster : Cluster
        Where it runs.
    check : callable
        Raises when the job has to end, or must be left alone.
    ends : type
        What it raises when the job has to end. Anything else is raised at once.
    halt : callable
        Tells the cluster to stop, and why.
    every : float
        Seconds between two checks.
    grace : float
        Seconds that it gets to come to its end after that.

    Raises
    ------
    Exception
        What ``check`` has raised, unless it succeeded in the last moment; what the cluster raises.
    """
    if cluster.name == "inline":  # in the calling thread, as everything there
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
            return _returned(answers.get(timeout=every))
        except queue.Empty:
            pass
        try:
            check()
        except ends as ended:
            halt(ended)
            try:
                outcome = answers.get(timeout=grace)
            except queue.Empty:
                raise ended from None
            if isinstance(outcome, Exception) or outcome.kind != "done":
                raise
            return outcome


def _returned(outcome: Outcome | Exception) -> Outcome:
    if isinstance(outcome, Exception):
        raise outcome
    return outcome
