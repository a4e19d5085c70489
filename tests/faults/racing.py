"""A handler whose two attempts at one split run against each other."""

from __future__ import annotations

from typing import Any

from tests.faults.handlers import FaultyHandler, _until

__all__ = ["RacingHandler"]


class RacingHandler(FaultyHandler):
    """Handle batches; at the ids ``bad`` the first attempt waits until a second one is there.

    It waits for ``wait`` seconds at most. ``then`` says what the second does: ``end`` (both go on at once), or ``hang``
    (the first goes on, alone). And metrics are pushed, to see what counts twice.
    """

    def __init__(self, config: dict[str, Any], metrics_client: Any) -> None:
        super().__init__(config)
        self._metrics = metrics_client

    def handle_batch(self, payload: Any, batch_id: str) -> Any:
        ids = payload["id"].to_pylist()
        self._metrics.increment("rows", len(ids))
        table = super().handle_batch(payload, batch_id)
        if self._bad.intersection(ids):
            if self._first("first-attempt"):
                _until((self._marks / "second-attempt").exists, self._config.get("wait", 60))
            else:
                self._first("second-attempt")
                if self._config["then"] == "hang":
                    _until(lambda: False, 600)
        return table
