"""The status document's pulse: it goes on whatever its listener does, and its last word is never lost in silence."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from cortex_dask.clusters.inline import Inline
from cortex_dask.errors import StorageError
from cortex_dask.runtime.coordinator import heartbeat, status_board
from cortex_dask.runtime.coordinator.coordinator import run_job
from cortex_dask.runtime.coordinator.heartbeat import Heartbeat
from cortex_dask.runtime.coordinator.status_board import StatusBoard
from tests.support.jobs import make_job

HANDLER = """
class Handler:
    def __init__(self, config):
        pass
    def handle_batch(self, payload, batch_id):
        return payload
"""


def test_a_listener_that_fails_stops_neither_the_job_nor_its_heartbeat(tmp_path: Path, caplog: Any) -> None:
    job = make_job(tmp_path, HANDLER)
    seen: list[str] = []

    def listener(document: dict[str, Any]) -> None:
        seen.append(document["status"])
        if len(seen) == 2:
            raise ValueError("the notebook is gone")

    board = StatusBoard(job.settings)
    pulse = Heartbeat(job.directory, board, listener)
    pulse._interval = 0.01
    pulse.start()
    deadline = time.monotonic() + 10
    while len(seen) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    before = job.directory.read_json("status.json")["coordinator"]["heartbeat"]
    while job.directory.read_json("status.json")["coordinator"]["heartbeat"] <= before:
        assert time.monotonic() < deadline, "the heartbeat has stopped"
        time.sleep(0.005)
    board.end("succeeded")
    pulse.stop()

    assert job.directory.read_json("status.json")["status"] == "succeeded"
    assert len(seen) == 2
    assert "the notebook is gone" in caplog.text


def test_a_job_whose_last_status_cannot_be_written_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = make_job(tmp_path, HANDLER)
    beat = Heartbeat.beat

    def failing(self: Heartbeat) -> None:
        if self._board.status in status_board.FINAL_STATUSES:  # the status is the one file that nobody may write now
            path = Path(job.url, "status.json")
            path.unlink(missing_ok=True)
            path.mkdir(exist_ok=True)
            Path(path, "in the way").touch()
        beat(self)

    monkeypatch.setattr(Heartbeat, "beat", failing)
    with pytest.raises(StorageError, match=r"status\.json"):
        run_job(job.url, Inline())
    monkeypatch.undo()
    shutil.rmtree(Path(job.url, "status.json"))

    assert run_job(job.url, Inline())["status"] == "succeeded"


def _pulse(job: Any) -> Heartbeat:
    pulse = Heartbeat(job.directory, StatusBoard(job.settings))
    pulse.beat()
    return pulse


def _said(job: Any) -> str:
    return str(job.directory.read_json("status.json")["status"])


def test_a_coordinator_begins_whatever_an_earlier_one_has_left(tmp_path: Path) -> None:
    job = make_job(tmp_path, HANDLER)
    first = _pulse(job)
    first._board.end("stopped")
    first.beat()
    first.beat()

    second = _pulse(job)

    assert _said(job) == "enqueuing"
    assert (first.overtaken, second.overtaken) == (None, None)


@pytest.mark.parametrize("late", ["timed out", "worker error", "completed with failures"])
def test_what_another_coordinator_has_ended_stays_as_it_is(late: str, tmp_path: Path) -> None:
    job = make_job(tmp_path, HANDLER)
    sleeper, other = _pulse(job), _pulse(job)
    other._board.end("succeeded")
    other.beat()

    sleeper.beat()
    sleeper._board.end(late)
    sleeper.beat()

    assert _said(job) == "succeeded"
    assert sleeper.overtaken is not None
    assert sleeper.overtaken["coordinator"]["id"] == other._board.coordinator_id


def test_that_the_output_is_whole_stands_over_another_ones_failure(tmp_path: Path) -> None:
    job = make_job(tmp_path, HANDLER)
    one, other = _pulse(job), _pulse(job)
    other._board.end("stopped")
    other.beat()

    one._board.end("succeeded")
    one.beat()

    assert _said(job) == "succeeded"


def test_a_coordinator_that_was_taken_for_dead_leaves_the_job_to_the_next(tmp_path: Path) -> None:
    job = make_job(tmp_path, HANDLER)
    one, other = _pulse(job), _pulse(job)
    one.beat()
    assert one.overtaken is None, "both live: somebody has started them by force"
    other.beat()

    one._beaten -= heartbeat.HEARTBEAT_LIMIT + 1
    one.beat()

    assert one.overtaken is not None
    assert job.directory.read_json("status.json")["coordinator"]["id"] == other._board.coordinator_id


def test_a_job_that_was_stopped_while_its_coordinator_slept_stays_stopped(tmp_path: Path) -> None:
    job = make_job(tmp_path, HANDLER)
    pulse = _pulse(job)
    document = job.directory.read_json("status.json")
    job.directory.write_json("status.json", {**document, "status": "stopped"})  # as Job.stop does

    pulse.beat()

    assert _said(job) == "stopped"
    assert pulse.overtaken is not None
