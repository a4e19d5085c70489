"""The deployed APIs of an environment, as the client offers them: deploy, patch, look at, delete."""

from __future__ import annotations

import datetime
import os
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import orjson

from cortex_dask.errors import JobNotFoundError, SpecError
from cortex_dask.formatting import nearest, shown
from cortex_dask.io.job.settings import HandlerSettings
from cortex_dask.io.job.status import FINAL_STATUSES
from cortex_dask.io.store.store import Store
from cortex_dask.project import archive as project_archive
from cortex_dask.spec.api import ApiSpec, parse_api
from cortex_dask.spec.target import Target

if TYPE_CHECKING:
    from cortex_dask.catalog import Catalog
    from cortex_dask.job import Job
    from cortex_dask.spec.api import ApiSpec
    from cortex_dask.spec.target import Target

_NAME = re.compile(r"[a-z0-9-]{1,63}")  # what may be one: nobody asks the store for an API "../x"
_STOPPERS = 16  # jobs that are stopped at a time
_MESSAGES = {"created": "created {}", "updated": "updated {}", "unchanged": "{} is up to date"}


class ApiClient:
    """The part of :class:`cortex_dask.Client` that is about deployed APIs.

    The documents that it returns have the keys that Cortex' client gave them: ``spec``, ``endpoint`` (the place in the
    store: nothing listens), ``api_versions``, ``batch_job_statuses``; and ours beside them.
    """

    _store: Store
    _jobs: Catalog

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
        from cortex_dask.spec.api import parse_api
        from cortex_dask.spec.target import find_apis, from_spec

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
        from cortex_dask.spec.target import from_class_spec

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
        from cortex_dask.spec.target import from_archive

        api = _without_path(api_spec)
        before = self._deployed.target(api.name)
        if before.pickled is None:
            from cortex_dask.spec.api import parse_api

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
        from cortex_dask.runtime import job_context

        self._deployed.get(api_name)
        self._deployed.delete(api_name, keep_cache=keep_cache)  # first, so that nobody submits to it any more
        here = job_context.current()
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
    def _deployed(self) -> Deployments:
        return Deployments(self._store)

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
    from cortex_dask.spec.target import CONFIG_FILES, from_spec

    folder = folder.expanduser().absolute()
    # The same project has the same hash, whichever way it is deployed.
    config_file = next((name for name in CONFIG_FILES if (folder / name).is_file()), None)
    return from_spec(api, folder, config_file=config_file)


def _without_path(api_spec: Mapping[str, Any]) -> ApiSpec:
    """Check the configuration of an API whose handler is a class, or may be one."""
    from cortex_dask.spec.api import parse_api

    if isinstance(api_spec, Mapping) and isinstance(handler := api_spec.get("handler", {}), Mapping):
        api_spec = {**api_spec, "handler": {"path": "handler.py", **handler}}
    return parse_api(api_spec)


def _packages(requirements: Sequence[str] | None, conda_packages: Sequence[str] | None) -> Any:
    """Return a project that only says what has to be installed; None where nothing has to."""
    import tempfile

    from cortex_dask.project import archive

    files = {"requirements.txt": requirements, "conda-packages.txt": conda_packages}
    wanted = {name: list(lines) for name, lines in files.items() if lines}
    if not wanted:
        return None
    with tempfile.TemporaryDirectory(prefix="cortex-dask-") as folder:
        for name, lines in wanted.items():
            Path(folder, name).write_text("".join(f"{line}\n" for line in lines))
        return archive.pack(folder)


Change = Literal["created", "updated", "unchanged"]

_READERS = 16  # concurrent reads: they hide the latency of object stores
_PROJECT, _PICKLED, _VERSION, _API = "project.tar.gz", "handler.pkl", "version.json", "api.json"


@dataclass(frozen=True, slots=True)
class DeployedApi:
    """An API, in its current version."""

    name: str
    api_id: str
    spec: dict[str, Any]  # what ``cortex.yaml`` says of it
    created_time: str  # ISO 8601, UTC
    updated_time: str
    versions: tuple[dict[str, str], ...]  # ``api_id`` and ``last_updated``, the newest first
    kind: str = "BatchAPI"


@dataclass(frozen=True, slots=True)
class _Version:
    """What a version's folder says of it."""

    spec: dict[str, Any]
    handler: dict[str, Any]  # HandlerSettings
    folder: str | None = None  # what relative paths in the submission's defaults are relative to
    size: int = 0  # of the project, uncompressed, in bytes
    files: tuple[str, ...] = field(default=(), repr=False)

    @classmethod
    def of(cls, api: ApiSpec, target: Target) -> _Version:
        archive = target.archive
        return cls(
            spec=api.model_dump(mode="json", exclude_none=True, exclude_unset=True, by_alias=True),
            handler=asdict(target.handler),
            folder=str(target.folder) if target.folder is not None and target.defaults.model_fields_set else None,
            size=0 if archive is None else archive.size,
            files=() if archive is None else tuple(file.name for file in archive.files),
        )


