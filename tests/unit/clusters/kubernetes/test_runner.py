"""How a runner is recognised."""

from __future__ import annotations

from typing import Any

import pytest

from cortex_dask.clusters.kubernetes.manifests import POD_VARIABLE
from cortex_dask.clusters.kubernetes.runner import has_finished, is_runner


@pytest.mark.parametrize(
    ("status", "finished"),
    [
        ({}, False),
        ({"active": 1}, False),
        ({"conditions": None}, False),
        ({"conditions": [{"type": "Suspended", "status": "True"}]}, False),
        ({"conditions": [{"type": "Failed", "status": "False"}]}, False),
        ({"conditions": [{"type": "Failed", "status": "True"}]}, True),
        ({"conditions": [{"type": "Suspended", "status": "True"}, {"type": "Complete", "status": "True"}]}, True),
    ],
)
def test_a_job_has_finished_when_it_is_complete_or_failed(status: dict[str, Any], finished: bool) -> None:
    assert has_finished({"status": status}) is finished


def test_a_process_knows_by_a_variable_that_it_is_a_runner(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(POD_VARIABLE, raising=False)
    assert not is_runner()
    monkeypatch.setenv(POD_VARIABLE, "demo-runner-abcde")
    assert is_runner()
