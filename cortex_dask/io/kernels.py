"""Arrow's compute functions, under the names of :mod:`pyarrow.compute`, which is imported when the first is used.

That import makes a function of each of some three hundred kernels and takes 20 ms, a tenth of a handler process' start.
Most jobs never call one.
"""

from __future__ import annotations

from typing import Any


def __getattr__(name: str) -> Any:
    import pyarrow.compute

    found = globals()[name] = getattr(pyarrow.compute, name)
    return found
