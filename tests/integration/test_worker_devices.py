"""Devices of real handler processes and real Dask workers. Nothing of this needs a GPU: the devices are only named."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from distributed import Client, LocalCluster

import cortex_dask
from cortex_dask.errors import SpecError
from cortex_dask.io.job.records import Outcome
from cortex_dask.runtime.worker import device_leases, slots, supervisor
from tests.support.jobs import TestJob, make_job
from tests.support.waiting import environment_of, lives, until

Make = Callable[..., TestJob]

SEES = """
class Handler:
    def __init__(self, config):
        pass
    def handle_batch(self, payload):
        return [{"devices": os.environ.get("CUDA_VISIBLE_DEVICES"), "pid": os.getpid()}] * len(payload)
"""


@pytest.fixture(scope="module", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DASK_CORTEX_DASK__CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> list[str]:
    """The names of this host's devices: two, that no other test has."""
    names = [f"GPU-{uuid.uuid4()}" for _ in range(2)]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", ",".join(names))
    monkeypatch.delenv("CUDA_DEVICE_ORDER", raising=False)
    return names


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


def seen(job: TestJob, outcome: Outcome) -> tuple[str, int]:
    """Return what the handler of a split has seen, and its process."""
    assert outcome.record is not None, outcome
    ((devices, pid),) = {(row["devices"], row["pid"]) for row in job.rows(outcome.record)}
    return devices, pid


def start(job: TestJob, count: int) -> list[str]:
    """Start processes in so many slots at once; returns the devices that each of them sees."""
    with contextlib.ExitStack() as stack:
        processes = [stack.enter_context(slots.lease(job.url)).process() for _ in range(count)]
        return [environment_of(process.pid)["CUDA_VISIBLE_DEVICES"] for process in processes]


# one Dask worker ----------------------------------------------------------------------------------------------------


