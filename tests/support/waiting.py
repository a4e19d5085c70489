"""Waiting for a condition, with a deadline, and what tests ask about other processes."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from typing import TypeVar

import psutil

Found = TypeVar("Found")


def until(condition: Callable[[], Found], what: str, seconds: float = 60.0) -> Found:
    """Wait until a condition is true, and return its value; fail after some time, with what was waited for."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        if time.monotonic() > deadline:
            raise AssertionError(f"waited {seconds:g} s in vain for {what}; found {found!r} at last")
        time.sleep(0.01)
    return found


def lives(pid: int) -> bool:
    """Whether a process runs; one that has ended and was not waited for does not."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def handler_processes() -> list[int]:
    """Return the handler processes that this process has started and that run."""
    found = []
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.Error):
            if any("cortex_dask.runtime.handler_process" in word for word in child.cmdline()) and lives(child.pid):
                found.append(child.pid)
    return found


def environment_of(pid: int) -> dict[str, str]:
    """Return the environment variables of a process, which the kernel shows a moment after its program was loaded."""
    return until(psutil.Process(pid).environ, f"the environment of process {pid}", 10)
