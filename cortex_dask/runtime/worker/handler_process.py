"""A handler process as its supervisor sees it: commanded, listened to, measured, killed."""

from __future__ import annotations

import contextlib
import os
import queue
import select
import signal
import threading
import time
from collections import deque
from collections.abc import Callable

import orjson
import psutil

from cortex_dask.runtime.frames import (
    LOG,
    MESSAGE,
    Close,
    Command,
    FrameReader,
    Gone,
    ProcessEvent,
    decode,
    encode,
    frame,
)
from cortex_dask.runtime.log_line import MAX_LINE, dropped, line
from cortex_dask.runtime.progress_cell import Snapshot
from cortex_dask.runtime.worker.launch import Launched
from cortex_dask.runtime.worker.log_writer import LogWriter

_READ = 1_048_576
_TAIL = 200  # lines of native output that are remembered, for what they say of a crash
#: Between two searches for the processes that the handler has started: a search goes through all of the host's.
_CHILDREN_SECONDS = 1.0


class HandlerProcess:
    """One process, from its start to its end."""

    def __init__(
        self,
        launched: Launched,
        log: LogWriter,
        labels: dict[str, str],
        batch_id: Callable[[int], str | None],  # of the running split, for native output
    ) -> None:
        self._log = log
        self._labels = labels
        self._batch_id = batch_id
        self.inbox: queue.SimpleQueue[ProcessEvent] = queue.SimpleQueue()  # the last one is Gone
        self.gone = threading.Event()
        self.tail: deque[str] = deque(maxlen=_TAIL)
        self._ready = False
        self._runs = 0
        self._sending = threading.Lock()
        self._popen, self._lifeline, self._cell = launched.popen, launched.lifeline, launched.cell
        self._last: Snapshot | None = None
        self._cell_lock = threading.Lock()
        self.pid = self._popen.pid
        self._memory = _Memory(self.pid)
        listener = threading.Thread(
            target=self._listen, args=(launched.events,), name=f"cortex-dask-pump-{self.pid}", daemon=True
        )
        listener.start()

    @property
    def is_ready(self) -> bool:
        """Whether its handler is loaded."""
        return self._ready

    def set_ready(self) -> None:
        """Record that its handler is loaded."""
        self._ready = True

    @property
    def has_run(self) -> bool:
        """Whether a split, or the completion, was started in it."""
        return self._runs > 0

    def start_run(self) -> int:
        """Count a split, or the completion, that is about to be sent; return its number."""
        self._runs += 1
        return self._runs

    def send(self, command: Command) -> None:
        """Send the process a command; if it is gone, the inbox has that."""
        assert self._popen.stdin is not None
        data = memoryview(frame(MESSAGE, encode(command)))
        with self._sending, contextlib.suppress(OSError, ValueError):
            while data:
                data = data[self._popen.stdin.write(data) or 0 :]

    def progress(self) -> Snapshot:
        """Return what the process is doing, or what it was doing when it ended."""
        with self._cell_lock:
            return self._last or self._cell.read()

    def memory(self) -> int:
        """Return the resident bytes of the process and of those that it has started."""
        return self._memory.measure()

    @property
    def returncode(self) -> int | None:
        """How it ended: its exit code, or minus the signal's number; None while it lives."""
        return self._popen.returncode if self.gone.is_set() else None

    def traceback(self, seconds: float = 1.0) -> str | None:
        """Ask a process that hangs where it is; return what it writes within some time."""
        before = len(self.tail)
        self.tail.clear()
        with contextlib.suppress(OSError):
            os.kill(self.pid, signal.SIGUSR2)
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and not self.gone.is_set():
            before = len(self.tail)
            self.gone.wait(0.05)
            if before and len(self.tail) == before:
                break
        return self.last_words()

    def last_words(self) -> str | None:
        """Return the traceback that the interpreter wrote when it was killed or asked, else the last native output."""
        lines = list(self.tail)
        current = [n for n, text in enumerate(lines) if text.startswith(("Current thread", "Fatal Python error"))]
        if not current:
            return "\n".join(lines[-20:]) or None
        first = current[0] if lines[current[0]].startswith("Fatal") else current[-1]
        last = next((n for n in range(current[-1] + 1, len(lines)) if not lines[n].startswith("  ")), len(lines))
        return "\n".join(lines[first:last])

    def terminate(self, grace: float) -> None:
        """Ask it to end, and kill it when it has not after some seconds."""
        with contextlib.suppress(OSError):
            os.killpg(self.pid, signal.SIGTERM)
        if not self.gone.wait(grace):
            self.kill()

    def kill(self) -> None:
        """Kill it and all that it has started."""
        family = self._memory.family()
        with contextlib.suppress(OSError):
            os.killpg(self.pid, signal.SIGKILL)
        for process in family:  # those that have left the group
            with contextlib.suppress(psutil.Error):
                process.kill()
        self.gone.wait(5.0)

    def close(self) -> None:
        """Ask it to end in good order; return at once, see :attr:`gone`."""
        self.send(Close())

    # listening --------------------------------------------------------------------------------------------------------

    def _listen(self, events: int) -> None:
        """Receive what the process writes, until it has ended and nothing is left."""
        assert self._popen.stdout is not None
        assert self._popen.stderr is not None
        frames = FrameReader()
        native = {self._popen.stdout.fileno(): _LineBuffer(), self._popen.stderr.fileno(): _LineBuffer()}
        streams = {events, *native}
        ending = _watch_exit(self.pid)
        poll = select.poll()
        for descriptor in (*streams, *([ending] if ending is not None else [])):
            os.set_blocking(descriptor, False)
            poll.register(descriptor, select.POLLIN)
        ended = False
        while not ended:
            ready = [descriptor for descriptor, _ in poll.poll(None if ending is not None else 100)]
            ended = ending in ready or (ending is None and self._popen.poll() is not None)
            if ended:
                with contextlib.suppress(OSError):
                    os.killpg(
                        self.pid, signal.SIGKILL
                    )  # what it has left behind; not reaped yet, so the number is its own
                self._popen.wait()
                ready = list(streams)  # a descendant that got away may hold them open, so their end is not waited for
            for descriptor in ready:
                if descriptor in streams and not self._receive(descriptor, events, frames, native, all_of_it=ended):
                    streams.discard(descriptor)
                    poll.unregister(descriptor)
        for lines in native.values():
            self._native(lines.rest())
        for descriptor in (events, self._lifeline, *([ending] if ending is not None else [])):
            os.close(descriptor)
        for pipe in (self._popen.stdin, self._popen.stdout, self._popen.stderr):
            if pipe is not None:
                with self._sending, contextlib.suppress(OSError):
                    pipe.close()
        with self._cell_lock:
            self._last = self._cell.read()
            self._cell.close()
        self.gone.set()
        self.inbox.put(Gone())

    def _receive(
        self, descriptor: int, events: int, frames: FrameReader, native: dict[int, _LineBuffer], *, all_of_it: bool
    ) -> bool:
        """Read what is there; return False when nothing more will come."""
        while True:
            try:
                data = os.read(descriptor, _READ)
            except BlockingIOError:
                return True
            except OSError:
                return False
            if not data:
                return False
            if descriptor == events:
                for kind, body in frames.feed(data):
                    if kind == LOG:
                        self._log.add(body)
                    else:
                        self.inbox.put(decode(body))
            else:
                self._native(native[descriptor].feed(data))
            if not all_of_it:
                return True

    def _native(self, lines: list[bytes]) -> None:
        """Put what was written to the native streams into the log."""
        for data in lines:
            if len(data) > MAX_LINE:
                self._log.add(self._line("WARNING", dropped(len(data))))
            elif data.startswith(b'{"asctime":') and _is_json(data):
                self._log.add(data)  # a record of a process that the handler forked
            else:
                text = data.decode(errors="backslashreplace").rstrip("\r").rpartition("\r")[2]
                self.tail.append(text)
                if text:
                    self._log.add(self._line("INFO", text))

    def _line(self, level: str, message: str) -> bytes:
        index = self.progress().batch
        batch_id = None if index is None else self._batch_id(index)
        return line(level, message, self._labels, batch_id=batch_id, process=self.pid)


