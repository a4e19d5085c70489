"""Why workers are missing, told while they are, and not to those who need not know."""

from __future__ import annotations

import io
import threading
from typing import Any

import pytest

from cortex_dask.clusters import dask
from cortex_dask.clusters.dask import Notice
from cortex_dask.display import PlainDisplay


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dask, "_PATIENCE", 0.0)


class Trouble:
    """A cluster that says what it is told to say; an exception is raised."""

    def __init__(self, answer: str | Exception | None) -> None:
        self.answer = answer
        self.asked = threading.Semaphore(0)

    def __call__(self) -> str | None:
        self.asked.release()
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


def looked(trouble: Trouble, *, is_missing: bool = True) -> Notice:
    made = Notice(trouble)
    made.look(is_missing=is_missing)
    if made._thread is not None:
        made._thread.join(10)
    return made


def test_a_reason_is_told_while_workers_are_missing() -> None:
    made = looked(Trouble("no node takes its pods"))
    assert made.text == "waiting for workers: no node takes its pods"

    made.look(is_missing=False)

    assert made.text == ""


def test_a_cluster_is_not_asked_all_the_time() -> None:
    trouble = Trouble("no room")
    made = looked(trouble)

    for _ in range(5):
        made.look(is_missing=True)

    assert trouble.asked.acquire(blocking=False)
    assert not trouble.asked.acquire(blocking=False)


@pytest.mark.parametrize("answer", [None, OSError("the API server is away")])
def test_where_no_reason_is_known_nothing_is_told(answer: Any) -> None:
    assert looked(Trouble(answer)).text == ""


def test_patience_with_workers_that_come(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dask, "_PATIENCE", 1000.0)
    trouble = Trouble("they start")

    assert looked(trouble).text == ""
    assert not trouble.asked.acquire(blocking=False)


def test_nothing_is_asked_where_nothing_is_missing() -> None:
    trouble = Trouble("no room")

    looked(trouble, is_missing=False)

    assert not trouble.asked.acquire(blocking=False)


def test_people_read_it_once() -> None:
    stream = io.StringIO()
    display = PlainDisplay(stream, clock=lambda: 0.0)
    status = {"api_name": "demo", "status": "running", "total_batch_count": 4, "batches_done": 0}

    for reason in ("", "waiting for workers: no room", "waiting for workers: no room", ""):
        display.update({**status, "status_reason": reason})

    display.update({**status, "status": "stopped", "status_reason": "stopped by a user"})
    assert stream.getvalue().count("demo: waiting for workers: no room\n") == 1
    assert "by a user" not in stream.getvalue(), "the summary says that"
