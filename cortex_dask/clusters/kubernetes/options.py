"""What a job says about its Kubernetes: ``kubernetes:`` of its API, and ``--cluster-option`` over it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from cortex_dask.errors import SpecError
from cortex_dask.formatting import nearest, shown
from cortex_dask.io.job.settings import JobSettings

_START_SECONDS = 600.0
_IDLE_SECONDS = 600.0
_RUNNER_ACCOUNT = "cortex-dask"

#: Options that say how this client reaches the API server: a runner is inside, and reaches it as its own pod does.
_CLIENT_ONLY = ("context", "kubeconfig")
_TEXTS = ("context", "image", "image_pull_policy", "kubeconfig", "namespace", "service_account")
_SECONDS = ("idle_timeout", "reconnect_timeout", "start_timeout")
_POLICIES = ("Always", "IfNotPresent", "Never")


@dataclass(frozen=True, slots=True)
class KubernetesOptions:
    """Where on a Kubernetes a job runs, and how its pods are made."""

    image: str
    namespace: str | None = None  # None: that of the kubeconfig's context
    context: str | None = None
    kubeconfig: str | None = None
    image_pull_policy: str | None = None
    image_pull_secrets: tuple[str, ...] = ()
    service_account: str | None = None  # of workers and runner; None: the namespace's default, and the runner's own
    start_timeout: float = _START_SECONDS
    idle_timeout: float = _IDLE_SECONDS
    labels: dict[str, str] = field(default_factory=dict)
    annotations: dict[str, str] = field(default_factory=dict)
    env: dict[str, str] = field(default_factory=dict)
    env_from: tuple[dict[str, str], ...] = ()  # {"secret": name} or {"config_map": name}
    node_group_label: str | None = None
    #: Templates: ``pod`` is laid over every pod, ``worker``, ``scheduler`` and ``runner`` over those of one kind.
    templates: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def runner_account(self) -> str:
        """The ServiceAccount of the runner, which makes the cluster: the namespace's default may not do that."""
        return self.service_account or _RUNNER_ACCOUNT

    @classmethod
    def of(cls, settings: JobSettings) -> KubernetesOptions:
        """Return the options of a job.

        Raises
        ------
        SpecError
            If there is no image, or an option is unknown or has an impossible value.
        """
        given = settings.cluster.options if settings.cluster.name == "kubernetes" else {}
        said = {**check(given), **({} if not _is_runner() else dict.fromkeys(_CLIENT_ONLY))}
        spec = settings.cluster.kubernetes
        image = said.get("image") or settings.handler.extra.get("image")
        if not image:
            raise SpecError(
                "kubernetes: no image is named; the workers' pods need one that holds Python and cortex_dask: set "
                "handler.image in cortex.yaml, or --cluster-option image=NAME"
            )
        return cls(
            image=image,
            namespace=said.get("namespace") or os.environ.get(NAMESPACE_VARIABLE) or spec.get("namespace"),
            context=said.get("context"),
            kubeconfig=said.get("kubeconfig"),
            image_pull_policy=said.get("image_pull_policy") or spec.get("image_pull_policy"),
            image_pull_secrets=tuple(spec.get("image_pull_secrets", ())),
            service_account=said.get("service_account") or spec.get("service_account"),
            start_timeout=float(said.get("start_timeout", _START_SECONDS)),
            idle_timeout=float(said.get("idle_timeout", _IDLE_SECONDS)),
            labels=dict(spec.get("labels", {})),
            annotations=dict(spec.get("annotations", {})),
            env=dict(spec.get("env", {})),
            env_from=tuple(
                {key: name for key, name in source.items() if name is not None} for source in spec.get("env_from", ())
            ),
            node_group_label=spec.get("node_group_label"),
            templates={key: spec[key] for key in ("pod", "worker", "scheduler", "runner") if spec.get(key)},
        )


#: Set in a runner's pod: where it is.
NAMESPACE_VARIABLE = "CORTEX_DASK_NAMESPACE"


def _is_runner() -> bool:
    return NAMESPACE_VARIABLE in os.environ


def check(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return cluster options when they are known and possible.

    Raises
    ------
    SpecError
        If one is not.
    """
    known = sorted((*_TEXTS, *_SECONDS))
    for name, value in options.items():
        if name not in known:
            near = nearest(name, known)
            hint = f"did you mean {near}? " if near else ""
            raise SpecError(
                f"cluster option {name}: unknown for kubernetes; {hint}known options are {', '.join(known)}; what "
                "pods need besides stands in cortex.yaml under kubernetes:"
            )
        if name in _TEXTS and (not isinstance(value, str) or not value):
            raise SpecError(f"cluster option {name}: found {shown(value)}; allowed is text")
        if name in _SECONDS and (
            isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf")
        ):
            raise SpecError(f"cluster option {name}: found {shown(value)}; allowed is a number of seconds above 0")
    policy = options.get("image_pull_policy", _POLICIES[0])
    if policy not in _POLICIES:
        raise SpecError(f"cluster option image_pull_policy: found {shown(policy)}; allowed is {', '.join(_POLICIES)}")
    return dict(options)
