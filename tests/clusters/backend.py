"""What a backend has to offer to the conformance suite, ``tests/clusters/test_conformance.py``.

To let a backend of your own through the suite:

1. Write ``tests/clusters/<name>.py`` with one subclass of :class:`Backend`, and name it in ``BACKENDS`` of
   ``tests/clusters/conftest.py`` (with the marks that its tests shall have).
2. :meth:`Backend.up` is called once for each process of the test run, before its first test: start the server, check
   the test bed, or call ``pytest.skip`` with the reason where it cannot be had here. :meth:`Backend.down` is called at
   the end in any case.
3. :meth:`Backend.fresh` is called before each test: mend what an earlier test has killed, and return nothing.
   :meth:`Backend.leftovers` is asked after each test until it is empty, for :attr:`Backend.leftover_seconds`.
4. Say in :attr:`Backend.cannot` what makes no sense for it (``"lose a worker"``, ``"lose the scheduler"``, ``"scale"``,
   ``"lose the coordinator"``, ``"detach"``), each with the reason; those scenarios are then skipped with it.

The suite itself submits jobs only with the command line, in processes of their own (:mod:`tests.clusters.jobs`), as
``cortex-dask submit PROJECT --cluster <Backend.cluster> --cluster-option <each of Backend.options> --workers 2``, with
the variables of :attr:`Backend.environment`, and looks at what lies in the store. Input, output, job directory and the
handler's marks (a gate that it waits at, a note of each call) all lie below :meth:`Backend.store_url`, which the test's
process, the coordinator and the workers must all reach under the same URL. The project is a folder with a
``handler.py`` that needs nothing but cortex_dask and pyarrow, so a worker needs no more than its image.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from tests.clusters.jobs import Call, ClusterJob

__all__ = ["Backend", "kill"]


class Backend(ABC):
    """One kind of cluster, as the suite drives it.

    Parameters
    ----------
    folder : Path
        An empty folder that lives as long as the backend does.
    """

    #: Of its tests, and the file's.
    name: ClassVar[str]
    #: Which scenarios make no sense for it, and why.
    cannot: ClassVar[Mapping[str, str]] = {}
    #: How long the suite waits for a cluster to come, a job to end, a worker to be replaced.
    seconds: ClassVar[float] = 60.0
    #: Whether somebody replaces a lost scheduler: then jobs go on by themselves.
    replaces_schedulers: ClassVar[bool] = False
    #: How long what a killed submitter leaves may stay (the idle timeout that :attr:`options` set, and a bit).
    leftover_seconds: ClassVar[float] = 30.0

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def up(self) -> None:  # noqa: B027 - not every backend has something to start
        """Start what all tests share."""

    def down(self) -> None:  # noqa: B027 - as above
        """End it, whatever state it is in."""

    def fresh(self) -> None:  # noqa: B027 - as above
        """Make it as good as new, before each test."""

    # how jobs are submitted -----------------------------------------------------------------------------------------

    @property
    @abstractmethod
    def cluster(self) -> str:
        """The value of ``--cluster``."""

    @property
    def options(self) -> Mapping[str, Any]:
        """``--cluster-option``s: image, namespace, ``idle_timeout`` … ; values are written as JSON."""
        return {}

    @property
    def environment(self) -> Mapping[str, str]:
        """Variables of the processes that submit, look, stop and resume, and of the test: credentials, endpoints.

        They are the laptop's; what a pod needs has to get there as a user would bring it there.
        """
        return {}

    @property
    def api(self) -> Mapping[str, Any]:
        """Further keys of the suite's API in its ``cortex.yaml``."""
        return {}

    def store_url(self, folder: Path) -> str:
        """Return an empty folder in a store that everybody reaches; ``folder`` is the test's own on this machine."""
        return str(folder / "store")

    # what happens to it ---------------------------------------------------------------------------------------------

    def lose_worker(self, job: ClusterJob, call: Call) -> None:
        """Take away the worker that runs this call, without a word: SIGKILL, or a pod deleted with no grace.

        ``call.worker`` is the process id of the Dask worker, ``call.host`` its host's name (a pod's name).
        """
        raise NotImplementedError

    def lose_coordinator(self, job: ClusterJob) -> None:
        """SIGKILL the coordinator, wherever it is; by default on this machine."""
        who = job.status()["coordinator"]
        assert who["host"] == socket.gethostname(), who
        kill(who["pid"])

    def lose_scheduler(self, job: ClusterJob) -> None:
        """SIGKILL the scheduler that runs the job; :meth:`fresh`, which is called in the test, brings another one."""
        raise NotImplementedError

    def scale(self, job: ClusterJob, workers: int) -> None:
        """Make it this many workers from outside, while the job runs: as an administrator would, or a spot market."""
        raise NotImplementedError

    def workers(self, job: ClusterJob) -> int:
        """Return how many Dask workers run for the job now."""
        raise NotImplementedError

    def keeps_record(self, job: ClusterJob) -> bool:
        """Whether the job's ``cluster.json`` may stay, as something harmless does that it tells of."""
        return False

    def leftovers(self, job: ClusterJob) -> list[str]:
        """Return what is still there of an ended job and should not be, as words: clusters, pods, secrets, processes.

        Extend it; handler processes and coordinators on this machine and ``cluster.json`` are looked for by the suite.
        """
        return []


def kill(pid: int) -> None:
    """End a process without a word; it may have ended already."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
