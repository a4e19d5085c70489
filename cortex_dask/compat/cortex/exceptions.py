"""The exceptions of Cortex' client, by the names that they had."""

from __future__ import annotations

from cortex_dask.errors import CortexDaskError as CortexException
from cortex_dask.errors import JobNotFoundError as NotFound

__all__ = ["CortexException", "NotFound"]