class Deployments:
    """The deployed APIs of one environment.

    Parameters
    ----------
    store : Store
        The environment's store.
    """

    def __init__(self, store: Store) -> None:
        self._store = store

    def names(self) -> list[str]:
        """Return the names of the APIs that are deployed."""
        return [name for name in sorted(self._store.children("apis")) if self._store.exists(f"apis/{name}/{_API}")]

    def all(self) -> list[DeployedApi]:
        """Return the APIs that are deployed, by name."""
        names = sorted(self._store.children("apis"))
        if not names:
            return []
        with ThreadPoolExecutor(min(_READERS, len(names))) as pool:
            return [api for api in pool.map(self.find, names) if api is not None]

    def find(self, name: str) -> DeployedApi | None:
        """Return an API, or None."""
        value = self._read(f"apis/{name}/{_API}")
        if value is None:
            return None
        version = self._version(name, value["api_id"])
        return DeployedApi(
            name,
            value["api_id"],
            version.spec,
            value["created_time"],
            value["updated_time"],
            tuple(value["versions"]),
        )

    def get(self, name: str) -> DeployedApi:
        """Return an API.

        Raises
        ------
        JobNotFoundError
            If there is none of that name.
        """
        found = self.find(name)
        if found is None:
            names = self.names()
            near = nearest(name, names)
            hint = f"did you mean {near}? " if near else ""
            raise JobNotFoundError(
                f"no API {shown(name)} is deployed in {self._store.url}; {hint}"
                f"deployed there: {', '.join(names) or 'none'}"
            )
        return found

    def spec(self, name: str, api_id: str) -> dict[str, Any] | None:
        """Return the configuration of a version; None where it is not known any more."""
        value = self._read(f"apis/{name}/{api_id}/{_VERSION}")
        return None if value is None else dict(value["spec"])

    def target(self, name: str) -> Target:
        """Return what a submission to an API needs.

        Raises
        ------
        JobNotFoundError
            If there is none of that name.
        """
        api = self.get(name)
        version = self._version(name, api.api_id)
        settings = HandlerSettings(**{**version.handler, "sys_path": tuple(version.handler.get("sys_path", ()))})
        spec = parse_api(version.spec)
        folder = f"apis/{name}/{api.api_id}"
        archive = None
        if settings.project is not None:
            data = self._store.read(f"{folder}/{_PROJECT}")
            archive = project_archive.Archive(settings.project, data, self._store.url, (), (), version.size)
        return Target(
            name,
            api.api_id,
            settings,
            config=spec.handler.config,
            compute=spec.compute,
            defaults=spec.job,
            folder=Path(version.folder) if version.folder else None,
            archive=archive,
            pickled=self._store.read(f"{folder}/{_PICKLED}") if settings.kind == "class" else None,
        )

    def deploy(self, api: ApiSpec, target: Target) -> tuple[DeployedApi, Change]:
        """Make a version the current one.

        Parameters
        ----------
        api : ApiSpec
            The configuration.
        target : Target
            What was made of it: the packed project, or the pickled class.

        Returns
        -------
        DeployedApi, str
            The API, and whether it was ``created``, ``updated``, or left ``unchanged`` because it is just this.
        """
        before = self.find(api.name)
        folder = f"apis/{api.name}/{target.api_id}"
        version = orjson.dumps(asdict(_Version.of(api, target)), option=orjson.OPT_INDENT_2)
        if before is not None and before.api_id == target.api_id and self._same(folder, version):
            return before, "unchanged"
        if target.archive is not None:
            self._store.write(f"{folder}/{_PROJECT}", target.archive.data)
        if target.pickled is not None:
            self._store.write(f"{folder}/{_PICKLED}", target.pickled)
        self._store.write(f"{folder}/{_VERSION}", version)
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
        older = [item for item in (before.versions if before else ()) if item["api_id"] != target.api_id]
        pointer = {
            "name": api.name,
            "kind": api.kind,
            "api_id": target.api_id,
            "created_time": before.created_time if before else now,
            "updated_time": now,
            "versions": [{"api_id": target.api_id, "last_updated": now}, *older],
        }
        # Last: whoever reads it finds all that it speaks of.
        self._store.write(f"apis/{api.name}/{_API}", orjson.dumps(pointer, option=orjson.OPT_INDENT_2))
        return self.get(api.name), "created" if before is None else "updated"

    def delete(self, name: str, *, keep_cache: bool = False) -> None:
        """Remove an API; its jobs stay.

        Parameters
        ----------
        name : str
            The API's name.
        keep_cache : bool
            Whether its packed versions stay in the store.
        """
        self._store.delete(f"apis/{name}/{_API}")  # first: half an API must never be found
        if not keep_cache:
            self._store.delete_tree(f"apis/{name}")

    def _same(self, folder: str, version: bytes) -> bool:
        try:
            return self._store.read(f"{folder}/{_VERSION}") == version
        except FileNotFoundError:
            return False

    def _version(self, name: str, api_id: str) -> _Version:
        value = self._read(f"apis/{name}/{api_id}/{_VERSION}")
        if value is None:
            raise JobNotFoundError(
                f"the API {name} is damaged: {self._store.url}/apis/{name}/{api_id}/{_VERSION} is missing; "
                "deploy it again"
            )
        return _Version(value["spec"], value["handler"], value.get("folder"), value.get("size", 0))

    def _read(self, name: str) -> dict[str, Any] | None:
        try:
            value: dict[str, Any] = orjson.loads(self._store.read(name))
        except FileNotFoundError:
            return None
        return value
