"""The deployed APIs of an environment, as the client offers them: deploy, patch, look at, delete."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cortex_dask.errors import SpecError
from cortex_dask.io.store import Store
from cortex_dask.progress import FINAL_STATUSES

if TYPE_CHECKING:
    from cortex_dask.api_spec import ApiSpec
    from cortex_dask.apis import DeployedApi, DeployedApis
    from cortex_dask.job import Job
    from cortex_dask.jobs import Jobs
    from cortex_dask.target import Target

__all__ = ["ApiClient", "api_document"]

_NAME = re.compile(r"[a-z0-9-]{1,63}")  # what may be one: nobody asks the store for an API "../x"
_STOPPERS = 16  # jobs that are stopped at a time
_MESSAGES = {"created": "created {}", "updated": "updated {}", "unchanged": "{} is up to date"}


class ApiClient:
    """The part of :class:`cortex_dask.Client` that is about deployed APIs.

    The documents that it returns have the keys that Cortex' client gave them: ``spec``, ``endpoint`` (the place in the
    store: nothing listens), ``api_versions``, ``batch_job_statuses``; and ours beside them.
    """

    _store: Store
    _jobs: Jobs

    def deploy(
        self,
        api_spec: Mapping[str, Any] | str | os.PathLike[str],
        project_dir: str | os.PathLike[str] | None = None,
        force: bool = True,
        wait: bool = False,
    ) -> dict[str, Any]:
        """Deploy an API, or a new version of it; the same again changes nothing.

        ::

            client.deploy({"name": "digits", "kind": "BatchAPI", "handler": {"path": "handler.py"}}, "my-classifier")
            client.submit("digits", "data/in", "data/out")

        Parameters
        ----------
        api_spec : mapping, str or path
            The API as a mapping; or a project directory or its ``cortex.yaml``, with just one API in it.
        project_dir : str or path, optional
            The project directory, when the API is a mapping.
        force, wait : bool
            Accepted for Cortex' sake: no update is ever in progress here, and an API is ready at once.

        Returns
        -------
        dict
            ``api`` (see :meth:`get_api`), ``message`` and ``error`` (empty: what is wrong is raised).

        Raises
        ------
        SpecError, ProjectError, HandlerError
            If the configuration, the project or the handler cannot be used.
        """
        from cortex_dask.api_spec import parse_api
        from cortex_dask.target import find_apis, from_spec

        if not isinstance(api_spec, Mapping):
            file, apis = find_apis(api_spec)
            if len(apis) > 1:
                raise SpecError(f"{file} has {len(apis)} APIs; give the one to deploy as a mapping, with project_dir")
            return self.deploy_target(apis[0], from_spec(apis[0], file.parent, config_file=file.name))
        if project_dir is None:
            raise SpecError("project_dir: is missing; name the folder that holds the file handler.path")
        api = parse_api(api_spec)
        return self.deploy_target(api, _packed(api, Path(project_dir)))

    def deploy_batch_api(
        self,
        api_spec: Mapping[str, Any],
        handler: type,
        requirements: Sequence[str] | None = None,
        conda_packages: Sequence[str] | None = None,
    ) -> dict[str, Any]:
        """Deploy an API with a class as its handler.

        Parameters
        ----------
        api_spec : mapping
            The API; ``handler.path`` may be left out.
        handler : type
            The class ``Handler``; it travels by value.
        requirements, conda_packages : list of str, optional
            What has to be installed for it: lines of ``requirements.txt`` and ``conda-packages.txt``.

        Returns
        -------
        dict
            As for :meth:`deploy`.

        Raises
        ------
        SpecError, HandlerError
            If the configuration or the class cannot be used.
        """
        from cortex_dask.target import from_class_spec

        if not isinstance(handler, type):
            raise SpecError(f"handler: found a value of type {type(handler).__name__}; a class is needed")
        api = _without_path(api_spec)
        return self.deploy_target(api, from_class_spec(handler, api, _packages(requirements, conda_packages)))

    def deploy_target(self, api: ApiSpec, target: Target) -> dict[str, Any]:
        """Deploy what is checked and packed already."""
        deployed, change = self._deployed.deploy(api, target)
        message = _MESSAGES[change].format(f"{deployed.name} ({deployed.kind})")
        return {"api": self._document(deployed), "message": message, "error": "", "change": change}

    def patch(self, api_spec: Mapping[str, Any], force: bool = False) -> dict[str, Any]:
        """Give a deployed API another configuration; its project or class stays.

        Parameters
        ----------
        api_spec : mapping
            The whole new configuration; its name says which API.
        force : bool
            Accepted for Cortex' sake.

        Returns
        -------
        dict
            As for :meth:`deploy`.

        Raises
        ------
        JobNotFoundError
            If no such API is deployed.
        SpecError, ProjectError, HandlerError
            If the configuration does not fit the project.
        """
        from cortex_dask.target import from_archive

        api = _without_path(api_spec)
        before = self._deployed.target(api.name)
        if before.pickled is None:
            from cortex_dask.api_spec import parse_api

            api = parse_api(api_spec)
        return self.deploy_target(api, from_archive(api, before))

    def get_api(self, api_name: str) -> dict[str, Any]:
        """Return a deployed API.

        Returns
        -------
        dict
            ``spec`` (its configuration, and ``id``), ``endpoint``, ``api_versions`` (``api_id`` and ``last_updated``,
            the newest first), ``batch_job_statuses`` (the status documents of its jobs, the newest first),
            ``created_time``, ``updated_time``.

        Raises
        ------
        JobNotFoundError
            If no such API is deployed.
        """
        return self._document(self._deployed.get(api_name))

    def list_apis(self) -> list[dict[str, Any]]:
        """Return all deployed APIs, as :meth:`get_api` does."""
        return [self._document(api) for api in self.deployed_apis()]

    def deployed_apis(self) -> list[DeployedApi]:
        """Return all deployed APIs without their jobs."""
        return self._deployed.all()

    def delete(self, api_name: str, keep_cache: bool = False) -> None:
        """Delete a deployed API and stop its jobs; jobs that have ended stay, with their logs and their output.

        A job whose own handler asks for it is not stopped: it comes to its end.

        Parameters
        ----------
        api_name : str
            The API's name.
        keep_cache : bool
            Whether its packed versions stay in the store.

        Raises
        ------
        JobNotFoundError
            If no such API is deployed.
        """
        from cortex_dask.runtime import surroundings

        self._deployed.get(api_name)
        self._deployed.delete(api_name, keep_cache=keep_cache)  # first, so that nobody submits to it any more
        here = surroundings.current()
        running = [job for job in self.running_jobs(api_name) if here is None or job.url != here.job_url]
        if running:
            with ThreadPoolExecutor(min(_STOPPERS, len(running))) as pool:
                for _ in pool.map(lambda job: job.stop(reason="its API was deleted"), running):
                    pass

    def deployed_target(self, name: str) -> Target | None:
        """Return what a submission to the API of this name needs; None if there is none."""
        return self._deployed.target(name) if self.is_deployed(name) else None

    def is_deployed(self, name: str) -> bool:
        """Tell whether an API of this name is deployed."""
        return _NAME.fullmatch(name) is not None and self._deployed.find(name) is not None

    def api_spec(self, api_name: str, api_id: str) -> dict[str, Any]:
        """Return the configuration of a version of an API; only its name where it is not known any more."""
        known = self._deployed.spec(api_name, api_id) or {"name": api_name, "kind": "BatchAPI"}
        return {**known, "id": api_id}

    def running_jobs(self, api_name: str) -> list[Job]:
        """Return the jobs of an API that have not ended."""
        return [job for job, document in self._jobs.of_api(api_name) if document["status"] not in FINAL_STATUSES]

    @property
    def _deployed(self) -> DeployedApis:
        from cortex_dask.apis import DeployedApis

        return DeployedApis(self._store)

    def _document(self, api: DeployedApi) -> dict[str, Any]:
        statuses = [document for _, document in self._jobs.of_api(api.name)]
        return api_document(api, f"{self._store.url}/apis/{api.name}", statuses)


def api_document(api: DeployedApi, endpoint: str, statuses: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return an API as Cortex' client gave it."""
    return {
        "spec": {**api.spec, "id": api.api_id},
        "endpoint": endpoint,
        "created_time": api.created_time,
        "updated_time": api.updated_time,
        "api_versions": [dict(version) for version in api.versions],
        "batch_job_statuses": list(statuses),
    }


