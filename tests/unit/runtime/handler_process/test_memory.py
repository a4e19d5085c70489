"""What says that memory has run out, or that a device is lost: the words of the libraries that say so."""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import dask
import pytest

import cortex_dask as cx
from cortex_dask.runtime.handler_process.memory import is_device_lost, is_out_of_memory, release_memory, resident
from tests.faults.jobs import ROOT


class OutOfMemoryError(RuntimeError):
    """As torch and CuPy call it."""


class ResourceExhaustedError(Exception):
    """As TensorFlow calls it."""


class _ArrayMemoryError(MemoryError):
    """As NumPy calls it."""


class Silent(Exception):  # noqa: N818
    def __str__(self) -> str:
        raise RuntimeError


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        _ArrayMemoryError("Unable to allocate 745. GiB for an array"),
        OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.10 GiB"),
        RuntimeError("CUDA out of memory. Tried to allocate 20.00 MiB (GPU 0; 15.78 GiB total capacity)"),
        RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
        RuntimeError("HIP out of memory. Tried to allocate 20.00 MiB"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        OutOfMemoryError("Out of memory allocating 8,589,934,592 bytes (allocated so far: 0 bytes)."),
        RuntimeError("cudaErrorMemoryAllocation: out of memory"),
        ResourceExhaustedError("OOM when allocating tensor with shape[64,112,112,64] and type float"),
        RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 34359738368 bytes."),
        RuntimeError("RESOURCE_EXHAUSTED: Failed to allocate request for 8.00GiB (8589934592B) on device ordinal 0"),
        Exception("[ONNXRuntimeError] : 1 : FAIL : Failed to allocate memory for requested buffer of size 8589934592"),
        Exception("[ONNXRuntimeError] : 1 : FAIL : CUDA failure 2: out of memory ; GPU=0 ; hostname=x"),
        Exception("[2] Call to cuMemAlloc results in CUDA_ERROR_OUT_OF_MEMORY"),
        MemoryError("std::bad_alloc: out_of_memory: CUDA error at: device_memory_resource.hpp"),
        RuntimeError("nrt_tensor_allocate status=4 message=Allocation Failure"),
    ],
    ids=lambda error: str(error)[:30],
)
def test_out_of_memory(error: Exception) -> None:
    assert is_out_of_memory(error)
    wrapped = ValueError("the model failed")
    wrapped.__cause__ = error
    assert is_out_of_memory(wrapped)
    assert not is_device_lost(error)


@pytest.mark.parametrize(
    "error",
    [
        ValueError("RESOURCE_EXHAUSTED: quota exceeded, try again later"),
        ValueError("the shop is out of memory sticks"),
        OSError(28, "No space left on device"),
        Silent(),
    ],
    ids=lambda error: type(error).__name__,
)
def test_other_errors_are_none(error: Exception) -> None:
    assert not is_out_of_memory(error)
    assert not is_device_lost(error)


def test_what_was_handled_meanwhile_is_no_cause() -> None:
    error = ValueError("something else went wrong")
    error.__context__ = MemoryError()
    assert not is_out_of_memory(error)


@pytest.mark.parametrize(
    "message",
    [
        "CUDA error: device-side assert triggered\nCUDA kernel errors might be asynchronously reported",
        "CUDA error: an illegal memory access was encountered",
        "CUDA error: unspecified launch failure",
        "cudaErrorIllegalAddress: an illegal memory access was encountered",
        "[700] Call to cuMemcpyDtoH results in CUDA_ERROR_ILLEGAL_ADDRESS",
        "CUDA error: uncorrectable ECC error encountered",
    ],
)
def test_a_device_that_is_lost(message: str) -> None:
    assert is_device_lost(RuntimeError(message))
    assert not is_out_of_memory(RuntimeError(message))


class _Cuda:
    """The part of ``torch.cuda`` that is used, as torch is not there."""

    def __init__(self, *, broken: bool = False) -> None:
        self.emptied = 0
        self._broken = broken

    def is_initialized(self) -> bool:
        return True

    def empty_cache(self) -> None:
        self.emptied += 1
        if self._broken:
            raise RuntimeError("CUDA error: device-side assert triggered")


@pytest.mark.parametrize("broken", [False, True])
def test_torchs_cache_is_emptied_where_torch_is_loaded(monkeypatch: pytest.MonkeyPatch, broken: bool) -> None:
    torch = ModuleType("torch")
    cuda = torch.cuda = _Cuda(broken=broken)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch", torch)
    release_memory()
    assert cuda.emptied == 1
    monkeypatch.delitem(sys.modules, "torch")
    release_memory()


def load() -> list[bytes]:
    """Leave blocks free that are too small for pages of their own, among some that live on: as loading a model does."""
    return [b"x" * (100_000 + number % 2) for number in range(1500)][::100]


class Loading:
    """A handler that tells what it has used no more since it was loaded."""

    def __init__(self, config):
        self.kept = load()
        self.loaded = resident()

    def handle_batch(self, payload):
        return [{"given_back": self.loaded - resident()}]


ON_GLIBC = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="others return what is freed by themselves")


@ON_GLIBC
def test_trim_gives_freed_memory_back() -> None:
    program = """
from cortex_dask.runtime.handler_process.memory import resident, trim
from tests.unit.runtime.handler_process.test_memory import load
kept, before = load(), resident()
trim()
print(before - resident() > 50_000_000)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert done.stdout == "True\n", done.stderr


@ON_GLIBC
def test_what_loading_a_model_took_is_given_back(tmp_path: Path) -> None:
    held = b"x" * 300_000_000  # the process that launches the handler's may be larger than that ever gets
    (tmp_path / "in.jsonl").write_text('{"x": 1}\n')
    with dask.config.set({"cortex-dask.store": str(tmp_path / "store")}):
        job = cx.run(
            Loading, tmp_path / "in.jsonl", tmp_path / "out", workers=1, batch_format="records", progress=False
        )
    assert job.to_arrow()["given_back"][0].as_py() > 50_000_000
    del held
