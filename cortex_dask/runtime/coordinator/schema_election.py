"""Which split settles the output's schema: the first in input order that has output, whatever the timing.

While nothing is settled, the first split runs alone until its first rows have spoken (or have turned out to be none),
so that in the usual case everybody else is sent with the schema. Splits that were sent without one propose theirs; the
proposal of the first split in input order counts, once all splits before it have ended without output.
"""

from __future__ import annotations

from collections.abc import Callable


class SchemaElection:
    """The state of the election.

    Parameters
    ----------
    schema : str or None
        The schema, if it is settled already (declared, or by an earlier run of the job).
    needed : bool
        Whether the job has an output at all.
    is_done : callable
        Whether a split's number is in the ledger.
    """

    def __init__(self, schema: str | None, *, needed: bool, is_done: Callable[[int], bool]) -> None:
        self.schema = schema
        self._needed = needed
        self._is_done = is_done
        self._released = False
        self._proposals: dict[int, str] = {}
        self._finished: set[int] = set()
        self._first = 0  # the first split in input order that has not ended

    @property
    def is_open(self) -> bool:
        """Whether a schema is needed and not settled."""
        return self._needed and self.schema is None

    def window(self, window: int) -> int:
        """Return how many splits may be in flight: one until the first rows have spoken."""
        return 1 if self.is_open and not self._released else window

    def no_output(self) -> None:
        """Take in that the first batch returned nothing: the others are not held back any longer."""
        self._released = True

    def propose(self, split: int, schema: str | None) -> None:
        """Take in what a split's first rows would make the schema."""
        if schema is not None:
            self._proposals[split] = schema

    def finished(self, split: int) -> None:
        """Take in that a split has ended."""
        if self.is_open:
            self._finished.add(split)
            self._released = True

    def winner(self) -> str | None:
        """Return the proposal that counts, if it has been made."""
        if not self.is_open:
            return None
        while self._first in self._finished or self._is_done(self._first):
            self._finished.discard(self._first)
            self._first += 1
        return self._proposals.get(self._first)

    def settle(self, schema: str) -> None:
        """Take in the settled schema."""
        self.schema = schema
        self._proposals.clear()
        self._finished.clear()
