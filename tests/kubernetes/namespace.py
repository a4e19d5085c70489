"""A namespace of one test run, driven with ``kubectl``: another way to the cluster than the one that is tested."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.faults.jobs import ROOT
from tests.support.waiting import until

__all__ = ["Namespace", "the_image"]

Item = dict[str, Any]

#: What users apply before their first job; the tests submit with this account, and no other rights.
RBAC = Path(ROOT, "deploy", "kubernetes", "rbac.yaml")
_CRD = "daskclusters.kubernetes.dask.org"
_REQUEST_SECONDS = 30


def the_image() -> str:
    """Return the image that the pods run."""
    image = os.environ.get("CORTEX_DASK_TEST_IMAGE")
    if not image:
        pytest.fail(
            "CORTEX_DASK_TEST_IMAGE is not set: the image of this code that the cluster's nodes have, or can pull "
            "(docs/kubernetes.md tells how to make one)",
            pytrace=False,
        )
    return image


class Namespace:
    """A namespace with a name of its own.

    Parameters
    ----------
    folder : Path
        Where the kubeconfig of its accounts lie.
    """

    def __init__(self, folder: Path) -> None:
        self.name = f"cortex-dask-test-{uuid.uuid4().hex[:8]}"
        self._folder = folder
        self._environment = dict(os.environ)  # a test may set another KUBECONFIG, one with less rights
        self._accounts: dict[str, Path] = {}

    # the beginning and the end --------------------------------------------------------------------------------------

    def create(self) -> None:
        """Make it, with the accounts that users are told to make.

        A cluster that cannot be used fails the test: who runs these tests wants to know whether they pass.
        """
        if shutil.which("kubectl") is None:
            pytest.fail("the tests on Kubernetes need kubectl on the PATH", pytrace=False)
        try:
            self.run("get", "crd", _CRD)
        except AssertionError as error:
            config = os.environ.get("KUBECONFIG") or "~/.kube/config"
            pytest.fail(
                f"the cluster of KUBECONFIG ({config}) cannot be reached, or lacks the Dask operator: {error}",
                pytrace=False,
            )
        self.run("create", "namespace", self.name)
        self.apply(RBAC.read_text())
        until(lambda: self.find("serviceaccount", "default"), "the namespace's own account", 60)

    def delete(self) -> None:
        """Remove it with all that is in it."""
        self.kubectl("delete", "daskclusters,daskjobs,daskautoscalers", "--all", "--wait=false", check=False)
        self.run("delete", "namespace", self.name, "--wait=false", "--ignore-not-found")
        try:
            until(lambda: not self._exists(), f"the namespace {self.name} to go", 90)
        except AssertionError:
            # The operator's finalizers hold it, and the operator is gone or slow.
            for item in self.items("daskclusters"):
                self.patch("daskcluster", item["metadata"]["name"], {"metadata": {"finalizers": None}})
            until(lambda: not self._exists(), f"the namespace {self.name} to go", 60)

    def _exists(self) -> bool:
        return bool(self.run("get", "namespace", self.name, "--ignore-not-found", "--output=name").strip())

    # kubectl --------------------------------------------------------------------------------------------------------

    def kubectl(self, *arguments: str, given: str | None = None, check: bool = True, as_account: str = "") -> str:
        """Run ``kubectl`` in the namespace and return what it printed; ``given`` is its standard input."""
        return self.run(f"--namespace={self.name}", *arguments, given=given, check=check, as_account=as_account)

    def run(self, *arguments: str, given: str | None = None, check: bool = True, as_account: str = "") -> str:
        environment = self._environment
        if as_account:
            environment = {**environment, "KUBECONFIG": str(self.kubeconfig(as_account))}
        ended = subprocess.run(
            ["kubectl", f"--request-timeout={_REQUEST_SECONDS}s", *arguments],
            input=given,
            capture_output=True,
            text=True,
            env=environment,
        )
        if check:
            assert ended.returncode == 0, f"kubectl {' '.join(arguments)}: {ended.stderr.strip()}"
        return ended.stdout

    def apply(self, text: str, *options: str) -> str:
        """Apply YAML documents."""
        return self.kubectl("apply", "--filename=-", *options, given=text)

    def apply_all(self, *items: Item) -> None:
        """Apply objects."""
        self.apply(yaml.safe_dump_all(items))

    def patch(self, kind: str, name: str, change: Item) -> None:
        """Merge a change into an object; one that is gone is no mistake."""
        self.kubectl("patch", kind, name, "--type=merge", f"--patch={json.dumps(change)}", check=False)

    def items(self, kinds: str, selector: str = "") -> list[Item]:
        """Return objects, e.g. ``items("pods", "dask.org/component=worker")``."""
        chosen = [f"--selector={selector}"] if selector else []
        found: list[Item] = json.loads(self.kubectl("get", kinds, "--output=json", *chosen))["items"]
        return found

    def find(self, kind: str, name: str) -> Item | None:
        """Return one object, if it is there."""
        text = self.kubectl("get", kind, name, "--output=json", "--ignore-not-found")
        return json.loads(text) if text.strip() else None

    def pods(self, selector: str = "") -> list[Item]:
        """Return the pods that are not being deleted."""
        return [pod for pod in self.items("pods", selector) if "deletionTimestamp" not in pod["metadata"]]

    def kill_pod(self, name: str) -> None:
        """Take a pod away without a word, as the loss of its node does."""
        self.kubectl("delete", "pod", name, "--grace-period=0", "--force", "--wait=false")

    def wait_for(self, condition: Callable[[], Any], what: str, seconds: float = 60.0) -> Any:
        """Wait until something is true, and return it; when it is not, tell what the namespace looks like."""
        try:
            return until(condition, what, seconds)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.look()}") from None

    def look(self) -> str:
        """Return what a person would look at."""
        columns = "--output=custom-columns=REASON:.reason,OBJECT:.involvedObject.name,MESSAGE:.message"
        events = self.kubectl("get", "events", "--sort-by=.lastTimestamp", columns, check=False)
        things = self.kubectl("get", "pods,daskclusters,daskautoscalers,jobs", "--show-labels", check=False)
        return f"{things}\n{chr(10).join(events.splitlines()[-25:])}"

    def server_version(self) -> tuple[int, int]:
        """Return the version of Kubernetes."""
        server = json.loads(self.run("version", "--output=json"))["serverVersion"]
        return int(server["major"]), int(server["minor"].rstrip("+"))

    # accounts -------------------------------------------------------------------------------------------------------

    def kubeconfig(self, account: str) -> Path:
        """Return a kubeconfig with the rights of a service account of this namespace, and its namespace as default."""
        if account not in self._accounts:
            secret = {
                "apiVersion": "v1",
                "kind": "Secret",
                "type": "kubernetes.io/service-account-token",
                "metadata": {
                    "name": f"{account}-login",
                    "annotations": {"kubernetes.io/service-account.name": account},
                },
            }
            self.apply_all(secret)
            token = until(lambda: self._token(f"{account}-login"), "a token", 30)
            view = yaml.safe_load(self.run("config", "view", "--minify", "--flatten", "--raw"))
            view["users"] = [{"name": account, "user": {"token": token}}]
            view["contexts"][0]["context"].update(user=account, namespace=self.name)
            path = self._folder / f"kubeconfig-{account}"
            path.touch(mode=0o600)
            path.write_text(yaml.safe_dump(view))
            self._accounts[account] = path
        return self._accounts[account]

    def _token(self, secret: str) -> str:
        return self.kubectl(
            "get", "secret", secret, "--output=go-template={{with .data.token}}{{base64decode .}}{{end}}"
        )
