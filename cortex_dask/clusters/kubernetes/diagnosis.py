"""Why pods do not run, as a sentence: read from what Kubernetes says about them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cortex_dask.clusters.kubernetes.api import KubeApi

#: Reasons for which a container waits that do not pass by themselves.
_HOPELESS = ("InvalidImageName", "ErrImageNeverPull")
#: Reasons that are told with the message beside them.
_IMAGE = ("ErrImagePull", "ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull", "RegistryUnavailable")
_CREATION = ("CreateContainerConfigError", "CreateContainerError", "RunContainerError")
#: What registries say of an image that they do not have.
_NO_IMAGE = ("not found", "notfound", "manifest unknown", "does not exist")
#: Warnings that every pod may have while it starts.
_PASSING = ("FailedScheduling", "Unhealthy")
#: So many restarts in a row are no accident.
_CRASHES = 3
_LOG_LINES = 15
_LONGEST = 400  # characters of a message or of a log


@dataclass(frozen=True, slots=True)
class Trouble:
    """Why a pod does not run.

    Attributes
    ----------
    reason : str
        A sentence without an end.
    is_hopeless : bool
        Whether waiting is of no use.
    container : str
        The container whose log says more; "" if none does.
    may_pass : bool
        Whether it is only that there is no room now.
    """

    reason: str
    is_hopeless: bool = False
    container: str = ""
    may_pass: bool = False


def is_going(item: Mapping[str, Any]) -> bool:
    """Whether an object is being deleted."""
    return "deletionTimestamp" in item["metadata"]


def is_ready(pod: Mapping[str, Any]) -> bool:
    """Whether a pod runs and answers."""
    conditions = {item["type"]: item["status"] for item in pod.get("status", {}).get("conditions") or ()}
    return conditions.get("Ready") == "True" and not is_going(pod)


def trouble_of_pod(pod: Mapping[str, Any], events: Sequence[Mapping[str, Any]] = ()) -> Trouble | None:
    """Return why a pod does not run; None where nothing is known to be wrong.

    Parameters
    ----------
    pod : mapping
        The pod.
    events : sequence of mapping
        The events of its namespace; of these only the pod's own are read.
    """
    status = pod.get("status", {})
    for condition in status.get("conditions") or ():
        if condition["type"] == "PodScheduled" and condition["status"] == "False":
            return Trouble(f"no node takes it: {_short(condition.get('message'))}{_asks(pod)}", may_pass=True)
    if status.get("phase") == "Failed":
        return Trouble(f"it failed: {status.get('reason', '')} {_short(status.get('message'))}".strip())
    containers = [*(status.get("initContainerStatuses") or ()), *(status.get("containerStatuses") or ())]
    warned = [item for item in _events_of(pod, events) if item.get("type") == "Warning"]
    for container in containers:
        if (found := _trouble_of_container(container, warned)) is not None:
            return found
    warned = [item for item in warned if item.get("reason") not in _PASSING]
    if warned and not is_ready(pod):
        last = _newest(warned)
        return Trouble(f"{last.get('reason')}: {_short(last.get('message'))}")
    return None


def _trouble_of_container(container: Mapping[str, Any], warned: Sequence[Mapping[str, Any]]) -> Trouble | None:
    name = container["name"]
    waiting = container.get("state", {}).get("waiting") or {}
    ended = container.get("state", {}).get("terminated") or container.get("lastState", {}).get("terminated") or {}
    reason, message = waiting.get("reason", ""), _short(waiting.get("message"))
    if reason in _IMAGE:
        # While it waits for the next try, the container itself no longer tells what went wrong with the last one.
        pulls = [item for item in warned if str(item.get("message", "")).startswith("Failed to pull image")]
        message = _short(_newest(pulls).get("message")) if pulls else message or reason
        is_hopeless = reason in _HOPELESS or any(word in message.lower() for word in _NO_IMAGE)
        return Trouble(f"the image {container['image']} cannot be had: {message}", is_hopeless)
    if reason in _CREATION:
        return Trouble(f"its container cannot be made: {message or reason}")
    crashed = ended and ended.get("exitCode", 0) != 0
    if reason == "CrashLoopBackOff" or (crashed and not container.get("ready")):
        many = container.get("restartCount", 0) >= _CRASHES
        return Trouble(f"it starts and ends again: {_end(ended)}", many, name)
    return None


def trouble_of_deployment(deployment: Mapping[str, Any]) -> Trouble | None:
    """Return why a Deployment cannot even make its pod: a quota, a service account that is missing, a policy."""
    for condition in deployment.get("status", {}).get("conditions") or ():
        if condition["type"] == "ReplicaFailure" and condition["status"] == "True":
            return Trouble(f"its pod cannot be made: {_short(condition.get('message'))}")
    return None


def trouble_of_events(names: Iterable[str], events: Iterable[Mapping[str, Any]]) -> Trouble | None:
    """Return the last error that the operator has told of its objects with these names."""
    known = set(names)
    errors = [
        event
        for event in events
        if event.get("involvedObject", {}).get("kind", "").startswith("Dask")
        and event["involvedObject"].get("name") in known
    ]
    return Trouble(f"the Dask operator says: {_short(_newest(errors).get('message'))}") if errors else None


def trouble_of_object(item: Mapping[str, Any], events: Iterable[Mapping[str, Any]]) -> Trouble | None:
    """Return the last warning about an object, e.g. why a ``Job`` cannot make its pod."""
    warned = _events_of(item, events)
    return Trouble(f"its pod cannot be made: {_short(_newest(warned).get('message'))}") if warned else None


def log_of(api: KubeApi, pod: str, container: str) -> str:
    """Return the end of a container's log, to stand behind a reason; "" where there is none."""
    text = api.log(pod, container=container, lines=_LOG_LINES)
    text = text or api.log(pod, container=container, lines=_LOG_LINES, previous=True)
    lines = [line for line in text.splitlines() if line.strip()][-_LOG_LINES:]
    return "; the end of its log:\n  " + "\n  ".join(lines) if lines else ""


