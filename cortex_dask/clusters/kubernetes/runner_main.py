"""What the pod of a runner runs: the coordinator of one job (``python -m``; nothing imports it).

See :mod:`cortex_dask.clusters.kubernetes.runner` for the ``Job`` around it.
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
from cortex_dask.clusters.kubernetes.runner import owner_reference
from cortex_dask.errors import CortexDaskError, JobRunningError, StorageError
from cortex_dask.formatting import parse_time
from cortex_dask.io.job.directory import JobDirectory
from cortex_dask.io.job.status import FINAL_STATUSES
from cortex_dask.runtime.coordinator import coordinator
from cortex_dask.runtime.coordinator.heartbeat import write_failure
from cortex_dask.runtime.coordinator.status_board import StatusBoard

_log = logging.getLogger(__name__)
_RETRY_SECONDS = 2.0  # between two attempts while another coordinator runs the job
_TERMINATED = 143  # the usual exit code after SIGTERM


def main() -> None:
    """Run the job of the command line.

    The exit code tells Kubernetes whether to restart the pod: 0 if the job has a final status, good or bad.
    """
    parser = argparse.ArgumentParser(prog="python -m cortex_dask.clusters.kubernetes.runner_main")
    parser.add_argument("job_url")
    parser.add_argument("--retry", action="store_true", help="handle the failed batches again")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    signal.signal(signal.SIGTERM, _exit_at_once)
    sys.exit(coordinate(arguments.job_url, retry=arguments.retry))


def coordinate(job_url: str, *, retry: bool = False) -> int:
    """Run a job to its end, and return the exit code."""
    run = coordinator.retry_failed if retry else coordinator.run_job
    while True:
        try:
            if _was_stopped(job_url):
                _log.info("the job was stopped while this runner was waited for")
                return 0
            document = run(job_url, Kubernetes())
        except JobRunningError as error:
            # A runner that was lost a moment ago still seems to run, until its last heartbeat is old enough.
            _log.info("%s; waiting", error)
            time.sleep(_RETRY_SECONDS)
        except StorageError as error:
            _log.error("%s", error)
            return 1  # the status could not be written, so the pod is restarted
        except CortexDaskError as error:
            _log.error("%s", error)
            with contextlib.suppress(CortexDaskError, OSError):
                write_failure(JobDirectory(job_url), str(error))
            return 0
        else:
            _log.info("the job has ended: %s %s", document["status"], document.get("status_reason") or "")
            return 0


def _was_stopped(job_url: str) -> bool:
    """Return whether the job was stopped after this runner was created, which may have waited for a node for hours.

    A stop request that no coordinator has seen is recorded as the job's status.
    """
    directory = JobDirectory(job_url)
    document = directory.read_json("status.json") or {}
    request = directory.stop_request()
    if request is not None and document.get("status") not in FINAL_STATUSES:
        # A coordinator that starts ignores requests that are older than itself.
        board = StatusBoard(directory.settings())
        board.end(request["status"], request["reason"])
        directory.write_json("status.json", board.document())
        return True
    ended = parse_time(document.get("end_time"))
    if document.get("status") != "stopped" or ended is None:
        return False
    with KubeApi(namespace=os.environ.get(NAMESPACE_VARIABLE)) as api:
        reference = owner_reference(api)
        job = None if reference is None else api.get("Job", reference["name"])
    created = None if job is None else parse_time(job["metadata"]["creationTimestamp"])
    return created is not None and created < ended


def _exit_at_once(number: int, frame: FrameType | None) -> None:
    """Exit without stopping the job, unlike a coordinator at a terminal: another runner continues with the cluster."""
    os._exit(_TERMINATED)


if __name__ == "__main__":
    main()
