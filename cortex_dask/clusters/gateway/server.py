"""The server of a Dask Gateway, by its own client library: each call has a deadline, and each error is a sentence.

Address and authentication are those of Dask's configuration, under ``gateway:``, as ``dask_gateway`` reads them: basic,
Kerberos, and JupyterHub with the token of the environment.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from cortex_dask.clusters.gateway.options import SiteOption
from cortex_dask.errors import ClusterError, SpecError
from cortex_dask.runtime.timeout import call_with_timeout

if TYPE_CHECKING:
    from dask_gateway.client import ClusterReport

#: The states of a cluster that does not come back.
ENDED = ("FAILED", "STOPPED", "STOPPING")

_ANSWER_SECONDS = 30.0  # creating a cluster writes to a database, and all else is quicker
_SECRET = re.compile(r"(?<=://)[^/@\s]*@")

_Answer = TypeVar("_Answer")


class GatewayUnreachableError(ClusterError):
    """The gateway's server does not answer now; it may later, for clusters outlive a restart of it."""


class GatewayApi:
    """The clusters of one user of a gateway.

    Parameters
    ----------
    seconds : float
        How long to wait for an answer.

    Raises
    ------
    SpecError
        If ``dask_gateway`` is not installed, or Dask's configuration names no gateway.
    """

    def __init__(self, seconds: float = _ANSWER_SECONDS) -> None:
        try:
            import dask_gateway
        except ImportError:
            raise SpecError(
                "cluster: gateway needs the package dask-gateway; install it with: pip install 'cortex-dask[gateway]'"
            ) from None
        import dask

        # Its import adds defaults to the configuration. Those that it adds within ``with dask.config.set(gateway=…)``
        # are gone when that is left, and it is imported only once.
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

    # what can be asked ----------------------------------------------------------------------------------------------

    def options(self) -> dict[str, SiteOption]:
        """Return the options that its clusters have.

        Raises
        ------
        SpecError
            If ``gateway.cluster.options`` in Dask's configuration sets one that the site lacks or refuses.
        """

        async def ask(gateway: Any) -> dict[str, SiteOption]:
            try:
                return SiteOption.read_all(await gateway.cluster_options())
            except (KeyError, TypeError, ValueError) as error:
                plain = SiteOption.read_all(await gateway.cluster_options(use_local_defaults=False))
                from cortex_dask.clusters.gateway.options import list_options

                raise SpecError(
                    f"gateway.cluster.options in Dask's configuration does not fit the gateway at {self.address} "
                    f"({_words(error)}); it has {list_options(plain)}"
                ) from None

        return self._call(ask)

    def create(self, options: Mapping[str, Any]) -> str:
        """Let a cluster be made, and return its name at once.

        Raises
        ------
        SpecError
            If the server refuses the options.
        """

        async def ask(gateway: Any) -> str:
            try:
                name: str = await gateway.submit(**options)
            except ValueError as error:
                raise SpecError(f"the gateway at {self.address} refuses the cluster: {_words(error)}") from None
            return name

        return self._call(ask)

    def report(self, name: str) -> ClusterReport | None:
        """Return what has become of a cluster, with the credentials for it; None if there is none of that name."""

        async def ask(gateway: Any) -> ClusterReport | None:
            try:
                return await gateway.get_cluster(name)
            except ValueError:  # 404: the server forgets clusters that have ended, after a day
                return None

        return self._call(ask)

    def list(self) -> list[ClusterReport]:
        """Return the user's clusters that are starting or running."""

        async def ask(gateway: Any) -> list[ClusterReport]:
            return list(await gateway.list_clusters(status=["pending", "running"]))

        return self._call(ask)

    def stop(self, name: str) -> None:
        """End a cluster; nothing happens if it has ended."""

        async def ask(gateway: Any) -> None:
            await gateway.stop_cluster(name)

        self._call(ask)

    def scale(self, name: str, workers: int) -> None:
        """Ask for so many workers; a site's limit makes fewer of them, which is no error."""

        async def ask(gateway: Any) -> None:
            import warnings

            with warnings.catch_warnings():
                warnings.simplefilter("ignore", self._module.client.GatewayWarning)
                await gateway.scale_cluster(name, workers)

        self._call(ask)

    # how ------------------------------------------------------------------------------------------------------------

    def _call(self, ask: Callable[[Any], Awaitable[_Answer]]) -> _Answer:
        """Ask the server, in an event loop in a thread: a notebook's loop runs already, and Dask's may be waiting."""

        async def work() -> _Answer:
            async with self._module.Gateway(asynchronous=True) as gateway:
                return await asyncio.wait_for(ask(gateway), self._seconds)

        try:
            answer: _Answer = call_with_timeout(lambda: asyncio.run(work()), None)
        except (ClusterError, SpecError):
            raise
        except Exception as error:
            raise self._sentence(error) from error
        return answer

    def _sentence(self, error: Exception) -> ClusterError | SpecError:
        import aiohttp

        where = f"the Dask Gateway at {self.address}"
        if isinstance(error, TimeoutError):
            return GatewayUnreachableError(f"{where} does not answer within {self._seconds:.0f} s")
        if isinstance(error, aiohttp.ClientResponseError):
            return self._refusal(error.status, where)
        if isinstance(error, aiohttp.InvalidURL):
            return SpecError(f"gateway.address in Dask's configuration is {self.address}, which is no URL")
        if isinstance(error, aiohttp.ClientSSLError):
            return ClusterError(f"{where} cannot be trusted: {_words(error)}")
        if isinstance(error, aiohttp.ClientConnectionError | OSError):
            return GatewayUnreachableError(
                f"{where} cannot be reached ({_words(error)}): check gateway.address in Dask's configuration, and "
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
            return ClusterError(f"{where} cannot do it: {_words(error)}")
        if type(error).__module__.startswith("kerberos") or "Kerberos" in str(error):
            return ClusterError(f"{where} does not accept the Kerberos ticket ({_words(error)}): get one with kinit")
        return ClusterError(
            f"{self.address} does not answer as a Dask Gateway does ({_words(error)}): check gateway.address and "
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


def _words(error: BaseException) -> str:
    """Return an error's first line, short and without a password."""
    lines = str(error).strip().splitlines()
    text = _SECRET.sub("…@", lines[0] if lines else "")[:200]
    return text or type(error).__name__
