"""The steps of an installation: programs that run to their end, or until nobody wants them any more."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from cortex_dask.runtime.worker.dependencies import DependencyError, mask
from cortex_dask.runtime.worker.handler_process import describe_exit

_POLL = 0.1  # seconds between two looks at whether the job goes on
_GRACE = 1.5  # seconds between SIGTERM and SIGKILL: everything has to end within five
_LAST_LINES = 12
_READ = 65_536
_LONGEST_LINE = 1_048_576


class AbandonedError(Exception):
    """Nobody needs what is being installed any more: its job was stopped or closed."""


@dataclass(slots=True)
class Installer:
    """Runs programs in the project directory, one after the other.

    Attributes
    ----------
    directory : str
        Where they run.
    log : callable
        Takes a level, a message and further fields: each line that they write, and how long they took.
    abandoned : callable
        Whether nobody wants them any more.
    secrets : tuple of str
        What is never logged.
    taken : dict
        How many seconds each step has taken.
    """

    directory: str
    log: Callable[..., None]
    abandoned: Callable[[], bool]
    secrets: tuple[str, ...] = ()
    taken: dict[str, float] = field(default_factory=dict)

    def check(self) -> None:
        """Raise :class:`AbandonedError` if nobody wants them any more."""
        if self.abandoned():
            raise AbandonedError

    def run(
        self, step: str, command: Sequence[str], environment: Mapping[str, str], keep: tuple[int, ...] = ()
    ) -> None:
        """Run one program.

        Parameters
        ----------
        step : str
            What it is called in the log and in errors.
        command : sequence of str
            The program and its arguments.
        environment : mapping
            Its environment variables.
        keep : tuple of int
            Descriptors that it inherits, and so holds open until it ends.

        Raises
        ------
        DependencyError
            If it cannot be started or fails; with its exit code and its last lines.
        AbandonedError
            If nobody wants it any more; it has ended.
        """
        self.check()
        began = time.monotonic()
        try:
            process = subprocess.Popen(
                list(command),
                cwd=self.directory,
                env=dict(environment),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                pass_fds=keep,
                start_new_session=True,  # its own group, so that all that it starts can be ended with it
            )
        except FileNotFoundError:
            raise DependencyError(f"{step}: {command[0]} is not installed on the worker's host") from None
        last: deque[str] = deque(maxlen=_LAST_LINES)
        whole = False
        try:
            self._follow(process, step, last)
            whole = process.returncode == 0
        finally:
            if not whole:
                _end(process)
            assert process.stdout is not None
            process.stdout.close()
        seconds = self.taken[step] = time.monotonic() - began
        if not whole:
            lines = "\n".join(["; it wrote last:", *(f"  {line}" for line in last)]) if last else "; it wrote nothing"
            raise DependencyError(f"{step} {describe_exit(process.returncode)} after {seconds:.1f} s{lines}")
        self.log("INFO", f"{step} took {seconds:.1f} s", step=step, seconds=round(seconds, 3))

    def _follow(self, process: subprocess.Popen[bytes], step: str, last: deque[str]) -> None:
        """Log what a program writes until it has ended."""
        assert process.stdout is not None
        stream = process.stdout.fileno()
        os.set_blocking(stream, False)
        rest, is_open, ended = b"", True, False
        while not ended:
            self.check()
            # What it has started may hold the stream open, so the stream's end is not waited for, nor is the first.
            if is_open:
                select.select([stream], [], [], _POLL)
            else:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(_POLL)
            ended = process.poll() is not None
            while is_open:
                try:
                    data = os.read(stream, _READ)
                except BlockingIOError:
                    break
                is_open = bool(data)
                *lines, rest = (rest + data).split(b"\n")
                if len(rest) > _LONGEST_LINE:
                    lines, rest = [*lines, rest], b""
                for line in lines:
                    self._write(line, step, last)
                if not ended:
                    break
        self._write(rest, step, last)

    def _write(self, data: bytes, step: str, last: deque[str]) -> None:
        text = data.decode(errors="backslashreplace").rstrip("\r").rpartition("\r")[2].rstrip()
        if text:
            text = mask(text, self.secrets)
            last.append(text)
            self.log("INFO", text, step=step)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a program and all that it has started."""
    with contextlib.suppress(OSError):
        os.killpg(process.pid, signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(_GRACE)
    with contextlib.suppress(OSError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
