"""Memory that runs out inside a handler: what says so, and what can be given back."""

from __future__ import annotations

import gc
import sys

__all__ = ["is_out_of_memory", "release_memory"]

#: What torch, CuPy, TensorFlow and Numba raise when a device is out of memory; few of them derive from MemoryError.
_DEVICE_ERRORS = frozenset({"OutOfMemoryError", "ResourceExhaustedError", "CudaAPIMemoryError"})
_DEVICE_MESSAGES = ("CUDA out of memory", "CUDA_ERROR_OUT_OF_MEMORY", "RESOURCE_EXHAUSTED")


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an exception says that the machine or a device has no memory left."""
    if isinstance(error, MemoryError):
        return True
    if any(base.__name__ in _DEVICE_ERRORS for base in type(error).__mro__):
        return True
    try:
        return any(text in str(error) for text in _DEVICE_MESSAGES)
    except Exception:  # noqa: BLE001 - a __str__ that raises says nothing of memory
        return False


def release_memory() -> None:
    """Free what is no longer used, also in the cache that torch keeps on a device."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and hasattr(torch, "cuda") and torch.cuda.is_initialized():
        torch.cuda.empty_cache()
