"""What the tests on real GPUs need: a driver, and PyTorch built for it. They fail without, and never skip."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest


@dataclass(frozen=True)
class Gpu:
    """A GPU, as ``nvidia-smi`` knows it."""

    index: str
    uuid: str
    memory: int  # bytes


@pytest.fixture(scope="session")
def gpus() -> list[Gpu]:
    """This machine's GPUs."""
    query = ["nvidia-smi", "--query-gpu=index,uuid,memory.total", "--format=csv,noheader,nounits"]
    try:
        asked = subprocess.run(query, capture_output=True, text=True, timeout=120, check=False)
    except OSError as error:
        pytest.fail(f"these tests need a machine with a GPU of NVIDIA's, and nvidia-smi cannot be run here: {error}")
    if asked.returncode:
        said = (asked.stdout + asked.stderr).strip()
        pytest.fail(f"these tests need a machine with a GPU of NVIDIA's, and nvidia-smi says: {said}")
    found = [[part.strip() for part in line.split(",")] for line in asked.stdout.splitlines() if line.strip()]
    code = "import torch; assert torch.cuda.is_available(), f'PyTorch {torch.__version__} finds no CUDA device'"
    torch = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)
    if torch.returncode:
        said = torch.stderr.strip().splitlines()[-1]
        pytest.fail(f"these tests need PyTorch with CUDA in {sys.prefix} (pip install torch), and there: {said}")
    return [Gpu(index, uuid, int(memory) * 1024**2) for index, uuid, memory in found]


@pytest.fixture(autouse=True)
def _whole_machine(gpus: list[Gpu], monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """The tests see all devices, whatever their caller has set."""
    for name in ("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("DASK_CORTEX_DASK__CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything here is marked ``gpu``, which is left out unless it is asked for."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.gpu)
