"""Which split decides the output's schema: the first in input order that has output, whatever the timing.

While the schema is open, the first split runs alone until its first rows (or their absence) are known, so that usually
all others are sent with the schema. Splits that were sent without one propose theirs; the proposal of the first split
in input order counts, once all splits before it have ended without output.
"""

from __future__ import annotations

from collections.abc import Callable


class SchemaElection:
    """The proposals for the output's schema, and the one that counts."""

    def __init__(self, *, needed: bool, is_done: Callable[[int], bool]) -> None:
        self.schema: str | None = None  # once it is decided
        self._needed = needed  # whether the job has an output at all
        self._is_done = is_done  # whether a split's number is in the ledger
        self._is_first_known = False  # whether the first rows are known
        self._proposals: dict[int, str] = {}
        self._finished: set[int] = set()
        self._first = 0  # the first split in input order that has not ended

    @property
    def is_open(self) -> bool:
        """Whether a schema is needed and not decided."""
        return self._needed and self.schema is None

    def limit_window(self, window: int) -> int:
        """Return how many splits may be in flight: one until the first rows are known."""
        return 1 if self.is_open and not self._is_first_known else window

    def report_no_output(self) -> None:
        """Record that the first batch returned nothing: the other splits are not held back any longer."""
        self._is_first_known = True

    def propose(self, split: int, schema: str | None) -> None:
        """Record the schema of a split's first rows."""
        if schema is not None:
            self._proposals[split] = schema

    def finish(self, split: int) -> None:
        """Record that a split has ended."""
        if self.is_open:
            self._finished.add(split)
            self._is_first_known = True

    def winner(self) -> str | None:
        """Return the proposal that counts, if it has been made."""
        if not self.is_open:
            return None
        while self._first in self._finished or self._is_done(self._first):
            self._finished.discard(self._first)
            self._first += 1
        return self._proposals.get(self._first)

    def decide(self, schema: str) -> None:
        """Set the schema: the winner's, a declared one, or that of an earlier run."""
        self.schema = schema
        self._proposals.clear()
        self._finished.clear()
