"""`KubernetesOptions`: ``kubernetes:`` of a job's API, with ``--cluster-option`` over it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from cortex_dask.errors import SpecError
from cortex_dask.formatting import did_you_mean, shown
from cortex_dask.io.job.settings import JobSettings

#: Set in a runner's pod: its namespace.
NAMESPACE_VARIABLE = "CORTEX_DASK_NAMESPACE"

_START_SECONDS = 600.0
_IDLE_SECONDS = 600.0
_RUNNER_ACCOUNT = "cortex-dask"

#: How the submitter reaches the API server. A runner reaches it with the service account of its pod.
_SUBMITTER_OPTIONS = ("context", "kubeconfig")
_TEXT_OPTIONS = ("context", "image", "image_pull_policy", "kubeconfig", "namespace", "service_account")
_DURATION_OPTIONS = ("idle_timeout", "reconnect_timeout", "start_timeout")
_PULL_POLICIES = ("Always", "IfNotPresent", "Never")


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
    def from_settings(cls, settings: JobSettings) -> KubernetesOptions:
        """Return the options of a job, or raise SpecError: no image, an unknown option, an impossible value."""
        given = settings.cluster.options if settings.cluster.name == "kubernetes" else {}
        options = {**check_options(given), **(dict.fromkeys(_SUBMITTER_OPTIONS) if _is_runner() else {})}
        spec = settings.cluster.kubernetes
        image = options.get("image") or settings.handler.image
        if not image:
            raise SpecError(
                "kubernetes: no image is named; the workers' pods need one that holds Python and cortex_dask: set "
                "handler.image in cortex.yaml, or --cluster-option image=NAME"
            )
        return cls(
            image=image,
            namespace=options.get("namespace") or os.environ.get(NAMESPACE_VARIABLE) or spec.get("namespace"),
            context=options.get("context"),
            kubeconfig=options.get("kubeconfig"),
            image_pull_policy=options.get("image_pull_policy") or spec.get("image_pull_policy"),
            image_pull_secrets=tuple(spec.get("image_pull_secrets", ())),
            service_account=options.get("service_account") or spec.get("service_account"),
            start_timeout=float(options.get("start_timeout", _START_SECONDS)),
            idle_timeout=float(options.get("idle_timeout", _IDLE_SECONDS)),
            labels=dict(spec.get("labels", {})),
            annotations=dict(spec.get("annotations", {})),
            env=dict(spec.get("env", {})),
            env_from=tuple(
                {key: name for key, name in source.items() if name is not None} for source in spec.get("env_from", ())
            ),
            node_group_label=spec.get("node_group_label"),
            templates={key: spec[key] for key in ("pod", "worker", "scheduler", "runner") if spec.get(key)},
        )


def _is_runner() -> bool:
    return NAMESPACE_VARIABLE in os.environ


def check_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return cluster options, or raise SpecError if one is unknown or impossible."""
    known = sorted((*_TEXT_OPTIONS, *_DURATION_OPTIONS))
    for name, value in options.items():
        if name not in known:
            raise SpecError(
                f"cluster option {name}: unknown for kubernetes; {did_you_mean(name, known)}known options are "
                f"{', '.join(known)}; what pods need besides stands in cortex.yaml under kubernetes:"
            )
        if name in _TEXT_OPTIONS and (not isinstance(value, str) or not value):
            raise SpecError(f"cluster option {name}: found {shown(value)}; allowed is text")
        if name in _DURATION_OPTIONS and (
            isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf")
        ):
            raise SpecError(f"cluster option {name}: found {shown(value)}; allowed is a number of seconds above 0")
    policy = options.get("image_pull_policy", _PULL_POLICIES[0])
    if policy not in _PULL_POLICIES:
        raise SpecError(
            f"cluster option image_pull_policy: found {shown(policy)}; allowed is {', '.join(_PULL_POLICIES)}"
        )
    return dict(options)
