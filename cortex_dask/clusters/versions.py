"""Versions on client, scheduler and workers, compared before anything is sent; and who can read the job directory.

Which difference breaks a job, and which is only a warning, follows from what travels: see :data:`RULES`. The versions
are asked for with Dask's own request, which sends no code, as bytecode of another Python could end a scheduler. Only
where those fit, a function of ours is called by name.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import os
import platform
import socket
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from cortex_dask import __version__
from cortex_dask.errors import ClusterError, CortexDaskError
from cortex_dask.formatting import table
from cortex_dask.io.job.directory import JobDirectory
from cortex_dask.io.job.settings import JobSettings
from cortex_dask.runtime.timeout import call_with_timeout

if TYPE_CHECKING:
    from distributed import Client

_log = logging.getLogger(__name__)

_ANSWER_SECONDS = 20.0  # a host that hangs is left out of the comparison
_READ_SECONDS = 15.0  # for the job directory, from one host
_ROLES = {"client": "the client", "scheduler": "the scheduler", "worker": "workers"}

Versions = Mapping[str, str | None]  # by package; None: missing, "": unknown


@dataclass(frozen=True, slots=True)
class Rule:
    """When two versions of a package fit together; a difference that does not break the job is a warning."""

    package: str
    parts: int | None  # how many numbers of the version have to be the same; None: all of it
    is_required: bool = False  # whether a host without it breaks the job
    is_for_pickles: bool = False  # whether it matters only to workers that load a class pickled by value
    ignores_patches: bool = False  # whether a difference after the second number is no warning either


#: In the order of the table that users see.
RULES = (
    # A class pickled by value is bytecode, which fits one minor version (cloudpickle: "the exact same version of
    # Python"). A project directory is source.
    Rule("python", parts=2, is_for_pickles=True, ignores_patches=True),
    # Client, scheduler and workers speak a protocol without any promise across releases (year and month); Dask's manual
    # asks for the same versions everywhere ("Manage Environments").
    Rule("dask", parts=2, is_required=True),
    Rule("distributed", parts=2, is_required=True),
    # A split is a task by name, with the job's settings as JSON.
    Rule("cortex_dask", parts=None, is_required=True),
    # Makes the pickle of a class.
    Rule("cloudpickle", parts=1, is_for_pickles=True),
    # The frames of the protocol; 1.0 changed what text is.
    Rule("msgpack", parts=1),
)
_RULES = {rule.package: rule for rule in RULES}


@dataclass(frozen=True, slots=True)
class Host:
    """The versions in one process."""

    role: str  # client, scheduler or worker
    name: str  # its address
    versions: Versions


@dataclass(frozen=True, slots=True)
class Differences:
    """What a comparison has found, as clauses."""

    broken: tuple[str, ...] = ()
    different: tuple[str, ...] = ()


def here() -> dict[str, str | None]:
    """Return the versions in this process."""
    own = {"python": platform.python_version(), "cortex_dask": __version__}
    return {rule.package: own.get(rule.package) or _installed(rule.package) for rule in RULES}


def compare(hosts: Sequence[Host], *, pickled_by: str | None = None) -> Differences:
    """Compare each host with the first one, which is the client.

    ``pickled_by`` is the version of Python that pickled the handler's class; None for a project directory.
    """
    client, *others = hosts
    broken: list[str] = []
    different: list[str] = []
    for rule in RULES:
        name, wanted, asked = rule.package, client.versions.get(rule.package), others
        clause = f"{name} is {wanted or 'missing'} here and "
        if name == "python" and pickled_by is not None:
            wanted, asked = pickled_by, [host for host in others if host.role == "worker"]  # which load the class
            clause = f"the handler's class was pickled by Python {pickled_by}, and it is "
        found = {(host.role, host.versions.get(name, "")) for host in asked}
        odd = sorted(((role, value) for role, value in found if _differs(rule, value, wanted)), key=str)
        if odd:
            breaks = any(_breaks(rule, role, value, wanted, is_pickled=pickled_by is not None) for role, value in odd)
            places = ", ".join(f"{value or 'missing'} on {_ROLES[role]}" for role, value in odd)
            (broken if breaks else different).append(clause + places)
    return Differences(tuple(broken), tuple(different))


def _differs(rule: Rule, value: str | None, wanted: str | None) -> bool:
    if value == "":
        return False
    return _prefix(value, 2) != _prefix(wanted, 2) if rule.ignores_patches else value != wanted


def _breaks(rule: Rule, role: str, value: str | None, wanted: str | None, *, is_pickled: bool) -> bool:
    """Return whether a version on a host of this role breaks the job."""
    if value is None or wanted is None:
        return rule.is_required
    if rule.is_for_pickles and not (is_pickled and role == "worker"):
        return False
    return _prefix(value, rule.parts) != _prefix(wanted, rule.parts)


def _prefix(text: str | None, parts: int | None) -> list[str]:
    return (text or "").split(".")[:parts]


def version_table(hosts: Sequence[Host]) -> str:
    """Return the versions as a table, with one line for all workers that are alike."""
    alike: dict[tuple[str, tuple[str | None, ...]], list[str]] = {}
    for host in hosts:
        alike.setdefault((host.role, tuple(host.versions.get(name) for name in _RULES)), []).append(host.name)
    rows = [["", *_RULES]]
    for (role, versions), names in alike.items():
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        rows.append([f"{role} {names[0]}{more}", *("missing" if text is None else text or "?" for text in versions)])
    return textwrap.indent(table(rows), "  ")


# on a cluster ---------------------------------------------------------------------------------------------------------


def check(client: Client, settings: JobSettings, job_url: str, *, scheduler_reads: bool = False) -> None:
    """Compare versions on a cluster, and have its hosts read the job directory.

    Raises :class:`ClusterError` if a difference breaks the job, or a worker cannot read the job directory; nor the
    scheduler, if ``scheduler_reads`` because the coordinator will run there.
    """
    try:
        hosts = _ask_versions(client)
    except TimeoutError:
        _log.warning(
            "the versions on the cluster were not compared: not all hosts answered within %g s", _ANSWER_SECONDS
        )
        return
    except OSError as error:  # connections that break are among them
        raise ClusterError(f"the Dask scheduler was lost while versions were compared: {error}") from error
    reports: dict[str, Any] = {}
    # A host that speaks another protocol, or runs other bytecode, is asked nothing further.
    if not compare(hosts).broken:
        reports = _ask_reports(client, job_url)
        hosts = [_with_report(host, reports) for host in hosts]
    found = compare(hosts, pickled_by=_pickled_by(settings))
    if found.broken:
        raise ClusterError(
            f"the versions on the cluster do not fit, so nothing was sent to it: {'; '.join(found.broken)}. "
            "Use the same environment, or the same image, everywhere:\n" + version_table(hosts)
        )
    if found.different:
        _log.warning("versions differ on the cluster: %s", "; ".join(found.different))
    roles = {host.name: host.role for host in hosts}
    for name, report in reports.items():
        role = roles.get(name, "worker")
        if isinstance(report, dict) and report["trouble"] and (role == "worker" or scheduler_reads):
            raise ClusterError(f"the {role} {name} (host {report['host']}) cannot read {report['trouble']}")


def _ask_versions(client: Any) -> list[Host]:
    """Return the versions that Dask knows of, the client's own first."""
    answers = call_with_timeout(client.get_versions, _ANSWER_SECONDS)
    return [
        Host("client", f"{socket.gethostname()} (process {os.getpid()})", here()),
        Host("scheduler", str(client.scheduler.address), _versions_in(answers["scheduler"])),
        *(Host("worker", name, _versions_in(answer)) for name, answer in sorted(answers["workers"].items()) if answer),
    ]


