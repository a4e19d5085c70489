"""Versions on client, scheduler and workers, compared before anything is sent; and who can read the job directory.

Which difference breaks a job, and which is only told, follows from what travels:

========================  =====================================================================================
``dask``, ``distributed`` Client, scheduler and workers speak a protocol without any promise across releases; Dask's
                          manual asks for the same versions everywhere ("Manage Environments"). Another release
                          (year and month) breaks; another patch of the same release is told.
``cortex_dask``           A split is a task by name, with the job's settings as JSON. Another version breaks.
``python``                A handler class that is pickled by value is bytecode, which fits one minor version
                          (cloudpickle: "the exact same version of Python"): another one breaks. A project directory
                          is source: a difference is told.
``msgpack``               The frames of the protocol. Another major version breaks, as 1.0 changed what text is.
``cloudpickle``           Makes the pickle of a class. Another major version breaks it; with a project nothing.
========================  =====================================================================================

The versions are asked for with Dask's own request, which sends no code, as bytecode of another Python could end a
scheduler. Only where those fit, a function of ours is called by name.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import os
import platform
import socket
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from cortex_dask import __version__
from cortex_dask.errors import ClusterError, CortexDaskError
from cortex_dask.io.job.directory import JobDirectory
from cortex_dask.io.job.settings import JobSettings
from cortex_dask.runtime.timeout import call_with_timeout

if TYPE_CHECKING:
    from distributed import Client


_log = logging.getLogger(__name__)

#: What is compared, in the order of the table.
PACKAGES = ("python", "dask", "distributed", "cortex_dask", "cloudpickle", "msgpack")
_ANSWER_SECONDS = 20.0  # a host that hangs is left out of the comparison
_READ_SECONDS = 15.0  # for the job directory, from one host


@dataclass(frozen=True, slots=True)
class Host:
    """The versions in one process; None where a package is missing, "" where it is not known.

    Attributes
    ----------
    role : {"client", "scheduler", "worker"}
        What it does.
    name : str
        Its address.
    versions : mapping of str to str
        By the names in :data:`PACKAGES`.
    """

    role: str
    name: str
    versions: Mapping[str, str | None]


@dataclass(frozen=True, slots=True)
class Findings:
    """What a comparison has found, as clauses without a capital or an end."""

    broken: tuple[str, ...] = ()
    different: tuple[str, ...] = ()


def here() -> dict[str, str | None]:
    """Return the versions in this process."""
    return {
        "python": platform.python_version(),
        "cortex_dask": __version__,
        **{name: _installed(name) for name in PACKAGES if name not in ("python", "cortex_dask")},
    }


def compare(hosts: Sequence[Host], *, pickled_by: str | None = None) -> Findings:
    """Compare each host with the first one, by the rules above.

    Parameters
    ----------
    hosts : sequence of Host
        The client comes first.
    pickled_by : str, optional
        The version of Python that pickled the handler's class; None: the handler is a project directory.
    """
    first, *others = hosts
    broken: list[str] = []
    different: list[str] = []
    for name in PACKAGES:
        wanted, asked = first.versions.get(name), others
        if name == "python" and pickled_by is not None:
            wanted, asked = pickled_by, [host for host in others if host.role == "worker"]  # nobody else loads it
        odd = sorted({(host.role, host.versions.get(name)) for host in asked if _differs(host, name, wanted)}, key=str)
        if not odd:
            continue
        breaks = any(_breaks(name, role, value, wanted, by_value=pickled_by is not None) for role, value in odd)
        first_words = f"{name} is {wanted or 'missing'} here and "
        if name == "python" and pickled_by is not None:
            first_words = f"the handler's class was pickled by Python {pickled_by}, and it is "
        (broken if breaks else different).append(first_words + _places(odd))
    return Findings(tuple(broken), tuple(different))


def table(hosts: Sequence[Host]) -> str:
    """Return the versions as a table, with one line for all workers that are alike."""
    alike: dict[tuple[str, tuple[str | None, ...]], list[str]] = {}
    for host in hosts:
        alike.setdefault((host.role, tuple(host.versions.get(name) for name in PACKAGES)), []).append(host.name)
    rows = [["", *PACKAGES]]
    for (role, versions), names in alike.items():
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        rows.append([f"{role} {names[0]}{more}", *("missing" if text is None else text or "?" for text in versions)])
    widths = [max(len(row[place]) for row in rows) for place in range(len(rows[0]))]
    lines = ("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows)
    return "\n".join(f"  {line}" for line in lines)


def check(client: Client, settings: JobSettings, job_url: str, *, scheduler_reads: bool = False) -> None:
    """Compare versions on a cluster, and let its hosts read the job directory.

    Parameters
    ----------
    client : distributed.Client
        A connected client.
    settings : JobSettings
        The job's.
    job_url : str
        The job directory.
    scheduler_reads : bool, default False
        Whether the scheduler's host has to read the job directory as well, because the coordinator will run there.

    Raises
    ------
    ClusterError
        If a difference breaks the job, or a host cannot read the job directory.
    """
    scout = Scout(client, job_url)
    try:
        hosts = scout.hosts()
    except TimeoutError:
        _log.warning(
            "the versions on the cluster were not compared: not all hosts answered within %g s", _ANSWER_SECONDS
        )
        return
    except OSError as error:  # connections that break are among them
        raise ClusterError(f"the Dask scheduler was lost while versions were compared: {error}") from error
    reports: dict[str, Any] = {}
    # One that speaks another protocol, or has bytecode that we have not, is told nothing further.
    if not compare(hosts).broken:
        reports = scout.reports(scheduler=True)
        hosts = [_reported(host, reports) for host in hosts]
    pickled_by = _pickled_by(settings)
    findings = compare(hosts, pickled_by=pickled_by)
    if findings.broken:
        raise ClusterError(
            f"the versions on the cluster do not fit, so nothing was sent to it: {'; '.join(findings.broken)}. "
            "Use the same environment, or the same image, everywhere:\n" + table(hosts)
        )
    if findings.different:
        _log.warning("versions differ on the cluster: %s", "; ".join(findings.different))
    roles = {host.name: host.role for host in hosts}
    for name, said in reports.items():
        role = roles.get(name, "worker")
        if isinstance(said, dict) and said["trouble"] and (role == "worker" or scheduler_reads):
            raise ClusterError(f"the {role} {name} (host {said['host']}) cannot read {said['trouble']}")


class Scout:
    """What the hosts of a cluster say about themselves; each question has a deadline.

    Parameters
    ----------
    client : distributed.Client
        A connected client.
    job_url : str
        The job directory that they try to read.
    """

    def __init__(self, client: Client, job_url: str) -> None:
        untyped: Any = client
        self._client = untyped
        self._job_url = job_url
        self._scheduler = str(untyped.scheduler.address)

    def hosts(self) -> list[Host]:
        """Return the versions that Dask knows of, the client's own first."""
        said = call_with_timeout(self._client.get_versions, _ANSWER_SECONDS)
        workers = sorted(said["workers"].items())
        return [
            Host("client", f"{socket.gethostname()} (process {os.getpid()})", here()),
            Host("scheduler", self._scheduler, _versions(said["scheduler"])),
            *(Host("worker", address, _versions(answer)) for address, answer in workers if answer),
        ]

    def reports(self, *, scheduler: bool = False) -> dict[str, Any]:
        """Call :func:`report` on the workers, and on the scheduler; errors are among the answers."""
        client, url = self._client, self._job_url
        said: dict[str, Any] = {}
        try:
            said.update(call_with_timeout(lambda: client.run(report, url, on_error="return"), _ANSWER_SECONDS))
            if scheduler:
                said[self._scheduler] = call_with_timeout(lambda: client.run_on_scheduler(report, url), _ANSWER_SECONDS)
        except TimeoutError:
            pass  # a worker that hangs says nothing, and gets no split that would not be lost
        except Exception as error:  # noqa: BLE001 - whatever the scheduler's host makes of a function that it lacks
            said[self._scheduler] = error
        return said


