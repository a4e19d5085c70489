"""Calls in a thread of their own, so that the caller can give up waiting for them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")

_CHECK_SECONDS = 1.0


class BackgroundCall(Generic[T]):
    """A function that is being called in a daemon thread; an abandoned call never delays the end of the process."""

    def __init__(self, function: Callable[[], T]) -> None:
        self._function = function
        self._done = threading.Event()
        self._results: list[T] = []
        self._error: BaseException | None = None
        name = f"cortex-dask-{getattr(function, '__name__', 'call').strip('<>')}"
        threading.Thread(target=self._call, name=name, daemon=True).start()

    def _call(self) -> None:
        try:
            self._results.append(self._function())
        except BaseException as error:  # noqa: BLE001 - raised in the thread that waits
            self._error = error
        finally:
            self._done.set()

    def result(self, seconds: float | None = None, check: Callable[[], None] | None = None) -> T:
        """Wait for what the function returns or raises; raise :class:`TimeoutError` after some seconds.

        ``check`` is called every second meanwhile; what it raises ends the wait.
        """
        deadline = None if seconds is None else time.monotonic() + seconds
        # Not Thread.join(): a signal during it makes Python before 3.13 take a thread for ended.
        while not self._done.wait(_seconds_left(deadline)):
            if deadline is not None and time.monotonic() >= deadline:
                raise TimeoutError
            if check is not None:
                check()
        if self._error is not None:
            raise self._error
        return self._results[0]


def call_with_timeout(function: Callable[[], T], seconds: float | None, check: Callable[[], None] | None = None) -> T:
    """Call a function that may hang; a call that takes longer goes on in its thread, and its result is dropped."""
    return BackgroundCall(function).result(seconds, check)


def _seconds_left(deadline: float | None) -> float:
    if deadline is None:
        return _CHECK_SECONDS
    return min(max(deadline - time.monotonic(), 0.0), _CHECK_SECONDS)
