"""Run one command as a whole process tree and measure it: wall seconds, CPU seconds, peak memory."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

__all__ = ["Measured", "measure"]

#: Often enough to see the peak of a run of half a second, seldom enough to cost one core about 2 %.
INTERVAL = 0.05
_GRACE = 15.0  # seconds that processes get to end which outlive the engine's own, as Spark's JVM may


@dataclass(frozen=True, slots=True)
class Measured:
    """What a run cost; ``error`` is the end of what it wrote when it failed."""

    wall: float
    cpu: float
    memory: int  # bytes: proportional set size where the system tells it, resident size elsewhere
    finished: float  # time.time() at its end
    error: str = ""


def measure(command: list[str], log: Path, *, environment: dict[str, str], limit: float) -> Measured:
    """Run a command to its end, or kill its whole group after ``limit`` seconds."""
    with log.open("wb") as output:
        started = time.perf_counter()
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
        watch = _Watch(process.pid)
        watch.start()
        timer = threading.Timer(limit, os.killpg, (process.pid, signal.SIGKILL))
        timer.start()
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.perf_counter() - started
        process.returncode = os.waitstatus_to_exitcode(status)
        finished = time.time()
        expired = not timer.is_alive()
        timer.cancel()
        watch.stop()
    left = _end_group(process.pid)
    error = ""
    if expired:
        error = f"killed after {limit:.0f} s"
    elif process.returncode:
        error = f"exit code {process.returncode}: {_tail(log)}"
    elif left:
        error = f"{left} processes were left behind"
    # what nobody waited for is not in the kernel's sum, so the larger of the two is nearer to the truth
    return Measured(wall, max(usage.ru_utime + usage.ru_stime, watch.cpu), watch.memory, finished, error)


class _Watch(threading.Thread):
    """Samples the memory and the CPU time of a process and all its descendants."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.pid = pid
        self.memory = 0
        self._cpu: dict[tuple[int, float], float] = {}
        self._over = threading.Event()

    @property
    def cpu(self) -> float:
        return sum(self._cpu.values())

    def stop(self) -> None:
        self._over.set()
        self.join()

    def run(self) -> None:
        while not self._over.is_set():
            try:
                root = psutil.Process(self.pid)
                tree = [root, *root.children(recursive=True)]
            except psutil.Error:
                return
            total = 0
            for process in tree:
                try:
                    times = process.cpu_times()
                    self._cpu[process.pid, process.create_time()] = times.user + times.system
                    total += _memory(process)
                except (psutil.Error, OSError):
                    continue  # it ended meanwhile
            self.memory = max(self.memory, total)
            self._over.wait(INTERVAL)


def _memory(process: psutil.Process) -> int:
    """Return the process's share of memory: pages that several processes map count once in the tree's sum."""
    try:
        rollup = Path(f"/proc/{process.pid}/smaps_rollup").read_text()
    except FileNotFoundError:
        return process.memory_info().rss
    line = next((line for line in rollup.splitlines() if line.startswith("Pss:")), "Pss: 0 kB")
    return int(line.split()[1]) * 1024


def _end_group(group: int) -> int:
    """Kill what is left of the group, with a moment for what is just ending; returns how many there were."""
    deadline = time.monotonic() + _GRACE
    while True:
        left = [process for process in psutil.process_iter() if _group(process.pid) == group]
        if not left or time.monotonic() > deadline:
            break
        psutil.wait_procs(left, timeout=0.1)
    for process in left:
        process.kill()
    return len(left)


def _group(pid: int) -> int | None:
    try:
        return os.getpgid(pid)
    except OSError:
        return None


def _tail(log: Path) -> str:
    return " | ".join(log.read_text(errors="replace").strip().splitlines()[-3:])[-300:]
