"""Running the programs that install dependencies, until they end or the installation is cancelled."""

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

_POLL = 0.1  # seconds between two checks whether the installation is cancelled
_GRACE = 1.5  # seconds between SIGTERM and SIGKILL: everything has to end within five
_LAST_LINES = 12
_READ = 65_536
_LONGEST_LINE = 1_048_576


class InstallationCancelledError(Exception):
    """The job that needs what is being installed was stopped or closed."""


@dataclass(slots=True)
class Installer:
    """Runs programs in the project directory, one after the other, and logs what they write."""

    directory: str
    log: Callable[..., None]  # takes a level, a message and further fields
    is_cancelled: Callable[[], bool]
    secrets: tuple[str, ...] = ()  # never logged
    durations: dict[str, float] = field(default_factory=dict)  # seconds, by step

    def raise_if_cancelled(self) -> None:
        """Raise :class:`InstallationCancelledError` if the installation is cancelled."""
        if self.is_cancelled():
            raise InstallationCancelledError

    def run_program(
        self, step: str, command: Sequence[str], environment: Mapping[str, str], keep: tuple[int, ...] = ()
    ) -> None:
        """Run one program to its end; ``step`` is its name in the log and in errors.

        It inherits the descriptors ``keep`` and holds them open until it ends. Raises :class:`DependencyError` with the
        exit code and the last lines if it fails, and :class:`InstallationCancelledError` after it was ended.
        """
        self.raise_if_cancelled()
        start = time.monotonic()
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
        succeeded = False
        try:
            self._log_output(process, step, last)
            succeeded = process.returncode == 0
        finally:
            if not succeeded:
                _end_group(process)
            assert process.stdout is not None
            process.stdout.close()
        seconds = self.durations[step] = time.monotonic() - start
        if not succeeded:
            lines = "\n".join(["; it wrote last:", *(f"  {line}" for line in last)]) if last else "; it wrote nothing"
            raise DependencyError(f"{step} {describe_exit(process.returncode)} after {seconds:.1f} s{lines}")
        self.log("INFO", f"{step} took {seconds:.1f} s", step=step, seconds=round(seconds, 3))

    def _log_output(self, process: subprocess.Popen[bytes], step: str, last: deque[str]) -> None:
        """Log the lines of a program until it has ended."""
        assert process.stdout is not None
        stream = process.stdout.fileno()
        os.set_blocking(stream, False)
        rest, is_open, ended = b"", True, False
        while not ended:
            self.raise_if_cancelled()
            # A process that it has started may hold the stream open, so the end of the program counts.
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
                    self._log_line(line, step, last)
                if not ended:
                    break
        self._log_line(rest, step, last)

    def _log_line(self, data: bytes, step: str, last: deque[str]) -> None:
        text = data.decode(errors="backslashreplace").rstrip("\r").rpartition("\r")[2].rstrip()
        if text:
            text = mask(text, self.secrets)
            last.append(text)
            self.log("INFO", text, step=step)


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """End a program and all processes that it has started."""
    with contextlib.suppress(OSError):
        os.killpg(process.pid, signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(_GRACE)
    with contextlib.suppress(OSError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
