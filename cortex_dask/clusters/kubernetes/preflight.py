"""What can be found out about a job on Kubernetes before it is started: nothing is made here.

A ``DaskCluster`` is accepted with unknown fields, which are dropped, and with quantities that no pod can have, which
the operator then stumbles over where nobody looks. So each of its pods is shown to the API server as a pod, too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from cortex_dask.clusters.kubernetes.api import KubeApi, Refused
from cortex_dask.clusters.kubernetes.manifests import pod_of
from cortex_dask.errors import ClusterError, SpecError
from cortex_dask.io.job.settings import JobSettings


def check_cluster(api: KubeApi, manifest: Mapping[str, Any]) -> None:
    """Let the API server look at a ``DaskCluster`` and at the pods that will be made of it.

    Raises
    ------
    ClusterError
        If something in it is unknown or impossible; or may not be made.
    """
    name, spec = manifest["metadata"]["name"], manifest["spec"]
    for kind in ("scheduler", "worker"):
        _check_pod(api, spec[kind], name, kind)
    _refuse_dropped(manifest, _dry_run(api, manifest), "the Dask operator's definition of a DaskCluster")


def check_runner(api: KubeApi, manifest: Mapping[str, Any]) -> None:
    """Let the API server look at a runner's ``Job``, and at its pod.

    Raises
    ------
    ClusterError
        If something in it is unknown or impossible; or may not be made.
    """
    _check_pod(api, manifest["spec"]["template"], manifest["metadata"]["name"], "runner")
    made = _dry_run(api, manifest)
    made["spec"].setdefault("ttlSecondsAfterFinished", 1)  # servers before 1.23 drop it: old runners are collected then
    _refuse_dropped(manifest, made, "this Kubernetes")


def _check_pod(api: KubeApi, template: Mapping[str, Any], name: str, kind: str) -> None:
    pod = pod_of(template, name)
    try:
        made = api.create(pod, dry_run=True)
    except Refused as error:
        if error.code == 403 and error.is_right:
            return  # not allowed to make pods, and so to have them looked at; the operator is
        if error.code == 403 and "exceeded quota" in str(error):
            return  # the quota is full now; that is told when it still is then
        raise ClusterError(f"kubernetes: the {kind}'s pod: {error}") from error
    _refuse_dropped(pod, made, "this Kubernetes", f"the {kind}'s pod: ")


def _dry_run(api: KubeApi, manifest: Mapping[str, Any]) -> dict[str, Any]:
    try:
        return api.create(manifest, dry_run=True)
    except Refused as error:
        if error.code == 409:  # one of this name is there: it is valid, or would not be
            return dict(manifest)
        raise


def _refuse_dropped(sent: Mapping[str, Any], made: Mapping[str, Any], who: str, where: str = "") -> None:
    paths = list(dropped(sent, made))
    if paths:
        raise ClusterError(
            f"kubernetes: {where}{who} does not know the field{'s' if len(paths) > 1 else ''} "
            f"{', '.join(paths[:5])}: correct what stands under kubernetes: in cortex.yaml"
        )


def dropped(sent: object, made: object, path: str = "") -> Iterator[str]:
    """Yield the paths of what was sent and is not in what the server has made of it: fields that it does not know.

    Older servers drop such fields without a word. Values are not compared: a server writes quantities anew, and leaves
    out what is empty.

    Examples
    --------
    >>> list(dropped({"spec": {"resorces": {"cpu": 1}, "image": "a"}}, {"spec": {"image": "a"}}))
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
                yield from dropped(value, made[key], inner)
    elif isinstance(sent, list) and isinstance(made, list):
        for number, item in enumerate(sent):
            name = item.get("name") if isinstance(item, Mapping) else None
            same = next((other for other in made if isinstance(other, Mapping) and other.get("name") == name), None)
            if name is None or same is None:
                same = made[number] if number < len(made) else None
            yield from dropped(item, same, f"{path}[{name or number}]")


def check_paths(job_url: str, settings: JobSettings, manifest: Mapping[str, Any]) -> None:
    """Refuse local paths that workers' pods do not have.

    Raises
    ------
    SpecError
        If the job directory, the input or the output is a local path, and no volume is mounted there.
    """
    container = manifest["spec"]["worker"]["spec"]["containers"][0]
    mounts = [str(mount["mountPath"]).rstrip("/") + "/" for mount in container.get("volumeMounts") or ()]
    places: dict[str, tuple[str, ...]] = {"the job directory": (job_url,)}
    if settings.samples is None or settings.samples.kind != "item_list":
        places["the input"] = settings.dataset.paths
    if settings.output is not None:
        places["the output"] = (settings.output.url,)
    for what, urls in places.items():
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
