"""The deployed APIs of an environment: versions of a handler and its configuration, submitted to by name.

In the store, ``apis/<name>/api.json`` names an API's current version and the earlier ones; ``apis/<name>/<version>/``
holds one of them.
"""

from __future__ import annotations

import datetime
import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import orjson

from cortex_dask.catalog import Catalog
from cortex_dask.errors import JobNotFoundError, SpecError
from cortex_dask.formatting import did_you_mean, shown
from cortex_dask.io.job.settings import HandlerSettings
from cortex_dask.io.job.status import FINAL_STATUSES
from cortex_dask.io.store.store import Store
from cortex_dask.job import Job
from cortex_dask.project.archive import Archive, pack
from cortex_dask.runtime import job_context
from cortex_dask.spec.api import ApiSpec, parse_api
from cortex_dask.spec.target import CONFIG_FILES, Target, find_apis, from_archive, from_class_spec, from_spec

Change = Literal["created", "updated", "unchanged"]

_MESSAGES = {"created": "created {}", "updated": "updated {}", "unchanged": "{} is up to date"}
_NAME = re.compile(r"[a-z0-9-]{1,63}")  # the store is not asked for any other name, such as "../x"
_CONCURRENT_STOPS = 16
_CONCURRENT_READS = 16  # hides the latency of object stores
_PROJECT, _PICKLED, _VERSION, _API = "project.tar.gz", "handler.pkl", "version.json", "api.json"


