"""Why pods do not run, as a sentence, from their status and their events."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cortex_dask.clusters.kubernetes.api import KubeApi

#: Reasons for which a container waits for ever.
_PERMANENT_REASONS = ("InvalidImageName", "ErrImageNeverPull")
#: Reasons whose message is shown.
_IMAGE_REASONS = ("ErrImagePull", "ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull", "RegistryUnavailable")
_CREATION_REASONS = ("CreateContainerConfigError", "CreateContainerError", "RunContainerError")
#: Words of registries for an image that they do not have.
_NO_IMAGE_WORDS = ("not found", "notfound", "manifest unknown", "does not exist")
#: Warnings that every pod may have while it starts.
_STARTUP_REASONS = ("FailedScheduling", "Unhealthy")
_MAX_RESTARTS = 3  # in a row; after that a crash is taken for permanent
_LOG_LINES = 15
_MAX_LENGTH = 400  # characters of a message


@dataclass(frozen=True, slots=True)
class PodProblem:
    """Why a pod does not run."""

    reason: str  # a clause, without a full stop
    is_permanent: bool = False  # waiting cannot help
    container: str = ""  # the container whose log has more; "" if none has
    is_lack_of_room: bool = False  # no node has room for it now


def is_being_deleted(item: Mapping[str, Any]) -> bool:
    """Return whether an object is being deleted."""
    return "deletionTimestamp" in item["metadata"]


def is_ready(pod: Mapping[str, Any]) -> bool:
    """Return whether a pod runs and answers."""
    conditions = {item["type"]: item["status"] for item in pod.get("status", {}).get("conditions") or ()}
    return conditions.get("Ready") == "True" and not is_being_deleted(pod)


def diagnose_pod(pod: Mapping[str, Any], events: Sequence[Mapping[str, Any]] = ()) -> PodProblem | None:
    """Return why a pod does not run, from its status and its own events among these, or None."""
    status = pod.get("status", {})
    for condition in status.get("conditions") or ():
        if condition["type"] == "PodScheduled" and condition["status"] == "False":
            return PodProblem(
                f"no node takes it: {_short(condition.get('message'))}{_requests(pod)}", is_lack_of_room=True
            )
    if status.get("phase") == "Failed":
        return PodProblem(f"it failed: {status.get('reason', '')} {_short(status.get('message'))}".strip())
    containers = [*(status.get("initContainerStatuses") or ()), *(status.get("containerStatuses") or ())]
    warnings = [item for item in _events_of(pod, events) if item.get("type") == "Warning"]
    for container in containers:
        if (found := _diagnose_container(container, warnings)) is not None:
            return found
    warnings = [item for item in warnings if item.get("reason") not in _STARTUP_REASONS]
    if warnings and not is_ready(pod):
        last = _newest(warnings)
        return PodProblem(f"{last.get('reason')}: {_short(last.get('message'))}")
    return None


def _diagnose_container(container: Mapping[str, Any], warnings: Sequence[Mapping[str, Any]]) -> PodProblem | None:
    name = container["name"]
    waiting = container.get("state", {}).get("waiting") or {}
    ended = container.get("state", {}).get("terminated") or container.get("lastState", {}).get("terminated") or {}
    reason, message = waiting.get("reason", ""), _short(waiting.get("message"))
    if reason in _IMAGE_REASONS:
        # While the container waits for the next try, its status no longer has the message of the last one.
        pulls = [item for item in warnings if str(item.get("message", "")).startswith("Failed to pull image")]
        message = _short(_newest(pulls).get("message")) if pulls else message or reason
        is_permanent = reason in _PERMANENT_REASONS or any(word in message.lower() for word in _NO_IMAGE_WORDS)
        return PodProblem(f"the image {container['image']} cannot be had: {message}", is_permanent)
    if reason in _CREATION_REASONS:
        return PodProblem(f"its container cannot be made: {message or reason}")
    crashed = ended and ended.get("exitCode", 0) != 0
    if reason == "CrashLoopBackOff" or (crashed and not container.get("ready")):
        is_permanent = container.get("restartCount", 0) >= _MAX_RESTARTS
        return PodProblem(f"it starts and ends again: {_exit_reason(ended)}", is_permanent, name)
    return None


def diagnose_deployment(deployment: Mapping[str, Any]) -> PodProblem | None:
    """Return why a Deployment cannot make its pod, or None: a quota, a missing service account, a policy."""
    for condition in deployment.get("status", {}).get("conditions") or ():
        if condition["type"] == "ReplicaFailure" and condition["status"] == "True":
            return PodProblem(f"its pod cannot be made: {_short(condition.get('message'))}")
    return None


def diagnose_by_operator_events(names: Iterable[str], events: Iterable[Mapping[str, Any]]) -> PodProblem | None:
    """Return the last error that the Dask operator reported for its objects with these names."""
    known = set(names)
    errors = [
        event
        for event in events
        if event.get("involvedObject", {}).get("kind", "").startswith("Dask")
        and event["involvedObject"].get("name") in known
    ]
    return PodProblem(f"the Dask operator says: {_short(_newest(errors).get('message'))}") if errors else None


def diagnose_by_warnings(item: Mapping[str, Any], events: Iterable[Mapping[str, Any]]) -> PodProblem | None:
    """Return the last warning about an object, e.g. why a ``Job`` cannot make its pod."""
    warnings = _events_of(item, events)
    return PodProblem(f"its pod cannot be made: {_short(_newest(warnings).get('message'))}") if warnings else None


def log_tail(api: KubeApi, pod: str, container: str) -> str:
    """Return the end of a container's log, to be appended to a reason, or "" if there is none."""
    text = api.log(pod, container=container, lines=_LOG_LINES)
    text = text or api.log(pod, container=container, lines=_LOG_LINES, previous=True)
    lines = [line for line in text.splitlines() if line.strip()][-_LOG_LINES:]
    return "; the end of its log:\n  " + "\n  ".join(lines) if lines else ""


