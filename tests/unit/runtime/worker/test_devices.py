"""Which devices a worker may use: what the environment, the driver and a container's runtime say."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from cortex_dask.errors import SpecError
from cortex_dask.io.job.settings import ComputeSettings
from cortex_dask.runtime.worker import devices
from cortex_dask.runtime.worker.devices import Device, capacity, check_slots, find_gpus, find_neuron

HOST = socket.gethostname()
A, B, C = (f"GPU-{letter * 8}-1111-2222-3333-444444444444" for letter in "abc")
SMI = f"GPU 0: NVIDIA H100 80GB HBM3 (UUID: {A})\nGPU 1: NVIDIA H100 80GB HBM3 (UUID: {B})\n"
SMI_MIG = (
    f"GPU 0: NVIDIA A100-SXM4-40GB (UUID: {A})\n"
    "  MIG 3g.20gb     Device  0: (UUID: MIG-11111111-aaaa)\n"
    "  MIG 1g.5gb      Device  1: (UUID: MIG-22222222-bbbb)\n"
    f"GPU 1: NVIDIA A100-SXM4-40GB (UUID: {B})\n"
)


@pytest.fixture(autouse=True)
def smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A real program of the name nvidia-smi, which at first fails as it does without a driver."""
    program = tmp_path / "bin" / "nvidia-smi"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\necho 'NVIDIA-SMI has failed'; exit 9\n")
    program.chmod(0o755)
    monkeypatch.setattr(devices, "NVIDIA_SMI_PLACES", (str(program),))
    devices.list_with_nvidia_smi.cache_clear()
    yield program
    devices.list_with_nvidia_smi.cache_clear()


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty /proc, /sys and /dev."""
    place = tmp_path / "root"
    place.mkdir()
    monkeypatch.setattr(devices, "HOST_ROOT", place)
    return place


def lists(program: Path, text: str) -> None:
    program.write_text(f"#!/bin/sh\ntest \"$*\" = -L || exit 1\ncat <<'END'\n{text}END\n")


def names(environment: dict[str, str]) -> list[str] | None:
    found = find_gpus(environment).found
    return None if found is None else [device.name for device in found]


def keys(environment: dict[str, str]) -> list[str]:
    return [device.key for device in find_gpus(environment).found or ()]


# NVIDIA -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("visible", "found"),
    [
        ("0,1", ["0", "1"]),
        (" 2 , 0 ", ["2", "0"]),
        ("", []),
        ("-1", []),
        ("1,-1,0", ["1"]),  # CUDA sees those before the first that is none
        ("NoDevFiles", []),
        (f"{A},{B}", [A, B]),
        ("MIG-GPU-1/2/0,MIG-33", ["MIG-GPU-1/2/0", "MIG-33"]),
        ("0,0", ["0"]),
    ],
)
def test_cuda_visible_devices_says_which_there_are(visible: str, found: list[str]) -> None:
    assert names({"CUDA_VISIBLE_DEVICES": visible}) == found


def test_the_driver_says_which_there_are(smi: Path) -> None:
    lists(smi, SMI)
    found = find_gpus({})
    assert found.found == (Device("0", A), Device("1", B))
    assert found.describe() == "2 GPUs (nvidia-smi -L)"


def test_numbers_and_uuids_of_one_device_have_one_key(smi: Path) -> None:
    lists(smi, SMI)
    assert keys({"CUDA_VISIBLE_DEVICES": "1,0"}) == [B, A]
    assert keys({"CUDA_VISIBLE_DEVICES": B}) == [B]
    assert keys({"CUDA_VISIBLE_DEVICES": B[:12]}) == [B]
    # sorted by speed, numbers may be those of other devices
    assert keys({"CUDA_VISIBLE_DEVICES": "1", "CUDA_DEVICE_ORDER": "FASTEST_FIRST"}) == [f"{HOST}-1"]


def test_a_divided_gpu_is_its_parts(smi: Path) -> None:
    lists(smi, SMI_MIG)
    assert names({}) == ["MIG-11111111-aaaa", "MIG-22222222-bbbb", B]


def test_without_nvidia_smi_the_driver_is_read(root: Path) -> None:
    for minor, (address, uuid) in enumerate([("0000:3b:00.0", B), ("0000:1a:00.0", A), ("0000:5e:00.0", C)]):
        place = root / "proc/driver/nvidia/gpus" / address
        place.mkdir(parents=True)
        (place / "information").write_text(f"Model: \t NVIDIA T4\nGPU UUID: \t {uuid}\nDevice Minor: \t {minor}\n")
    (root / "dev").mkdir()
    (root / "dev/nvidia0").touch()
    (root / "dev/nvidia1").touch()  # and not nvidia2: it was not given to this container
    assert find_gpus({}).found == (Device("0", A), Device("1", B))


@pytest.mark.parametrize(
    ("given", "found"),
    [("0", ["0"]), ("2,3", ["0", "1"]), (f"{C},{A}", [C, A]), ("none", []), ("void", []), ("all", None), ("", None)],
)
def test_a_container_without_a_driver_to_ask(given: str, found: list[str] | None) -> None:
    assert names({"NVIDIA_VISIBLE_DEVICES": given}) == found


def test_the_driver_knows_better_than_the_image(smi: Path) -> None:
    # Images of NVIDIA say "all" everywhere; lists number the host's devices, and the container's begin at 0.
    lists(smi, SMI)
    assert keys({"NVIDIA_VISIBLE_DEVICES": "6,7"}) == [A, B]


def test_where_nothing_is_known_devices_are_counted() -> None:
    found = find_gpus({})
    assert found.found is None
    assert found.counted(3) == Device("3", f"{HOST}-3")


def test_the_variables_of_a_slot(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_DEVICE_ORDER", raising=False)
    found = find_gpus({"CUDA_VISIBLE_DEVICES": "4,5"})
    assert found.found is not None
    shown = found.environment(found.found)
    assert shown == {"CUDA_VISIBLE_DEVICES": "4,5", "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
    monkeypatch.setenv("CUDA_DEVICE_ORDER", "FASTEST_FIRST")
    assert found.environment(found.found[1:]) == {
        "CUDA_VISIBLE_DEVICES": "5",
        "CUDA_DEVICE_ORDER": "FASTEST_FIRST",
    }


# AMD ----------------------------------------------------------------------------------------------------------------


def test_rocm() -> None:
    found = find_gpus({"ROCR_VISIBLE_DEVICES": "2,GPU-00ff"})
    assert found.found == (Device("2", f"{HOST}-2"), Device("GPU-00ff", "GPU-00ff"))
    assert found.environment(found.found) == {"ROCR_VISIBLE_DEVICES": "2,GPU-00ff"}
    # HIP counts among those that ROCR shows
    both = find_gpus({"ROCR_VISIBLE_DEVICES": "2,3", "HIP_VISIBLE_DEVICES": "1"})
    assert (both.variable, both.found) == ("HIP_VISIBLE_DEVICES", (Device("1", f"{HOST}-3"),))
    assert find_gpus({"HIP_VISIBLE_DEVICES": "-1"}).found == ()


def test_the_topology_of_amds_driver(root: Path) -> None:
    nodes = root / "sys/class/kfd/kfd/topology/nodes"
    for node, text in enumerate(
        [
            "cpu_cores_count 64\nsimd_count 0\nunique_id 0\n",
            "simd_count 304\ndrm_render_minor 128\nunique_id 255\n",
            "simd_count 304\ndrm_render_minor 129\nunique_id 256\n",
        ]
    ):
        (nodes / str(node)).mkdir(parents=True)
        (nodes / str(node) / "properties").write_text(text)
    (root / "dev/dri").mkdir(parents=True)
    (root / "dev/dri/renderD129").touch()
    found = find_gpus({})
    assert (found.variable, found.found) == ("ROCR_VISIBLE_DEVICES", (Device("0", "GPU-0000000000000100"),))


# AWS Neuron -----------------------------------------------------------------------------------------------------------


def test_neuron_devices_are_named_by_their_cores(root: Path) -> None:
    assert find_neuron({}) is None
    (root / "dev").mkdir()
    for number in range(3):
        (root / f"dev/neuron{number}").touch()
        place = root / f"sys/devices/virtual/neuron_device/neuron{number}"
        place.mkdir(parents=True)
        (place / "core_count").write_text("2\n")
    found = find_neuron({})
    assert found is not None
    assert found.found is not None
    assert [device.name for device in found.found] == ["0-1", "2-3", "4-5"]
    assert found.environment(found.found[1:]) == {"NEURON_RT_VISIBLE_CORES": "2-5"}
    part = find_neuron({"NEURON_RT_VISIBLE_CORES": "2-5"})
    assert part is not None
    assert part.found == found.found[1:]


# how many slots they suffice for ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("gpu", "slots"), [(1, 3), (0.5, 6), (1 / 3, 9), (2, 1), (4, 0)])
def test_capacity(gpu: float, slots: int) -> None:
    compute = ComputeSettings(gpu=gpu)
    environment = {"CUDA_VISIBLE_DEVICES": "0,1,2"}
    assert capacity(compute, environment) == slots
    if slots:
        check_slots(compute, slots, environment)
    with pytest.raises(SpecError, match="workers: "):
        check_slots(compute, slots + 1, environment)


def test_too_many_slots_are_one_sentence() -> None:
    with pytest.raises(SpecError) as caught:
        check_slots(ComputeSettings(gpu=1), 4, {"CUDA_VISIBLE_DEVICES": "0,1"})
    assert str(caught.value) == (
        "workers: found 4 with compute.gpu: 1; this machine has 2 GPUs (CUDA_VISIBLE_DEVICES is '0,1'), enough for 2: "
        "say workers: 2, or compute.gpu: 0.5, so that workers share a device"
    )
    with pytest.raises(SpecError) as caught:
        check_slots(ComputeSettings(gpu=1), 1, {"CUDA_VISIBLE_DEVICES": ""})
    assert str(caught.value) == (
        "workers: found 1 with compute.gpu: 1; this machine has no GPUs (CUDA_VISIBLE_DEVICES is ''), enough for none: "
        "run it where there are more, or change compute.gpu"
    )


def test_counted_devices_are_no_limit_and_none_are_needed_without_gpu() -> None:
    assert capacity(ComputeSettings(gpu=1), {}) is None
    check_slots(ComputeSettings(gpu=1), 100, {})
    assert capacity(ComputeSettings(), {"CUDA_VISIBLE_DEVICES": ""}) is None
    check_slots(ComputeSettings(), 100, {"CUDA_VISIBLE_DEVICES": ""})
