"""Structured logging: ``from cortex_internal.lib.log import logger as cortex_logger``."""

from __future__ import annotations

from cortex_dask.runtime.logs import logger

__all__ = ["logger"]
