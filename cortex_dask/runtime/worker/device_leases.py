"""Leases of devices: no two slots of a host's Dask workers are given the same device by mistake.

A lease is a small file that its holder keeps locked (``flock``). The kernel drops the lock when the last process that
holds it ends, however it ends: the Dask worker, and the handler process that inherits it and may outlive the worker
for a moment, with the device's memory still in use. A worker that looks for a device counts the locked files and
removes the others. The files lie in the temporary directory and are named by the devices' keys; containers that share
the directory but not the devices have different keys.
"""

from __future__ import annotations

import contextlib
import fcntl
import glob
import itertools
import os
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from cortex_dask.io.job.settings import ComputeSettings
from cortex_dask.runtime.worker.devices import Device, DeviceError, Devices, needed, per_device

#: Seconds that a slot waits for devices that others hold: their processes may just be ending. Longer would hide that
#: there are more slots than the devices suffice for.
WAIT_SECONDS = 60.0
_POLL = 0.2
_LOCK_FILE = "leasing.lock"


@dataclass(slots=True)
class DeviceLease:
    """Some devices, or a share of one, until they are released."""

    devices: tuple[Device, ...]
    descriptors: tuple[int, ...]  # of the locked files: a process that inherits them holds the lease as well
    paths: tuple[Path, ...]  # of the locked files

    def release(self) -> None:
        """Give the devices back, also for processes that have inherited the lease."""
        for path, descriptor in zip(self.paths, self.descriptors, strict=True):
            path.unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                fcntl.flock(descriptor, fcntl.LOCK_UN)
            os.close(descriptor)
        self.paths = self.descriptors = ()


def acquire(devices: Devices, amount: float, folder: Path | None = None) -> DeviceLease | None:
    """Lease devices, or the n-th part of one for 1/n; returns None if too few are free at this moment.

    A slot that takes a share of a device prefers one that its own worker shares, then a free one, then one that other
    workers share: so a worker's share of the host stays together. Raises :class:`DeviceError` if there are too few.
    """
    count, slots = max(int(amount), 1), per_device(amount)
    if devices.found is not None and len(devices.found) < count:
        raise DeviceError(
            f"a worker of this job needs {amount:g} {devices.kind}{'s' if amount > 1 else ''}, and on host "
            f"{os.uname().nodename} there are {devices.describe()} for it"
        )
    root = folder or leases_folder()
    with _host_lock(root):
        chosen = _choose(root, devices, count, Fraction(1, slots))
        if chosen is None:
            return None
        paths: list[Path] = []
        descriptors: list[int] = []
        for device in chosen:
            path = root / f"{_stem(device)}@{slots}@{os.getpid()}@{uuid.uuid4().hex}"
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            paths.append(path)
            descriptors.append(descriptor)
    return DeviceLease(tuple(chosen), tuple(descriptors), tuple(paths))


def _choose(root: Path, devices: Devices, count: int, share: Fraction) -> list[Device] | None:
    """Return the devices to lease, or None; called with the host's lock held."""
    ranked: list[tuple[int, Device]] = []
    mine = os.getpid()
    for device in devices.found if devices.found is not None else _counted(devices):
        holders = _holders(root, device)
        used = sum((part for part, _ in holders), Fraction(0))
        if used + share > 1:
            continue
        rank = 1 if not holders else 0 if all(pid == mine for _, pid in holders) else 2
        ranked.append((rank, device))
        if devices.found is None and sum(rank == 1 for rank, _ in ranked) == count:
            break  # there is no end to them
    if len(ranked) < count:
        return None
    ranked.sort(key=lambda item: item[0])
    return [device for _, device in ranked[:count]]


def _counted(devices: Devices) -> Iterator[Device]:
    return (devices.counted(number) for number in itertools.count())


def _holders(root: Path, device: Device) -> list[tuple[Fraction, int]]:
    """Return the share and the process of each lease of a device, and remove leases whose holders have ended."""
    holders: list[tuple[Fraction, int]] = []
    for path in root.glob(f"{glob.escape(_stem(device))}@*"):
        slots, pid, _ = path.name.rsplit("@", 3)[1:]
        try:
            descriptor = os.open(path, os.O_RDWR)
        except FileNotFoundError:
            continue  # just released
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holders.append((Fraction(1, int(slots)), int(pid)))
        else:
            path.unlink(missing_ok=True)
        finally:
            os.close(descriptor)
    return holders


