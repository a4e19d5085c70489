"""An existing Dask scheduler, given by its address."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cortex_dask.clusters.client import DaskCluster
from cortex_dask.errors import SpecError

if TYPE_CHECKING:
    from distributed import Client

__all__ = ["Address"]

_CONNECT_SECONDS = 30.0
_WORKERS_SECONDS = 60.0


class Address(DaskCluster):
    """A scheduler that somebody else runs, e.g. ``tcp://127.0.0.1:8786``; its workers are used, and left running.

    Parameters
    ----------
    address : str
        The scheduler's address.
    """

    name = "address"

    def __init__(self, address: str) -> None:
        super().__init__()
        self._address = address

    def connect(self) -> Client:
        """Connect to the scheduler and wait for a worker.

        Raises
        ------
        SpecError
            If nobody answers, or there is no worker.
        """
        from distributed import Client

        try:
            client = Client(self._address, set_as_default=False, timeout=_CONNECT_SECONDS)
        except (OSError, TimeoutError) as error:
            raise SpecError(
                f"cluster: no Dask scheduler answers at {self._address} within {_CONNECT_SECONDS:.0f} s ({error}): "
                "start it, or correct the address"
            ) from error
        try:
            client.wait_for_workers(1, timeout=_WORKERS_SECONDS)
        except TimeoutError:
            client.close()
            raise SpecError(
                f"cluster: the Dask scheduler at {self._address} has no worker after {_WORKERS_SECONDS:.0f} s: "
                "start workers for it"
            ) from None
        return client
