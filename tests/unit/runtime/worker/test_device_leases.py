"""Leases of devices: among slots, among real processes, and after a kill."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cortex_dask.io.job.settings import ComputeSettings
from cortex_dask.runtime.worker import device_leases
from cortex_dask.runtime.worker.device_leases import DeviceLease, SlotDevices, acquire
from cortex_dask.runtime.worker.devices import Device, DeviceError, Devices

Acquire = Callable[..., list[str] | None]

#: A process that leases devices like a worker, says which, passes them on to a child if asked, and waits.
HOLDER = """
import subprocess, sys
from pathlib import Path
from cortex_dask.runtime.worker.device_leases import acquire
from cortex_dask.runtime.worker.devices import Device, Devices
folder, names, amount, heir = sys.argv[1:]
devices = Devices("GPU", "X", tuple(Device(name, name) for name in names.split(",")), "a test")
lease = acquire(devices, float(amount), Path(folder))
child = None
if heir == "heir":
    child = subprocess.Popen(["sleep", "600"], pass_fds=lease.descriptors)
print(",".join(device.name for device in lease.devices), child.pid if child else "", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def take(tmp_path: Path) -> Iterator[Acquire]:
    """Leases some of a list of devices, and gives all back at the end."""
    leases: list[DeviceLease] = []

    def take_some(amount: float, names: str | None = "0,1") -> list[str] | None:
        lease = acquire(made(names), amount, tmp_path)
        if lease is None:
            return None
        leases.append(lease)
        return [device.name for device in lease.devices]

    take_some.leases = leases  # type: ignore[attr-defined]
    yield take_some
    for lease in leases:
        lease.release()


def made(names: str | None) -> Devices:
    found = None if names is None else tuple(Device(name, name) for name in names.split(",") if name)
    return Devices("GPU", "CUDA_VISIBLE_DEVICES", found, "a test")


class Holder:
    """A process that holds a lease."""

    def __init__(self, folder: Path, names: str, amount: float, heir: str = "") -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", HOLDER, str(folder), names, str(amount), heir],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        self.devices, _, heir_pid = self.process.stdout.readline().rstrip("\n").partition(" ")
        self.heir = int(heir_pid) if heir_pid else None

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()


def test_a_device_is_leased_once(take: Acquire) -> None:
    assert take(1) == ["0"]
    assert take(1) == ["1"]
    assert take(1) is None
    take.leases[0].release()  # type: ignore[attr-defined]
    assert take(1) == ["0"]


def test_several_devices_for_one_slot(take: Acquire) -> None:
    assert take(2, "0,1,2") == ["0", "1"]
    assert take(2, "0,1,2") is None
    assert take(1, "0,1,2") == ["2"]


@pytest.mark.parametrize("slots", [2, 3, 7, 10])
def test_a_device_is_shared_by_exactly_so_many(take: Acquire, slots: int) -> None:
    assert [take(1 / slots, "0") for _ in range(slots + 1)] == [["0"]] * slots + [None]


def test_shares_and_whole_devices_do_not_meet(take: Acquire) -> None:
    assert take(0.5) == ["0"]
    assert take(1) == ["1"]
    assert take(0.25) == ["0"]
    assert take(0.5) is None
    assert take(0.25) == ["0"]
    assert take(0.25) is None


def test_counted_devices_have_no_end(take: Acquire) -> None:
    assert [take(1, None) for _ in range(3)] == [["0"], ["1"], ["2"]]
    assert take(2, None) == ["3", "4"]
    assert [take(0.5, None) for _ in range(3)] == [["5"], ["5"], ["6"]]


def test_too_few_are_one_sentence(take: Acquire) -> None:
    with pytest.raises(DeviceError) as caught:
        take(4)
    host = os.uname().nodename
    assert (
        str(caught.value) == f"a worker of this job needs 4 GPUs, and on host {host} there are 2 GPUs (a test) for it"
    )


def test_a_killed_worker_leases_nothing(tmp_path: Path, take: Acquire) -> None:
    holder = Holder(tmp_path, "0,1", 1)
    assert holder.devices == "0"
    assert take(1) == ["1"]
    assert take(1) is None
    holder.kill()
    assert take(1) == ["0"]


def test_a_device_is_not_free_before_the_handler_that_outlives_its_worker_has_ended(
    tmp_path: Path, take: Acquire
) -> None:
    holder = Holder(tmp_path, "0", 1, heir="heir")
    holder.process.send_signal(signal.SIGKILL)
    holder.process.wait()
    assert holder.heir is not None
    assert take(1, "0") is None
    os.kill(holder.heir, signal.SIGKILL)
    holder.kill()  # its output ends with the last that holds it
    assert take(1, "0") == ["0"]


def test_what_is_released_is_free_whoever_has_inherited_it(tmp_path: Path, take: Acquire) -> None:
    assert take(1, "0") == ["0"]
    (lease,) = take.leases  # type: ignore[attr-defined]
    heir = subprocess.Popen(["sleep", "600"], pass_fds=lease.descriptors)
    try:
        lease.release()
        assert take(1, "0") == ["0"]
    finally:
        heir.kill()
        heir.wait()


def test_the_shares_of_a_worker_stay_together(tmp_path: Path, take: Acquire) -> None:
    # or a job that needs whole devices could never have one on a host where two workers have run halves
    holder = Holder(tmp_path, "0,1", 0.5)
    assert holder.devices == "0"
    assert [take(0.5) for _ in range(3)] == [["1"], ["1"], ["0"]]
    holder.kill()


def test_workers_that_look_at_once_get_different_devices(tmp_path: Path) -> None:
    names = [str(number) for number in range(6)]
    holders: list[Holder] = []
    threads = [threading.Thread(target=lambda: holders.append(Holder(tmp_path, ",".join(names), 1))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(holder.devices for holder in holders) == names
    for holder in holders:
        holder.kill()


# a slot's -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def slots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[float], SlotDevices]]:
    monkeypatch.setattr(device_leases, "leases_folder", lambda: tmp_path)
    made: list[SlotDevices] = []

    def make(gpu: float) -> SlotDevices:
        made.append(SlotDevices(ComputeSettings(gpu=gpu)))
        return made[-1]

    yield make
    for slot in made:
        slot.release()


ENVIRONMENT = {"CUDA_VISIBLE_DEVICES": "GPU-aa,GPU-bb"}


def test_a_slot_keeps_its_devices(slots: Callable[[float], SlotDevices]) -> None:
    lines: list[str] = []
    slot = slots(1)
    for _ in range(2):
        variables = slot.lease(ENVIRONMENT, lambda level, message: lines.append(message), None, lambda: False)
        assert variables["CUDA_VISIBLE_DEVICES"] == "GPU-aa"
    assert lines == ["this worker's GPU: GPU-aa"]
    assert len(slot.descriptors) == 1
    slot.release()
    assert not slot.held
    assert slot.descriptors == ()


def test_counted_devices_are_said_to_be(
    slots: Callable[[float], SlotDevices], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("cortex_dask.runtime.worker.devices.NVIDIA_SMI_PLACES", ())
    monkeypatch.setattr("cortex_dask.runtime.worker.devices.HOST_ROOT", tmp_path)
    monkeypatch.setattr("cortex_dask.runtime.worker.devices.list_with_nvidia_smi", lambda: None)
    lines: list[tuple[str, str]] = []
    shown = slots(2).lease({}, lambda *line: lines.append(line), None, lambda: False)
    assert shown["CUDA_VISIBLE_DEVICES"] == "0,1"
    assert [level for level, _ in lines] == ["INFO", "WARNING"]
    assert "set CUDA_VISIBLE_DEVICES for the Dask worker" in lines[1][1]


def test_a_slot_waits_for_devices_and_then_says_who_has_them(
    slots: Callable[[float], SlotDevices], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device_leases, "WAIT_SECONDS", 0.3)
    first, second = slots(2), slots(1)
    first.lease(ENVIRONMENT, print, None, lambda: False)
    with pytest.raises(DeviceError) as caught:
        second.lease(ENVIRONMENT, print, lambda: False, lambda: False)
    assert str(caught.value) == (
        f"a worker of this job needs 1 GPU, and on host {os.uname().nodename} the 2 GPUs (CUDA_VISIBLE_DEVICES is "
        f"'GPU-aa,GPU-bb') are leased by process {os.getpid()}: start no more workers there than its devices suffice "
        "for, or wait for the other jobs"
    )
    assert not second.held
    timer = threading.Timer(0.05, first.release)
    timer.start()
    assert second.lease(ENVIRONMENT, print, lambda: False, lambda: False)["CUDA_VISIBLE_DEVICES"] == "GPU-aa"
    timer.join()


def test_a_slot_takes_the_devices_of_one_that_has_nothing_to_do(slots: Callable[[float], SlotDevices]) -> None:
    idle, busy = slots(2), slots(1)
    idle.lease(ENVIRONMENT, print, None, lambda: False)

    def make_room() -> bool:
        held = idle.held
        idle.release()
        return held

    assert busy.lease(ENVIRONMENT, print, make_room, lambda: False)["CUDA_VISIBLE_DEVICES"] == "GPU-aa"


def test_nobody_waits_for_a_job_that_has_ended(slots: Callable[[float], SlotDevices]) -> None:
    first, second = slots(2), slots(1)
    first.lease(ENVIRONMENT, print, None, lambda: False)
    answers = iter([False, True])
    assert second.lease(ENVIRONMENT, print, lambda: False, lambda: next(answers)) == {}
    assert not second.held
