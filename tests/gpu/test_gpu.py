"""Handlers on real GPUs: which they see, what an out-of-memory error of CUDA does, what a lost device does."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cortex_dask.runtime.frames import Ready
from cortex_dask.runtime.worker import slots, supervisor
from cortex_dask.runtime.worker.devices import find_gpus
from tests.gpu.conftest import Gpu
from tests.support.jobs import TestJob, make_job

Make = Callable[..., TestJob]

#: Touches its devices, and says which they are.
SEES = """
import torch
class Handler:
    def __init__(self, config):
        self.devices = range(torch.cuda.device_count())
        self.held = [torch.zeros(1024, 1024, device=f"cuda:{n}") for n in self.devices]
        uuids = [str(torch.cuda.get_device_properties(n).uuid) for n in self.devices]
        open(os.path.join(config["folder"], str(os.getpid())), "w").write(" ".join(uuids))
    def handle_batch(self, payload):
        return [{"sum": float(sum(tensor.sum() for tensor in self.held))}] * len(payload)
"""


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    """Makes jobs, and ends their processes."""
    jobs: list[TestJob] = []

    def make_one(*arguments: Any, **options: Any) -> TestJob:
        jobs.append(make_job(tmp_path, *arguments, **options))
        return jobs[-1]

    yield make_one
    for job in jobs:
        job.close()


@pytest.fixture
def seen(tmp_path: Path) -> Path:
    folder = tmp_path / "seen"
    folder.mkdir()
    return folder


def run_at_once(job: TestJob, count: int) -> None:
    """Load the handler in so many slots at the same time."""
    with contextlib.ExitStack() as stack:
        processes = [stack.enter_context(slots.lease(job.url)).process() for _ in range(count)]
        for process in processes:
            event = process.inbox.get(timeout=120)
            assert isinstance(event, Ready), event


def devices_in(folder: Path) -> list[list[str]]:
    """Return which devices each process has seen, as nvidia-smi calls them."""
    noted = [path.read_text().split() for path in folder.iterdir()]
    return [[f"GPU-{uuid.removeprefix('GPU-')}" for uuid in uuids] for uuids in noted]


def used(gpu: Gpu) -> int:
    """Return the bytes of a device's memory that are in use."""
    query = ["nvidia-smi", f"--id={gpu.uuid}", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    return int(subprocess.run(query, capture_output=True, text=True, check=True).stdout) * 1024**2


def messages(job: TestJob) -> list[str]:
    job.close()
    return [line["message"] for line in job.logs()]


# which devices ------------------------------------------------------------------------------------------------------


def test_the_driver_lists_the_same_devices(gpus: list[Gpu]) -> None:
    found = find_gpus(os.environ)
    assert found.found is not None, found
    assert [(device.name, device.key) for device in found.found] == [(gpu.index, gpu.uuid) for gpu in gpus]


def test_each_process_sees_exactly_one_device(make: Make, gpus: list[Gpu], seen: Path) -> None:
    job = make(SEES, compute={"gpu": 1}, config={"folder": str(seen)})
    run_at_once(job, len(gpus))
    assert sorted(devices_in(seen)) == sorted([gpu.uuid] for gpu in gpus)


def test_two_processes_on_each_device(make: Make, gpus: list[Gpu], seen: Path) -> None:
    job = make(SEES, compute={"gpu": 0.5}, config={"folder": str(seen)})
    run_at_once(job, 2 * len(gpus))
    assert sorted(devices_in(seen)) == sorted([gpu.uuid] for gpu in gpus for _ in range(2))
    assert {row["sum"] for row in job.rows(job.record())} == {0.0}


def test_one_process_on_all_devices(make: Make, gpus: list[Gpu], seen: Path) -> None:
    job = make(SEES, compute={"gpu": len(gpus)}, config={"folder": str(seen)})
    job.record()
    assert devices_in(seen) == [[gpu.uuid for gpu in gpus]]


def test_more_devices_than_there_are(make: Make, gpus: list[Gpu], seen: Path) -> None:
    outcome = make(SEES, compute={"gpu": len(gpus) + 1}, config={"folder": str(seen)}).run()
    assert outcome.kind == "worker error"
    assert f"needs {len(gpus) + 1} GPUs" in outcome.message


# memory -------------------------------------------------------------------------------------------------------------

#: Takes a sixth of the device's memory for each row: four rows fit, five and more may not.
HUNGRY = """
import torch
class Handler:
    def __init__(self, config):
        self.row = torch.cuda.get_device_properties(0).total_memory // 6
        self.sizes = []
    def handle_batch(self, payload):
        self.sizes.append(len(payload))
        held = [torch.ones(self.row, dtype=torch.uint8, device="cuda") for row in payload]
        return [{"n": row["n"], "one": int(tensor[-1]), "pid": os.getpid()} for row, tensor in zip(payload, held)]
    def on_job_complete(self):
        print("sizes", self.sizes)
"""


def test_out_of_memory_halves_the_batch_and_the_result_is_complete(make: Make, gpus: list[Gpu]) -> None:
    job = make(HUNGRY, rows=64, batch_size=16, compute={"gpu": 1})
    record = job.record()
    rows = job.rows(record)
    assert [(row["n"], row["one"]) for row in rows] == [(n, 1) for n in range(64)]
    assert record.failures == ()
    assert record.rows_limit == 4
    assert supervisor.run_completion(job.url, job.report).kind == "done"
    said = messages(job)
    (line,) = [message for message in said if message.startswith("sizes")]
    # The first batch finds the size out; the others are handled in pieces of it from the start.
    assert line.startswith("sizes [16, 8, 4, 4, 8, 4, 4, 4, 4, 4, 4"), line
    assert line.count(",") + 1 == 7 + 3 * 4, line


def test_a_process_that_runs_out_repeatedly_is_replaced_and_leaves_no_memory_behind(
    make: Make, gpus: list[Gpu]
) -> None:
    handler = HUNGRY.replace(
        "held = [", 'if payload[0]["n"] % 16 == 0 and len(payload) > 1: self.fill()\n        held = ['
    )
    handler += """
    def fill(self):
        torch.empty(torch.cuda.get_device_properties(0).total_memory, dtype=torch.uint8, device="cuda")
"""
    before = used(gpus[0])
    job = make(handler, rows=64, batch_size=16, compute={"gpu": 1})
    pids = [{row["pid"] for row in job.rows(job.record())} for _ in range(2)]
    assert [len(pid) for pid in pids] == [1, 1]
    assert pids[0] != pids[1]
    assert [message for message in messages(job) if "is replaced" in message]
    assert used(gpus[0]) < before + gpus[0].memory // 10


def test_a_row_that_is_too_large_is_a_dead_letter_and_costs_nothing_else(make: Make, gpus: list[Gpu]) -> None:
    handler = HUNGRY.replace(
        "held = [", 'self.row *= 1 + 9 * any(row["n"] == 5 for row in payload)\n        held = [', 1
    )
    handler = handler.replace("self.sizes.append(len(payload))", "self.row = self.usual").replace(
        "self.sizes = []", "self.sizes = []\n        self.usual = self.row"
    )
    record = make(handler, rows=16, batch_size=4, compute={"gpu": 1}).record()
    assert [(failure.batch, failure.cause) for failure in record.failures] == [(1, "out of memory")]
    assert record.rows_out == 12


def test_an_assertion_on_the_device_costs_one_batch(make: Make, gpus: list[Gpu]) -> None:
    # After it every call of CUDA fails in that process, whatever it does.
    handler = """
    import torch
    class Handler:
        def __init__(self, config):
            self.table = torch.arange(100, device="cuda")
        def handle_batch(self, payload):
            index = torch.tensor([row["n"] if row["n"] != 35 else 1_000_000 for row in payload], device="cuda")
            return [{"n": n} for n in self.table[index].tolist()]
    """
    job = make(handler, compute={"gpu": 1}, limits={"max_attempts": 2})
    record = job.record()
    assert [row["n"] for row in job.rows(record)] == [n for n in range(100) if not 30 <= n < 40]
    (failure,) = record.failures
    assert (failure.batch, failure.attempts) == (3, 2)
    assert len([message for message in messages(job) if "is replaced" in message]) == 2