def test_a_handler_sees_exactly_its_device(make: Make, host: list[str]) -> None:
    job = make(SEES, rows=10, compute={"gpu": 1})
    devices, pid = seen(job, job.run())
    assert devices == host[0]
    assert environment_of(pid)["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"
    assert start(job, 2) == host
    job.close()
    assert f"this worker's GPU: {host[0]}" in [line["message"] for line in job.logs()]


@pytest.mark.parametrize(
    ("gpu", "slots_of"), [(0.5, ["0", "0", "1", "1"]), (1 / 3, ["0", "0", "0", "1"]), (2, ["0,1"]), (1, ["0", "1"])]
)
def test_shares_of_devices_and_several(make: Make, host: list[str], gpu: float, slots_of: list[str]) -> None:
    job = make(SEES, rows=10, compute={"gpu": gpu})
    expected = [",".join(host[int(number)] for number in names.split(",")) for names in slots_of]
    assert start(job, len(expected)) == expected


def test_a_job_without_gpu_sees_what_the_worker_sees(make: Make, host: list[str]) -> None:
    job = make(SEES, rows=10)
    assert seen(job, job.run())[0] == ",".join(host)


def test_what_the_user_sets_counts(make: Make, host: list[str]) -> None:
    job = make(SEES, rows=10, compute={"gpu": 1}, where={"env": {"CUDA_VISIBLE_DEVICES": "mine"}})
    assert seen(job, job.run())[0] == "mine"


def test_a_process_that_is_replaced_keeps_its_device(make: Make, host: list[str]) -> None:
    job = make(SEES, rows=10, compute={"gpu": 1})
    first, pid = seen(job, job.run())
    os.kill(pid, signal.SIGKILL)
    with slots.lease(job.url) as slot:
        process = slot.current
    assert process is not None
    until(process.gone.is_set, "the supervisor to see the death")
    second, other = seen(job, job.run())
    assert (first, second) == (host[0], host[0])
    assert pid != other


def test_more_than_the_host_has_is_one_sentence(make: Make, host: list[str]) -> None:
    outcome = make(SEES, rows=10, compute={"gpu": 3}).run()
    assert outcome.kind == "worker error"
    assert outcome.message == (
        f"a worker of this job needs 3 GPUs, and on host {os.uname().nodename} there are 2 GPUs (CUDA_VISIBLE_DEVICES "
        f"is '{','.join(host)}') for it"
    )


def test_devices_that_nobody_gives_back_are_one_sentence(
    make: Make, host: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device_leases, "WAIT_SECONDS", 0.2)
    job = make(SEES, rows=10, compute={"gpu": 1})
    with slots.lease(job.url) as one, slots.lease(job.url) as two:
        one.process()
        two.process()
        outcome = job.run()
    assert outcome.kind == "worker error"
    assert f"leased by process {os.getpid()}" in outcome.message
    assert job.run().kind == "done"


def test_devices_are_given_back_when_a_job_is_closed_or_stopped(make: Make, host: list[str]) -> None:
    jobs = [make(SEES, rows=10, compute={"gpu": 2}) for _ in range(3)]
    for job in jobs:
        with slots.lease(job.url) as slot:
            process = slot.process()
        if job is jobs[1]:
            slots.stop_job(job.url, "enough")
            until(lambda slot=slot: not slot.has_devices, "the devices to be given back")
        else:
            job.close()
            assert not slot.has_devices
        assert process.gone.is_set()


def test_an_idle_job_gives_its_devices_to_one_that_has_work(make: Make, host: list[str]) -> None:
    # A scheduler that lets a split of the second job run here has given it the device that the first one holds.
    first, second = (make(SEES, rows=10, compute={"gpu": 2}) for _ in range(2))
    both = ",".join(host)
    _, pid = seen(first, first.run())
    began = time.monotonic()
    assert seen(second, second.run())[0] == both
    assert time.monotonic() - began < device_leases.WAIT_SECONDS / 4
    until(lambda: not lives(pid), "the idle process to end")
    again, other = seen(first, first.run())
    assert again == both
    assert other != pid


def test_a_process_that_was_started_ahead_takes_nothing_from_others(make: Make, host: list[str]) -> None:
    first, second = (make(SEES, rows=10, compute={"gpu": 2}) for _ in range(2))
    _, pid = seen(first, first.run())
    slots.prestart(second.url, 1)
    until(lambda: "cortex-dask-prestart" not in [thread.name for thread in threading.enumerate()], "the attempt to end")
    assert lives(pid)
    with slots.lease(second.url) as slot:
        assert slot.current is None


# memory of a device -------------------------------------------------------------------------------------------------


def messages(job: TestJob) -> list[str]:
    job.close()
    return [line["message"] for line in job.logs()]


def test_a_process_that_runs_out_of_memory_repeatedly_is_replaced(make: Make) -> None:
    # All batches of ten rows run out of memory at first, each of their pieces of five as well if it is the first.
    handler = """
    class Handler:
        def __init__(self, config):
            pass
        def handle_batch(self, payload):
            if payload[0]["n"] % 10 == 0 and len(payload) > 1:
                raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")
            return [{"n": row["n"], "pid": os.getpid()} for row in payload]
    """
    job = make(handler, rows=40)
    outcomes = [job.run() for _ in range(4)]
    rows = [job.rows(outcome.record) for outcome in outcomes]
    assert [[row["n"] for row in part] for part in rows] == [list(range(40))] * 4
    pids = [{row["pid"] for row in part} for part in rows]
    assert [len(part) for part in pids] == [1, 1, 1, 1]
    # After the first split three batches and one more have run out: it is replaced. The next one is given twice as
    # many, so it is replaced after two splits.
    assert pids[0] != pids[1] == pids[2] != pids[3]
    said = [message for message in messages(job) if "is replaced" in message]
    assert said[0] == (
        "the handler process is replaced: 4 batches have run out of memory in it (the next split gets a new one)"
    )
    assert len(said) == 2


def test_a_row_is_given_up_only_in_a_process_that_has_memory_in_one_piece(make: Make, tmp_path: Path) -> None:
    handler = """
    class OutOfMemoryError(RuntimeError):
        pass
    class Handler:
        def __init__(self, config):
            self.first = not os.path.exists(config["mark"])
            open(config["mark"], "w").close()
        def handle_batch(self, payload):
            if self.first and payload[0]["n"] >= 20:  # from here on no row's worth of it is in one piece
                raise OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
            return payload
    """
    job = make(handler, rows=100, config={"mark": str(tmp_path / "mark")})
    record = job.record()
    assert [row["n"] for row in job.rows(record)] == list(range(100))
    assert record.failures == ()
    (said,) = [message for message in messages(job) if "is replaced" in message]
    assert said == (
        "the handler process is replaced: 3 batches have run out of memory in it, the last with a single row "
        "(split 0 is run again in a new one)"
    )


def test_rows_that_are_too_large_in_every_process_are_dead_letters_in_the_end(make: Make) -> None:
    handler = """
    class Handler:
        def __init__(self, config):
            print("loaded")
        def handle_batch(self, payload):
            raise RuntimeError("CUDA out of memory")
    """
    job = make(handler, rows=100)
    record = job.record()
    assert [failure.cause for failure in record.failures] == ["out of memory"] * 10
    assert sorted(failure.batch for failure in record.failures) == list(range(10))
    said = messages(job)
    # A process may fail with 3 batches, the next with 6, and the third would be replaced after 12.
    assert said.count("loaded") == 3
    assert len([message for message in said if "is replaced" in message]) == 2


def test_one_huge_row_does_not_make_the_whole_job_go_row_by_row(make: Make) -> None:
    handler = """
    class Handler:
        def __init__(self, config):
            self.sizes = []
        def handle_batch(self, payload):
            self.sizes.append(len(payload))
            if len(payload) > 1 and 5 in [row["n"] for row in payload]:
                raise RuntimeError("CUDA out of memory")
            return payload
        def on_job_complete(self):
            print("sizes", self.sizes)
    """
    job = make(handler, rows=48, batch_size=16)
    record = job.record()
    assert [row["n"] for row in job.rows(record)] == list(range(48))
    assert record.rows_limit == 8
    assert supervisor.run_completion(job.url, job.report).kind == "done"
    (line,) = [message for message in messages(job) if message.startswith("sizes")]
    assert line == "sizes [16, 8, 4, 4, 2, 1, 1, 2, 8, 8, 8, 8, 8]"


@pytest.mark.parametrize("in_line", [False, True])
def test_the_size_that_worked_comes_with_the_split(make: Make, in_line: bool) -> None:
    # so every worker has it, also one that was started later, and a job that is resumed: it is in the ledger
    handler = """
    class Handler:
        def __init__(self, config):
            pass
        def handle_batch(self, payload):
            if len(payload) > 4:
                raise RuntimeError("CUDA out of memory")
            return [{"size": len(payload)}] * len(payload)
    """
    job = make(handler, rows=32, batch_size=16)
    assert job.record(in_line=in_line).rows_limit == 4
    other = make(handler.replace("if len(payload) > 4", "if len(payload) > 3"), rows=32, batch_size=16)
    task = supervisor.SplitTask(other.url, other.splits[0], 1, None, rows_limit=3)
    from cortex_dask.runtime.handler_process import inline

    outcome = (inline if in_line else supervisor).run_split(task, other.report)
    assert outcome.record is not None
    assert {row["size"] for row in other.rows(outcome.record)} == {3, 1}
    other.close()
    assert not [line for line in other.logs() if "out of memory" in line["message"]]


def test_a_process_that_has_lost_its_device_is_replaced_and_costs_one_batch_an_attempt(make: Make) -> None:
    handler = """
    class Handler:
        def __init__(self, config):
            self.lost = False
        def handle_batch(self, payload):
            # After an assertion on the device, every call of this process fails.
            self.lost = self.lost or payload[0]["n"] == 30
            if self.lost:
                raise RuntimeError("CUDA error: device-side assert triggered")
            return payload
    """
    job = make(handler, limits={"max_attempts": 2})
    record = job.record()
    assert [row["n"] for row in job.rows(record)] == [n for n in range(100) if not 30 <= n < 40]
    (failure,) = record.failures
    assert (failure.batch, failure.cause, failure.attempts) == (3, "exception", 2)
    assert len([message for message in messages(job) if "is replaced" in message]) == 2


# several Dask workers -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def scheduler() -> Iterator[LocalCluster]:
    with LocalCluster(
        n_workers=0, processes=False, host="127.0.0.1", protocol="tcp://", dashboard_address="127.0.0.1:0"
    ) as cluster:
        yield cluster


@pytest.fixture
def workers(
    scheduler: LocalCluster, host: list[str], tmp_path: Path
) -> Iterator[Callable[..., list[subprocess.Popen[bytes]]]]:
    """Starts ``dask worker`` processes, all of which see both devices of the host."""
    started: list[subprocess.Popen[bytes]] = []

    def start_some(count: int, *options: str) -> list[subprocess.Popen[bytes]]:
        command = [sys.executable, "-m", "distributed.cli.dask_worker", scheduler.scheduler_address, "--no-nanny"]
        command += ["--no-dashboard", "--host", "127.0.0.1", "--local-directory", str(tmp_path), *options]
        with (tmp_path / "workers.log").open("ab") as log:
            started.extend(
                subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log) for _ in range(count)
            )
        with Client(scheduler.scheduler_address, set_as_default=False) as client:
            client.wait_for_workers(sum(process.poll() is None for process in started), timeout=60)
        return started

    yield start_some
    for process in started:
        process.terminate()
    for process in started:
        process.wait(30)
    until(lambda: not scheduler.scheduler_info["workers"], "the workers to leave")


