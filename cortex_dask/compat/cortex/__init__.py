"""The Python client of Cortex, for handlers: ``import cortex; cortex.client()``.

In a handler process :func:`client` returns a client of the environment that the job runs in. Documents have the keys
that Cortex gave them. Our client is imported when one is made, so that a handler that only imports this package pays
nothing for it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from cortex_dask import __version__
from cortex_dask.runtime import job_context

if TYPE_CHECKING:
    from cortex_dask.client import Client as _Client

__all__ = ["Client", "__version__", "client", "env_delete", "env_list", "new_client"]


def client(env: str | None = None) -> Client:
    """Return the client of an environment.

    Parameters
    ----------
    env : str, optional
        The environment's name; None: the one that this job runs in.
    """
    from cortex_dask.client import Client as OurClient
    from cortex_dask.environments import Environment

    here = job_context.current()
    if here is not None and env in (None, here.name):
        return Client(OurClient(Environment(here.name, here.store, here.cluster)))
    return Client(OurClient(env))


def new_client(name: str, operator_endpoint: str) -> Client:
    """Make an environment, and return its client.

    Parameters
    ----------
    name : str
        The environment's name.
    operator_endpoint : str
        Its store: a folder or any fsspec URL. There is no operator to speak to.
    """
    from cortex_dask import environments

    environments.configure(name, operator_endpoint)
    return client(name)


def env_list() -> list[dict[str, Any]]:
    """Return the environments that are configured here, and the one that this job runs in.

    Returns
    -------
    list of dict
        ``name``, ``operator_endpoint`` (the store), ``cluster``, ``is_default``.
    """
    from cortex_dask import environments

    here = job_context.current()
    listed = [
        {"name": known.name, "operator_endpoint": known.store, "cluster": known.cluster, "is_default": known.is_default}
        for known in environments.list_all()
    ]
    if here is None:
        return listed
    own = {"name": here.name, "operator_endpoint": here.store, "cluster": here.cluster, "is_default": True}
    return [own, *({**other, "is_default": False} for other in listed if other["name"] != here.name)]


def env_delete(name: str) -> None:
    """Forget an environment; its store is left as it is."""
    from cortex_dask import environments

    environments.delete(name)


class Client:
    """The APIs and jobs of one environment, in the words of Cortex' client.

    Parameters
    ----------
    ours : cortex_dask.Client
        Our client of the same environment.
    """

    def __init__(self, ours: _Client) -> None:
        self._ours = ours
        self._catalog = ours.catalog
        self._deployments = ours.deployments
        self.env_name = ours.environment.name
        self.env = {"name": ours.environment.name, "operator_endpoint": ours.environment.store}

    def __repr__(self) -> str:
        return f"<cortex.Client {self.env_name}: {self.env['operator_endpoint']}>"

    def deploy(
        self,
        api_spec: Mapping[str, Any],
        project_dir: str | os.PathLike[str] | None = None,
        force: bool = True,
        wait: bool = False,
    ) -> dict[str, Any]:
        """Deploy or update an API; see :meth:`cortex_dask.Client.deploy`."""
        return self._deployments.deploy(api_spec, project_dir)

    def deploy_batch_api(
        self,
        api_spec: Mapping[str, Any],
        handler: type,
        requirements: Sequence[str] | None = None,
        conda_packages: Sequence[str] | None = None,
    ) -> dict[str, Any]:
        """Deploy an API with a class as its handler; see :meth:`cortex_dask.Client.deploy_batch_api`."""
        return self._deployments.deploy_class(api_spec, handler, requirements, conda_packages)

    def patch(self, api_spec: Mapping[str, Any], force: bool = False) -> dict[str, Any]:
        """Give a deployed API another configuration; see :meth:`cortex_dask.Client.patch`."""
        return self._deployments.patch(api_spec)

    def get_api(self, api_name: str) -> dict[str, Any]:
        """Return a deployed API; see :meth:`cortex_dask.Client.get_api`."""
        return self._deployments.describe(api_name)

    def list_apis(self) -> list[dict[str, Any]]:
        """Return all deployed APIs."""
        return self._deployments.describe_all()

    def delete(self, api_name: str, keep_cache: bool = False) -> None:
        """Delete a deployed API and stop its jobs; see :meth:`cortex_dask.Client.delete`."""
        self._deployments.delete(api_name, keep_cache=keep_cache)

    def submit(self, target: Any, input: Any = None, output: Any = None, **options: Any) -> dict[str, Any]:
        """Submit a job that runs on its own, and return its status document, with its ``job_id``.

        It does not end with this process: a handler may submit one and leave.

        Parameters
        ----------
        target : str, type or path
            The name of a deployed API; or a class, a project directory, or its ``cortex.yaml``.
        input, output, **options
            As for :func:`cortex_dask.submit`; the keys of a Cortex submission (``workers``, ``item_list``, ``config``
            …) are among them.
        """
        if isinstance(target, str):
            target = self._deployments.find_target(target) or target  # a folder may have the same name
        return self._ours.detach(target, input, output, **options).describe()

    def get_job(self, api_name: str, job_id: str) -> dict[str, Any]:
        """Return a job: ``api_spec``, ``job_status`` (the status document) and ``endpoint`` (the job directory)."""
        job = self._catalog.get(api_name, job_id)
        spec = self._deployments.spec(api_name, job.settings.api_id)
        return {"api_spec": spec, "job_status": job.describe(), "endpoint": job.url}

    def stop_job(self, api_name: str, job_id: str, keep_cache: bool = False) -> None:
        """Stop a job."""
        self._catalog.get(api_name, job_id).stop()

    def stream_job_logs(self, api_name: str, job_id: str) -> None:
        """Print a job's log until it has ended."""
        for line in self._ours.stream_job_logs(api_name, job_id):
            print(line)  # noqa: T201 - what it is for
