"""Deployed APIs: configurations and handlers that lie in an environment's store, by name, ready to be submitted to.

=================================  =================================================================================
``apis/<name>/api.json``           which version is the current one, and which there have been; makes the API exist
``apis/<name>/<api id>/``          a version: ``version.json``, and ``project.tar.gz``, ``handler.pkl`` or both
=================================  =================================================================================

The id of a version is a hash of what it holds, so deploying the same again changes nothing. A job takes a copy of its
version along: what is deployed or deleted later does not concern it.
"""

from __future__ import annotations

import datetime
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import orjson

from cortex_dask import project
from cortex_dask.api_spec import ApiSpec, parse_api
from cortex_dask.errors import JobNotFoundError
from cortex_dask.io.settings import HandlerSettings
from cortex_dask.io.store import Store
from cortex_dask.target import Target
from cortex_dask.wording import nearest, shown

__all__ = ["Change", "DeployedApi", "DeployedApis"]

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


class DeployedApis:
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
            archive = project.Archive(settings.project, data, self._store.url, (), (), version.size)
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