class _LineBuffer:
    """Bytes of a native stream, line by line."""

    def __init__(self) -> None:
        self._rest = b""
        self._skipped = 0

    def feed(self, data: bytes) -> list[bytes]:
        *lines, self._rest = (self._rest + data).split(b"\n")
        if len(self._rest) > MAX_LINE:  # longer than any line may be: only its length counts
            lines.append(self._rest)
            self._rest = b""
        return lines

    def rest(self) -> list[bytes]:
        rest, self._rest = self._rest, b""
        return [rest] if rest else []


class _Memory:
    """The resident memory of a process and its descendants."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._family: list[psutil.Process] = []
        self._searched = -_CHILDREN_SECONDS

    def measure(self) -> int:
        """Return the bytes; 0 when the process is gone."""
        if time.monotonic() - self._searched > _CHILDREN_SECONDS:
            self.family()
        total = 0
        for process in self._family:
            with contextlib.suppress(psutil.Error, OSError):
                total += process.memory_info().rss
        return total

    def family(self) -> list[psutil.Process]:
        """Return the process and its descendants."""
        self._searched = time.monotonic()
        try:
            process = psutil.Process(self._pid)
            self._family = [process, *process.children(recursive=True)]
        except (psutil.Error, OSError):
            self._family = self._family[:1]
        return self._family


def describe_exit(returncode: int | None) -> str:
    """Return how a process ended, for people."""
    if returncode is None:
        return "ended"
    if returncode >= 0:
        return f"exited with code {returncode}"
    number = -returncode
    try:
        name, words = signal.Signals(number).name, (signal.strsignal(number) or "").lower()
    except ValueError:
        return f"was killed by signal {number}"
    if number == signal.SIGKILL:
        return "was killed by SIGKILL (perhaps by the kernel, because the machine had no memory left)"
    return f"was killed by {name} ({words})" if words else f"was killed by {name}"


def _watch_exit(pid: int) -> int | None:
    """Return a descriptor that becomes readable when the process ends, where the system has such a thing."""
    if hasattr(os, "pidfd_open"):
        with contextlib.suppress(OSError):
            return os.pidfd_open(pid)
    return None


def _is_json(data: bytes) -> bool:
    try:
        orjson.loads(data)
    except orjson.JSONDecodeError:
        return False
    return True
