"""The API's ``kubernetes:``, which says what only Kubernetes needs to know."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from cortex_dask.formatting import shown
from cortex_dask.spec.validation import Document

_DNS_LABEL = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?")
_DNS_NAME = re.compile(r"(?=.{1,253}$)[a-z0-9](?:[a-z0-9-]*[a-z0-9])?(?:\.[a-z0-9](?:[a-z0-9-]*[a-z0-9])?)*")
_KEY_NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?")
# https://kubernetes.io/docs/reference/kubernetes-api/common-definitions/quantity
_QUANTITY = re.compile(r"[+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[KMGTPE]i|[numkMGTPE]|[eE][+-]?[0-9]+)?")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]*")
# AWS_SECRET_ACCESS_KEY, DB_PASSWORD, HF_TOKEN …; AWS_ACCESS_KEY_ID and TOKENIZERS_PARALLELISM are none.
_SECRET = re.compile(r"(?:^|_)(?:SECRET|PASSWORD|PASSWD|TOKEN|CREDENTIALS?|PRIVATE_KEY|API_?KEY)(?:$|_)", re.IGNORECASE)

_TEMPLATE = "a pod template with the keys metadata and spec"


def _namespace(value: str) -> str:
    if not _DNS_LABEL.fullmatch(value):
        raise ValueError(
            f"found {shown(value)}; allowed are at most 63 lower-case letters, digits and dashes, with no dash at "
            "either end"
        )
    return value


def _object_name(value: str) -> str:
    if not _DNS_NAME.fullmatch(value):
        raise ValueError(
            f"found {shown(value)}; allowed are the names of Kubernetes objects: lower-case letters, digits, dashes "
            "and dots"
        )
    return value


def _label_key(value: str) -> str:
    prefix, slash, name = value.rpartition("/")
    if not _KEY_NAME.fullmatch(name) or (slash and not _DNS_NAME.fullmatch(prefix)):
        raise ValueError(
            f"found the key {shown(value)}; allowed are at most 63 letters, digits, dashes, underscores and dots, and "
            "before them a domain and a slash: example.com/team"
        )
    return value


def _labels(value: dict[str, str]) -> dict[str, str]:
    for key, text in value.items():
        _label_key(key)
        if text and not _KEY_NAME.fullmatch(text):
            raise ValueError(
                f"found {shown(text)} for {key}; allowed are at most 63 letters, digits, dashes, underscores and dots, "
                "with a letter or digit at either end"
            )
    return value


def _annotations(value: dict[str, str]) -> dict[str, str]:
    for key in value:
        _label_key(key)
    return value


def _variables(value: dict[str, str]) -> dict[str, str]:
    for name in value:
        if not _VARIABLE.fullmatch(name):
            raise ValueError(f"found the name {shown(name)}; a variable's name has letters, digits and underscores")
        _no_secret(name)
    return value


def _no_secret(name: str) -> None:
    if _SECRET.search(name):
        raise ValueError(
            f"found a value for {name}, which looks like a secret and would stand in the manifest: put it into a "
            "Kubernetes Secret, and name that in kubernetes.env_from, or in the template by valueFrom.secretKeyRef"
        )


def _template(value: dict[str, Any]) -> dict[str, Any]:
    for key, item in value.items():
        if key not in ("metadata", "spec"):
            raise ValueError(f"found the key {shown(key)}; allowed is {_TEMPLATE}")
        if not isinstance(item, Mapping):
            raise ValueError(f"found {shown(item)} for {key}; allowed is a mapping")
    metadata = value.get("metadata", {})
    for key, item in metadata.items():
        if key not in ("labels", "annotations"):
            raise ValueError(f"found the key metadata.{key}; allowed are metadata.labels and metadata.annotations")
        if not isinstance(item, Mapping) or not all(isinstance(text, str) for pair in item.items() for text in pair):
            raise ValueError(f"found {shown(item)} for metadata.{key}; allowed is a mapping of text to text")
    _labels(metadata.get("labels", {}))
    _annotations(metadata.get("annotations", {}))
    for container in _containers(value.get("spec", {})):
        for variable in container.get("env") or ():
            if isinstance(variable, Mapping) and isinstance(variable.get("name"), str) and variable.get("value"):
                _no_secret(variable["name"])
        _quantities(container.get("resources"))
    return value


def _quantities(resources: Any) -> None:
    """Refuse quantities that Kubernetes does not read: it would not say which, or where."""
    for kind in ("requests", "limits"):
        amounts = resources.get(kind) if isinstance(resources, Mapping) else None
        for name, amount in amounts.items() if isinstance(amounts, Mapping) else ():
            if amount is None:
                continue  # it takes away what stands below
            if isinstance(amount, bool) or not _QUANTITY.fullmatch(str(amount)):
                raise ValueError(
                    f"found {shown(amount)} for resources.{kind}.{name}; allowed are quantities such as 500m, 2 or 4Gi"
                )


def _containers(spec: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    for key in ("containers", "initContainers"):
        items = spec.get(key, [])
        if not isinstance(items, list) or not all(isinstance(item, Mapping) for item in items):
            raise ValueError(f"found {shown(items)} for spec.{key}; allowed is a list of containers")
        yield from items


ObjectName = Annotated[str, AfterValidator(_object_name)]
Labels = Annotated[dict[str, str], AfterValidator(_labels)]
Annotations = Annotated[dict[str, str], AfterValidator(_annotations)]
Template = Annotated[dict[str, Any], AfterValidator(_template)]


class EnvironmentSource(Document):
    """An entry of ``kubernetes.env_from``: a Secret or a ConfigMap whose keys become variables."""

    secret: ObjectName | None = Field(default=None, description="the name of a Secret")
    config_map: ObjectName | None = Field(default=None, description="the name of a ConfigMap")

    @model_validator(mode="after")
    def _one(self) -> EnvironmentSource:
        if (self.secret is None) == (self.config_map is None):
            found = "none of them" if self.secret is None else "both"
            raise ValueError(f"found {found}; exactly one of secret and config_map is needed")
        return self


class KubernetesSpec(Document):
    """``kubernetes``: where the pods of an API run, as whom, and a pod template that is merged into theirs."""

    namespace: Annotated[str, AfterValidator(_namespace)] | None = Field(
        default=None, description="the name of a namespace"
    )
    labels: Labels = Field(default_factory=dict, description="a mapping of text to text")
    annotations: Annotations = Field(default_factory=dict, description="a mapping of text to text")
    service_account: ObjectName | None = Field(default=None, description="the name of a ServiceAccount")
    image_pull_policy: Literal["Always", "IfNotPresent", "Never"] | None = None
    image_pull_secrets: list[ObjectName] = Field(default_factory=list, description="a list of names of Secrets")
    env: Annotated[dict[str, str], AfterValidator(_variables)] = Field(
        default_factory=dict, description="a mapping of text to text; put numbers, true and false in quotes"
    )
    env_from: list[EnvironmentSource] = Field(
        default_factory=list, description="a list of {secret: NAME} and {config_map: NAME}"
    )
    node_group_label: Annotated[str, AfterValidator(_label_key)] | None = Field(
        default=None, description="the label by which nodes tell their group"
    )
    pod: Template = Field(default_factory=dict, description=_TEMPLATE)
    worker: Template = Field(default_factory=dict, description=_TEMPLATE)
    scheduler: Template = Field(default_factory=dict, description=_TEMPLATE)
    runner: Template = Field(default_factory=dict, description=_TEMPLATE)

    def plain(self) -> dict[str, Any]:
        """Return what was said as plain JSON values."""
        return self.model_dump(mode="json", exclude_none=True, exclude_defaults=True)
