"""Metrics: added up, merged, never in the way."""

from __future__ import annotations

import random

import numpy as np
import orjson
import pytest

from cortex_dask.runtime.metrics import MetricsClient, merge, quantile


def test_counters_gauges_and_histograms_are_added_up_by_name_and_tags() -> None:
    client = MetricsClient()
    client.increment("seen")
    client.increment("seen", 4)
    client.increment("seen", tags={"kind": "x"})
    client.gauge("level", 3)
    client.gauge("level", 2)
    for value in (1, 2, 4):
        client.histogram("seconds", value)
    series = {(item["metric"], tuple(item["tags"])): item for item in client.collect()}
    assert series["seen", ()]["value"] == 5
    assert series["seen", ("kind",)]["value"] == 1
    assert series["level", ()]["value"] == 2
    seconds = series["seconds", ()]
    assert (seconds["count"], seconds["sum"], seconds["min"], seconds["max"]) == (3, 7, 1, 4)
    assert client.collect() == []


@pytest.mark.parametrize("name", ["cortex_x", "istio_requests"])
def test_reserved_names_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="reserved"):
        MetricsClient().increment(name)


def test_values_that_are_no_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match="finite"):
        MetricsClient().histogram("x", float("nan"))


def test_numbers_of_numpy_travel_as_json() -> None:
    client = MetricsClient()
    client.increment("a", np.int64(3))
    client.gauge("b", np.float32(0.5))
    client.histogram("c", np.float64(2))
    assert orjson.loads(orjson.dumps(client.collect()))[0]["value"] == 3


def test_merging_parts_is_the_same_as_counting_the_whole() -> None:
    values = [random.Random(1).lognormvariate(0, 2) for _ in range(5000)]
    whole, parts = MetricsClient(), [MetricsClient() for _ in range(4)]
    for number, value in enumerate(values):
        for client in (whole, parts[number % 4]):
            client.increment("n")
            client.histogram("v", value)
    merged = {item["metric"]: item for item in merge(part.collect() for part in parts)}
    expected = {item["metric"]: item for item in whole.collect()}
    assert merged["n"] == expected["n"]
    assert merged["v"]["buckets"] == expected["v"]["buckets"]
    for share in (0.5, 0.9, 0.99):
        exact = sorted(values)[int(share * len(values)) - 1]
        assert quantile(merged["v"], share) == pytest.approx(exact, rel=0.03)


def test_negative_values_and_zero_have_quantiles_too() -> None:
    client = MetricsClient()
    for value in (-100, -1, 0, 1, 100):
        client.histogram("v", value)
    (series,) = client.collect()
    assert quantile(series, 0.2) == -100
    assert quantile(series, 0.6) == 0
    assert quantile(series, 1.0) == 100


def test_tags_without_end_do_not_fill_the_memory() -> None:
    client = MetricsClient()
    for number in range(20_000):
        client.increment("n", tags={"row": str(number)})
    assert len(client.collect()) == 10_000
