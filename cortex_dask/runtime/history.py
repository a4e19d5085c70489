"""What is known of a split's batches from earlier attempts: it goes from one handler process to the next."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Self

from cortex_dask.runtime.failures import Verdict


@dataclass(slots=True)
class BatchHistory:
    """One batch that has failed before."""

    attempts: int = 0  # that failed
    rows_limit: int | None = None  # rows that may be handled at once, since more of them took too much memory
    verdict: Verdict | None = None  # set: it is a dead letter, and is not handled any more


@dataclass(slots=True)
class SplitHistory:
    """The batches of a split that have failed before, and how the split is to be run."""

    batches: dict[int, BatchHistory] = field(default_factory=dict)  # by index in the split of origin
    #: The batch from which on nothing is read any more, because the process died over it again and again.
    unreadable: tuple[int, Verdict] | None = None
    #: Whether reading, handling and writing take turns, so that it is certain which one a crash hits.
    careful: bool = False

    def of(self, index: int) -> BatchHistory:
        """Return the history of a batch, to be changed."""
        return self.batches.setdefault(index, BatchHistory())

    def to_json(self) -> dict[str, Any]:
        """Return the history as plain JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Self:
        """Build a history from what :meth:`to_json` returned."""
        batches = {
            int(index): BatchHistory(item["attempts"], item["rows_limit"], _verdict(item["verdict"]))
            for index, item in value["batches"].items()
        }
        unreadable = value["unreadable"]
        verdict = _verdict(unreadable[1]) if unreadable else None
        return cls(batches, (unreadable[0], verdict) if verdict else None, value["careful"])


def _verdict(value: dict[str, Any] | None) -> Verdict | None:
    return None if value is None else Verdict(**value)
