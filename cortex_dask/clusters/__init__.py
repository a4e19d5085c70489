"""Where splits run: one small class per backend behind one port, :class:`~cortex_dask.runtime.cluster.Cluster`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cortex_dask.errors import SpecError

if TYPE_CHECKING:
    from cortex_dask.io.job.settings import JobSettings
    from cortex_dask.runtime.cluster import Cluster

_ADDRESSES = ("tcp://", "tls://", "ucx://", "ws://", "wss://", "inproc://")

# Each backend is imported when it is used: most bring Dask, or the client of a server.


def make_cluster(name: str | Cluster) -> Cluster:
    """Return the backend that ``--cluster`` or ``cluster=`` names; raises :class:`SpecError` if there is none.

    ``"local"``: this machine. ``"inline"``: the calling thread. ``"tcp://host:8786"``: an existing scheduler.
    ``"gateway"``: a cluster of a Dask Gateway. ``"kubernetes"``: one of the Dask operator. A
    :class:`~cortex_dask.runtime.cluster.Cluster` is returned as it is.
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
    raise _unknown(name)


def detach(name: str, job_url: str, settings: JobSettings, *, retry: bool = False) -> None:
    """Start a coordinator that outlives the caller, in the way of the named backend, and return.

    Raises :class:`SpecError` if the backend has no place for one, and :class:`ClusterError` if its cluster does not
    come up.
    """
    if name == "local":
        from cortex_dask.clusters.detached import process

        process.start_coordinator(job_url, retry=retry)
    elif name == "inline":
        raise SpecError("cluster: inline is the calling thread; a job that runs on its own needs another, e.g. local")
    elif name == "gateway":
        from cortex_dask.clusters.gateway.cluster import Gateway

        Gateway().detach(job_url, settings, retry=retry)
    elif name == "kubernetes":
        from cortex_dask.clusters.kubernetes import runner

        runner.start_runner(job_url, settings, retry=retry)
    elif name.startswith(_ADDRESSES):
        from cortex_dask.clusters.detached import scheduler

        scheduler.start_coordinator(name, job_url, settings, retry=retry)
    else:
        raise _unknown(name)


def _unknown(name: str) -> SpecError:
    return SpecError(
        f"cluster: {name!r} is no cluster: say 'local' (this machine), 'inline' (the calling thread, for debuggers), "
        "the address of a Dask scheduler, e.g. 'tcp://127.0.0.1:8786', 'gateway' or 'kubernetes'"
    )
