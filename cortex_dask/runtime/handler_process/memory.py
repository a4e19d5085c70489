"""Memory that runs out inside a handler, on the host or on a device: what says so, and what can be given back."""

from __future__ import annotations

import contextlib
import gc
import os
import re
import sys

#: What torch, CuPy, TensorFlow, RMM and Numba raise when a device is out of memory; few derive from MemoryError.
_CLASSES = frozenset({"OutOfMemoryError", "ResourceExhaustedError", "CudaAPIMemoryError"})
#: What the others say, in an exception of some general class, with the names of the error in CUDA's two interfaces, in
#: HIP and in the libraries on top of them. JAX and a TensorFlow server say RESOURCE_EXHAUSTED, as does every server
#: that has had too many requests, so a word of memory has to be with it.
_MESSAGES = re.compile(
    r"""(CUDA|HIP|ROCm|GPU|XPU|MPS\ backend|device)(\ error:|\ failure\ 2:)?\ out\ of\ memory
    | CUDA_ERROR_OUT_OF_MEMORY | cudaErrorMemoryAllocation | hipErrorOutOfMemory | hipErrorMemoryAllocation
    | CU(DNN|BLAS|SPARSE|FFT|SOLVER)_STATUS_ALLOC_FAILED | CUFFT_ALLOC_FAILED | HIPBLAS_STATUS_ALLOC_FAILED
    | Failed\ to\ allocate\ memory\ for\ requested\ buffer      # ONNX Runtime
    | OOM\ when\ allocating                                     # TensorFlow
    | std::bad_alloc
    | nrt_\w+.*Allocation\ Failure                               # AWS Neuron
    | RESOURCE_EXHAUSTED.*(memory|allocat|OOM)
    """,
    re.IGNORECASE | re.DOTALL | re.VERBOSE,
)

#: Errors after which CUDA answers every further call of the process with the same error, or worse.
_LOST = re.compile(
    r"""device-side\ assert | illegal\ memory\ access | misaligned\ address | illegal\ instruction\ was\ encountered
    | unspecified\ launch\ failure | uncorrectable\ ECC | fallen\ off\ the\ bus | GPU\ is\ lost
    | CUDA_ERROR_(ILLEGAL_ADDRESS|ASSERT|LAUNCH_FAILED|ILLEGAL_INSTRUCTION|MISALIGNED_ADDRESS|ECC_UNCORRECTABLE)
    | CUDA_ERROR_CONTEXT_IS_DESTROYED | cudaErrorIllegalAddress | cudaErrorAssert | cudaErrorLaunchFailure
    """,
    re.IGNORECASE | re.VERBOSE,
)
_CAUSES = 5  # how far the causes of an exception are followed


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an exception says that the machine or a device has no memory left, itself or by its cause."""
    return any(
        isinstance(one, MemoryError)
        or any(base.__name__ in _CLASSES for base in type(one).__mro__)
        or _MESSAGES.search(_text(one)) is not None
        for one in _with_causes(error)
    )


def is_device_lost(error: BaseException) -> bool:
    """Tell whether an exception says that this process cannot use its device any more, whatever it does."""
    return any(_LOST.search(_text(one)) is not None for one in _with_causes(error))


def _with_causes(error: BaseException) -> list[BaseException]:
    found = [error]
    while len(found) < _CAUSES and (cause := found[-1].__cause__) is not None:
        found.append(cause)
    return found


def _text(error: BaseException) -> str:
    try:
        return str(error)
    except Exception:  # noqa: BLE001 - a __str__ that raises says nothing of memory
        return ""


def resident() -> int:
    """Return the bytes that this process has in memory; 0 where the system (not Linux) does not tell them cheaply.

    What has been freed and not been given back is among them. The peak that ``getrusage`` tells would not do: it counts
    from the size of the process that launched this one.
    """
    with contextlib.suppress(OSError), open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return 0


def trim() -> None:
    """Give freed memory back to the system, where the C library keeps it (glibc); takes milliseconds.

    What was needed to load a model is freed, but lies below what lives on, and glibc returns only what is on top.
    """
    import ctypes

    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def release_memory() -> None:
    """Free what is no longer used, also in the pools that torch and CuPy keep on a device."""
    gc.collect()
    trim()
    with contextlib.suppress(Exception):  # a device that is in trouble: the next call of the handler says so
        torch = sys.modules.get("torch")
        if torch is not None and hasattr(torch, "cuda") and torch.cuda.is_initialized():
            torch.cuda.empty_cache()
    with contextlib.suppress(Exception):
        cupy = sys.modules.get("cupy")
        if cupy is not None:
            cupy.get_default_memory_pool().free_all_blocks()
