"""Structured logging: ``from cortex_internal.lib.log import logger as cortex_logger``."""

from __future__ import annotations

from cortex_dask.runtime.handler_process.log import logger

__all__ = ["logger"]
