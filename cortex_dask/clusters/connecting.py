"""Connecting to a cluster that comes up in the background, while the job is planned."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from distributed import Client

__all__ = ["Connecting"]

_LOOK_UP_SECONDS = 1.0


class Connecting:
    """A call of ``connect`` in the background."""

    def __init__(self, connect: Callable[[], Client]) -> None:
        self._connect = connect
        self._client: Client | None = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="cortex-dask-connect", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._client = self._connect()
        except BaseException as error:  # noqa: BLE001 - raised in the thread that waits
            self._error = error

    def result(self, look_up: Callable[[], None]) -> Client:
        """Wait for the client, and call something every second meanwhile; raises what ``connect``, or that, raises."""
        while self._thread.is_alive():
            self._thread.join(_LOOK_UP_SECONDS)
            look_up()
        if self._error is not None:
            raise self._error
        assert self._client is not None
        return self._client

    def abandon(self) -> Client | None:
        """Wait until ``connect`` has given up, or return the client that it has got."""
        self._thread.join()
        return self._client
