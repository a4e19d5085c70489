"""What keeps workers away, for the status of a job that waits for them."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable

__all__ = ["Notice"]

_PATIENCE = 10.0  # seconds in which workers come, as a rule, and nothing has to be said
_AGAIN = 15.0  # seconds between two times that the cluster is asked


class Notice:
    """Asks a cluster in the background why workers are missing, and holds its answer while they are.

    Parameters
    ----------
    trouble : callable
        Returns the reason as a sentence without an end, or None; may take its time, and may raise.
    """

    def __init__(self, trouble: Callable[[], str | None]) -> None:
        self._trouble = trouble
        self._missing_since: float | None = None
        self._asked = 0.0
        self._thread: threading.Thread | None = None
        #: The answer; "" while nothing is missing, or known.
        self.text = ""

    def say(self, text: str) -> None:
        """Tell something else, as long as nobody looks for workers."""
        self.text = text

    def look(self, *, is_missing: bool) -> None:
        """Take whether workers are missing; called again and again."""
        now = time.monotonic()
        if not is_missing:
            self._missing_since, self.text = None, ""
            return
        if self._missing_since is None:
            self._missing_since = now
        is_asking = self._thread is not None and self._thread.is_alive()
        if now - self._missing_since < _PATIENCE or now - self._asked < _AGAIN or is_asking:
            return
        self._asked = now
        self._thread = threading.Thread(target=self._ask, name="cortex-dask-notice", daemon=True)
        self._thread.start()

    def _ask(self) -> None:
        with contextlib.suppress(Exception):  # it only says more
            reason = self._trouble()
            if self._missing_since is not None:
                self.text = f"waiting for workers: {reason}" if reason else ""
