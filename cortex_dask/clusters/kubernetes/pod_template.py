"""Laying one pod template over another, as ``kubectl`` does: what has a name is merged by it, the rest is replaced."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

#: Lists whose entries are the same thing where this key is the same (``patchMergeKey`` in Kubernetes' own API).
_NAMED_BY = {
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
#: Of these an entry is one choice of many: it takes the other's place, and its keys are not mixed with the other's.
_REPLACED_WHOLE = ("env", "volumes")
#: Lists that only grow.
_APPENDED = ("envFrom", "tolerations")

#: What a pod template says about the machine that a pod runs on.
_OF_MACHINES = ("affinity", "nodeName", "nodeSelector", "runtimeClassName", "topologySpreadConstraints")

#: Where clouds write which group of nodes a node belongs to: EKS, eksctl, GKE, AKS, Karpenter, and one for all others.
_GROUP_LABELS = (
    "eks.amazonaws.com/nodegroup",
    "alpha.eksctl.io/nodegroup-name",
    "cloud.google.com/gke-nodepool",
    "kubernetes.azure.com/agentpool",
    "karpenter.sh/nodepool",
    "cortex-dask/node-group",
)


def lay_over(base: Mapping[str, Any], over: Mapping[str, Any], *, main: str = "") -> dict[str, Any]:
    """Return a template with another one laid over it; neither is changed.

    Parameters
    ----------
    base, over : mapping
        ``{"metadata": …, "spec": …}``, or any part of that.
    main : str
        The container that an entry of ``containers`` without a name stands for.

    Returns
    -------
    dict
        Mappings are merged key by key, and a null takes a key away. Containers, variables, volumes, mounts and ports
        are merged by their names; tolerations and sources of variables are added; any other list is replaced.

    Examples
    --------
    >>> lay_over({"containers": [{"name": "worker", "image": "a"}]}, {"containers": [{"image": "b"}]}, main="worker")
    {'containers': [{'name': 'worker', 'image': 'b'}]}
    """
    merged = dict(base)
    for key, value in over.items():
        there = merged.get(key)
        if value is None:
            merged.pop(key, None)
        elif isinstance(value, Mapping):
            merged[key] = lay_over(there if isinstance(there, Mapping) else {}, value, main=main)
        elif isinstance(value, list) and (isinstance(there, list) or key in _NAMED_BY):
            merged[key] = _lists(key, there or [], value, main)
        else:
            merged[key] = copy.deepcopy(value)
    return copy.deepcopy(merged)


def _lists(key: str, base: list[Any], over: list[Any], main: str) -> list[Any]:
    if key in _APPENDED:
        return [*base, *(item for item in over if item not in base)]
    name = _NAMED_BY.get(key)
    if name is None or not all(isinstance(item, Mapping) for item in (*base, *over)):
        return over
    merged = list(base)
    for item in over:
        if key == "containers" and "name" not in item:
            item = {"name": main, **item}
        same = next((number for number, old in enumerate(merged) if name in item and old.get(name) == item[name]), None)
        if same is None:
            merged.append(lay_over({}, item))
        elif key in _REPLACED_WHOLE:
            merged[same] = item
        else:
            merged[same] = lay_over(merged[same], item)
    return merged


def only_where_machines_do_not_matter(template: Mapping[str, Any]) -> dict[str, Any]:
    """Return a template without what it says about machines: where pods run, and what their containers ask for.

    A GPU that the workers' template asks for, and the nodes that have one, are no business of the scheduler's.
    """
    plain = copy.deepcopy(dict(template))
    spec = plain.get("spec")
    if isinstance(spec, dict):
        for key in _OF_MACHINES:
            spec.pop(key, None)
        for container in spec.get("containers") or ():
            container.pop("resources", None)
    return plain


def with_node_groups(pod_spec: Mapping[str, Any], groups: tuple[str, ...], label: str | None) -> dict[str, Any]:
    """Return a pod's spec that runs on the nodes of some groups only, whatever else it requires of its node.

    Parameters
    ----------
    pod_spec : mapping
        The ``spec`` of a pod.
    groups : tuple of str
        The names of the node groups.
    label : str, optional
        The label in which nodes name their group; None: that of any of the well-known clouds.
    """
    labels = _GROUP_LABELS if label is None else (label,)
    ours = [{"key": key, "operator": "In", "values": list(groups)} for key in labels]
    path = ("affinity", "nodeAffinity", "requiredDuringSchedulingIgnoredDuringExecution", "nodeSelectorTerms")
    there: Any = pod_spec
    for key in path:
        there = (there or {}).get(key)
    # One term has to hold as a whole, so every term that the user requires is joined with every label of ours.
    terms = [
        {**term, "matchExpressions": [*(term.get("matchExpressions") or []), expression]}
        for term in there or [{}]
        for expression in ours
    ]
    nested: Any = terms
    for key in reversed(path):
        nested = {key: nested}
    return lay_over(pod_spec, nested)
