"""What makes a submission another one than that of the job with its id."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from cortex_dask.io.job.settings import ClusterSettings, DeadLetterSettings, HandlerSettings, JobSettings, differences
from cortex_dask.io.job.splits import DatasetInput

SETTINGS = JobSettings(
    job_id="j",
    api_name="api",
    api_id="1",
    created_time="2026-01-01T12:00:00.000+00:00",
    handler=HandlerSettings("class", env={"TOKEN": "hush"}),
    dataset=DatasetInput(("in",)),
)


def test_the_same_submission_at_another_time_and_place_is_the_same_job() -> None:
    again = replace(
        SETTINGS, api_id="2", created_time="2026-01-02T12:00:00.000+00:00", cluster=ClusterSettings("gateway")
    )
    assert differences(SETTINGS, SETTINGS) == differences(SETTINGS, again) == []


def test_each_difference_is_named_with_both_values() -> None:
    other = replace(SETTINGS, dataset=replace(SETTINGS.dataset, paths=("out",)), workers=SETTINGS.workers + 1)
    assert differences(SETTINGS, other) == [
        "dataset.paths was ['in'], is ['out']",
        f"workers was {SETTINGS.workers}, is {SETTINGS.workers + 1}",
    ]


def test_values_of_the_user_are_never_shown() -> None:
    other = replace(SETTINGS, config={"key": "secret"}, handler=replace(SETTINGS.handler, env={"TOKEN": "other"}))
    assert differences(SETTINGS, other) == ["config differs", "handler.env differs"]


@pytest.mark.parametrize(
    ("earlier", "expected"),
    [
        ({"sqs_dead_letter_queue": {"arn": "a", "max_receive_count": 2}}, DeadLetterSettings(2, queue_arn="a")),
        ({"dead_letter": {"path": "s3://b/c", "max_receive_count": 3}}, DeadLetterSettings(3, folder="s3://b/c")),
        ({}, None),
    ],
)
def test_settings_of_an_earlier_release(earlier: dict[str, Any], expected: DeadLetterSettings | None) -> None:
    """They kept below ``extra`` of the handler what has fields of its own now."""
    handler = {
        "kind": "project",
        "extra": {"image": "i:1", "dependencies": {"pip": "r.txt"}, "python": "3.12", **earlier},
    }
    dataset = {"paths": ["in"], "format": "auto", "columns": None, "filters": None, "batch_size": 5}
    document = {
        "job_id": "j",
        "api_name": "a",
        "api_id": "i",
        "created_time": "t",
        "handler": handler,
        "dataset": dataset,
    }

    settings = JobSettings.from_json(document)

    assert (settings.handler.image, settings.handler.python) == ("i:1", "3.12")
    assert settings.handler.dependencies == {"pip": "r.txt"}
    assert settings.dead_letters == expected
    assert JobSettings.from_json(settings.to_json()) == settings
