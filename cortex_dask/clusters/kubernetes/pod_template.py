"""Templates of pods, merged as ``kubectl`` does: list entries with a name by their names, other lists replaced."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

#: The key that identifies the entries of a list (``patchMergeKey`` in Kubernetes' own API).
_KEYS = {
    "containers": "name",
    "env": "name",
    "hostAliases": "ip",
    "imagePullSecrets": "name",
    "initContainers": "name",
    "ports": "containerPort",
    "topologySpreadConstraints": "topologyKey",
    "volumeMounts": "mountPath",
    "volumes": "name",
}
#: Lists whose entries are replaced as a whole, for an entry has one of several keys.
_REPLACED_ENTRIES = ("env", "volumes")
#: Lists that are appended to.
_APPENDED = ("envFrom", "tolerations")

#: Keys of a pod's spec that select the machine it runs on.
_MACHINE_KEYS = ("affinity", "nodeName", "nodeSelector", "runtimeClassName", "topologySpreadConstraints")

#: Labels of nodes with the name of their group: of EKS, eksctl, GKE, AKS, Karpenter, and one for all others.
_GROUP_LABELS = (
    "eks.amazonaws.com/nodegroup",
    "alpha.eksctl.io/nodegroup-name",
    "cloud.google.com/gke-nodepool",
    "kubernetes.azure.com/agentpool",
    "karpenter.sh/nodepool",
    "cortex-dask/node-group",
)


def merge_template(base: Mapping[str, Any], over: Mapping[str, Any], *, main: str = "") -> dict[str, Any]:
    """Return a template with another one merged over it; an entry of ``containers`` without a name means ``main``.

    Mappings are merged key by key, and a null removes a key. Containers, variables, volumes, mounts and ports are
    merged by their names; tolerations and sources of variables are appended; any other list is replaced.

    >>> over = {"containers": [{"image": "b"}]}
    >>> merge_template({"containers": [{"name": "worker", "image": "a"}]}, over, main="worker")
    {'containers': [{'name': 'worker', 'image': 'b'}]}
    """
    merged = dict(base)
    for key, value in over.items():
        current = merged.get(key)
        if value is None:
            merged.pop(key, None)
        elif isinstance(value, Mapping):
            merged[key] = merge_template(current if isinstance(current, Mapping) else {}, value, main=main)
        elif isinstance(value, list) and (isinstance(current, list) or key in _KEYS):
            merged[key] = _merge_lists(key, current or [], value, main)
        else:
            merged[key] = copy.deepcopy(value)
    return copy.deepcopy(merged)


def _merge_lists(key: str, base: list[Any], over: list[Any], main: str) -> list[Any]:
    if key in _APPENDED:
        return [*base, *(item for item in over if item not in base)]
    name = _KEYS.get(key)
    if name is None or not all(isinstance(item, Mapping) for item in (*base, *over)):
        return over
    merged = list(base)
    for item in over:
        if key == "containers" and "name" not in item:
            item = {"name": main, **item}
        same = next((number for number, old in enumerate(merged) if name in item and old.get(name) == item[name]), None)
        if same is None:
            merged.append(merge_template({}, item))
        elif key in _REPLACED_ENTRIES:
            merged[same] = item
        else:
            merged[same] = merge_template(merged[same], item)
    return merged


def without_machine_requirements(template: Mapping[str, Any]) -> dict[str, Any]:
    """Return a template without the nodes that it selects and the resources that its containers request.

    For the scheduler and the runner, which need no GPU if the template of all pods requests one.
    """
    plain = copy.deepcopy(dict(template))
    spec = plain.get("spec")
    if isinstance(spec, dict):
        for key in _MACHINE_KEYS:
            spec.pop(key, None)
        for container in spec.get("containers") or ():
            container.pop("resources", None)
    return plain


def with_node_groups(pod_spec: Mapping[str, Any], groups: tuple[str, ...], label: str | None) -> dict[str, Any]:
    """Return a pod's spec that also requires a node of one of these groups; by default in the label of any cloud."""
    labels = _GROUP_LABELS if label is None else (label,)
    ours = [{"key": key, "operator": "In", "values": list(groups)} for key in labels]
    path = ("affinity", "nodeAffinity", "requiredDuringSchedulingIgnoredDuringExecution", "nodeSelectorTerms")
    required: Any = pod_spec
    for key in path:
        required = (required or {}).get(key)
    # A node must match one term as a whole, so each term of the user is combined with each label of ours.
    terms = [
        {**term, "matchExpressions": [*(term.get("matchExpressions") or []), expression]}
        for term in required or [{}]
        for expression in ours
    ]
    nested: Any = terms
    for key in reversed(path):
        nested = {key: nested}
    return merge_template(pod_spec, nested)
