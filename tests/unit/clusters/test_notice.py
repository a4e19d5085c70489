"""Why workers are missing, told while they are, and not to those who need not know."""

from __future__ import annotations

import io
import threading
from typing import Any

import pytest

from cortex_dask.clusters.notice import ClusterNotice
from cortex_dask.display import PlainDisplay
from tests.support.waiting import until


class Explain:
    """A cluster that gives an answer; an exception is raised."""

    def __init__(self, answer: str | Exception | None) -> None:
        self.answer = answer
        self.calls = 0
        self.called = threading.Event()

    def __call__(self) -> str | None:
        self.calls += 1
        self.called.set()
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


def test_a_reason_is_told_while_workers_are_missing() -> None:
    notice = ClusterNotice(Explain("no node takes its pods"), patience=0.0)

    notice.update(is_missing=True)

    until(lambda: notice.text == "waiting for workers: no node takes its pods", "the answer")
    notice.update(is_missing=False)
    assert notice.text == ""


def test_a_cluster_is_not_asked_all_the_time() -> None:
    explain = Explain("no room")
    notice = ClusterNotice(explain, patience=0.0)
    notice.update(is_missing=True)
    until(lambda: notice.text, "the answer")

    for _ in range(5):
        notice.update(is_missing=True)

    assert explain.calls == 1


@pytest.mark.parametrize("answer", [None, OSError("the API server is away")])
def test_where_no_reason_is_known_nothing_is_told(answer: Any) -> None:
    explain = Explain(answer)
    notice = ClusterNotice(explain, patience=0.0)

    notice.update(is_missing=True)

    assert explain.called.wait(10)
    assert notice.text == ""


def test_workers_that_come_soon_are_waited_for_in_silence() -> None:
    explain = Explain("they start")
    notice = ClusterNotice(explain, patience=1000.0)

    notice.update(is_missing=True)

    assert (notice.text, explain.calls) == ("", 0)


def test_nothing_is_asked_where_nothing_is_missing() -> None:
    explain = Explain("no room")

    ClusterNotice(explain, patience=0.0).update(is_missing=False)

    assert explain.calls == 0


def test_a_display_shows_it_once() -> None:
    stream = io.StringIO()
    display = PlainDisplay(stream, clock=lambda: 0.0)
    status = {"api_name": "demo", "status": "running", "total_batch_count": 4, "batches_done": 0}

    for reason in ("", "waiting for workers: no room", "waiting for workers: no room", ""):
        display.update({**status, "status_reason": reason})

    display.update({**status, "status": "stopped", "status_reason": "stopped by a user"})
    assert stream.getvalue().count("demo: waiting for workers: no room\n") == 1
    assert "by a user" not in stream.getvalue(), "the summary says that"
