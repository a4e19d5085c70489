"""The runner of a job on Kubernetes: a ``Job`` whose pod is the coordinator.

It is made by whoever submits the job, who may then go. It is started again when it dies, with its node or by itself,
and finds its cluster by name. The cluster belongs to it, so removing the ``Job`` removes all that the job has there.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import signal
import sys
import time
from types import FrameType

from cortex_dask.clusters.kubernetes.api import KubeApi
from cortex_dask.clusters.kubernetes.cluster import Kubernetes
from cortex_dask.clusters.kubernetes.options import NAMESPACE_VARIABLE
from cortex_dask.clusters.kubernetes.runner import owner
from cortex_dask.errors import CortexDaskError, JobRunningError, StorageError
from cortex_dask.formatting import parse_time

_log = logging.getLogger(__name__)
_OTHER_SECONDS = 2.0  # between two looks whether another coordinator has gone
_EVICTED = 143  # the exit code of a process that was asked to end


def main() -> None:
    """Run the job of the command line; the pod's main process.

    The exit code tells Kubernetes whether to start it again: 0 when the job's status says how it has ended, whatever
    that is, and something else when this process could not even say that.
    """
    parser = argparse.ArgumentParser(prog="python -m cortex_dask.clusters.kubernetes.runner_main")
    parser.add_argument("job_url")
    parser.add_argument("--retry", action="store_true", help="handle the failed batches again")
    given = parser.parse_args()
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    signal.signal(signal.SIGTERM, _leave)
    sys.exit(run(given.job_url, retry=given.retry))


def run(job_url: str, *, retry: bool = False) -> int:
    """Run a job to its end and return the exit code."""
    from cortex_dask.runtime.coordinator import coordinator

    begin = coordinator.retry_failed if retry else coordinator.run_job
    while True:
        try:
            if _was_stopped(job_url):
                _log.info("the job was stopped while this runner was waited for")
                return 0
            document = begin(job_url, Kubernetes())
        except JobRunningError as error:
            # A runner that was lost a moment ago still seems to run, until its last sign of life is old enough.
            _log.info("%s; waiting", error)
            time.sleep(_OTHER_SECONDS)
        except StorageError as error:
            _log.error("%s", error)
            return 1  # nobody could be told, so it is tried again later
        except CortexDaskError as error:
            _log.error("%s", error)
            _note(job_url, error)
            return 0
        else:
            _log.info("the job has ended: %s %s", document["status"], document.get("status_reason") or "")
            return 0


def _was_stopped(job_url: str) -> bool:
    """Whether somebody has stopped the job since this runner was made: it may have waited for a node for hours."""
    from cortex_dask.io.job.directory import JobDirectory
    from cortex_dask.io.job.status import FINAL_STATUSES
    from cortex_dask.runtime.coordinator.status_board import StatusBoard

    directory = JobDirectory(job_url)
    document = directory.read_json("status.json") or {}
    request = directory.stop_request()
    if request is not None and document.get("status") not in FINAL_STATUSES:
        # Nobody was there to take it; a coordinator, once it begins, would take it for an old one.
        board = StatusBoard(directory.settings())
        board.end(request["status"], request["reason"])
        directory.write_json("status.json", board.document())
        return True
    ended = parse_time(document.get("end_time"))
    if document.get("status") != "stopped" or ended is None:
        return False
    with KubeApi(namespace=os.environ.get(NAMESPACE_VARIABLE)) as api:
        reference = owner(api)
        job = None if reference is None else api.get("Job", reference["name"])
    made = None if job is None else parse_time(job["metadata"]["creationTimestamp"])
    return made is not None and made < ended


def _leave(number: int, frame: FrameType | None) -> None:
    """End at once: the node goes, and another runner goes on where the ledger ends.

    To stop the job, as a coordinator at a terminal does, would be wrong: nobody has asked for that. The cluster stays.
    """
    os._exit(_EVICTED)


def _note(job_url: str, error: CortexDaskError) -> None:
    """Write the status of a job that its coordinator could not even begin to run."""
    from cortex_dask.io.job.directory import JobDirectory
    from cortex_dask.io.job.status import FINAL_STATUSES
    from cortex_dask.runtime.coordinator.status_board import StatusBoard

    with contextlib.suppress(CortexDaskError, OSError):
        job = JobDirectory(job_url)
        if (job.read_json("status.json") or {}).get("status") not in FINAL_STATUSES:
            board = StatusBoard(job.settings())
            board.end("worker error", str(error))
            job.write_json("status.json", board.document())


if __name__ == "__main__":
    main()
