"""Which tests ``make test`` leaves to ``make test-all``: the second of its kind, the slow store, every gateway.

``make test`` covers every layer, and one fault of each kind on each store, within minutes. A pattern is searched in a
test's id. One that matches nothing fails a run over the whole suite, so this list cannot outlive its tests.
"""

from __future__ import annotations

import re

EXTENDED = [
    # Backends: every test of the conformance suite on schedulers and gateways; one job each stays.
    r"^tests/clusters/(?!test_conformance\.py::test_run_a_job\[(local|address)\])",
    r"^tests/integration/test_(gateway_\w+|scheduled_example|scale)\.py",
    # Faults: one of each kind on each store stays.
    r"^tests/faults/test_fault_table\.py::test_fault\[(local|s3)-(?!exception, twice of three|exit, always"
    r"|hang, once|memory hog that fits)",
    r"^tests/faults/test_fault_table\.py::test_(handlers_killed|each_format|malformed|input_that_is)\w*\[s3",
    r"^tests/faults/test_coordinator_faults\.py::test_killed_and_resumed\w*\[(local-(?!later|sealing)|s3-(?!first))",
    r"^tests/faults/test_coordinator_faults\.py::test_(append|overwrite|a_coordinator_that_wakes)\w*\[s3",
    r"^tests/faults/test_limits\.py::(\w+\[s3|test_retry_that_fails)",
    r"^tests/faults/test_storage_faults\.py::test_(requests_that_fail\[(?!1\])|an_outage_in_the_middle\[503|an_outage_that)",
    r"^tests/faults/test_worker_faults\.py::test_a_batch_that_kills_its_worker",
    r"^tests/integration/test_store_s3\.py::test_a_fault_at_any_request\[.*503",
    # Contract: projects on a local disk stay.
    r"^tests/contract/test_unchanged_projects\.py::(.*s3|test_the_commands)",
    r"^tests/contract/test_1_project\.py::test_(a_project_over_the_size|a_dry_run_shows)",
    # Integration.
    r"^tests/integration/test_bad_input\.py::.*\[s3",
    r"^tests/integration/test_cli_jobs\.py::TestInterrupts::(test_an_interrupt\w+\[[12]\]|test_a_reader)",
    r"^tests/integration/test_worker_devices\.py::test_(the_size_that|dask_workers_of|rows_that_are_too|a_worker_that_is)",
    r"^tests/integration/test_supervisor\.py::test_processes_that_come",
]


def split_tiers(ids: list[str]) -> tuple[set[str], list[str]]:
    """Return the ids that only ``make test-all`` runs, and the patterns that match none."""
    matches = {pattern: {found for found in ids if re.search(pattern, found)} for pattern in EXTENDED}
    return set().union(*matches.values()), [pattern for pattern, found in matches.items() if not found]
