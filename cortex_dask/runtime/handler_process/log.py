"""Structured logging in the handler process: every record, print and warning becomes one line of JSON.

    from cortex_dask import logger

    logger.info("completed processing batch", extra={"confidence": 0.97})

gives ``{"asctime": "2021-01-19 15:14:05,291", "levelname": "INFO", "message": "completed processing batch",
"process": 235, "batch_id": "…", "confidence": 0.97, "labels": {…}}``. The keys of ``extra`` stand in the line itself;
``asctime, levelname, message, process`` and ``labels`` are reserved and never overridden. Times are UTC.

The lines go to the supervisor, which stores them (:mod:`cortex_dask.runtime.worker.log_writer`), so that the last ones
before a crash are kept. Outside of a handler process :data:`logger` is a plain logger.
"""

from __future__ import annotations

import faulthandler
import io
import logging
import os
import sys
import threading
from collections.abc import Callable, Mapping
from typing import Any, TextIO

from cortex_dask.runtime.log_line import MAX_LINE, dropped, line, to_text

_STANDARD = frozenset(logging.makeLogRecord({}).__dict__) | {"asctime", "message", "extra_fields", "taskName"}
_TEXT_LIMIT = 65_536  # characters of a printed line that may wait for its line feed

_batch_name: Callable[[], str] | None = None
_recorders: list[StreamRecorder] = []


# the logger ---------------------------------------------------------------------------------------------------------


class BatchLogger(logging.Logger):
    """A logger that accepts any key in ``extra``; the standard one raises for ``message``, ``process`` and others."""

    def makeRecord(  # noqa: N802 - named by the standard library
        self,
        name: str,
        level: int,
        fn: str,
        lno: int,
        msg: object,
        args: Any,
        exc_info: Any,
        func: str | None = None,
        extra: Mapping[str, object] | None = None,
        sinfo: str | None = None,
    ) -> logging.LogRecord:
        """Make a record; what ``extra`` must not overwrite is kept beside."""
        harmless = {key: value for key, value in (extra or {}).items() if key not in _STANDARD}
        record = super().makeRecord(name, level, fn, lno, msg, args, exc_info, func, harmless, sinfo)
        record.extra_fields = dict(extra or {})
        return record


def _make_logger(name: str) -> logging.Logger:
    standard = logging.getLoggerClass()
    logging.setLoggerClass(BatchLogger)
    try:
        return logging.getLogger(name)
    finally:
        logging.setLoggerClass(standard)


#: What ``from cortex_internal.lib.log import logger`` and ``cortex_dask.logger`` give.
logger = _make_logger("cortex")


# in the handler process ---------------------------------------------------------------------------------------------


def set_batch(name: Callable[[], str] | None) -> None:
    """Set which batch the next lines belong to, by what makes its id, as few batches log anything."""
    global _batch_name
    for recorder in _recorders:
        if recorder.pending:
            recorder.finish_line()
    _batch_name = name


def current_batch() -> str | None:
    """Return the id of the batch in hand."""
    name = _batch_name
    return None if name is None else name()