def _versions_in(answer: Mapping[str, Any]) -> dict[str, str | None]:
    packages = answer["packages"]
    found: dict[str, str | None] = {rule.package: packages.get(rule.package) for rule in RULES}
    python = ".".join(str(packages.get("python") or "").split(".")[:3])
    return {**found, "python": python, "cortex_dask": ""}  # what is imported counts, and not what is installed


def _ask_reports(client: Any, job_url: str) -> dict[str, Any]:
    """Call :func:`report` on the workers and on the scheduler; errors are among the answers."""
    scheduler = str(client.scheduler.address)
    answers: dict[str, Any] = {}
    try:
        answers.update(call_with_timeout(lambda: client.run(report, job_url, on_error="return"), _ANSWER_SECONDS))
        answers[scheduler] = call_with_timeout(lambda: client.run_on_scheduler(report, job_url), _ANSWER_SECONDS)
    except TimeoutError:
        pass  # splits of a worker that hangs are lost, and sent again
    except Exception as error:  # noqa: BLE001 - a scheduler that lacks the function may raise anything
        answers[scheduler] = error
    return answers


async def report(job_url: str) -> dict[str, Any]:
    """Return the version of this package in a process, and what keeps it from reading the job directory."""
    try:
        trouble = await asyncio.wait_for(asyncio.to_thread(_why_unreadable, job_url), _READ_SECONDS)
    except TimeoutError:
        trouble = f"the job directory {job_url} within {_READ_SECONDS:.0f} s: is its store reachable from there?"
    return {"cortex_dask": __version__, "host": socket.gethostname(), "trouble": trouble}


def _why_unreadable(job_url: str) -> str | None:
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


def _with_report(host: Host, reports: Mapping[str, Any]) -> Host:
    """Add a host's version of this package, or what stands for it where :func:`report` could not be called."""
    answer = reports.get(host.name)
    if answer is None:
        return host
    text = str(answer)  # Dask passes the messages of errors on
    value: str | None
    if isinstance(answer, dict):
        value = answer["cortex_dask"]
    elif "No module named 'cortex_dask'" in text:
        value = None
    else:
        value = "another" if "cortex_dask" in text else f"unusable ({text})"
    return Host(host.role, host.name, {**host.versions, "cortex_dask": value})


# on a worker that comes later -----------------------------------------------------------------------------------------


def needed_versions(settings: JobSettings) -> dict[str, str | None]:
    """Return the versions that a split needs, for :func:`own_mismatch`."""
    return {
        "cortex_dask": __version__,
        "distributed": _installed("distributed"),
        "pickled_by": _pickled_by(settings),
    }


def own_mismatch(needed: Mapping[str, str | None]) -> str | None:
    """Return why this process, a worker that may have come in the middle of the job, cannot run its splits."""
    own = here()
    pickled_by = needed.get("pickled_by")
    wanted = {"cortex_dask": needed.get("cortex_dask"), "distributed": needed.get("distributed"), "python": pickled_by}
    for name, value in wanted.items():
        is_pickled = pickled_by is not None
        if value is not None and _breaks(_RULES[name], "worker", own[name], value, is_pickled=is_pickled):
            return (
                f"a worker on {socket.gethostname()} has {name} {own[name] or '(missing)'}, and the job needs {value}: "
                "start workers with the same environment, or the same image, as the coordinator's; the job can be "
                "resumed"
            )
    return None


def _pickled_by(settings: JobSettings) -> str | None:
    if settings.handler.kind != "class":
        return None
    # The coordinator is not always the submitter.
    return str(settings.handler.python or platform.python_version())


@functools.cache
def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
