"""Where the slots are: one small class per backend behind one seam, :class:`~cortex_dask.runtime.cluster.Cluster`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cortex_dask.errors import SpecError

if TYPE_CHECKING:
    from cortex_dask.runtime.cluster import Cluster

__all__ = ["make_cluster"]

_ADDRESSES = ("tcp://", "tls://", "ucx://", "ws://", "wss://", "inproc://")


def make_cluster(name: str | Cluster) -> Cluster:
    """Return the backend that ``--cluster`` or ``cluster=`` names; a backend that is made already is returned as it is.

    Parameters
    ----------
    name : str or Cluster
        ``"local"``: this machine. ``"inline"``: the calling thread. ``"tcp://host:8786"``: an existing scheduler.
        ``"gateway"``: a cluster of a Dask Gateway. ``"kubernetes"``: one of the Dask operator.

    Raises
    ------
    SpecError
        If there is no such backend.
    """
    if not isinstance(name, str):
        if hasattr(name, "prepare"):
            return name
        raise SpecError(
            f"cluster: found a value of type {type(name).__name__}; give its scheduler's address, 'local' or 'inline'"
        )
    if name == "local":
        from cortex_dask.clusters.local import LocalThreads

        return LocalThreads()
    if name == "inline":
        from cortex_dask.clusters.inline import Inline

        return Inline()
    if name == "gateway":
        from cortex_dask.clusters.gateway.cluster import Gateway

        return Gateway()
    if name == "kubernetes":
        from cortex_dask.clusters.kubernetes.cluster import Kubernetes

        return Kubernetes()
    if name.startswith(_ADDRESSES):
        from cortex_dask.clusters.address import Address

        return Address(name)
    raise SpecError(
        f"cluster: {name!r} is no cluster: say 'local' (this machine), 'inline' (the calling thread, for debuggers), "
        "the address of a Dask scheduler, e.g. 'tcp://127.0.0.1:8786', 'gateway' or 'kubernetes'"
    )
