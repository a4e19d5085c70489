"""The running totals of a job, made from ledger records; their size does not grow with the batches that succeed."""

from __future__ import annotations

from collections.abc import Mapping

from cortex_dask.io.job.records import SplitRecord
from cortex_dask.io.job.splits import PlanHeader, Split
from cortex_dask.runtime.metrics import Totals


class JobTotals:
    """What the ledger adds up to; all zero until :meth:`set_plan`."""

    def __init__(self) -> None:
        self._header: PlanHeader | None = None
        self._retries: dict[int, Split] = {}
        self.records = 0  # in the ledger, of planned splits and of retries
        self.splits = 0  # planned splits done
        self.batches = 0  # batches of planned splits done, whether they succeeded or not
        self.failed_attempts = 0
        self.rows_in = 0
        self.rows_out = 0
        self.bytes_out = 0
        self.parts = 0
        self.handle_seconds = 0.0
        #: Batches that failed for good: (split of origin, index) -> cause; malformed lines: (split, -1 - n).
        self.failed: dict[tuple[int, int], str] = {}
        #: The most rows that every worker's device or memory has room for; None: none has run out of memory.
        self.rows_limit: int | None = None
        #: The metrics that handlers pushed.
        self.metrics = Totals()

    def set_plan(self, header: PlanHeader, retries: Mapping[int, Split]) -> None:
        """Set what records refer to: the plan, and the splits that repeat failed batches, by number."""
        self._header = header
        self._retries = dict(retries)

    def add_retries(self, retries: Mapping[int, Split]) -> None:
        """Add splits that repeat failed batches: these are no failures any more when the split succeeds."""
        self._retries.update(retries)

    def add(self, record: SplitRecord) -> None:
        """Add one record of the ledger."""
        retry = self._retries.get(record.split)
        origin = record.split
        self.records += 1
        if retry is None:
            self.splits += 1
            self.batches += record.batches
            self.rows_in += record.rows_in
        else:
            origin = retry.origin
            for index in retry.only or ():
                self.failed.pop((origin, index), None)
        for position, failure in enumerate(record.failures):
            if failure.batch is not None:
                self.failed[origin, failure.batch] = failure.cause
            elif retry is None:
                self.failed[origin, -1 - position] = failure.cause
        self.failed_attempts += record.failed_attempts
        self.rows_out += record.rows_out
        self.handle_seconds += record.handle_seconds
        self.metrics.add(record.metrics)
        if (limit := record.rows_limit) is not None:
            self.rows_limit = min(limit, self.rows_limit or limit)
        if record.part is not None:
            self.parts += 1
            self.bytes_out += record.part.bytes

    @property
    def planned_splits(self) -> int:
        """Splits of the plan, without retries."""
        return 0 if self._header is None else self._header.splits

    @property
    def total_splits(self) -> int:
        """Splits of the plan and retries: so many records the ledger will have."""
        return self.planned_splits + len(self._retries)

    @property
    def splits_left(self) -> int:
        """Splits that have no record yet."""
        return self.total_splits - self.records

    @property
    def failed_batches(self) -> int:
        """Batches and malformed lines that failed for good."""
        return len(self.failed)

    @property
    def succeeded_batches(self) -> int:
        """Batches whose rows are committed."""
        return self.batches - sum(1 for _, index in list(self.failed) if index >= 0)  # read from other threads

    @property
    def total_batches(self) -> int:
        """Batches of the whole job; an estimate while the plan could not know and not all splits are done."""
        header = self._header
        if header is None:
            return 0
        if header.batches_exact:
            return header.batches
        if self.splits >= header.splits:
            return self.batches
        if not self.splits:
            return max(header.batches, 1)
        return self.batches + round((header.splits - self.splits) * self.batches / self.splits)

    @property
    def total_is_exact(self) -> bool:
        """Whether :attr:`total_batches` is known rather than estimated."""
        header = self._header
        return header is not None and (header.batches_exact or self.splits >= header.splits)

    def retryable(self) -> dict[int, tuple[int, ...]]:
        """Return the failed batches that can be repeated, by split of origin.

        Malformed lines would fail again, and how many batches the unreadable rest of a JSON file holds is unknown.
        """
        is_exact = self._header is not None and self._header.batches_exact
        batches: dict[int, list[int]] = {}
        for (split, index), cause in sorted(self.failed.items()):
            if index >= 0 and (is_exact or cause != "unreadable input"):
                batches.setdefault(split, []).append(index)
        return {split: tuple(indexes) for split, indexes in batches.items()}
