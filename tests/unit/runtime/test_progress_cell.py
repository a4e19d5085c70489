"""The progress cell: shared with a real other process, readable at any moment."""

from __future__ import annotations

import os
import subprocess
import sys
import time

from cortex_dask.runtime.progress_cell import Phase, ProgressCell

WRITER = """
import sys
from cortex_dask.runtime.progress_cell import ProgressCell
cell = ProgressCell(int(sys.argv[1]))
cell.start_run(7)
for index in range(int(sys.argv[2])):
    cell.start_batch(index)
    cell.start_call(1, 10)
    cell.end_call()
    cell.end_batch(10)
cell.start_batch(99_999)
cell.start_call(2, 5)
print("written", flush=True)
sys.stdin.read()
"""


def test_another_process_sees_what_is_in_hand_and_so_it_is_after_a_kill() -> None:
    cell, descriptor = ProgressCell.create()
    before = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(descriptor), "3"],
        pass_fds=(descriptor,),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    os.close(descriptor)
    assert process.stdout is not None
    process.stdout.readline()
    process.kill()
    process.communicate()
    seen = cell.read()
    assert (seen.run, seen.phase, seen.batch, seen.attempt, seen.rows_in_hand) == (7, Phase.RUNNING, 99_999, 2, 5)
    assert (seen.batches, seen.rows, seen.reading) == (3, 30, None)
    assert seen.called is not None
    assert before < seen.called < time.monotonic()
    cell.close()


def test_a_reader_in_between_never_sees_a_batch_with_an_earlier_batchs_time() -> None:
    cell, descriptor = ProgressCell.create()
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(descriptor), "200000"],
        pass_fds=(descriptor,),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    os.close(descriptor)
    latest: dict[int, float] = {}
    while (seen := cell.read()).batch != 99_999 or seen.attempt != 2:
        if seen.batch is not None and seen.called is not None:
            # a call that is said to last since before an earlier look at a lower batch would be a torn read
            assert all(seen.called >= at for index, at in latest.items() if index < seen.batch)
            latest = {seen.batch: seen.called}
    process.communicate()
    cell.close()


def test_what_is_read_handled_written_counts_as_progress() -> None:
    cell = ProgressCell()
    cell.start_run(1)
    looks = [cell.read().beats]
    for step in (
        cell.count_read,
        lambda: cell.start_call(1, 1),
        lambda: cell.end_batch(1),
        lambda: cell.count_written(1),
        lambda: cell.set_phase(Phase.CLOSING),
    ):
        step()
        looks.append(cell.read().beats)
    assert len(set(looks)) == len(looks)


def test_a_new_run_forgets_the_last_one() -> None:
    cell = ProgressCell()
    cell.start_run(1)
    cell.start_batch(4)
    cell.start_call(3, 8)
    cell.start_read(5)
    cell.start_run(2)
    seen = cell.read()
    assert (seen.run, seen.batch, seen.called, seen.reading, seen.batches, seen.attempt) == (2, None, None, None, 0, 0)


def test_a_note_costs_no_more_than_some_microseconds() -> None:
    cell = ProgressCell()
    began = time.process_time()
    for index in range(10_000):
        cell.start_batch(index)
        cell.start_call(1, 32)
        cell.end_call()
        cell.end_batch(32)
    assert time.process_time() - began < 0.5  # 50 microseconds each: ten times what it takes, for a busy machine
