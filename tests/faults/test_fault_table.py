"""One table of faults of the handler and of its process, run on local and S3 stores."""

from __future__ import annotations

import random
import re
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import psutil
import pytest

from cortex_dask.io.job.settings import LimitSettings
from cortex_dask.io.store.store import Store
from tests.faults.checks import exactly_once
from tests.faults.jobs import BATCH, FaultJob
from tests.support.waiting import until

MIB = 1024**2
BAD = (120, 877)  # in two files and two splits


@dataclass(frozen=True)
class Fault:
    """A row of the table.

    ``strikes`` and ``times`` are the handler's ``fault`` and ``times``. Without ``cause`` everything has to be
    recovered; with it, the batches with the bad rows end in the dead letter for that cause, after so many attempts,
    with an error that matches.
    """

    name: str
    strikes: str
    times: int | None = None
    cause: str | None = None
    error: str = ""
    attempts: int = 3
    failed_attempts: int | None = None  # of all batches together
    options: dict[str, Any] = field(default_factory=dict)


def _limits(**limits: Any) -> dict[str, Any]:
    return {"limits": LimitSettings(**limits)}


FAULTS = [
    Fault("exception, always", "raise", None, "exception", r"ValueError: cannot handle 50 rows", failed_attempts=6),
    Fault("exception, once", "raise", 1, failed_attempts=2),
    Fault("exception, twice of three", "raise", 2, failed_attempts=4),
    Fault("exception, one attempt", "raise", None, "exception", "", 1, 2, _limits(max_attempts=1)),
    Fault(
        "wrong number of rows beside kept columns",
        "a row too few",
        None,
        "exception",
        r"49\b.*\b50|50\b.*\b49",
        options={"keep": ("text",)},
    ),
    Fault("rows that do not fit the schema", "another type", None, "exception", "answer"),
    Fault("exit, always", "exit", None, "crash", r"exited with code 3", 2, 4, _limits(max_attempts=2)),
    Fault("exit, once", "exit", 1, failed_attempts=2),
    Fault("segmentation fault, always", "segv", None, "crash", "SIGSEGV", 1, 2, _limits(max_attempts=1)),
    Fault("segmentation fault, once", "segv", 1),
    Fault("SIGKILL, always", "kill", None, "crash", "SIGKILL", 1, 2, _limits(max_attempts=1)),
    Fault("SIGKILL, once", "kill", 1),
    Fault("SystemExit", "system exit", None, "exception", "SystemExit: enough"),
    Fault(
        "hang, always",
        "hang",
        None,
        "timed out",
        "batch_timeout",
        2,
        options=_limits(batch_timeout=0.8, max_attempts=2),
    ),
    Fault("hang, once", "hang", 1, options=_limits(batch_timeout=0.8)),
    Fault(
        "hang in native code",
        "hang in native code",
        None,
        "timed out",
        "batch_timeout",
        2,
        options=_limits(batch_timeout=0.8, max_attempts=2),
    ),
    # Longer than a busy machine takes to read from a store, which must not count as a stall.
    Fault("stall", "hang", None, "timed out", "stall_timeout", 1, options=_limits(stall_timeout=5.0, max_attempts=1)),
    Fault("memory hog that fits in halves", "hog that fits in halves", None, options={"memory": 400 * MIB}),
    Fault("memory hog", "hog", None, "out of memory", "limit", options={"memory": 400 * MIB, "batch_size": 2}),
    Fault("MemoryError that fits in halves", "memory error that fits in halves", None),
    Fault("MemoryError", "memory error", None, "out of memory", "MemoryError"),
]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_fault(fault: Fault, new_job: Callable[..., FaultJob]) -> None:
    job = new_job(files=2, workers=1, fault=fault.strikes, times=fault.times, bad=BAD, **fault.options)

    job.run()

    result = exactly_once(job)
    if fault.cause is None:
        assert result.letters == []
    else:
        assert result.dead_ids == result.sharing_a_batch(BAD)
        for letter in result.letters:
            assert letter["cause"] == fault.cause
            assert re.search(fault.error, letter["error"])
            if fault.cause != "out of memory":
                assert letter["attempts"] == fault.attempts
    if fault.failed_attempts is not None:
        assert result.status["batch_metrics"]["failed"] == fault.failed_attempts
    assert job.completions() == 1
    until(job.handlers_gone, "the handler processes to end")


def test_a_hang_that_ends_when_asked_where_it_hangs_harms_no_bystander(local_job: Callable[..., FaultJob]) -> None:
    # The signal that asks ends the wait; until it is killed, the process goes on with the next batches.
    limits = LimitSettings(batch_timeout=0.8, max_attempts=2)
    job = local_job(fault="hang until a signal comes", bad=BAD[:1], seconds=0.05, limits=limits)

    job.run()

    result = exactly_once(job)
    assert set(result.dead_ids) <= set(result.sharing_a_batch(BAD[:1])), "its split may have ended before it was killed"
    assert {letter["cause"] for letter in result.letters} <= {"timed out"}
    assert result.status["batch_metrics"]["failed"] <= 2


