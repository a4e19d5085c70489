"""The handler of the fault tests: it triples a column, and does on given rows what the job's ``config`` says.

What has to be remembered beyond a process (which fault has struck already, who handled what) lies in a folder of marks.
"""

from __future__ import annotations

import array
import ctypes
import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa

__all__ = ["FaultyHandler", "answer"]

MIB = 1024**2


def answer(number: int) -> int:
    """Return what the handler makes of an id."""
    return number * 3 + 1


def _raise(rows: int) -> None:
    raise ValueError(f"cannot handle {rows} rows")


def _exit(rows: int) -> None:
    os._exit(3)


def _system_exit(rows: int) -> None:
    sys.exit("enough")


def _signal(number: signal.Signals) -> Callable[[int], None]:
    def strike(rows: int) -> None:
        os.kill(os.getpid(), number)
        time.sleep(60)

    return strike


def _hang(rows: int) -> None:
    while True:
        time.sleep(60)


def _hang_in_native_code(rows: int) -> None:
    while True:
        ctypes.PyDLL(None).sleep(600)  # keeps the interpreter's lock


def _hang_until_a_signal_comes(rows: int) -> None:
    ctypes.CDLL(None).sleep(600)


def _hog(each: int, base: int = 0) -> Callable[[int], None]:
    def strike(rows: int) -> None:
        held = bytearray(base + each * rows)
        held[::4096] = b"x" * len(held[::4096])  # touch every page
        _until(lambda: False, 0.7)  # long enough to be seen
        del held

    return strike


def _memory_error(most: int) -> Callable[[int], None]:
    def strike(rows: int) -> None:
        if rows > most:
            raise MemoryError(f"{rows} rows are too many")

    return strike


def _kill_worker(rows: int) -> None:
    os.kill(os.getppid(), signal.SIGKILL)
    time.sleep(60)


def _until(condition: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)


#: What strikes before a batch is handled.
FAULTS: dict[str, Callable[[int], None]] = {
    "raise": _raise,
    "exit": _exit,
    "system exit": _system_exit,
    "segv": _signal(signal.SIGSEGV),
    "kill": _signal(signal.SIGKILL),
    "hang": _hang,
    "hang in native code": _hang_in_native_code,
    "hang until a signal comes": _hang_until_a_signal_comes,
    "hog that fits in halves": _hog(8 * MIB),  # 50 rows: 400 MiB
    "hog": _hog(0, base=500 * MIB),
    "memory error that fits in halves": _memory_error(20),
    "memory error": _memory_error(0),
    "kill worker": _kill_worker,
}


def _column(numbers: Iterable[int]) -> pa.Array:
    # pa.array imports pandas, which would take half of the tests' time
    values = array.array("q", numbers)
    return pa.Array.from_buffers(pa.int64(), len(values), [None, pa.py_buffer(values)])


class FaultyHandler:
    """Handle batches, but for the faults that ``config`` names.

    ``marks``: a local folder. ``fault``: a key of :data:`FAULTS`, or one of the answers in ``handle_batch``. ``bad``:
    the ids that it strikes. ``times``: how often it strikes each of them; None: always. ``until``: a file in the folder
    of marks whose existence ends the fault. ``gate``: no batch is finished before this file exists in the folder of
    marks. ``seconds``: what a batch takes. ``largest_file``: bytes that a file may have that this process writes.
    ``after_commits``: the store; a fault strikes when something was committed there since this process began.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        self._config = config
        self._marks = Path(config["marks"])
        self._bad = frozenset(config.get("bad", ()))
        self._commits = self._count_commits()
        if "largest_file" in config and not (self._marks / config["until"]).exists():
            resource.setrlimit(resource.RLIMIT_FSIZE, (config["largest_file"], resource.RLIM_INFINITY))

    def handle_batch(self, payload: Any, batch_id: str) -> Any:
        ids = payload["id"].to_pylist() if isinstance(payload, pa.Table) else [row["id"] for row in payload]
        self._log(f"{os.getpid()} {os.getppid()} {batch_id} {','.join(map(str, ids))}")
        gate = self._config.get("gate")
        if gate is not None:
            _until((self._marks / gate).exists, 60)
        time.sleep(self._config.get("seconds", 0))
        struck = self._struck(ids)
        fault = self._config.get("fault")
        if struck and "after_commits" in self._config:
            _until(lambda: self._count_commits() > self._commits, 60)
        if struck and fault in FAULTS:
            FAULTS[fault](len(ids))
        table = self._table(ids)
        if struck and fault == "a row too few":
            return table.slice(1)
        if struck and fault == "another type":
            return table.set_column(1, "answer", pa.array(["many"] * len(ids)))
        return table

    def _table(self, ids: list[int]) -> pa.Table:
        return pa.Table.from_arrays([_column(ids), _column(map(answer, ids))], ["id", "answer"])

    def on_job_complete(self) -> None:
        self._log("complete")

    def _count_commits(self) -> int:
        store = self._config.get("after_commits")
        return 0 if store is None else len(list(Path(store).glob("jobs/*/*/ledger/*.jsonl")))

    def _struck(self, ids: Iterable[int]) -> bool:
        until = self._config.get("until")
        if until is not None and (self._marks / until).exists():
            return False
        return any(self._strikes(number) for number in ids if number in self._bad)

    def _strikes(self, number: int) -> bool:
        times = self._config.get("times")
        return times is None or any(self._first(f"struck-{number}-{time}") for time in range(times))

    def _first(self, name: str) -> bool:
        try:
            os.close(os.open(self._marks / name, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        except FileExistsError:
            return False
        return True

    def _log(self, line: str) -> None:
        if "largest_file" in self._config:
            return  # the log would be the file that cannot grow
        descriptor = os.open(self._marks / "calls", os.O_CREAT | os.O_APPEND | os.O_WRONLY, 0o600)
        try:
            os.write(descriptor, f"{line}\n".encode())
        finally:
            os.close(descriptor)