def submission(tmp_path: Path, gpu: float, workers: int, rows: int = 64) -> dict[str, Any]:
    (tmp_path / "in").mkdir(exist_ok=True)
    for number in range(8):
        pq.write_table(pa.table({"n": range(rows)}), tmp_path / "in" / f"{number}.parquet")
    return {
        "input": str(tmp_path / "in"),
        "output": str(tmp_path / f"out-{uuid.uuid4().hex}"),
        "batch_size": 8,
        "workers": workers,
        "compute": {"gpu": gpu},
        "progress": False,
    }


class Together:
    """Notes its device, and waits in its second batch (the first settles the schema) until all others are there."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.device = os.environ["CUDA_VISIBLE_DEVICES"]
        self.folder = config["folder"]
        self.expected = config["expected"]
        self.calls = 0

    def handle_batch(self, payload: Any) -> Any:
        self.calls += 1
        if self.calls == 1:
            Path(self.folder, f"{os.getpid()}").write_text(f"{os.getppid()} {self.device}")
        elif self.calls == 2:
            deadline = time.monotonic() + 60
            while len(os.listdir(self.folder)) < self.expected and time.monotonic() < deadline:
                time.sleep(0.01)
        return [{"n": n} for n in payload["n"]]


def test_dask_workers_of_one_host_share_its_devices(
    workers: Callable[..., list[subprocess.Popen[bytes]]], scheduler: LocalCluster, host: list[str], tmp_path: Path
) -> None:
    pids = [str(process.pid) for process in workers(2, "--nthreads", "3", "--resources", "GPU=1")]
    for gpu, slots_of_each in ((1, 1), (0.5, 2)):
        folder = tmp_path / f"seen-{gpu}"
        folder.mkdir()
        expected = 2 * slots_of_each
        job = cortex_dask.run(
            Together,
            cluster=scheduler.scheduler_address,
            config={"folder": str(folder), "expected": expected},
            **submission(tmp_path, gpu, workers=expected),
        )
        assert job.status == "succeeded"
        assert len(job.to_pandas()) == 8 * 64
        noted = [path.read_text().split() for path in folder.iterdir()]
        # each worker's slots are on one device, and the other worker's on the other
        assert len(noted) == expected
        assert sorted({parent for parent, _ in noted}) == sorted(pids)
        devices = {parent: {device for other, device in noted if other == parent} for parent, _ in noted}
        assert sorted(name for (name,) in devices.values()) == sorted(host), noted


def test_a_worker_that_is_killed_frees_its_device(
    workers: Callable[..., list[subprocess.Popen[bytes]]], scheduler: LocalCluster, host: list[str], tmp_path: Path
) -> None:
    processes = list(workers(2, "--nthreads", "1", "--resources", "GPU=1"))
    folder = tmp_path / "seen"
    folder.mkdir()

    def kill_one() -> None:
        until(lambda: len(list(folder.iterdir())) == 2, "two handlers at work")
        processes[0].kill()
        processes[0].wait()
        workers(1, "--nthreads", "1", "--resources", "GPU=1")

    killer = threading.Thread(target=kill_one)
    killer.start()
    job = cortex_dask.run(
        Together,
        cluster=scheduler.scheduler_address,
        config={"folder": str(folder), "expected": 3},
        **submission(tmp_path, 1, workers=2),
    )
    killer.join()
    assert job.status == "succeeded"
    noted = [path.read_text().split() for path in folder.iterdir()]
    assert len(noted) == 3
    by_worker = {int(parent): device for parent, device in noted}
    lost, survivor = (process.pid for process in processes)
    (newcomer,) = by_worker.keys() - {lost, survivor}
    assert by_worker[newcomer] == by_worker[lost] != by_worker[survivor]


# this machine -------------------------------------------------------------------------------------------------------


def test_local_workers_need_devices(host: list[str], tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"workers: found 3 with compute\.gpu: 1; this machine has 2 GPUs"):
        cortex_dask.run(Together, config={"folder": "", "expected": 0}, **submission(tmp_path, 1, workers=3))


def test_local_workers_are_as_many_as_devices_suffice_for(host: list[str], tmp_path: Path) -> None:
    (tmp_path / "seen").mkdir()
    options = submission(tmp_path, 1, workers=2)
    del options["workers"]
    job = cortex_dask.run(Together, config={"folder": str(tmp_path / "seen"), "expected": 2}, **options)
    assert job.status == "succeeded"
    devices = [path.read_text().split()[1] for path in (tmp_path / "seen").iterdir()]
    assert sorted(devices) == sorted(host)
