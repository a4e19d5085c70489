"""Calls that may hang: their results, errors, limits and checks."""

from __future__ import annotations

import threading
import time

import pytest

from cortex_dask.runtime.timeout import BackgroundCall, call_with_timeout


def test_the_result_comes_back() -> None:
    assert call_with_timeout(lambda: 7, 30.0) == 7


def test_none_is_a_result() -> None:
    assert call_with_timeout(lambda: None, 30.0) is None


def test_what_the_function_raises_is_raised() -> None:
    def fail() -> None:
        raise KeyError("it")

    with pytest.raises(KeyError, match="it"):
        call_with_timeout(fail, 30.0)


def test_a_call_that_hangs_is_abandoned() -> None:
    release = threading.Event()
    began = time.monotonic()
    try:
        with pytest.raises(TimeoutError):
            call_with_timeout(lambda: release.wait(60), 0.1)
        assert time.monotonic() - began < 30
    finally:
        release.set()


def test_a_check_may_end_the_wait_and_the_result_can_still_be_had() -> None:
    release = threading.Event()
    call = BackgroundCall(lambda: release.wait(60))

    def check() -> None:
        raise InterruptedError

    with pytest.raises(InterruptedError):
        call.result(check=check)
    release.set()
    assert call.result(30.0) is True