class Deployments:
    """Deploys, describes and deletes the APIs of an environment.

    Its documents have the keys of Cortex' client (``spec``, ``endpoint``, ``api_versions``, ``batch_job_statuses``, …)
    and ours beside them; ``endpoint`` is the place in the store, where nothing listens.
    """

    def __init__(self, store: Store, catalog: Catalog) -> None:
        self._store = store
        self._catalog = catalog
        self._versions = ApiVersions(store)

    def deploy(
        self, api_spec: Mapping[str, Any] | str | os.PathLike[str], project_dir: str | os.PathLike[str] | None = None
    ) -> dict[str, Any]:
        """Deploy an API: a mapping with its project directory, or a project with one API."""
        if not isinstance(api_spec, Mapping):
            file, apis = find_apis(api_spec)
            if len(apis) > 1:
                raise SpecError(f"{file} has {len(apis)} APIs; give the one to deploy as a mapping, with project_dir")
            return self.deploy_target(apis[0], from_spec(apis[0], file.parent, config_file=file.name))
        if project_dir is None:
            raise SpecError("project_dir: is missing; name the folder that holds the file handler.path")
        api = parse_api(api_spec)
        return self.deploy_target(api, _pack_project(api, Path(project_dir)))

    def deploy_class(
        self,
        api_spec: Mapping[str, Any],
        handler: type,
        requirements: Sequence[str] | None = None,
        conda_packages: Sequence[str] | None = None,
    ) -> dict[str, Any]:
        """Deploy an API whose handler is a class, pickled."""
        if not isinstance(handler, type):
            raise SpecError(f"handler: found a value of type {type(handler).__name__}; a class is needed")
        api = _parse_without_path(api_spec)
        return self.deploy_target(api, from_class_spec(handler, api, pack_dependencies(requirements, conda_packages)))

    def patch(self, api_spec: Mapping[str, Any]) -> dict[str, Any]:
        """Give a deployed API another configuration; its project or class stays."""
        api = _parse_without_path(api_spec)
        before = self._versions.target(api.name)
        if before.pickled is None:
            api = parse_api(api_spec)
        return self.deploy_target(api, from_archive(api, before))

    def deploy_target(self, api: ApiSpec, target: Target) -> dict[str, Any]:
        """Deploy what is checked and packed already."""
        deployed, change = self._versions.add(api, target)
        message = _MESSAGES[change].format(f"{deployed.name} ({deployed.kind})")
        return {"api": self._document(deployed), "message": message, "error": "", "change": change}

    def describe(self, name: str) -> dict[str, Any]:
        """Return the document of an API with the statuses of its jobs."""
        return self._document(self._versions.get(name))

    def describe_all(self) -> list[dict[str, Any]]:
        """Return the documents of all deployed APIs."""
        return [self._document(api) for api in self.list_apis()]

    def list_apis(self) -> list[DeployedApi]:
        """Return all deployed APIs, without their jobs."""
        return self._versions.current()

    def spec(self, name: str, api_id: str) -> dict[str, Any]:
        """Return the configuration of a version with its id; only its name where the version was deleted."""
        known = self._versions.spec(name, api_id) or {"name": name, "kind": "BatchAPI"}
        return {**known, "id": api_id}

    def find_target(self, name: str) -> Target | None:
        """Return what a submission to the API of this name needs; None if none is deployed."""
        return self._versions.target(name) if self.is_deployed(name) else None

    def choose_target(self, target: Any) -> Any:
        """Return the deployed API that a submission's target names, unless it is the path of a project."""
        if not isinstance(target, str):
            return target
        path = Path(target).expanduser()
        if path.is_file() or any((path / name).is_file() for name in CONFIG_FILES):
            return target
        return self.find_target(target) or target  # a path that does not exist is refused when it is resolved

    def is_deployed(self, name: str) -> bool:
        """Tell whether an API of this name is deployed."""
        return _NAME.fullmatch(name) is not None and self._versions.find(name) is not None

    def running_jobs(self, name: str) -> list[Job]:
        """Return the jobs of an API that have not ended."""
        return [job for job, document in self._catalog.of_api(name) if document["status"] not in FINAL_STATUSES]

    def delete(self, name: str, *, keep_cache: bool = False) -> None:
        """Delete an API and stop its jobs, but for the one whose handler calls this."""
        self._versions.get(name)
        self._versions.remove(name, keep_cache=keep_cache)  # before its jobs are stopped, so that no new ones come
        here = job_context.current()
        running = [job for job in self.running_jobs(name) if here is None or job.url != here.job_url]
        if running:
            with ThreadPoolExecutor(min(_CONCURRENT_STOPS, len(running))) as pool:
                list(pool.map(lambda job: job.stop(reason="its API was deleted"), running))  # raises what stop raised

    def _document(self, api: DeployedApi) -> dict[str, Any]:
        return {
            "spec": {**api.spec, "id": api.api_id},
            "endpoint": f"{self._store.url}/apis/{api.name}",
            "created_time": api.created_time,
            "updated_time": api.updated_time,
            "api_versions": [dict(version) for version in api.versions],
            "batch_job_statuses": [document for _, document in self._catalog.of_api(api.name)],
        }


@dataclass(frozen=True, slots=True)
class DeployedApi:
    """An API in its current version."""

    name: str
    api_id: str
    spec: dict[str, Any]  # its entry in ``cortex.yaml``
    created_time: str  # ISO 8601, UTC
    updated_time: str
    versions: tuple[dict[str, str], ...]  # ``api_id`` and ``last_updated``, the newest first
    kind: str = "BatchAPI"


@dataclass(frozen=True, slots=True)
class _Version:
    """The contents of ``version.json`` in a version's folder."""

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