def _events_of(item: Mapping[str, Any], events: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    uid = item["metadata"].get("uid")
    return [event for event in events if event.get("involvedObject", {}).get("uid") == uid]


def _newest(events: Iterable[Mapping[str, Any]]) -> Mapping[str, Any]:
    return max(events, key=lambda event: str(event.get("lastTimestamp") or event["metadata"].get("creationTimestamp")))


def _requests(pod: Mapping[str, Any]) -> str:
    """Return the resources and node groups that a pod requests, for a message."""
    requested: dict[str, list[str]] = {}
    for container in pod["spec"]["containers"]:
        resources = container.get("resources") or {}
        for name, amount in {**(resources.get("limits") or {}), **(resources.get("requests") or {})}.items():
            requested.setdefault(name, []).append(str(amount))
    words = [f"{name} {' and '.join(requested[name])}" for name in sorted(requested)]
    if nodes := _nodes(pod):
        words.append(f"nodes of {nodes}")
    return f" (it asks for {', '.join(words)})" if words else ""


def _nodes(pod: Mapping[str, Any]) -> str:
    """Return the groups of nodes that a pod may run on."""
    terms: Any = pod["spec"]
    for key in ("affinity", "nodeAffinity", "requiredDuringSchedulingIgnoredDuringExecution", "nodeSelectorTerms"):
        terms = (terms or {}).get(key)
    values = [
        str(value)
        for term in terms or ()
        for expression in term.get("matchExpressions") or ()
        for value in expression.get("values") or ()
    ]
    return " or ".join(dict.fromkeys(values))


def _exit_reason(ended: Mapping[str, Any]) -> str:
    if not ended:
        return "nothing is known about its end"
    reason = ended.get("reason", "")
    if reason == "OOMKilled":
        return "it was killed because it took more memory than its limit"
    parts = [f"exit code {ended.get('exitCode')}", "" if reason == "Error" else reason, _short(ended.get("message"))]
    return ", ".join(part for part in parts if part)


def _short(text: str | None) -> str:
    words = " ".join((text or "").split()).rstrip(".")
    return words if len(words) <= _MAX_LENGTH else f"{words[:_MAX_LENGTH]}…"