async def report(job_url: str) -> dict[str, Any]:
    """Return the version of this package in a process, and what keeps it from reading the job directory."""
    try:
        trouble = await asyncio.wait_for(asyncio.to_thread(_trouble, job_url), _READ_SECONDS)
    except TimeoutError:
        trouble = f"the job directory {job_url} within {_READ_SECONDS:.0f} s: is its store reachable from there?"
    return {"cortex_dask": __version__, "host": socket.gethostname(), "trouble": trouble}


def _trouble(job_url: str) -> str | None:
    try:
        JobDirectory(job_url).settings()
    except (CortexDaskError, OSError, ImportError, ValueError) as error:
        if "://" not in job_url and isinstance(error, LookupError):
            return (
                f"the job directory {job_url}: this is a local path, and the host has no such folder; give the "
                "environment a store that all hosts reach, e.g. s3://bucket/prefix or a shared file system"
            )
        return f"the job directory {job_url}: {type(error).__name__}: {error}"
    return None


# for workers that come later ------------------------------------------------------------------------------------------


def needed_versions(settings: JobSettings) -> dict[str, str | None]:
    """Return what a split says about the versions that it needs, for :func:`own_mismatch`."""
    return {
        "cortex_dask": __version__,
        "distributed": _installed("distributed"),
        "pickled_by": _pickled_by(settings),
    }


