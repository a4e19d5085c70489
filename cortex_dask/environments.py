"""Environments: where jobs are stored and where they run, by name, kept in Dask's configuration.

::

    cortex-dask:
      default: production
      environments:
        production: {store: "s3://bucket/cortex", cluster: "tls://scheduler:8786"}

Dask reads this from its configuration files and from variables (``DASK_CORTEX_DASK__DEFAULT=production``,
``DASK_CORTEX_DASK__ENVIRONMENTS__PRODUCTION__STORE=…``). The functions that change environments write
``cortex-dask.yaml`` in the user's folder of Dask's configuration. The environment ``local`` is always there: its store
is a folder of the user's data, its cluster this machine; ``cortex-dask.store``, ``cortex-dask.cluster`` and so on
override these.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cortex_dask.dask_config import configuration_files, configuration_places
from cortex_dask.errors import SpecError
from cortex_dask.formatting import nearest, shown
from cortex_dask.spec.yaml import load_yaml

#: The name of the environment that is always there.
LOCAL = "local"

_SECTION = "cortex-dask"
_SPELLINGS = (_SECTION, "cortex_dask")  # Dask takes both; variables give the second
_FILE = "cortex-dask.yaml"
_KEYS = ("store", "cluster", "cluster_options", "gateway")
_NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9_-]{0,61}[A-Za-z0-9])?")


@dataclass(frozen=True, slots=True)
class Environment:
    """Where jobs are stored, and where they run."""

    name: str
    store: str  # a local path or fsspec URL
    cluster: str = "local"
    is_default: bool = False
    cluster_options: dict[str, Any] = field(default_factory=dict)  # how the cluster is made
    gateway: dict[str, Any] = field(default_factory=dict)  # ``options``: what a site calls cpu, memory, gpu, image, env


def current(name: str | None = None) -> Environment:
    """Return an environment.

    Parameters
    ----------
    name : str, optional
        Its name; None: the default one.

    Raises
    ------
    SpecError
        If there is none of that name, or the configuration of it cannot be used.
    """
    section = _section()
    environments = _environments(section)
    default = _default(section)
    wanted = default if name is None else name
    found = _find(wanted, environments)
    if found is None:
        near = nearest(wanted, environments)
        hint = f"did you mean {near}? " if near else ""
        says = f"the default environment {shown(wanted)}, as Dask's configuration names it," if name is None else ""
        raise SpecError(
            f"{says or f'the environment {shown(wanted)}'} does not exist; {hint}known are {', '.join(environments)}; "
            "make one with: cortex-dask env configure NAME --store URL"
        )
    return _environment(found, environments[found], is_default=found == _find(default, environments))


def list_all() -> list[Environment]:
    """Return all environments, sorted by name, ``local`` first."""
    section = _section()
    environments = _environments(section)
    default = _find(_default(section), environments)
    names = sorted(environments, key=lambda name: (name != LOCAL, name))
    return [_environment(name, environments[name], is_default=name == default) for name in names]


def configure(
    name: str, store: str, *, cluster: str | None = None, cluster_options: Mapping[str, Any] | None = None
) -> Environment:
    """Make an environment, or change one.

    Parameters
    ----------
    name : str
        Letters, digits, dashes and underscores.
    store : str
        The folder for APIs and jobs: a local path or any fsspec URL. A relative path is made absolute.
    cluster : str, optional
        Where jobs run: ``local``, ``inline``, ``gateway``, ``kubernetes``, or a scheduler's address; None: as it was,
        else ``local``.
    cluster_options : mapping, optional
        How that cluster is made; None: as it was.

    Raises
    ------
    SpecError
        If the name or the store cannot be used, or the configuration cannot be written.
    """
    if not _NAME.fullmatch(name):
        raise SpecError(
            f"the environment's name {shown(name)} cannot be used; allowed are at most 63 letters, digits, dashes and "
            "underscores, with a letter or digit at both ends"
        )
    if not store.strip():
        raise SpecError("the environment's store is empty; name a folder or a URL such as s3://bucket/cortex")
    if "://" not in store:
        store = str(Path(store).expanduser().absolute())
    with _editing() as section:
        environments = section["environments"]
        known = _find(name, environments) or name
        before = environments.get(known)
        kept = before if isinstance(before, Mapping) else {}
        changed = {"store": store, "cluster": cluster or kept.get("cluster") or "local"}
        if cluster_options is not None:
            changed["cluster_options"] = dict(cluster_options)
        environments[known] = {**kept, **changed}
    return current(name)


def set_default(name: str) -> Environment:
    """Make an environment the default one.

    Raises
    ------
    SpecError
        If there is none of that name.
    """
    found = current(name)
    with _editing() as section:
        section["default"] = found.name
    return current(name)


def rename(old: str, new: str) -> Environment:
    """Give an environment another name; it stays the default one if it was.

    Raises
    ------
    SpecError
        If there is no environment ``old``, it is not in the user's own file, or there is a ``new`` one already.
    """
    before = current(old)
    if not _NAME.fullmatch(new):
        raise SpecError(
            f"the environment's name {shown(new)} cannot be used; allowed are letters, digits, dashes and underscores"
        )
    if new in _environments(_section()):
        raise SpecError(f"there is an environment {new} already; delete it first, or choose another name")
    with _editing() as section:
        environments = section["environments"]
        _must_hold(environments, before.name)
        environments[new] = environments.pop(before.name)
        if before.is_default:
            section["default"] = new
    return current(new)


def delete(name: str) -> None:
    """Forget an environment; its store is left as it is. If it was the default one, ``local`` becomes that.

    Raises
    ------
    SpecError
        If there is none of that name, or it is not in the user's own file.
    """
    before = current(name)
    with _editing() as section:
        environments = section["environments"]
        _must_hold(environments, before.name)
        del environments[before.name]
        if before.is_default:
            section.pop("default", None)


# Dask's configuration -------------------------------------------------------------------------------------------------


def _section() -> dict[str, Any]:
    if "dask" not in sys.modules and not _may_be_configured():
        return {}
    import dask.config  # a tenth of a second and more, so not before it is needed

    section = dask.config.get(_SECTION, default={})
    if not isinstance(section, Mapping):
        raise SpecError(f"{_SECTION} in Dask's configuration is {shown(section)}; a mapping is needed")
    return dict(section)


def _may_be_configured() -> bool:
    """Return whether anything that Dask would read could speak of us.

    The places are those of ``dask.config``, and what stands in them is Dask's to read: here it is only looked whether
    there is something, as most people have nothing there, and to import Dask takes longer than many a job.
    """
    if any(name.startswith("DASK_") and name[5:].upper().startswith(("CORTEX", "INTERNAL")) for name in os.environ):
        return True
    try:
        places = configuration_places()
        return any(b"cortex" in file.read_bytes() for place in places for file in configuration_files(place))
    except OSError:
        return True  # Dask says what is wrong with it


def _environments(section: Mapping[str, Any]) -> dict[str, Any]:
    environments = section.get("environments") or {}
    if not isinstance(environments, Mapping):
        raise SpecError(
            f"{_SECTION}.environments in Dask's configuration is {shown(environments)}; a mapping is needed"
        )
    local = {
        "store": section.get("store") or _data_folder(),
        "cluster": section.get("cluster") or "local",
        "cluster_options": section.get("cluster_options") or section.get("cluster-options"),
        "gateway": section.get("gateway"),
    }
    return {LOCAL: local, **{str(name): value for name, value in environments.items()}}


def _default(section: Mapping[str, Any]) -> str:
    return str(section.get("default") or LOCAL)


def _find(name: str, environments: Mapping[str, Any]) -> str | None:
    """Return the name as it is written in the configuration: variables know neither capitals nor dashes."""
    if name in environments:
        return name
    simple = {str(known).lower().replace("_", "-"): str(known) for known in environments}
    return simple.get(name.lower().replace("_", "-"))


def _environment(name: str, value: object, *, is_default: bool) -> Environment:
    where = f"{_SECTION}.environments.{name} in Dask's configuration"
    if not isinstance(value, Mapping):
        raise SpecError(f"{where} is {shown(value)}; a mapping with the keys store and cluster is needed")
    for key in value:
        if key not in _KEYS:
            near = nearest(str(key), _KEYS)
            hint = f"did you mean {near}? " if near else ""
            raise SpecError(f"{where} has the unknown key {shown(key)}; {hint}known keys are {', '.join(_KEYS)}")
    store, cluster = value.get("store"), value.get("cluster") or "local"
    if store is None and name == LOCAL:
        store = _data_folder()
    if not isinstance(store, str) or not store:
        raise SpecError(f"{where} has the store {shown(store)}; a path or URL is needed")
    if not isinstance(cluster, str):
        raise SpecError(
            f"{where} has the cluster {shown(cluster)}; local, inline, gateway, kubernetes or a scheduler's address is "
            "needed"
        )
    mappings = {key: value.get(key) or {} for key in ("cluster_options", "gateway")}
    for key, mapping in mappings.items():
        if not isinstance(mapping, Mapping):
            raise SpecError(f"{where} has the {key} {shown(mapping)}; a mapping is needed")
    return Environment(name, store, cluster, is_default, dict(mappings["cluster_options"]), dict(mappings["gateway"]))


def _data_folder() -> str:
    """Return the folder for the user's own jobs: in XDG's data folder, or where macOS has it."""
    if base := os.environ.get("XDG_DATA_HOME"):
        return str(Path(base).absolute() / "cortex-dask")
    with contextlib.suppress(RuntimeError):
        home = Path.home()
        return str(
            home / ("Library/Application Support" if sys.platform == "darwin" else ".local/share") / "cortex-dask"
        )
    return str(Path(tempfile.gettempdir()) / f"cortex-dask-{os.getuid()}" / "data")


def _must_hold(environments: Mapping[str, Any], name: str) -> None:
    if name not in environments:
        where = (
            "is always there"
            if name == LOCAL
            else f"does not stand in {_user_file()} but elsewhere in Dask's configuration"
        )
        raise SpecError(f"the environment {name} {where}, so it cannot be renamed or deleted here")


def _user_file() -> Path:
    import dask.config

    path = Path(dask.config.PATH).expanduser()
    return path if path.suffix in (".yaml", ".yml", ".json") else path / _FILE


@contextlib.contextmanager
def _editing() -> Iterator[dict[str, Any]]:
    """Hand out the section of the user's file, and write it when the block ends without an error."""
    import dask.config

    file = _user_file()
    document = load_yaml(file) if file.exists() else {}
    if not isinstance(document or {}, dict):
        raise SpecError(f"{file} holds {shown(document)}; a mapping is needed")
    document = dict(document or {})
    key = next((spelling for spelling in _SPELLINGS if spelling in document), _SECTION)
    section = document.get(key) or {}
    if not isinstance(section, dict) or not isinstance(section.get("environments") or {}, dict):
        raise SpecError(f"{file}: {key} and the environments in it must be mappings")
    section = document[key] = {**section, "environments": dict(section.get("environments") or {})}
    yield section
    _write(file, document)
    # Files and variables are read anew, for this section only: the process may have set others itself.
    collected = dask.config.collect()
    for spelling in _SPELLINGS:
        dask.config.config.pop(spelling, None)
        if spelling in collected:
            dask.config.config[spelling] = collected[spelling]


def _write(file: Path, document: Mapping[str, Any]) -> None:
    """Replace a file, whole or not at all."""
    import yaml

    text = yaml.safe_dump(document, sort_keys=False, allow_unicode=True)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as stream:
                stream.write(text)
            Path(temporary).replace(file)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise SpecError(f"{file} cannot be written: {error.strerror}") from None