def _packed(api: ApiSpec, folder: Path) -> Target:
    from cortex_dask.target import CONFIG_FILES, from_spec

    folder = folder.expanduser().absolute()
    # The same project has the same hash, whichever way it is deployed.
    config_file = next((name for name in CONFIG_FILES if (folder / name).is_file()), None)
    return from_spec(api, folder, config_file=config_file)


def _without_path(api_spec: Mapping[str, Any]) -> ApiSpec:
    """Check the configuration of an API whose handler is a class, or may be one."""
    from cortex_dask.api_spec import parse_api

    if isinstance(api_spec, Mapping) and isinstance(handler := api_spec.get("handler", {}), Mapping):
        api_spec = {**api_spec, "handler": {"path": "handler.py", **handler}}
    return parse_api(api_spec)


def _packages(requirements: Sequence[str] | None, conda_packages: Sequence[str] | None) -> Any:
    """Return a project that only says what has to be installed; None where nothing has to."""
    import tempfile

    from cortex_dask import project

    files = {"requirements.txt": requirements, "conda-packages.txt": conda_packages}
    wanted = {name: list(lines) for name, lines in files.items() if lines}
    if not wanted:
        return None
    with tempfile.TemporaryDirectory(prefix="cortex-dask-") as folder:
        for name, lines in wanted.items():
            Path(folder, name).write_text("".join(f"{line}\n" for line in lines))
        return project.pack(folder)
