"""The server of a Dask Gateway, through its own client library, with deadlines and errors as sentences.

Address and authentication are those of Dask's configuration, under ``gateway:``, as ``dask_gateway`` reads them: basic,
Kerberos, and JupyterHub with the token of the environment.
"""

from __future__ import annotations

import asyncio
import re
import warnings
from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from cortex_dask.clusters.gateway.options import SiteOption, list_options
from cortex_dask.errors import ClusterError, SpecError
from cortex_dask.runtime.timeout import call_with_timeout

if TYPE_CHECKING:
    from dask_gateway.client import ClusterReport

#: The final states of a cluster.
ENDED = ("FAILED", "STOPPED", "STOPPING")

_ANSWER_SECONDS = 30.0  # the slowest request creates a cluster, which is a write to a database
_SECRET = re.compile(r"(?<=://)[^/@\s]*@")

_Answer = TypeVar("_Answer")


class GatewayUnreachableError(ClusterError):
    """The gateway's server does not answer now; it may later, as clusters outlive a restart of it."""


class GatewayApi:
    """The clusters of one user of a gateway; SpecError if ``dask_gateway`` or the gateway's address is missing."""

    def __init__(self, seconds: float = _ANSWER_SECONDS) -> None:
        try:
            import dask_gateway
        except ImportError:
            raise SpecError(
                "cluster: gateway needs the package dask-gateway; install it with: pip install 'cortex-dask[gateway]'"
            ) from None
        import dask

        # Its import adds defaults to the configuration, once. Those that it adds within ``with dask.config.set(…)`` are
        # lost at the end of that block.
        for defaults in dask.config.defaults:
            if "gateway" in defaults:
                dask.config.update(dask.config.config, {"gateway": defaults["gateway"]}, priority="old")
        self._module = dask_gateway
        self._seconds = seconds
        configured = dask.config.get("gateway.address", None)
        if not configured:
            raise SpecError(
                "cluster: gateway needs an address: set gateway.address in Dask's configuration, or the variable "
                "DASK_GATEWAY__ADDRESS, e.g. to https://gateway.example.com"
            )
        from dask_gateway.utils import format_template

        try:
            address = str(format_template(configured)).rstrip("/")
        except KeyError as error:
            raise SpecError(
                f"gateway.address in Dask's configuration names the variable {error}, which is not set"
            ) from None
        #: The server's address, without a password.
        self.address = _SECRET.sub("…@", address)

    # requests -----------------------------------------------------------------------------------------------------

    def options(self) -> dict[str, SiteOption]:
        """Return the options of the site.

        Raises SpecError if ``gateway.cluster.options`` in Dask's configuration has one that the site lacks or refuses.
        """

        async def send(gateway: Any) -> dict[str, SiteOption]:
            try:
                return SiteOption.read_all(await gateway.cluster_options())
            except (KeyError, TypeError, ValueError) as error:
                known = SiteOption.read_all(await gateway.cluster_options(use_local_defaults=False))
                raise SpecError(
                    f"gateway.cluster.options in Dask's configuration does not fit the gateway at {self.address} "
                    f"({_first_line(error)}); it has {list_options(known)}"
                ) from None

        return self._call(send)

    def create(self, options: Mapping[str, Any]) -> str:
        """Start a cluster, and return its name at once; SpecError if the server refuses the options."""

        async def send(gateway: Any) -> str:
            try:
                name: str = await gateway.submit(**options)
            except ValueError as error:
                raise SpecError(f"the gateway at {self.address} refuses the cluster: {_first_line(error)}") from None
            return name

        return self._call(send)

    def report(self, name: str) -> ClusterReport | None:
        """Return the state of a cluster and the credentials for it, or None if there is none of that name."""

        async def send(gateway: Any) -> ClusterReport | None:
            try:
                return await gateway.get_cluster(name)
            except ValueError:  # 404; the server forgets clusters a day after their end
                return None

        return self._call(send)

    def list(self) -> list[ClusterReport]:
        """Return the user's clusters that are starting or running."""

        async def send(gateway: Any) -> list[ClusterReport]:
            return list(await gateway.list_clusters(status=["pending", "running"]))

        return self._call(send)

    def stop(self, name: str) -> None:
        """End a cluster, unless it has ended."""

        async def send(gateway: Any) -> None:
            await gateway.stop_cluster(name)

        self._call(send)

    def scale(self, name: str, workers: int) -> None:
        """Request so many workers; a limit of the site may allow fewer, which is no error."""

        async def send(gateway: Any) -> None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", self._module.client.GatewayWarning)
                await gateway.scale_cluster(name, workers)

        self._call(send)

    # errors ---------------------------------------------------------------------------------------------------------

    def _call(self, send: Callable[[Any], Awaitable[_Answer]]) -> _Answer:
        """Send a request, in an event loop in a thread: a notebook's loop runs already, and Dask's may be waiting."""

        async def work() -> _Answer:
            async with self._module.Gateway(asynchronous=True) as gateway:
                return await asyncio.wait_for(send(gateway), self._seconds)

        try:
            answer: _Answer = call_with_timeout(lambda: asyncio.run(work()), None)
        except (ClusterError, SpecError):
            raise
        except Exception as error:
            raise self._to_error(error) from error
        return answer

    def _to_error(self, error: Exception) -> ClusterError | SpecError:
        import aiohttp

        where = f"the Dask Gateway at {self.address}"
        if isinstance(error, TimeoutError):
            return GatewayUnreachableError(f"{where} does not answer within {self._seconds:.0f} s")
        if isinstance(error, aiohttp.ClientResponseError):
            return self._refusal(error.status, where)
        if isinstance(error, aiohttp.InvalidURL):
            return SpecError(f"gateway.address in Dask's configuration is {self.address}, which is no URL")
        if isinstance(error, aiohttp.ClientSSLError):
            return ClusterError(f"{where} cannot be trusted: {_first_line(error)}")
        if isinstance(error, aiohttp.ClientConnectionError | OSError):
            return GatewayUnreachableError(
                f"{where} cannot be reached ({_first_line(error)}): check gateway.address in Dask's configuration, and "
                "that its server runs"
            )
        if isinstance(error, ModuleNotFoundError):
            return SpecError(f"gateway.auth in Dask's configuration needs the Python package {error.name}")
        if "JUPYTERHUB_API_TOKEN" in str(error):
            return SpecError(
                "gateway.auth.type in Dask's configuration is jupyterhub, but the variable JUPYTERHUB_API_TOKEN is not "
                "set: run on JupyterHub, or set it to a token of yours"
            )
        if isinstance(error, self._module.GatewayClusterError | self._module.GatewayServerError):
            return ClusterError(f"{where} cannot do it: {_first_line(error)}")
        if type(error).__module__.startswith("kerberos") or "Kerberos" in str(error):
            return ClusterError(
                f"{where} does not accept the Kerberos ticket ({_first_line(error)}): get one with kinit"
            )
        return ClusterError(
            f"{self.address} does not answer as a Dask Gateway does ({_first_line(error)}): check gateway.address and "
            "gateway.auth in Dask's configuration"
        )

    def _refusal(self, status: int, where: str) -> ClusterError:
        if status == 401:
            import dask

            kind = dask.config.get("gateway.auth.type", "basic")
            return ClusterError(
                f"{where} does not know this user, or the password or token is wrong (gateway.auth.type is {kind}): "
                "correct gateway.auth in Dask's configuration"
            )
        if status == 403:
            return ClusterError(f"{where} does not allow this user to do that: ask its administrator")
        if status in (502, 503, 504):
            return GatewayUnreachableError(f"{where} is being restarted, or its server is down (HTTP {status})")
        return ClusterError(f"{where} answers with the HTTP status {status}: check gateway.address")


def _first_line(error: BaseException) -> str:
    """Return an error's first line, short and without a password."""
    lines = str(error).strip().splitlines()
    text = _SECRET.sub("…@", lines[0] if lines else "")[:200]
    return text or type(error).__name__