def _events_of(item: Mapping[str, Any], events: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    uid = item["metadata"].get("uid")
    return [event for event in events if event.get("involvedObject", {}).get("uid") == uid]


def _newest(events: Iterable[Mapping[str, Any]]) -> Mapping[str, Any]:
    return max(events, key=lambda event: str(event.get("lastTimestamp") or event["metadata"].get("creationTimestamp")))


def _asks(pod: Mapping[str, Any]) -> str:
    """Return what a pod asks for, for whoever has to find room for it."""
    asked: dict[str, list[str]] = {}
    for container in pod["spec"]["containers"]:
        resources = container.get("resources") or {}
        for name, amount in {**(resources.get("limits") or {}), **(resources.get("requests") or {})}.items():
            asked.setdefault(name, []).append(str(amount))
    words = [f"{name} {' and '.join(asked[name])}" for name in sorted(asked)]
    if nodes := _nodes(pod):
        words.append(f"nodes of {nodes}")
    return f" (it asks for {', '.join(words)})" if words else ""


def _nodes(pod: Mapping[str, Any]) -> str:
    """Return the groups of nodes that a pod may run on."""
    there: Any = pod["spec"]
    for key in ("affinity", "nodeAffinity", "requiredDuringSchedulingIgnoredDuringExecution", "nodeSelectorTerms"):
        there = (there or {}).get(key)
    values = [
        str(value)
        for term in there or ()
        for expression in term.get("matchExpressions") or ()
        for value in expression.get("values") or ()
    ]
    return " or ".join(dict.fromkeys(values))


def _end(ended: Mapping[str, Any]) -> str:
    if not ended:
        return "nothing is known about its end"
    reason = ended.get("reason", "")
    if reason == "OOMKilled":
        return "it was killed because it took more memory than its limit"
    said = _short(ended.get("message"))
    return f"exit code {ended.get('exitCode')}{f', {reason}' if reason not in ('', 'Error') else ''}{_after(said)}"


def _after(text: str) -> str:
    return f", {text}" if text else ""


def _short(text: str | None) -> str:
    words = " ".join((text or "").split()).rstrip(".")
    return words if len(words) <= _LONGEST else f"{words[:_LONGEST]}…"
