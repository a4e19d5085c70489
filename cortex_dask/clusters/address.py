"""An existing Dask scheduler, given by its address."""

from __future__ import annotations

import contextlib
import warnings
from typing import TYPE_CHECKING, Any

from cortex_dask.clusters.connection import check_scheduler
from cortex_dask.clusters.dask import DaskCluster
from cortex_dask.errors import ClusterError, SpecError
from cortex_dask.formatting import shown

if TYPE_CHECKING:
    from distributed import Client, Security

_CONNECT_SECONDS = 30.0
_CLIENT_SECONDS = 10.0  # for a scheduler that has answered already; a lost one is waited for in reconnect()
_RECONNECT_SECONDS = 2.0
_OPTIONS = ("connect_timeout", "start_timeout", "reconnect_timeout")
_OTHER_BACKENDS = ("local", "inline", "gateway", "kubernetes")


class Address(DaskCluster):
    """An existing scheduler, e.g. ``tcp://127.0.0.1:8786``; its workers are used, and left running.

    Without ``security`` the credentials are those of Dask's configuration (``distributed.comm.tls``).
    """

    name = "address"
    start_seconds = 60.0

    def __init__(self, address: str, security: Security | None = None) -> None:
        super().__init__()
        self._address = address
        self._security = security

    @property
    def options(self) -> dict[str, Any]:
        """The options that the job was submitted with, unless they are of a backend that starts a cluster."""
        where = self.settings.cluster
        return {} if where.name in _OTHER_BACKENDS else where.options

    def connect(self) -> Client:
        """Connect to the scheduler; workers may come later."""
        unknown = sorted(set(self.options) - set(_OPTIONS))
        if unknown:
            raise SpecError(
                f"cluster option {shown(unknown[0])} is unknown for the scheduler at {self._address}, which somebody "
                f"else runs; allowed are {', '.join(_OPTIONS)}"
            )
        return self._connect(self.seconds("connect_timeout", _CONNECT_SECONDS))

    def _connect(self, seconds: float) -> Client:
        from distributed import Client, Security
        from distributed.versions import VersionMismatchWarning

        security = self._security or Security()
        check_scheduler(self._address, security, seconds)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", VersionMismatchWarning)  # versions are compared later, by our own rules
                return Client(
                    self._address,
                    security=security,
                    set_as_default=False,
                    timeout=min(seconds, _CLIENT_SECONDS),
                )
        except (OSError, TimeoutError, ImportError, TypeError, ValueError, RuntimeError) as error:
            raise ClusterError(
                f"cluster: the Dask scheduler at {self._address} does not take this client: "
                f"{type(error).__name__}: {error}"
            ) from error

    def reconnect(self) -> Client | None:
        """Return a client of a scheduler that was started again at the same address."""
        try:
            return self._connect(_RECONNECT_SECONDS)
        except ClusterError as error:
            raise ConnectionError(str(error)) from error  # not final: it may be starting

    def explain_missing_workers(self) -> str | None:
        """Return what its workers lack, and how to start some."""
        gpu = self.settings.compute.gpu
        with contextlib.suppress(Exception):
            workers = self.workers()
            if workers and gpu:
                return (
                    f"the job asks for {gpu:g} GPU for each split, and none of the {len(workers)} workers of the "
                    f"scheduler at {self._address} offers that many: start workers with "
                    f"dask worker {self._address} --resources GPU=1 (the number of devices that each has)"
                )
        resources = " --resources GPU=1" if gpu else ""
        return (
            f"the scheduler at {self._address} has no workers: start some with dask worker {self._address}{resources}"
        )