def own_mismatch(needed: Mapping[str, str | None]) -> str | None:
    """Return why this process, a worker that may have come in the middle of the job, cannot run its splits."""
    own = here()
    for name in ("cortex_dask", "distributed"):
        wanted = needed.get(name)
        if wanted is not None and _breaks(name, "worker", own[name], wanted, by_value=False):
            return _mismatch(name, own[name], wanted)
    pickled_by = needed.get("pickled_by")
    if pickled_by is not None and _breaks("python", "worker", own["python"], pickled_by, by_value=True):
        return _mismatch("python", own["python"], pickled_by)
    return None


def _mismatch(name: str, value: str | None, wanted: str) -> str:
    return (
        f"a worker on {socket.gethostname()} has {name} {value or '(missing)'}, and the job needs {wanted}: start "
        "workers with the same environment, or the same image, as the coordinator's; the job can be resumed"
    )


# the rules ------------------------------------------------------------------------------------------------------------


def _differs(host: Host, name: str, wanted: str | None) -> bool:
    value = host.versions.get(name, "")
    if value == "":
        return False
    if name == "python":  # patches of one minor version are alike; and the scheduler runs no handler
        return _minor(value) != _minor(wanted)
    return value != wanted


def _breaks(name: str, role: str, value: str | None, wanted: str | None, *, by_value: bool) -> bool:
    """Return whether a version that is not the wanted one breaks the job."""
    if value is None or wanted is None:
        return name in ("cortex_dask", "dask", "distributed")
    if name == "cortex_dask":
        return value != wanted
    if name in ("dask", "distributed"):
        return _minor(value) != _minor(wanted)
    if name == "python":
        return by_value and role == "worker" and _minor(value) != _minor(wanted)
    if name == "cloudpickle":
        return by_value and role == "worker" and _major(value) != _major(wanted)
    return name == "msgpack" and _major(value) != _major(wanted)


def _places(odd: Iterable[tuple[str, str | None]]) -> str:
    return ", ".join(f"{value or 'missing'} on {_WHERE[role]}" for role, value in odd)


_WHERE = {"scheduler": "the scheduler", "worker": "workers", "client": "the client"}


def _major(text: str | None) -> str:
    return (text or "").split(".")[0]


def _minor(text: str | None) -> str:
    return ".".join((text or "").split(".")[:2])


def _pickled_by(settings: JobSettings) -> str | None:
    if settings.handler.kind != "class":
        return None
    # Who coordinates is not always who has submitted.
    return str(settings.handler.extra.get("python") or platform.python_version())


# what the hosts answer ------------------------------------------------------------------------------------------------


def _versions(answer: Mapping[str, Any]) -> dict[str, str | None]:
    packages = answer["packages"]
    python = ".".join(str(packages.get("python") or "").split(".")[:3])
    return {
        "python": python,
        "cortex_dask": "",  # not what is installed counts, but what is imported
        **{name: packages.get(name) for name in PACKAGES if name not in ("python", "cortex_dask")},
    }


def _reported(host: Host, reports: Mapping[str, Any]) -> Host:
    said = reports.get(host.name)
    if said is None:
        return host
    value: str | None = said["cortex_dask"] if isinstance(said, dict) else _unusable(said)
    return Host(host.role, host.name, {**host.versions, "cortex_dask": value})


def _unusable(error: Exception) -> str | None:
    """Return what stands for the version where :func:`report` cannot be called; Dask hands on the words of errors."""
    words = str(error)
    if "No module named 'cortex_dask'" in words:
        return None
    return "another" if "cortex_dask" in words else f"unusable ({words})"


@functools.cache
def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
