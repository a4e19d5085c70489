"""Outcomes that travel ahead of their tasks' results, so that nobody has to fetch those.

To fetch a result takes a question to the scheduler, which asks the worker: for short splits that is most of their time.
So a worker sends the outcome of a split as an event, too, just before the task ends. Both take the same way, one after
the other, so the outcome is here when the scheduler says that the task has ended. If it is not (it was too large for an
event, or the connection was new) the result is fetched as ever.
"""

from __future__ import annotations

from typing import Any

__all__ = ["MOST_BYTES", "Mailbox", "letter"]

#: Larger outcomes are fetched: a scheduler keeps the latest thousand events of a topic.
MOST_BYTES = 8192

Address = tuple[str, int, int]  # of the attempt: the coordinator's token, split, number

_KIND = "outcome"


def letter(to: Address, outcome: bytes) -> dict[str, Any] | None:
    """Return the event that carries an outcome; None where it is too large."""
    return {"type": _KIND, "to": to, "outcome": outcome} if len(outcome) <= MOST_BYTES else None


class Mailbox:
    """The outcomes that have come in before their tasks have ended.

    Parameters
    ----------
    token : str
        Whose outcomes they are: other coordinators hear the same events.
    """

    def __init__(self, token: str) -> None:
        self._token = token
        self._expected: set[Address] = set()
        self._letters: dict[Address, bytes] = {}

    def expect(self, split: int, attempt: int) -> None:
        """Say that an attempt is about to be sent."""
        self._expected.add((self._token, split, attempt))

    def put(self, event: dict[str, Any]) -> bool:
        """Take an event, if it is one for here; returns whether it was an outcome, whosever."""
        if event["type"] != _KIND:
            return False
        address = tuple(event["to"])
        if address in self._expected:
            self._letters[address] = event["outcome"]
        return True

    def take(self, split: int, attempt: int) -> bytes | None:
        """Return an attempt's outcome, if it is here; nothing more is expected of the attempt."""
        address = (self._token, split, attempt)
        self._expected.discard(address)
        return self._letters.pop(address, None)