class JsonHandler(logging.Handler):
    """Sends each record as a line of JSON, with labels that identify the job and the worker."""

    def __init__(self, send: Callable[[bytes], None], labels: Mapping[str, str]) -> None:
        super().__init__()
        self._send = send
        self._labels = dict(labels)
        self._formatter = logging.Formatter()

    def createLock(self) -> None:  # noqa: N802 - named by the standard library
        """Have no lock: the pipe has one, and a forked child must not inherit this one while it is held."""
        self.lock = None

    def handle(self, record: logging.LogRecord) -> bool:
        """Write a record that passes the filters; unlike the standard library's, without a lock."""
        passed: Any = self.filter(record)
        if passed:
            self.emit(passed if isinstance(passed, logging.LogRecord) else record)  # a filter may replace it (3.12)
        return bool(passed)

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record; an error in it never breaks the batch."""
        try:
            message = record.getMessage()
        except Exception:  # noqa: BLE001 - "%d" with text, say: the arguments are shown as they are
            message = f"{to_text(record.msg)} {to_text(record.args)}"
        self.write(record.levelname, message, self._given_keys(record), record.created)

    def write(
        self, level: str, message: str, extra: Mapping[str, Any] | None = None, created: float | None = None
    ) -> None:
        """Write a line, or that it was too long."""
        data = line(level, message, self._labels, batch_id=current_batch(), extra=extra, created=created)
        if len(data) > MAX_LINE:
            data = line("WARNING", dropped(len(data)), self._labels, batch_id=current_batch())
        self._send(data)

    def _given_keys(self, record: logging.LogRecord) -> dict[str, Any]:
        given: dict[str, Any] | None = getattr(record, "extra_fields", None)
        if given is None:
            given = {key: value for key, value in record.__dict__.items() if key not in _STANDARD}
        if record.exc_info and record.exc_info[0] is not None:
            given = {**given, "exc_info": self._formatter.formatException(record.exc_info)}
        if record.stack_info:
            given = {**given, "stack_info": record.stack_info}
        return given


class StreamRecorder(io.TextIOBase):
    """Replaces ``sys.stdout`` or ``sys.stderr``: each line that is printed becomes a record.

    ``descriptor`` is the native stream, for code that asks for :meth:`fileno` or ``buffer``.
    """

    def __init__(self, write_line: Callable[[str], None], descriptor: int) -> None:
        self._write_line = write_line
        self._descriptor = descriptor
        self._lock = threading.RLock()
        self.pending = ""
        self.buffer = os.fdopen(os.dup(descriptor), "wb", buffering=0)

    @property
    def encoding(self) -> str:  # type: ignore[override]  # the base class has an attribute there
        """Return ``utf-8``."""
        return "utf-8"

    @property
    def errors(self) -> str:  # type: ignore[override]  # as above
        """Return how text that cannot be encoded is written."""
        return "backslashreplace"

    def fileno(self) -> int:
        """Return the native stream's descriptor; what is written there is in the log as well."""
        return self._descriptor

    def isatty(self) -> bool:
        """Return False."""
        return False

    def writable(self) -> bool:
        """Return True."""
        return True

    def write(self, text: str) -> int:
        """Receive text; each whole line is a record. A carriage return starts its line anew, as progress bars do."""
        with self._lock:
            if "\n" not in text and len(self.pending) + len(text) <= _TEXT_LIMIT:
                self.pending += text
                return len(text)
            *lines, rest = (self.pending + text).split("\n")
            self.pending = rest
            for item in lines:
                self._record(item)
            if len(self.pending) > _TEXT_LIMIT:
                self.finish_line()
        return len(text)

    def finish_line(self) -> None:
        """Record what waits for its line feed."""
        with self._lock:
            item, self.pending = self.pending, ""
            self._record(item)

    def forget(self) -> None:
        """Start anew, in a forked child: the line that waits is the parent's, and so is the lock."""
        self._lock, self.pending = threading.RLock(), ""

    def _record(self, item: str) -> None:
        item = item.rstrip("\r").rpartition("\r")[2]
        if item:
            self._write_line(item)


def install(send: Callable[[bytes], None], labels: Mapping[str, str], level: str) -> None:
    """Turn everything that this process logs, prints or warns of into lines of JSON; once, in the handler process.

    ``send`` is called with each line, from any thread; ``level`` is ``debug``, ``info``, ``warning`` or ``error``.
    """
    owner = os.getpid()

    def send_or_print(data: bytes) -> None:
        # A process that the handler forked must not write into the pipe of frames; the supervisor knows such lines
        # again.
        if os.getpid() == owner:
            send(data)
        else:
            os.write(2, data + b"\n")

    handler = JsonHandler(send_or_print, labels)
    logging.basicConfig(handlers=[handler], level=level.upper(), force=True)
    logging.captureWarnings(True)
    out, err = (StreamRecorder(lambda text: handler.write("INFO", text), number) for number in (1, 2))
    _recorders[:] = [out, err]
    sys.stdout, sys.stderr = _as_text(out), _as_text(err)
    # for code that writes there directly
    sys.__stdout__, sys.__stderr__ = sys.stdout, sys.stderr  # type: ignore[misc, assignment]
    os.register_at_fork(after_in_child=_forget_lines)
    faulthandler.enable(file=2)


def finish_lines() -> None:
    """Record what was printed without a line feed."""
    for recorder in _recorders:
        recorder.finish_line()


def _forget_lines() -> None:
    for recorder in _recorders:
        recorder.forget()


def _as_text(recorder: StreamRecorder) -> TextIO:
    return recorder  # type: ignore[return-value]  # it is what TextIO describes, short of inheriting from it
