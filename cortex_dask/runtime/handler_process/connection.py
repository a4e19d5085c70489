"""The handler process's pipes: commands in, events out, and a lifeline that ends it when its supervisor is gone.

The lifeline is a pipe into which nothing is ever written. When the supervisor's process ends, however it ends, the
kernel closes the other end. On Linux the kernel itself then sends SIGKILL to this process and all that it has
started, even in the middle of native code that holds the interpreter's lock. Elsewhere a thread does it, which waits
for the end of the commands.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import queue
import select
import signal
import threading

from cortex_dask.runtime.frames import Command, FrameReader, FrameWriter, ProcessEvent, SchemaAnswer, decode
from cortex_dask.runtime.progress_cell import ProgressCell

_ORPHAN_CHECK = 5.0  # seconds between two checks of the parent, should a copy of the pipe's other end live on elsewhere


def die() -> None:
    """End this process and all that it has started, now."""
    with contextlib.suppress(OSError):
        os.killpg(os.getpgrp(), signal.SIGKILL)  # its own group, which it leads
    os._exit(1)


class Connection:
    """The process's side of the pipes; commands come on the standard input."""

    def __init__(self, events: int, cell: int, lifeline: int) -> None:  # descriptors that the supervisor passed on
        for descriptor in (events, cell, lifeline):
            os.set_inheritable(descriptor, False)  # passing them on to us made them inheritable
        self._events = FrameWriter(events)
        self._parent = os.getppid()
        self._lifeline = lifeline
        self.cell = ProgressCell(cell)
        self.commands: queue.SimpleQueue[Command] = queue.SimpleQueue()  # in order
        self.answers: queue.SimpleQueue[SchemaAnswer] = queue.SimpleQueue()  # to SchemaAsked
        self._arm()
        stdin = os.dup(0)  # what the handler reads from its standard input is nothing, not our commands
        with open(os.devnull, "rb") as nothing:
            os.dup2(nothing.fileno(), 0)
        threading.Thread(target=self._listen, args=(stdin,), name="cortex-dask-commands", daemon=True).start()

    def send(self, event: ProcessEvent) -> None:
        """Send the supervisor an event."""
        try:
            self._events.send(event)
        except OSError:
            die()

    def send_log(self, data: bytes) -> None:
        """Send the supervisor a log line."""
        try:
            self._events.send_log(data)
        except OSError:
            die()

    def _arm(self) -> None:
        """Have the kernel kill the process group when the lifeline's other end is closed (Linux)."""
        if hasattr(fcntl, "F_SETSIG"):
            with contextlib.suppress(OSError):
                fcntl.fcntl(self._lifeline, fcntl.F_SETOWN, -os.getpgrp())
                fcntl.fcntl(self._lifeline, fcntl.F_SETSIG, signal.SIGKILL)
                flags = fcntl.fcntl(self._lifeline, fcntl.F_GETFL)
                fcntl.fcntl(self._lifeline, fcntl.F_SETFL, flags | os.O_ASYNC)

    def _listen(self, stdin: int) -> None:
        """Receive commands; their end is the end of this process."""
        reader = FrameReader()
        poll = select.poll()
        poll.register(stdin, select.POLLIN)
        poll.register(self._lifeline, 0)  # its end is always reported
        while True:
            ready = dict(poll.poll(_ORPHAN_CHECK * 1000))
            if self._lifeline in ready or os.getppid() != self._parent:
                die()
            if stdin not in ready:
                continue
            data = os.read(stdin, 1_048_576)
            if not data:
                die()
            for _, body in reader.feed(data):
                command: Command = decode(body)
                if isinstance(command, SchemaAnswer):
                    self.answers.put(command)
                else:
                    self.commands.put(command)
