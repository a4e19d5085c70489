"""The account that users are told to make: it can do what jobs need, which all other tests show, and nothing else."""

from __future__ import annotations

import pytest

from tests.clusters.kubernetes import ACCOUNT
from tests.kubernetes.namespace import Namespace


@pytest.mark.parametrize(
    ("verb", "what"),
    [
        ("get", "secrets"),
        ("list", "secrets"),
        ("create", "secrets"),
        ("create", "deployments.apps"),
        ("create", "pods --subresource=exec"),
        ("delete", "pods"),
        ("create", "roles.rbac.authorization.k8s.io"),
        ("create", "rolebindings.rbac.authorization.k8s.io"),
        ("impersonate", "serviceaccounts"),
    ],
)
def test_the_account_may_not(verb: str, what: str, namespace: Namespace) -> None:
    assert namespace.kubectl("auth", "can-i", verb, *what.split(), check=False, as_account=ACCOUNT).strip() == "no"


def test_the_account_may_do_nothing_in_other_namespaces(namespace: Namespace) -> None:
    namespace.kubeconfig(ACCOUNT)
    answer = namespace.run("auth", "can-i", "list", "pods", "--namespace=default", check=False, as_account=ACCOUNT)
    assert answer.strip() == "no"
