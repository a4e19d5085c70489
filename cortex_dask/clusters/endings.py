"""How an attempt at a split has ended that was sent to a Dask scheduler, and why nothing more is heard of one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import orjson

from cortex_dask.clusters.base import WorkerLost
from cortex_dask.errors import ClusterError
from cortex_dask.io.records import Outcome

if TYPE_CHECKING:
    from distributed import Future

__all__ = ["outcome_of", "reason_of"]


def outcome_of(future: Future[Any], sent: bytes | None) -> Outcome | Exception:
    """Return how an attempt has ended, whose outcome may have been sent ahead."""
    if future.status == "finished":
        try:
            return Outcome.from_json(orjson.loads(future.result() if sent is None else sent))
        except Exception as error:  # noqa: BLE001 - the result could not be fetched: its worker is gone
            return WorkerLost(reason_of(error))
    if future.status == "cancelled":
        lost = "the scheduler dropped the task: it was restarted, or the connection to it was lost"
        return WorkerLost(lost, workers=0)
    raised: Exception = future.exception()
    if isinstance(raised, ImportError) and str(raised.name or "").partition(".")[0] == "cortex_dask":
        return ClusterError(
            f"a worker of the cluster cannot import cortex_dask ({raised}): start workers with the same environment, "
            "or the same image, as the others; the job can be resumed"
        )
    # the scheduler's own attempts: it sends a task whose worker has died to another one, some times
    return WorkerLost(reason_of(raised), getattr(raised, "allowed_failures", 0) + 1) if _is_loss(raised) else raised


def _is_loss(error: BaseException) -> bool:
    from distributed import CancelledError, KilledWorker
    from distributed.comm.core import CommClosedError

    return isinstance(error, KilledWorker | CancelledError | CommClosedError)


def reason_of(error: BaseException) -> str:
    """Return an error as the reason in a sentence."""
    if type(error).__name__ == "KilledWorker":
        return "the workers that ran the split ended: killed, out of memory, or their hosts vanished"
    return f"{type(error).__name__}: {error}"
