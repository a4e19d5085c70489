"""Imported by the server from which the tests' processes are forked, so that these start at once."""

from __future__ import annotations

import distributed.scheduler
import distributed.worker  # noqa: F401 - imported for the processes to come
import s3fs  # noqa: F401 - as above

import cortex_dask.runtime.worker.supervisor  # noqa: F401 - as above
import tests.faults.processes  # noqa: F401 - as above
