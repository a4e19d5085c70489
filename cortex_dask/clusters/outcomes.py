"""How an attempt at a split has ended, as a Dask client learns it.

To fetch a result takes a question to the scheduler, which asks the worker: for short splits that is most of their time.
So a worker sends the outcome of a split as an event, too, just before the task ends. Both take the same way, one after
the other, so the outcome is here when the scheduler reports that the task has ended. If it is not (it was too large for
an event, or the connection was new) the result is fetched.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import orjson

from cortex_dask.errors import ClusterError
from cortex_dask.io.job.records import Outcome
from cortex_dask.runtime.cluster import WorkerLost

if TYPE_CHECKING:
    from distributed import Future

#: Larger outcomes are fetched: a scheduler keeps the latest thousand events of a topic.
LARGEST_EVENT = 8192

Attempt = tuple[str, int, int]  # the coordinator's token, the split, the number of the attempt


def outcome_event(attempt: Attempt, outcome: bytes) -> dict[str, Any] | None:
    """Return the event that carries an outcome; None if it is too large."""
    return {"attempt": attempt, "outcome": outcome} if len(outcome) <= LARGEST_EVENT else None


class OutcomeEvents:
    """The outcomes of one coordinator's attempts that have arrived as events, before their tasks have ended."""

    def __init__(self, token: str) -> None:
        self._token = token  # other coordinators of the job receive the same events
        self._expected: set[Attempt] = set()
        self._outcomes: dict[Attempt, bytes] = {}

    def __len__(self) -> int:
        """Return how many attempts have an outcome here or may still get one."""
        return len(self._expected)

    def expect(self, split: int, attempt: int) -> None:
        """Keep the outcome of an attempt that is about to be sent."""
        self._expected.add((self._token, split, attempt))

    def receive(self, event: dict[str, Any]) -> bool:
        """Keep the outcome in an event if it is expected; return whether the event is an outcome at all."""
        if "outcome" not in event:
            return False
        attempt = tuple(event["attempt"])
        if attempt in self._expected:
            self._outcomes[attempt] = event["outcome"]
        return True

    def pop(self, split: int, attempt: int) -> bytes | None:
        """Return an attempt's outcome if it has arrived, and expect it no longer."""
        key = (self._token, split, attempt)
        self._expected.discard(key)
        return self._outcomes.pop(key, None)


def outcome_of(future: Future[Any], event: bytes | None) -> Outcome | Exception:
    """Return the outcome of an attempt from the future that has ended, or from the event that came before."""
    if future.status == "finished":
        try:
            return Outcome.from_json(orjson.loads(future.result() if event is None else event))
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
    if not _is_loss(raised):
        return raised
    # KilledWorker comes after the scheduler's own attempts on other workers.
    return WorkerLost(reason_of(raised), getattr(raised, "allowed_failures", 0) + 1)


def _is_loss(error: BaseException) -> bool:
    from distributed import CancelledError, KilledWorker
    from distributed.comm.core import CommClosedError

    return isinstance(error, KilledWorker | CancelledError | CommClosedError)


def reason_of(error: BaseException) -> str:
    """Return an error as the reason in a sentence."""
    if type(error).__name__ == "KilledWorker":
        return "the workers that ran the split ended: killed, out of memory, or their hosts vanished"
    return f"{type(error).__name__}: {error}"