def leases_folder() -> Path:
    """Return the folder of this user's leases on this host; other users could neither read nor remove them."""
    root = Path(tempfile.gettempdir(), f"cortex-dask-devices-{os.getuid()}")
    root.mkdir(mode=0o700, exist_ok=True)
    if root.is_symlink() or root.stat().st_uid != os.getuid():
        raise DeviceError(f"{root} belongs to somebody else: remove it, or set TMPDIR to a folder of your own")
    return root


def _stem(device: Device) -> str:
    return device.key.replace("/", "-")


@contextlib.contextmanager
def _host_lock(root: Path) -> Iterator[None]:
    """Hold the lock under which leases on this host are made and counted."""
    root.mkdir(exist_ok=True)
    descriptor = os.open(root / _LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


class SlotDevices:
    """The devices of one slot: leased before its first process starts, and kept while the slot is in use."""

    def __init__(self, compute: ComputeSettings) -> None:
        self._compute = compute
        self._leases: list[DeviceLease] = []
        self._variables: dict[str, str] = {}

    @property
    def descriptors(self) -> tuple[int, ...]:
        """The descriptors that the slot's process inherits, so that the devices are leased until it has ended."""
        return tuple(descriptor for lease in self._leases for descriptor in lease.descriptors)

    @property
    def held(self) -> bool:
        """Whether devices are leased."""
        return bool(self._leases)

    def lease(
        self,
        environment: Mapping[str, str],
        log: Callable[[str, str], None],
        make_room: Callable[[], bool] | None,
        is_cancelled: Callable[[], bool],
    ) -> dict[str, str]:
        """Lease the slot's devices, unless they are, and return the variables that show them to its process.

        ``environment`` is the worker's. ``make_room`` ends an idle process of this worker and returns whether there was
        one; without it, nothing waits for devices. Nothing is leased once ``is_cancelled``. Raises
        :class:`DeviceError` if there are too few devices, or they do not become free.
        """
        if self._leases or is_cancelled():
            return self._variables
        variables: dict[str, str] = {}
        try:
            for devices, amount in needed(self._compute, environment):
                lease = _wait_for(devices, amount, make_room, is_cancelled)
                if lease is None:
                    self.release()
                    return {}
                self._leases.append(lease)
                variables.update(devices.environment(lease.devices))
                names = ", ".join(device.name for device in lease.devices)
                log("INFO", f"this worker's {devices.kind}{'s' if len(lease.devices) > 1 else ''}: {names}")
                if devices.found is None:
                    log(
                        "WARNING",
                        f"nothing on this host says which {devices.kind}s there are, so they are counted; if there "
                        f"are any, set {devices.variable} for the Dask worker",
                    )
        except BaseException:
            self.release()
            raise
        self._variables = variables
        return variables

    def release(self) -> None:
        """Give the devices back."""
        for lease in self._leases:
            lease.release()
        self._leases, self._variables = [], {}


def _wait_for(
    devices: Devices, amount: float, make_room: Callable[[], bool] | None, is_cancelled: Callable[[], bool]
) -> DeviceLease | None:
    """Lease devices as soon as they are free; returns None once the wait is cancelled."""
    deadline = time.monotonic() + WAIT_SECONDS
    while True:
        lease = acquire(devices, amount)
        if lease is not None:
            return lease
        if make_room is not None and make_room():
            continue
        if is_cancelled():
            return None
        if make_room is None or time.monotonic() > deadline:
            raise DeviceError(_describe_holders(devices, amount))
        time.sleep(_POLL)


def _describe_holders(devices: Devices, amount: float) -> str:
    root = leases_folder()
    with _host_lock(root):  # a lease that is just being made looks like one whose holder has ended
        pids = {pid for device in devices.found or () for _, pid in _holders(root, device)}
    who = f"process {pids.pop()}" if len(pids) == 1 else f"processes {', '.join(map(str, sorted(pids)))}"
    return (
        f"a worker of this job needs {amount:g} {devices.kind}{'s' if amount > 1 else ''}, and on host "
        f"{os.uname().nodename} the {devices.describe()} are leased by {who}: start no more workers there than its "
        "devices suffice for, or wait for the other jobs"
    )
