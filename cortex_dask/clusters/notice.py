"""What people should know about a cluster while a job runs: why its workers are missing."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable

_PATIENCE = 10.0  # seconds in which workers usually come
_ASK_SECONDS = 15.0  # between two questions to the cluster


class ClusterNotice:
    """Asks a cluster in the background why workers are missing, and holds its answer while they are."""

    def __init__(self, explain: Callable[[], str | None], *, patience: float = _PATIENCE) -> None:
        self._explain = explain  # returns the reason as a clause, or None; may take long, and may raise
        self._patience = patience
        self._missing_since: float | None = None
        self._asked = 0.0
        self._thread: threading.Thread | None = None
        #: The notice; "" while no workers are missing, or the reason is unknown.
        self.text = ""

    def say(self, text: str) -> None:
        """Show another text until the next :meth:`update`."""
        self.text = text

    def update(self, *, is_missing: bool) -> None:
        """Record whether workers are missing; called about once a second."""
        now = time.monotonic()
        if not is_missing:
            self._missing_since, self.text = None, ""
            return
        if self._missing_since is None:
            self._missing_since = now
        is_asking = self._thread is not None and self._thread.is_alive()
        if now - self._missing_since < self._patience or now - self._asked < _ASK_SECONDS or is_asking:
            return
        self._asked = now
        self._thread = threading.Thread(target=self._ask, name="cortex-dask-notice", daemon=True)
        self._thread.start()

    def _ask(self) -> None:
        with contextlib.suppress(Exception):  # the job does not depend on the answer
            reason = self._explain()
            if self._missing_since is not None:
                self.text = f"waiting for workers: {reason}" if reason else ""