class ApiVersions:
    """The versions of APIs, as files in an environment's store."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def names(self) -> list[str]:
        """Return the names of the APIs that are deployed."""
        return [name for name in sorted(self._store.children("apis")) if self._store.exists(f"apis/{name}/{_API}")]

    def current(self) -> list[DeployedApi]:
        """Return the APIs that are deployed, by name."""
        names = sorted(self._store.children("apis"))
        if not names:
            return []
        with ThreadPoolExecutor(min(_CONCURRENT_READS, len(names))) as pool:
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
        """Return an API; raise JobNotFoundError, with the names that are there, if it is not deployed."""
        found = self.find(name)
        if found is None:
            names = self.names()
            raise JobNotFoundError(
                f"no API {shown(name)} is deployed in {self._store.url}; {did_you_mean(name, names)}"
                f"deployed there: {', '.join(names) or 'none'}",
                api_name=name,
            )
        return found

    def spec(self, name: str, api_id: str) -> dict[str, Any] | None:
        """Return the configuration of a version; None if it was deleted."""
        value = self._read(f"apis/{name}/{api_id}/{_VERSION}")
        return None if value is None else dict(value["spec"])

    def target(self, name: str) -> Target:
        """Return what a submission to an API needs; raise JobNotFoundError if it is not deployed."""
        api = self.get(name)
        version = self._version(name, api.api_id)
        settings = HandlerSettings.from_json(version.handler)
        spec = parse_api(version.spec)
        folder = f"apis/{name}/{api.api_id}"
        archive = None
        if settings.project is not None:
            data = self._store.read(f"{folder}/{_PROJECT}")
            archive = Archive(settings.project, data, self._store.url, (), (), version.size)
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

    def add(self, api: ApiSpec, target: Target) -> tuple[DeployedApi, Change]:
        """Make a version the current one, and return the API and what that changed."""
        before = self.find(api.name)
        folder = f"apis/{api.name}/{target.api_id}"
        version = orjson.dumps(asdict(_Version.of(api, target)), option=orjson.OPT_INDENT_2)
        if before is not None and before.api_id == target.api_id and self._is_stored(folder, version):
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
        # Last, so that a reader of it finds every file that it names.
        self._store.write(f"apis/{api.name}/{_API}", orjson.dumps(pointer, option=orjson.OPT_INDENT_2))
        return self.get(api.name), "created" if before is None else "updated"

    def remove(self, name: str, *, keep_cache: bool = False) -> None:
        """Remove an API, and its packed versions unless the cache is kept."""
        self._store.delete(f"apis/{name}/{_API}")  # first: half an API must never be found
        if not keep_cache:
            self._store.delete_tree(f"apis/{name}")

    def _is_stored(self, folder: str, version: bytes) -> bool:
        try:
            return self._store.read(f"{folder}/{_VERSION}") == version
        except FileNotFoundError:
            return False

    def _version(self, name: str, api_id: str) -> _Version:
        value = self._read(f"apis/{name}/{api_id}/{_VERSION}")
        if value is None:
            raise JobNotFoundError(
                f"the API {name} is damaged: {self._store.url}/apis/{name}/{api_id}/{_VERSION} is missing; "
                "deploy it again",
                api_name=name,
            )
        return _Version(value["spec"], value["handler"], value.get("folder"), value.get("size", 0))

    def _read(self, name: str) -> dict[str, Any] | None:
        try:
            value: dict[str, Any] = orjson.loads(self._store.read(name))
        except FileNotFoundError:
            return None
        return value


def _pack_project(api: ApiSpec, folder: Path) -> Target:
    folder = folder.expanduser().absolute()
    # The configuration file is left out, so that a project has one hash whether its API is a mapping or in the file.
    config_file = next((name for name in CONFIG_FILES if (folder / name).is_file()), None)
    return from_spec(api, folder, config_file=config_file)


def _parse_without_path(api_spec: Mapping[str, Any]) -> ApiSpec:
    """Check the configuration of an API that may have a class as its handler, and so no ``handler.path``."""
    if isinstance(api_spec, Mapping) and isinstance(handler := api_spec.get("handler", {}), Mapping):
        api_spec = {**api_spec, "handler": {"path": "handler.py", **handler}}
    return parse_api(api_spec)


def pack_dependencies(requirements: Sequence[str] | None, conda_packages: Sequence[str] | None) -> Archive | None:
    """Return a project that holds only dependency files; None without any."""
    files = {"requirements.txt": requirements, "conda-packages.txt": conda_packages}
    given = {name: list(lines) for name, lines in files.items() if lines}
    if not given:
        return None
    with tempfile.TemporaryDirectory(prefix="cortex-dask-") as folder:
        for name, lines in given.items():
            Path(folder, name).write_text("".join(f"{line}\n" for line in lines))
        return pack(folder)
