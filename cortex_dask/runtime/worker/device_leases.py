"""Leases of devices among all Dask workers of a host, so that no two of their slots are given the same one by mistake.

A lease is a small file that its holder keeps locked (``flock``). The kernel drops the lock when the last process that
holds it ends, however it ends: the Dask worker, and the handler process that inherits it and may outlive the worker
for a moment, with the device's memory still in use. Whoever looks for a device counts the locked files, and removes
the others. The files lie in the temporary directory and are named by the devices' keys; containers that share the
directory but not the devices have different keys.
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
_MUTEX = "leasing.lock"


@dataclass(slots=True)
class DeviceLease:
    """Some devices, or a share of one, until they are released.

    Attributes
    ----------
    devices : tuple of Device
        The devices.
    descriptors : tuple of int
        The locked files: a process that inherits them holds the lease as well.
    paths : tuple of Path
        Where those lie.
    """

    devices: tuple[Device, ...]
    descriptors: tuple[int, ...]
    paths: tuple[Path, ...]

    def release(self) -> None:
        """Give the devices back, also for those that have inherited the lease."""
        for path, descriptor in zip(self.paths, self.descriptors, strict=True):
            path.unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                fcntl.flock(descriptor, fcntl.LOCK_UN)
            os.close(descriptor)
        self.paths = self.descriptors = ()


def acquire(devices: Devices, amount: float, folder: Path | None = None) -> DeviceLease | None:
    """Lease devices; returns None when not so many are free at this moment.

    A slot that takes a share of a device joins its own worker's slots first, then takes a device that nobody uses, and
    only then one that other workers share: so a worker's share of the host stays together.

    Parameters
    ----------
    devices : Devices
        Those that this process may use.
    amount : float
        How many; 1/n: the n-th part of one.
    folder : Path, optional
        Where the leases of this host lie.

    Raises
    ------
    DeviceError
        If there are not so many.
    """
    count, slots = max(int(amount), 1), per_device(amount)
    if devices.found is not None and len(devices.found) < count:
        raise DeviceError(
            f"a worker of this job needs {amount:g} {devices.kind}{'s' if amount > 1 else ''}, and on host "
            f"{os.uname().nodename} there are {devices.describe()} for it"
        )
    root = folder or _folder()
    with _alone(root):
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
    """Return the devices to lease; with the host's mutex held."""
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
    """Return the share and the process of each lease of a device; those whose holders have ended are removed."""
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


def _folder() -> Path:
    """Return the folder of this host's leases: this user's own, as others could neither read nor remove them."""
    root = Path(tempfile.gettempdir(), f"cortex-dask-devices-{os.getuid()}")
    root.mkdir(mode=0o700, exist_ok=True)
    if root.is_symlink() or root.stat().st_uid != os.getuid():
        raise DeviceError(f"{root} belongs to somebody else: remove it, or set TMPDIR to a folder of your own")
    return root


def _stem(device: Device) -> str:
    return device.key.replace("/", "-")


@contextlib.contextmanager
def _alone(root: Path) -> Iterator[None]:
    """Be the only one on this host that looks for devices."""
    root.mkdir(exist_ok=True)
    descriptor = os.open(root / _MUTEX, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


class SlotDevices:
    """The devices of one slot: leased before its first process starts, and kept until nobody uses the slot any more.

    Parameters
    ----------
    compute : ComputeSettings
        Says what the slot needs.
    """

    def __init__(self, compute: ComputeSettings) -> None:
        self._compute = compute
        self._leases: list[DeviceLease] = []
        self._variables: dict[str, str] = {}

    @property
    def descriptors(self) -> tuple[int, ...]:
        """What the slot's process inherits, so that the devices are its own until it has ended."""
        return tuple(descriptor for lease in self._leases for descriptor in lease.descriptors)

    @property
    def held(self) -> bool:
        """Whether anything is leased."""
        return bool(self._leases)

    def obtain(
        self,
        environment: Mapping[str, str],
        log: Callable[[str, str], None],
        make_room: Callable[[], bool] | None,
        abandoned: Callable[[], bool],
    ) -> dict[str, str]:
        """Return the variables that show the slot's devices to its process; leases them if that was not done yet.

        Parameters
        ----------
        environment : mapping
            The worker's.
        log : callable
            Takes a level and a message.
        make_room : callable, optional
            Ends a process of this worker that has nothing to do, and returns whether there was one. None: do not wait
            for devices either.
        abandoned : callable
            Whether nobody needs the devices any more; then nothing is returned and nothing is leased.

        Raises
        ------
        DeviceError
            If there are too few, or the others do not give them back.
        """
        if self._leases or abandoned():
            return self._variables
        variables: dict[str, str] = {}
        try:
            for devices, amount in needed(self._compute, environment):
                lease = _wait_for(devices, amount, make_room, abandoned)
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
    devices: Devices, amount: float, make_room: Callable[[], bool] | None, abandoned: Callable[[], bool]
) -> DeviceLease | None:
    """Lease devices as soon as they are free; None when nobody needs them any more."""
    deadline = time.monotonic() + WAIT_SECONDS
    while True:
        lease = acquire(devices, amount)
        if lease is not None:
            return lease
        if make_room is not None and make_room():
            continue
        if abandoned():
            return None
        if make_room is None or time.monotonic() > deadline:
            raise DeviceError(_taken(devices, amount))
        time.sleep(_POLL)


def _taken(devices: Devices, amount: float) -> str:
    root = _folder()
    with _alone(root):  # or a lease that is just being made would be taken for one whose holder has ended
        pids = {pid for device in devices.found or () for _, pid in _holders(root, device)}
    who = f"process {pids.pop()}" if len(pids) == 1 else f"processes {', '.join(map(str, sorted(pids)))}"
    return (
        f"a worker of this job needs {amount:g} {devices.kind}{'s' if amount > 1 else ''}, and on host "
        f"{os.uname().nodename} the {devices.describe()} are leased by {who}: start no more workers there than its "
        "devices suffice for, or wait for the other jobs"
    )
