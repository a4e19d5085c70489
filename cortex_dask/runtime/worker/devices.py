"""The accelerators that a worker may use: finding them, naming them, and showing some of them to a process.

A GPU is known by a *name*, which goes into the variable that a handler's libraries read, and by a *key*, under which
all workers of a host know the same device: its UUID where that can be found out, since a container, a batch system or
a cgroup may number devices anew.
"""

from __future__ import annotations

import functools
import os
import re
import socket
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cortex_dask.errors import CortexDaskError, SpecError
from cortex_dask.io.job.settings import ComputeSettings

HOST_ROOT = Path("/")  # of /proc, /sys and /dev

_SMI_SECONDS = 60.0  # the driver may take several seconds for each device where nobody keeps it loaded
#: Where nvidia-smi lies when the search path does not have it: drivers that a node mounts into containers, WSL.
NVIDIA_SMI_PLACES = (
    "nvidia-smi",
    "/usr/bin/nvidia-smi",
    "/usr/local/nvidia/bin/nvidia-smi",
    "/usr/lib/wsl/lib/nvidia-smi",
)

#: ``GPU 0: NVIDIA A100 (UUID: GPU-…)`` and, indented below it, ``MIG 1g.5gb Device 0: (UUID: MIG-…)``.
_SMI_GPU = re.compile(r"GPU (\d+):.*\(UUID: (GPU-[^)\s]+)\)")
_SMI_MIG = re.compile(r"\s+MIG .*\(UUID: (MIG-[^)]+)\)")
#: What CUDA takes for a device; the first that is none ends the list.
_CUDA_NAME = re.compile(r"\d+|GPU-[0-9A-Za-z-]+|MIG-[0-9A-Za-z/-]+")


class DeviceError(CortexDaskError):
    """A slot needs more devices than its worker's host has, or has free."""


@dataclass(frozen=True, slots=True)
class Device:
    """One device."""

    name: str  # in the environment variable
    key: str  # the same for all workers of a host