def test_bystanders_of_a_crash_are_handled_again_only_in_its_own_split(local_job: Callable[..., FaultJob]) -> None:
    job = local_job(fault="segv", bad=BAD)

    job.run()

    result = exactly_once(job)
    split_of = {letter["split"] for letter in result.letters}
    near = {row for split in split_of for row in result.parts.get(_part(result, split), ())}
    handled = [number for call in job.calls() for number in call.ids]
    again = {number for number in handled if handled.count(number) > 1}
    assert again <= near | set(result.dead_ids)


def _part(result: Any, split: int) -> str:
    part = result.records[split].part
    return part.name if part is not None else ""


def test_malformed_lines_go_to_the_dead_letter_and_their_neighbours_go_on(new_job: Callable[..., FaultJob]) -> None:
    job = new_job(files=2, input_format="json", output_format="json", fault="raise", times=1, bad=BAD)
    path = sorted(job.firsts)[1]
    source = Store(path.rpartition("/")[0])
    lines = source.read("01.jsonl").splitlines(keepends=True)
    lines[100:100] = [b'{"id": 1, "text": \n', b"[1, 2]\n"]
    lines.append(b"no JSON at all")
    source.write("01.jsonl", b"".join(lines))

    job.run()

    result = exactly_once(job)
    errors = sorted(letter["error"] for letter in result.letters)
    assert [re.search(r"01.jsonl, line (\d+): ", error)[1] for error in errors] == ["101", "102", "503"]
    assert [letter["batch"] for letter in result.letters] == [None] * 3
    assert {letter["payload"][0] for letter in result.letters} == {'{"id": 1, "text": ', "[1, 2]", "no JSON at all"}


@pytest.mark.parametrize("how", ["json", "parquet"])
def test_each_format_of_output_is_exact_when_batches_crash_and_fail(how: str, new_job: Callable[..., FaultJob]) -> None:
    limits = LimitSettings(max_attempts=2)
    job = new_job(files=2, input_format=how, output_format="json", fault="kill", bad=BAD, limits=limits)

    job.run()

    result = exactly_once(job)
    assert len(result.letters) == 2
    assert {letter["cause"] for letter in result.letters} == {"crash"}


def test_handlers_killed_from_outside_at_random_moments(new_job: Callable[..., FaultJob]) -> None:
    job = new_job(limits=LimitSettings(max_attempts=7), seconds=0.02)
    chance = random.Random(20260131)
    killed: list[int] = []
    over = threading.Event()

    def kill() -> None:
        while len(killed) < 6 and not over.wait(chance.uniform(0.05, 0.3)):
            pids = {call.pid for call in job.calls()[-4:]} - set(killed)
            if pids:
                pid = chance.choice(sorted(pids))
                try:
                    psutil.Process(pid).send_signal(signal.SIGKILL)
                except psutil.NoSuchProcess:
                    continue
                killed.append(pid)

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        job.run()
    finally:
        over.set()
        killer.join()

    assert len(killed) >= 3
    result = exactly_once(job, status="succeeded")
    assert result.letters == []


@pytest.mark.parametrize("how", ["truncated", "changed", "gone"])
def test_input_that_is_not_what_was_planned(how: str, new_job: Callable[..., FaultJob]) -> None:
    # The first batch of the job waits at a gate, so every other file is read after it has been spoilt.
    job = new_job(files=3, gate="open", workers=1)
    path = sorted(job.firsts)[-1]
    folder, _, name = path.rpartition("/")
    source = Store(folder)
    thread = threading.Thread(target=job.run)
    thread.start()
    until(job.calls, "the first batch")
    if how == "gone":
        source.delete(name)
    else:
        data = source.read(name)
        source.write(name, data[: len(data) // 2] if how == "truncated" else data[:-8][::-1] + data[-8:])
    job.mark("open")
    thread.join()

    result = exactly_once(job, unread=500)
    assert {letter["cause"] for letter in result.letters} == {"unreadable input"}
    assert all(name in letter["error"] for letter in result.letters)
    assert len(result.letters) == 500 // BATCH


def test_what_the_handler_prints_before_a_crash_is_in_the_log(local_job: Callable[..., FaultJob]) -> None:
    job = local_job(fault="segv", bad=BAD, limits=LimitSettings(max_attempts=1))

    job.run()

    exactly_once(job)
    log = job.handle.logs(level="error")
    assert log["message"].str.contains("SIGSEGV").sum() >= 2
