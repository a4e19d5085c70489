"""How commands end: exit codes, errors as one sentence, interrupts."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import sys
import traceback
from collections.abc import Iterator
from types import FrameType
from typing import Any, NoReturn

import click

from cortex_dask.errors import CortexDaskError, InputError, JobFailedError, JobNotFoundError, StorageError

FAILED, BAD_INPUT, WITH_FAILURES, TIMED_OUT, STOPPED = 1, 2, 3, 124, 130

#: Shows the traceback of an unexpected exception.
DEBUG_VARIABLE = "CORTEX_DASK_DEBUG"

_BY_STATUS = {
    "succeeded": 0,
    "completed with failures": WITH_FAILURES,
    "failed while enqueuing": BAD_INPUT,
    "timed out": TIMED_OUT,
    "stopped": STOPPED,
}


def exit_code(status: str) -> int:
    """Return the exit code for a job's final status."""
    return _BY_STATUS.get(status, FAILED)


class Commands(click.Group):
    """A group whose commands print errors as one sentence on standard error, not as a traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command."""
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except KeyboardInterrupt:
            ctx.exit(STOPPED)
        except BrokenPipeError:
            raise  # click exits silently: the reader of the output has closed it
        except Exception as error:  # noqa: BLE001 - the last resort
            _fail(ctx, error)


def _fail(ctx: click.Context, error: Exception) -> NoReturn:
    if os.environ.get(DEBUG_VARIABLE):
        traceback.print_exc()
    message, code = _explain(error)
    click.echo(f"Error: {message}", err=True)
    ctx.exit(code)


def _explain(error: Exception) -> tuple[str, int]:
    if isinstance(error, JobFailedError):
        return str(error), exit_code(error.status)
    if isinstance(error, InputError | StorageError | JobNotFoundError):
        return str(error), BAD_INPUT
    if isinstance(error, CortexDaskError):
        return str(error), FAILED
    if isinstance(error, OSError) and error.errno in (
        errno.ENOENT,
        errno.EACCES,
        errno.ENOTDIR,
        errno.EISDIR,
        errno.EROFS,
        errno.ENOSPC,
    ):
        return f"{error.filename or 'file'}: {os.strerror(error.errno).lower()}", BAD_INPUT
    if isinstance(error, FileNotFoundError):
        return f"not found: {error}", BAD_INPUT
    shown = "" if os.environ.get(DEBUG_VARIABLE) else f"; run again with {DEBUG_VARIABLE}=1 for the traceback"
    return f"{type(error).__name__}: {error} (this is a bug{shown})", FAILED


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Make the first Ctrl-C, SIGTERM or SIGHUP raise KeyboardInterrupt, for an orderly stop; the second one kills.

    SIGHUP (the terminal was closed) stays ignored under ``nohup``. Handler processes end when this process does.
    """
    interrupted = False
    terminals = [number for number in (1, 2) if os.isatty(number)]

    def interrupt(number: int, frame: FrameType | None) -> None:
        nonlocal interrupted
        if interrupted:
            os._exit(STOPPED)
        interrupted = True
        if number == signal.SIGHUP:
            _silence(terminals)
        raise KeyboardInterrupt

    numbers = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) == signal.SIG_DFL:
        numbers.append(signal.SIGHUP)
    before = {number: signal.signal(number, interrupt) for number in numbers}
    try:
        yield
    finally:
        if not interrupted:  # after an interrupt, this process only ends
            for number, handler in before.items():
                signal.signal(number, handler)
        sys.stdout.flush()


def _silence(descriptors: list[int]) -> None:
    """Redirect descriptors to the null device, as writing to a closed terminal fails."""
    null = os.open(os.devnull, os.O_WRONLY)
    for descriptor in descriptors:
        os.dup2(null, descriptor)
    os.close(null)