@dataclass(frozen=True, slots=True)
class Devices:
    """The devices of one kind that this process may use."""

    kind: Literal["GPU", "Neuron device"]
    variable: str  # the environment variable that shows some of them to a process
    found: tuple[Device, ...] | None  # None: unknown, so they are counted from 0 as slots ask for them
    where: str  # the source of this knowledge, for messages

    def counted(self, number: int) -> Device:
        """Return the device with this number, of which nothing else is known."""
        return Device(str(number), f"{socket.gethostname()}-{number}")

    def environment(self, chosen: Sequence[Device]) -> dict[str, str]:
        """Return the variables that show exactly these devices to a process."""
        names = ",".join(device.name for device in chosen)
        if self.variable == "NEURON_RT_VISIBLE_CORES":
            return {self.variable: _ranges(_cores(names))}
        shown = {self.variable: names}
        if self.variable == "CUDA_VISIBLE_DEVICES":
            # Numbers mean the same as in nvidia-smi, unless the user has chosen another order.
            shown["CUDA_DEVICE_ORDER"] = os.environ.get("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
        return shown

    def describe(self) -> str:
        """Return the number of devices and how it is known, for messages."""
        number = len(self.found or ())
        return f"{number or 'no'} {self.kind}{'' if number == 1 else 's'} ({self.where})"


def per_device(gpu: float) -> int:
    """Return how many slots share a device: 1 for ``gpu: 1`` and more, 2 for 0.5."""
    return max(round(1 / gpu), 1) if 0 < gpu < 1 else 1


def capacity(compute: ComputeSettings, environment: Mapping[str, str] | None = None) -> int | None:
    """Return how many slots this machine's devices suffice for; None if that is not limited or not known."""
    most: list[int] = []
    for devices, amount in needed(compute, os.environ if environment is None else environment):
        if devices.found is not None:
            most.append(len(devices.found) * per_device(amount) // max(int(amount), 1))
    return min(most, default=None)


def check_slots(compute: ComputeSettings, slots: int, environment: Mapping[str, str] | None = None) -> None:
    """Raise :class:`SpecError` if this machine's devices do not suffice for so many slots."""
    for devices, amount in needed(compute, os.environ if environment is None else environment):
        if devices.found is None:
            continue
        most = len(devices.found) * per_device(amount) // max(int(amount), 1)
        if most >= slots:
            continue
        key = "gpu" if devices.kind == "GPU" else "inf"
        found = f"found {slots} with compute.{key}: {amount:.3g}; this machine has {devices.describe()}, enough for"
        advice = f"say workers: {most}" if most else f"run it where there are more, or change compute.{key}"
        if most and key == "gpu":
            share = 1 / -(-slots // len(devices.found))
            advice += f", or compute.gpu: {share:.3g}, so that workers share a device"
        raise SpecError(f"workers: {found} {most or 'none'}: {advice}")


def needed(compute: ComputeSettings, environment: Mapping[str, str]) -> list[tuple[Devices, float]]:
    """Return the kinds of devices that a slot needs, each with the number of them."""
    kinds: list[tuple[Devices, float]] = []
    if compute.gpu > 0:
        kinds.append((find_gpus(environment), compute.gpu))
    if compute.inf > 0 and (neuron := find_neuron(environment)) is not None:
        kinds.append((neuron, float(compute.inf)))
    return kinds


# GPUs ---------------------------------------------------------------------------------------------------------------


def find_gpus(environment: Mapping[str, str]) -> Devices:
    """Return the GPUs that a process with this environment may use.

    The first of these that names devices decides: the environment (``CUDA_VISIBLE_DEVICES``, ``HIP_VISIBLE_DEVICES``,
    ``ROCR_VISIBLE_DEVICES``), NVIDIA's driver (``nvidia-smi``, ``/proc/driver/nvidia/gpus``), the container's runtime
    (``NVIDIA_VISIBLE_DEVICES``), AMD's driver.
    """
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return _named_by_cuda(visible, environment)
    for variable in ("HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES"):
        if variable in environment:
            return _named_by_rocm(variable, environment)
    known = _nvidia()
    if known is not None:
        listed, where = known
        mig = any(name.startswith("MIG-") for name, _ in listed)  # these have no numbers of their own
        found = tuple(Device(uuid if mig else name, uuid) for name, uuid in listed)
        return Devices("GPU", "CUDA_VISIBLE_DEVICES", found, where)
    given = environment.get("NVIDIA_VISIBLE_DEVICES", "all")
    if given not in ("all", ""):
        return _given_to_container(given)
    amd = _amd()
    if amd:
        return Devices("GPU", "ROCR_VISIBLE_DEVICES", tuple(amd), "AMD's driver")
    return Devices("GPU", "CUDA_VISIBLE_DEVICES", None, "nothing here says which there are")


def _named_by_cuda(visible: str, environment: Mapping[str, str]) -> Devices:
    names: list[str] = []
    for part in visible.split(","):
        name = part.strip()
        if not _CUDA_NAME.fullmatch(name) or name in names:
            break
        names.append(name)
    uuids: dict[str, str] = {}
    # Numbers that are sorted by speed are not those of the driver.
    if names and environment.get("CUDA_DEVICE_ORDER", "PCI_BUS_ID") == "PCI_BUS_ID":
        uuids = dict((_nvidia() or ([], ""))[0])
    found = tuple(Device(name, _key(name, uuids)) for name in names)
    return Devices("GPU", "CUDA_VISIBLE_DEVICES", found, f"CUDA_VISIBLE_DEVICES is {visible!r}")


def _key(name: str, uuids: Mapping[str, str]) -> str:
    if name.isdigit():
        return uuids.get(name, f"{socket.gethostname()}-{name}")
    whole = [uuid for uuid in uuids.values() if uuid.startswith(name)]  # CUDA takes the first part of a UUID as well
    return whole[0] if len(whole) == 1 else name


def _given_to_container(given: str) -> Devices:
    """Return the devices that the container's runtime shows, which it numbers anew from 0."""
    names = [] if given in ("none", "void") else [name.strip() for name in given.split(",") if name.strip()]
    are_uuids = all(name.startswith(("GPU-", "MIG-")) for name in names)
    host = socket.gethostname()
    found = tuple(
        Device(name, name) if are_uuids else Device(str(number), f"{host}-{number}")
        for number, name in enumerate(names)
    )
    return Devices("GPU", "CUDA_VISIBLE_DEVICES", found, f"NVIDIA_VISIBLE_DEVICES is {given!r}")


def _nvidia() -> tuple[list[tuple[str, str]], str] | None:
    """Return the driver's devices as pairs of name and UUID, and their source; None where there is no driver."""
    listed = list_with_nvidia_smi()
    if listed:
        return listed, "nvidia-smi -L"
    listed = []
    for place in sorted((HOST_ROOT / "proc/driver/nvidia/gpus").glob("*/information")):  # by bus address
        try:
            text = place.read_text()
        except OSError:
            continue
        uuid = re.search(r"^GPU UUID:\s*(GPU-\S+)", text, re.MULTILINE)
        minor = re.search(r"^Device Minor:\s*(\d+)", text, re.MULTILINE)
        # A container may see the entries of devices that it was not given.
        if uuid and minor and (HOST_ROOT / f"dev/nvidia{minor[1]}").exists():
            listed.append((str(len(listed)), uuid[1]))
    return (listed, "/proc/driver/nvidia/gpus") if listed else None


@functools.cache
def list_with_nvidia_smi() -> list[tuple[str, str]] | None:
    """Return the devices that nvidia-smi lists, asked once in this process; None where it does not work."""
    for program in NVIDIA_SMI_PLACES:
        try:
            asked = subprocess.run(
                [program, "-L"], stdin=subprocess.DEVNULL, capture_output=True, timeout=_SMI_SECONDS, check=False
            )
        except (OSError, subprocess.TimeoutExpired):
            continue
        if asked.returncode == 0:
            return read_smi(asked.stdout.decode(errors="replace"))
    return None


def read_smi(text: str) -> list[tuple[str, str]]:
    """Return the devices that ``nvidia-smi -L`` lists, as pairs of name and UUID; a divided GPU is its parts."""
    listed: list[tuple[str, str]] = []
    whole: tuple[str, str] | None = None  # a GPU that has no parts, so far
    for line in text.splitlines():
        if gpu := _SMI_GPU.match(line):
            listed += [whole] if whole else []
            whole = (gpu[1], gpu[2])
        elif mig := _SMI_MIG.match(line):
            whole = None
            listed.append((mig[1], mig[1]))
    return [*listed, *([whole] if whole else [])]


# AMD ----------------------------------------------------------------------------------------------------------------


def _named_by_rocm(variable: str, environment: Mapping[str, str]) -> Devices:
    """Return the devices that ROCm's variables name; HIP counts among the devices that ROCR shows."""
    names = _until_negative(environment[variable])
    lower = _until_negative(environment["ROCR_VISIBLE_DEVICES"]) if "ROCR_VISIBLE_DEVICES" in environment else None
    found: list[Device] = []
    for name in names:
        real = name
        if variable == "HIP_VISIBLE_DEVICES" and lower is not None:
            if not name.isdigit() or int(name) >= len(lower):
                break
            real = lower[int(name)]
        found.append(Device(name, f"{socket.gethostname()}-{real}" if real.isdigit() else real))
    return Devices("GPU", variable, tuple(found), f"{variable} is {environment[variable]!r}")


def _until_negative(value: str) -> list[str]:
    names: list[str] = []
    for name in (part.strip() for part in value.split(",")):
        if not name or name.startswith("-"):
            break
        names.append(name)
    return names


def _amd() -> list[Device]:
    """Return AMD's GPUs from the topology that the kernel shows, as far as this process may open them."""
    places = (HOST_ROOT / "sys/class/kfd/kfd/topology/nodes").glob("*/properties")
    found: list[Device] = []
    for place in sorted(places, key=lambda place: int(place.parent.name) if place.parent.name.isdigit() else 0):
        try:
            properties = dict(line.split(maxsplit=1) for line in place.read_text().splitlines() if " " in line)
        except OSError:
            continue
        if int(properties.get("simd_count", 0)) == 0:
            continue  # a processor
        if not (HOST_ROOT / f"dev/dri/renderD{properties.get('drm_render_minor', '').strip()}").exists():
            continue
        number, unique = len(found), int(properties.get("unique_id", 0))
        key = f"GPU-{unique:016x}" if unique else f"{socket.gethostname()}-{number}"
        found.append(Device(str(number), key))
    return found


# AWS Neuron -----------------------------------------------------------------------------------------------------------


def find_neuron(environment: Mapping[str, str]) -> Devices | None:
    """Return the AWS Neuron devices that a process may use, each named by its cores; None where there are none.

    ``NEURON_RT_VISIBLE_CORES`` takes numbers of cores, a device has 2 to 8 of them, and a core belongs to one process.
    """
    chips = list((HOST_ROOT / "dev").glob("neuron[0-9]*"))
    counts = [*(HOST_ROOT / "sys/devices/virtual/neuron_device").glob("neuron*/core_count")]
    if not chips or not counts:
        return None
    try:
        cores = int(counts[0].read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return None
    said = environment.get("NEURON_RT_VISIBLE_CORES")
    numbers = _cores(said) if said else list(range(len(chips) * cores))
    groups = [numbers[start : start + cores] for start in range(0, len(numbers) - cores + 1, cores)]
    host = socket.gethostname()
    found = tuple(Device(_ranges(group), f"{host}-neuron-{group[0] // cores}") for group in groups)
    where = f"NEURON_RT_VISIBLE_CORES is {said!r}" if said else f"{len(chips)} of /dev/neuron*, {cores} cores each"
    return Devices("Neuron device", "NEURON_RT_VISIBLE_CORES", found, where)


def _cores(text: str) -> list[int]:
    numbers: list[int] = []
    for part in text.split(","):
        first, _, last = part.strip().partition("-")
        if first.isdigit() and (last or first).isdigit():
            numbers += range(int(first), int(last or first) + 1)
    return numbers


def _ranges(numbers: Sequence[int]) -> str:
    """Return numbers as inclusive ranges, as the variable takes them: ``0-3,8-11``."""
    spans: list[list[int]] = []
    for number in sorted(numbers):
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ",".join(f"{first}-{last}" if last > first else str(first) for first, last in spans)
