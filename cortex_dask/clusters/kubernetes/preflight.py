"""Checks of a job on Kubernetes before anything is created.

The API server accepts a ``DaskCluster`` with unknown fields, which it drops, and with quantities that no pod can have,
at which only the operator fails, out of sight. So each of its pods is also checked by the API server as a pod.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from cortex_dask.clusters.kubernetes.api import KubeApi, RefusedError
from cortex_dask.clusters.kubernetes.manifests import make_pod
from cortex_dask.errors import ClusterError, SpecError
from cortex_dask.io.job.settings import JobSettings


def check_cluster(api: KubeApi, manifest: Mapping[str, Any]) -> None:
    """Have the API server check a ``DaskCluster`` and its pods; raise ClusterError if it refuses something."""
    name, spec = manifest["metadata"]["name"], manifest["spec"]
    for kind in ("scheduler", "worker"):
        _check_pod(api, spec[kind], name, kind)
    _check_for_dropped_fields(manifest, _dry_run(api, manifest), "the Dask operator's definition of a DaskCluster")


def check_runner(api: KubeApi, manifest: Mapping[str, Any]) -> None:
    """Have the API server check a runner's ``Job`` and its pod; raise ClusterError if it refuses something."""
    _check_pod(api, manifest["spec"]["template"], manifest["metadata"]["name"], "runner")
    made = _dry_run(api, manifest)
    made["spec"].setdefault("ttlSecondsAfterFinished", 1)  # servers before 1.23 drop it
    _check_for_dropped_fields(manifest, made, "this Kubernetes")


def _check_pod(api: KubeApi, template: Mapping[str, Any], name: str, kind: str) -> None:
    pod = make_pod(template, name)
    try:
        made = api.create(pod, dry_run=True)
    except RefusedError as error:
        if error.code == 403 and error.lacks_permission:
            return  # this user may not create pods, not even to check them; the operator may
        if error.code == 403 and "exceeded quota" in str(error):
            return  # the quota is full now; it is reported if it still is when the pod is made
        raise ClusterError(f"kubernetes: the {kind}'s pod: {error}") from error
    _check_for_dropped_fields(pod, made, "this Kubernetes", f"the {kind}'s pod: ")


def _dry_run(api: KubeApi, manifest: Mapping[str, Any]) -> dict[str, Any]:
    try:
        return api.create(manifest, dry_run=True)
    except RefusedError as error:
        if error.code == 409:  # one of this name exists, so it is valid
            return dict(manifest)
        raise


def _check_for_dropped_fields(sent: Mapping[str, Any], made: Mapping[str, Any], server: str, where: str = "") -> None:
    paths = list(dropped_fields(sent, made))
    if paths:
        raise ClusterError(
            f"kubernetes: {where}{server} does not know the field{'s' if len(paths) > 1 else ''} "
            f"{', '.join(paths[:5])}: correct what stands under kubernetes: in cortex.yaml"
        )


def dropped_fields(sent: object, made: object, path: str = "") -> Iterator[str]:
    """Yield the paths of fields that were sent and are missing in the server's answer, because it does not know them.

    Older servers drop such fields silently. Values are not compared: a server rewrites quantities, and leaves out what
    is empty.

    >>> list(dropped_fields({"spec": {"resorces": {"cpu": 1}, "image": "a"}}, {"spec": {"image": "a"}}))
    ['spec.resorces']
    """
    if isinstance(sent, Mapping):
        for key, value in sent.items():
            inner = f"{path}.{key}" if path else str(key)
            if value in (None, "", 0, False) or value == {} or value == []:
                continue
            if not isinstance(made, Mapping) or key not in made:
                yield inner
            else:
                yield from dropped_fields(value, made[key], inner)
    elif isinstance(sent, list) and isinstance(made, list):
        for number, item in enumerate(sent):
            name = item.get("name") if isinstance(item, Mapping) else None
            same = next((other for other in made if isinstance(other, Mapping) and other.get("name") == name), None)
            if name is None or same is None:
                same = made[number] if number < len(made) else None
            yield from dropped_fields(item, same, f"{path}[{name or number}]")


def check_paths(job_url: str, settings: JobSettings, manifest: Mapping[str, Any]) -> None:
    """Raise SpecError if the job directory, the input or the output is a local path without a volume in the pods."""
    container = manifest["spec"]["worker"]["spec"]["containers"][0]
    mounts = [str(mount["mountPath"]).rstrip("/") + "/" for mount in container.get("volumeMounts") or ()]
    locations: dict[str, tuple[str, ...]] = {"the job directory": (job_url,)}
    if settings.samples is None or settings.samples.kind != "item_list":
        locations["the input"] = settings.dataset.paths
    if settings.output is not None:
        locations["the output"] = (settings.output.url,)
    for what, urls in locations.items():
        for url in urls:
            local = url.removeprefix("file://")
            if "://" in local or "::" in local or any(local.startswith(mount) for mount in mounts):
                continue
            hint = (
                "use an environment whose store they reach, as in cortex-dask env configure NAME --store s3://…"
                if what == "the job directory"
                else "name a URL that they reach, such as s3://…"
            )
            raise SpecError(
                f"kubernetes: {what} {url} is a path of this machine, which pods do not have: {hint}, or mount a "
                "volume there (kubernetes.pod in cortex.yaml)"
            )
