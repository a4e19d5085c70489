"""The heartbeat: it goes on whatever its listener does, its last document is never lost in silence, and it yields."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from cortex_dask.clusters.inline import Inline
from cortex_dask.errors import StorageError
from cortex_dask.runtime.coordinator import heartbeat
from cortex_dask.runtime.coordinator.coordinator import run_job
from cortex_dask.runtime.coordinator.heartbeat import Heartbeat, write_failure
from cortex_dask.runtime.coordinator.status_board import StatusBoard
from tests.support.jobs import make_job
from tests.support.waiting import until

HANDLER = """
class Handler:
    def __init__(self, config):
        pass
    def handle_batch(self, payload, batch_id):
        return payload
"""


def stored(job: Any) -> dict[str, Any]:
    document: dict[str, Any] = job.directory.read_json("status.json")
    return document


def test_a_listener_that_fails_stops_neither_the_job_nor_its_heartbeat(tmp_path: Path, caplog: Any) -> None:
    job = make_job(tmp_path, HANDLER)
    seen: list[str] = []

    def listener(document: dict[str, Any]) -> None:
        seen.append(document["status"])
        if len(seen) == 2:
            raise ValueError("the notebook is gone")

    board = StatusBoard(job.settings)
    with Heartbeat(job.directory, board, listener, interval=0.01):
        until(lambda: len(seen) == 2, "the second document")
        before = stored(job)["coordinator"]["heartbeat"]
        until(lambda: stored(job)["coordinator"]["heartbeat"] > before, "a heartbeat after the failure")
        board.end("succeeded")

    assert stored(job)["status"] == "succeeded"
    assert len(seen) == 2
    assert "the notebook is gone" in caplog.text


def test_a_job_whose_last_status_cannot_be_written_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = make_job(tmp_path, HANDLER)
    end = StatusBoard.end

    def end_and_block(self: StatusBoard, status: str, reason: str = "") -> None:
        """Put a folder in the place of the status, the one file that cannot be written from now on."""
        end(self, status, reason)
        path = Path(job.url, "status.json")
        path.unlink()
        path.mkdir()
        Path(path, "in the way").touch()

    monkeypatch.setattr(StatusBoard, "end", end_and_block)
    with pytest.raises(StorageError, match=r"status\.json"):
        run_job(job.url, Inline())
    monkeypatch.undo()
    shutil.rmtree(Path(job.url, "status.json"))

    assert run_job(job.url, Inline())["status"] == "succeeded"


class Coordinator:
    """The status of a coordinator, written when a test says so."""

    def __init__(self, job: Any) -> None:
        self.board = StatusBoard(job.settings)
        self.heartbeat = Heartbeat(job.directory, self.board)
        self.heartbeat.beat()

    def beat(self) -> None:
        self.heartbeat.beat()

    def end(self, status: str) -> None:
        self.board.end(status)
        self.heartbeat.beat()

    @property
    def overtaken(self) -> dict[str, Any] | None:
        return self.heartbeat.overtaken


def test_a_coordinator_replaces_what_an_earlier_one_has_left(tmp_path: Path) -> None:
    job = make_job(tmp_path, HANDLER)
    first = Coordinator(job)
    first.end("stopped")
    first.beat()

    second = Coordinator(job)

    assert stored(job)["status"] == "enqueuing"
    assert (first.overtaken, second.overtaken) == (None, None)


@pytest.mark.parametrize("late", ["timed out", "worker error", "completed with failures"])
def test_a_final_status_of_another_coordinator_stays(late: str, tmp_path: Path) -> None:
    job = make_job(tmp_path, HANDLER)
    sleeper, other = Coordinator(job), Coordinator(job)
    other.end("succeeded")

    sleeper.beat()
    sleeper.end(late)

    assert stored(job)["status"] == "succeeded"
    assert sleeper.overtaken is not None
    assert sleeper.overtaken["coordinator"]["id"] == other.board.coordinator_id


def test_a_complete_output_replaces_the_failure_of_another_coordinator(tmp_path: Path) -> None:
    job = make_job(tmp_path, HANDLER)
    one, other = Coordinator(job), Coordinator(job)
    other.end("stopped")

    one.end("succeeded")

    assert stored(job)["status"] == "succeeded"


def test_a_coordinator_that_was_taken_for_dead_leaves_the_job_to_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = make_job(tmp_path, HANDLER)
    one, other = Coordinator(job), Coordinator(job)
    one.beat()
    assert one.overtaken is None, "both live: they were started by force"
    other.beat()

    monkeypatch.setattr(heartbeat, "HEARTBEAT_LIMIT", -1.0)  # so the last beat of the first one is too old
    one.beat()

    assert one.overtaken is not None
    assert stored(job)["coordinator"]["id"] == other.board.coordinator_id


def test_a_job_that_was_stopped_while_its_coordinator_slept_stays_stopped(tmp_path: Path) -> None:
    job = make_job(tmp_path, HANDLER)
    sleeper = Coordinator(job)
    job.directory.write_json("status.json", {**stored(job), "status": "stopped"})  # as Job.stop does

    sleeper.beat()

    assert stored(job)["status"] == "stopped"
    assert sleeper.overtaken is not None


def test_a_failure_is_written_for_a_job_that_no_coordinator_could_run(tmp_path: Path) -> None:
    job = make_job(tmp_path, HANDLER)
    job.directory.store.delete("status.json")

    write_failure(job.directory, "no memory left")

    document = stored(job)
    assert (document["status"], document["status_reason"], document["eta"]) == ("worker error", "no memory left", None)
    assert document["end_time"] is not None


def test_a_failure_does_not_replace_a_final_status(tmp_path: Path) -> None:
    job = make_job(tmp_path, HANDLER)
    Coordinator(job).end("succeeded")

    write_failure(job.directory, "too late")

    assert stored(job)["status"] == "succeeded"
