"""Contract 5, failures: attempts, dead-letter queues, ``on_job_complete``, the nine statuses, the status document."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import signal
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import dask.config
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

import cortex_dask as cx
from cortex_dask.cli import main
from cortex_dask.clusters.local import LocalThreads
from cortex_dask.display import SilentDisplay
from cortex_dask.io.job.failures import read_failures
from cortex_dask.io.job.settings import DeadLetterSettings
from cortex_dask.job import Job
from cortex_dask.runtime.coordinator.coordinator import run_job
from tests.faults.jobs import make_job
from tests.faults.processes import Coordinator, Moment
from tests.support.sqs import Queue
from tests.support.waiting import until

BATCHES, SIZE = 6, 10

#: Everything is told by the job's config, so that one project serves all tests.
HANDLER = """\
import json
import os
import sys
import time
from pathlib import Path


class Handler:
    def __init__(self, config, job_spec):
        self.config = config
        self.spec = job_spec
        self.seen = 0
        if "hog" in config:
            self.hog = bytearray(b"x") * (config["hog"] << 20)
            time.sleep(60)
        if "broken" in config:
            raise RuntimeError(config["broken"])

    def handle_batch(self, payload, batch_id):
        ids = [int(row["id"]) if isinstance(row, dict) else row for row in payload]
        with open(self.config["calls"], "a") as calls:
            calls.write(json.dumps([ids[0], batch_id]) + "\\n")
        while ids[0] in self.config.get("wait", ()) and not Path(self.config["go"]).exists():
            time.sleep(0.01)
        if ids[0] in self.config.get("fail", ()) and not Path(self.config["cured"]).exists():
            raise ValueError(f"no luck with {ids[0]}")
        self.seen += len(ids)
        return [{"id": number, "square": number * number} for number in ids]

    def on_job_complete(self):
        output = self.spec["output"]
        found = sorted(os.listdir(output)) if output else []
        with open(self.config["completed"], "a") as completed:
            completed.write(json.dumps({"seen": self.seen, "found": found, "spec": self.spec}) + "\\n")
        if not Path(self.config["cured"]).exists():
            if "complete" in self.config:
                raise RuntimeError(self.config["complete"])
            while "hang" in self.config:
                time.sleep(0.01)
"""

CORTEX_YAML = """\
- name: squares
  kind: BatchAPI
  handler:
    type: python
    path: handler.py
  compute: {mem: 400Mi}
"""


class Project:
    """A project directory, an input of six batches, and files by which the tests speak with the handler."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "project").mkdir()
        (folder / "project/handler.py").write_text(HANDLER)
        (folder / "project/cortex.yaml").write_text(CORTEX_YAML)
        pq.write_table(pa.table({"id": range(BATCHES * SIZE)}), folder / "in.parquet", row_group_size=SIZE)
        self.cured, self.go = folder / "cured", folder / "go"

    def options(self, **options: Any) -> dict[str, Any]:
        names = ("calls", "completed", "cured", "go")
        config = {**{name: str(self.folder / name) for name in names}, **options.pop("config", {})}
        given = {"input": str(self.folder / "in.parquet"), "batch_size": SIZE, "batch_format": "records", **options}
        if "item_list" in given:
            del given["input"], given["batch_size"], given["batch_format"]
        return {"output": str(self.folder / "out"), "workers": 2, "job_id": "job-1", **given, "config": config}

    def submit(self, **options: Any) -> Job:
        return cx.submit(self.folder / "project", **self.options(**options))

    def end(self, **options: Any) -> dict[str, Any]:
        """Run a job to its end, and return its status document."""
        job = self.submit(**options)
        with contextlib.suppress(cx.CortexDaskError):  # its status tells
            job.watch(SilentDisplay(), 60)
        return job.describe()

    def attempts(self) -> dict[int, int]:
        """Return how often each batch was tried, by its first id."""
        counts: dict[int, int] = {}
        for first, _ in self.lines("calls"):
            counts[first] = counts.get(first, 0) + 1
        return counts

    def lines(self, name: str) -> list[Any]:
        path = self.folder / name
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def rows(self) -> list[int]:
        table = pq.read_table(self.folder / "out") if list(self.folder.glob("out/*.parquet")) else pa.table({"id": []})
        return sorted(table["id"].to_pylist())


@pytest.fixture
def project(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Project]:
    monkeypatch.chdir(tmp_path)
    cache = str(tmp_path_factory.getbasetemp() / "cache")
    monkeypatch.setenv("DASK_CORTEX_DASK__STORE", str(tmp_path / "store"))
    monkeypatch.setenv("DASK_CORTEX_DASK__CACHE", cache)
    with dask.config.set({"cortex-dask.store": str(tmp_path / "store"), "cortex-dask.cache": cache}):
        yield Project(tmp_path)


@pytest.fixture
def queue(s3: str) -> Iterator[Queue]:
    with Queue() as made:
        yield made


ALL = list(range(BATCHES * SIZE))


class TestAttempts:
    def test_a_batch_that_raises_is_dropped_after_its_last_attempt_and_the_job_goes_on(self, project: Project) -> None:
        document = project.end(config={"fail": [20]}, max_attempts=2)
        assert document["status"] == "completed with failures"
        assert project.attempts() == {first: 2 if first == 20 else 1 for first in range(0, BATCHES * SIZE, SIZE)}
        assert project.rows() == [number for number in ALL if not 20 <= number < 30]
        assert document["batch_metrics"]["failed"] == 2
        assert document["batch_metrics"]["succeeded"] == BATCHES - 1

    def test_max_receive_count_says_how_often_a_batch_is_tried(self, project: Project) -> None:
        folder = project.folder / "dead"
        project.end(config={"fail": [20]}, dead_letter={"path": str(folder), "max_receive_count": 4})
        assert project.attempts()[20] == 4
        (file,) = folder.rglob("*.jsonl")
        (letter,) = map(json.loads, file.read_text().splitlines())
        assert (letter["attempts"], letter["rows"], letter["cause"]) == (4, SIZE, "exception")
        assert letter["payload"] == [{"id": number} for number in range(20, 30)]
        assert file.parent == folder / "job-1"
        assert file.read_bytes() == (project.folder / f"store/jobs/squares/job-1/failures/{file.name}").read_bytes()


@pytest.mark.s3
class TestQueue:
    def test_failed_batches_are_delivered_in_cortex_form_and_once(self, project: Project, queue: Queue) -> None:
        given = {"sqs_dead_letter_queue": {"arn": queue.arn, "max_receive_count": 3}, "config": {"fail": [20, 40]}}
        document = project.end(**given)
        assert (document["status"], document["undelivered"]) == ("completed with failures", 0)
        assert project.attempts()[20] == project.attempts()[40] == 3
        ids = dict(project.lines("calls"))
        got = sorted(queue.receive(), key=lambda item: item["body"][0]["id"])
        assert [item["body"] for item in got] == [[{"id": n} for n in range(first, first + SIZE)] for first in (20, 40)]
        assert [(item["job_id"], item["api_name"], item["batch_id"], item["attempts"]) for item in got] == [
            ("job-1", "squares", ids[first], "3") for first in (20, 40)
        ]
        assert {item["cause"] for item in got} == {"exception"}

        # Handled again: one in vain, so that it stands, and both with success. The queue keeps what it got, once.
        job = cx.Client().get_job("squares", "job-1")
        job.retry_failed()
        with pytest.warns(UserWarning, match="2 batches failed for good"):
            job.wait(60)
        assert project.attempts()[20] == 6
        project.cured.touch()
        job.retry_failed().wait(60)
        assert (job.status, project.rows(), queue.receive()) == ("succeeded", ALL, [])

    def test_a_batch_of_items_is_a_list_of_samples(self, project: Project, queue: Queue) -> None:
        document = project.end(
            item_list={"items": list(range(9)), "batch_size": 3},
            sqs_dead_letter_queue={"arn": queue.arn, "max_receive_count": 1},
            config={"fail": [3]},
        )
        assert document["failed_batches"] == 1
        assert [item["body"] for item in queue.receive()] == [[3, 4, 5]]

    def test_a_batch_that_cannot_be_delivered_stays_and_the_job_says_so(self, project: Project, queue: Queue) -> None:
        job = project.submit(
            sqs_dead_letter_queue={"arn": queue.arn, "max_receive_count": 1}, config={"fail": [20], "wait": [10]}
        )
        until(project.attempts, "the first batch")
        queue.delete()
        project.go.touch()
        with pytest.warns(UserWarning, match="1 batch failed for good"):
            job.wait(60)
        document = job.describe()
        assert (document["status"], document["undelivered"]) == ("completed with failures", 1)
        assert "1 of them could not be delivered to the queue arn:aws:sqs:" in document["status_reason"]
        assert job.failures()["payload"].tolist() == [[{"id": number} for number in range(20, 30)]]

        queue.create()
        with pytest.warns(UserWarning, match="1 batch failed for good"):
            job.resume().wait(60)
        assert (job.describe()["undelivered"], len(queue.receive())) == (0, 1)
        assert project.attempts()[20] == len(project.lines("completed")) == 1

    def test_a_resumed_job_delivers_what_the_ledger_holds_and_no_receipt_names(
        self, project: Project, queue: Queue
    ) -> None:
        target = {"arn": queue.arn, "max_receive_count": 1}
        project.end(sqs_dead_letter_queue=target, config={"fail": [20, 40]})
        assert len(queue.receive()) == 2
        # as if the coordinator had been killed before it could deliver one of the two, and end
        folder = project.folder / "store/jobs/squares/job-1"
        receipts = list(folder.glob("delivered/*.json"))
        for number, path in enumerate(receipts):
            receipt = json.loads(path.read_text())
            path.write_text(json.dumps({**receipt, "delivered": receipt["delivered"][: 1 - number]}))
        status = json.loads((folder / "status.json").read_text())
        (folder / "status.json").write_text(json.dumps({**status, "status": "stopped"}))
        run_job(str(folder), LocalThreads())
        assert len(queue.receive()) == 1

    def test_a_queue_that_does_not_exist_is_found_before_the_first_batch(self, project: Project, s3: str) -> None:
        arn = "arn:aws:sqs:us-east-1:123456789012:nobody"
        text = (project.folder / "project/cortex.yaml").read_text()
        job = f"  job: {{sqs_dead_letter_queue: {{arn: '{arn}', max_receive_count: 2}}, job_id: job-1}}\n"
        (project.folder / "project/cortex.yaml").write_text(text + job)
        config = json.dumps(project.options()["config"])
        done = CliRunner().invoke(
            main, ["submit", "project", "--input", "in.parquet", "--output", "out", "--config", config]
        )
        assert done.exit_code == 2, done.output
        assert "sqs_dead_letter_queue.arn: there is no queue nobody of account 123456789012 in us-east-1" in done.output
        assert project.attempts() == {}
        assert cx.Client().get_job("squares", "latest").status == "failed while enqueuing"


KILLS = [
    Moment("create", "ledger/", when="after"),  # final, and not sent
    Moment("write", "delivered/", when="before"),  # sent, and not noted
    Moment("write", "delivered/", when="after"),
]


@pytest.mark.s3
@pytest.mark.parametrize("fifo", [False, True], ids=["standard", "fifo"])
@pytest.mark.parametrize("moment", KILLS, ids=str)
def test_a_coordinator_killed_over_a_delivery(moment: Moment, fifo: bool, tmp_path: Path, s3: str) -> None:
    """Every batch arrives; what was sent in the moment of the kill twice, or, in a FIFO queue, once."""
    bad = [10, 300, 510, 999]
    job = make_job(str(tmp_path / "store"), tmp_path / "marks", files=2, fault="raise", bad=bad)
    with Queue(fifo=fifo) as queue:
        settings = job.directory.settings()
        changed = dataclasses.replace(settings, dead_letters=DeadLetterSettings(3, queue_arn=queue.arn))
        job.directory.write_json("job.json", changed.to_json())
        with Coordinator(job, moment) as coordinator:
            assert coordinator.join() == -signal.SIGKILL, coordinator.said()
        assert job.run()["undelivered"] == 0
        got = [item["batch_id"] for item in queue.receive()]
    assert sorted(set(got)) == sorted(letter["batch_id"] for letter in read_failures(job.directory))
    assert len(set(got)) == len(bad)
    if fifo or moment.request == "create" or moment.when == "after":
        assert len(got) == len(bad)


class TestCompletion:
    def test_it_runs_once_on_the_instance_that_handled_all_batches_and_reads_the_output(self, project: Project) -> None:
        document = project.end(workers=1)
        (call,) = project.lines("completed")
        assert call["seen"] == BATCHES * SIZE
        assert call["spec"]["output"] == str(project.folder / "out")
        parts = [name for name in call["found"] if name.startswith("part-")]
        assert len(parts) == document["parts"]
        assert "_manifest.json" in call["found"]
        assert "_SUCCESS" not in call["found"]  # the job is complete when on_job_complete is

    def test_one_worker_is_one_instance_on_a_cluster_that_has_more(self, project: Project) -> None:
        from distributed import LocalCluster

        with LocalCluster(
            n_workers=2, threads_per_worker=2, host="127.0.0.1", dashboard_address="127.0.0.1:0", memory_limit=0
        ) as cluster:
            assert project.end(workers=1, cluster=cluster.scheduler_address)["status"] == "succeeded"
        (call,) = project.lines("completed")
        assert call["seen"] == BATCHES * SIZE

    def test_with_several_workers_it_runs_once_too(self, project: Project) -> None:
        assert project.end(workers=3)["status"] == "succeeded"
        assert len(project.lines("completed")) == 1

    def test_it_runs_when_batches_have_failed(self, project: Project) -> None:
        assert project.end(config={"fail": [20]}, max_attempts=1)["status"] == "completed with failures"
        assert len(project.lines("completed")) == 1

    def test_its_failure_fails_the_job_and_a_resumed_job_tries_it_again_until_it_has_succeeded(
        self, project: Project
    ) -> None:
        document = project.end(config={"complete": "the mail server is away", "fail": [20]}, max_attempts=1)
        assert document["status"] == "worker error"
        assert document["status_reason"] == "on_job_complete failed: RuntimeError: the mail server is away"
        assert not (project.folder / "out/_SUCCESS").exists()
        job = cx.Client().get_job("squares", "job-1")
        with pytest.raises(cx.JobFailedError, match="the mail server is away"):
            job.resume().wait(60)
        assert len(project.lines("completed")) == 2

        project.cured.touch()
        with pytest.warns(UserWarning, match="1 batch failed for good"):
            job.resume().wait(60)
        assert len(project.lines("completed")) == 3
        job.retry_failed().wait(60)
        job.resume().wait(60)
        assert len(project.lines("completed")) == 3
        assert (project.attempts()[0], job.status) == (1, "succeeded")

    def test_it_does_not_run_again_when_the_coordinator_vanished_before_it_could_note_its_success(
        self, project: Project
    ) -> None:
        project.end()
        folder = project.folder / "store/jobs/squares/job-1"
        assert (folder / "completed.json").exists()
        status = json.loads((folder / "status.json").read_text())
        (folder / "status.json").write_text(json.dumps({**status, "status": "running", "coordinator": {}}))
        assert run_job(str(folder), LocalThreads())["status"] == "succeeded"
        assert len(project.lines("completed")) == 1

    @pytest.mark.parametrize("cluster", ["local", "inline"])
    def test_the_inline_cluster_does_the_same(self, project: Project, cluster: str) -> None:
        with pytest.raises(cx.JobFailedError, match="on_job_complete failed: RuntimeError: no"):
            cx.run(
                project.folder / "project",
                cluster=cluster,
                progress=False,
                **project.options(config={"complete": "no"}),
            )
        project.cured.touch()
        job = cx.Client().get_job("squares", "job-1")
        for _ in range(2):
            job.resume(cluster=cluster).wait(60)
        assert (job.status, len(project.lines("completed"))) == ("succeeded", 2)

    def test_one_that_hangs_is_stopped_after_the_timeout(self, project: Project) -> None:
        document = project.end(config={"hang": True}, timeout=3)
        assert (document["status"], len(project.lines("completed"))) == ("timed out", 1)
        assert document["status_reason"] == "the job took longer than its timeout of 3 s"

    def test_one_that_hangs_can_be_stopped_by_a_user(self, project: Project) -> None:
        job = project.submit(config={"hang": True})
        until(lambda: project.lines("completed"), "on_job_complete")
        job.stop()
        assert (job.status, job.describe()["status_reason"]) == ("stopped", "stopped by a user")


class TestStatuses:
    def test_a_job_is_enqueuing_then_running_then_succeeded(self, project: Project) -> None:
        seen: dict[str, dict[str, Any]] = {}

        def look(document: dict[str, Any]) -> None:
            seen.setdefault(document["status"], document)
            if document["status"] == "running":
                project.go.touch()

        options = project.options(config={"wait": [0]})
        source, output = options.pop("input"), options.pop("output")
        job, _ = cx.Client().create(cx.Client().resolve(project.folder / "project", source, output, options))  # type: ignore[arg-type]
        assert job.status == "enqueuing"  # submitted, and nobody has begun with it
        run_job(job.url, LocalThreads(), on_status=look)
        assert list(seen) == ["enqueuing", "running", "succeeded"]
        for document in seen.values():
            check_document(document)
        assert seen["enqueuing"]["worker_counts"]["pending"] == 2

    def test_running_while_batches_are_handled(self, project: Project) -> None:
        job = project.submit(config={"wait": [0]})
        until(project.attempts, "the first batch")
        until(lambda: job.describe()["worker_counts"]["running"], "a worker that runs")
        document = job.describe()
        project.go.touch()
        assert document["status"] == "running"
        check_document(document)
        assert document["end_time"] is None
        assert document["batches_in_queue"] == BATCHES
        job.wait(60)

    def test_failed_while_enqueuing_when_there_is_no_input(self, project: Project) -> None:
        (project.folder / "in.parquet").unlink()
        document = project.end()
        assert document["status"] == "failed while enqueuing"
        assert "in.parquet" in document["status_reason"]
        check_document(document)
        assert document["start_time"] is None

    def test_completed_with_failures(self, project: Project) -> None:
        document = project.end(config={"fail": [20]}, max_attempts=1)
        assert document["status"] == "completed with failures"
        assert document["status_reason"] == f"1 of {BATCHES} batches failed for good"
        check_document(document)

    def test_worker_error_when_init_raises(self, project: Project) -> None:
        document = project.end(config={"broken": "there is no model"})
        assert document["status"] == "worker error"
        assert "RuntimeError: there is no model" in document["status_reason"]
        assert document["worker_counts"]["failed"] >= 1
        check_document(document)

    def test_out_of_memory_when_init_takes_more_than_there_is(self, project: Project) -> None:
        document = project.end(config={"hog": 700})
        assert document["status"] == "out of memory"
        assert "its limit is 400 MiB" in document["status_reason"]
        check_document(document)

    def test_timed_out(self, project: Project) -> None:
        document = project.end(config={"wait": [0]}, timeout=2)
        assert document["status"] == "timed out"
        assert document["status_reason"] == "the job took longer than its timeout of 2 s"
        check_document(document)

    def test_stopped_by_a_user(self, project: Project) -> None:
        job = project.submit(config={"wait": [0]})
        until(project.attempts, "the first batch")
        job.stop()
        document = job.describe()
        assert (document["status"], document["status_reason"]) == ("stopped", "stopped by a user")
        check_document(document)


def test_the_status_document_has_the_keys_of_the_contract(project: Project) -> None:
    document = project.end(timeout=100)
    check_document(document)
    expected = {
        "job_id": "job-1",
        "api_name": "squares",
        "kind": "BatchAPI",
        "workers": 2,
        "config": project.options()["config"],
        "timeout": 100,
        "status": "succeeded",
        "batches_in_queue": 0,
        "total_batch_count": BATCHES,
    }
    assert {key: document[key] for key in expected} == expected
    assert document["batch_metrics"]["succeeded"] == BATCHES
    assert document["batch_metrics"]["failed"] == 0
    assert 0 < document["batch_metrics"]["avg_time_per_batch"] < 1
    counts = document["worker_counts"]
    assert (counts["pending"], counts["running"], counts["failed"], counts["stalled"]) == (0, 0, 0, 0)
    assert 1 <= counts["succeeded"] <= 2
    times = [datetime.fromisoformat(document[key]) for key in ("created_time", "start_time", "end_time")]
    assert times == sorted(times)
    assert document == json.loads((project.folder / "store/jobs/squares/job-1/status.json").read_text())


def check_document(document: dict[str, Any]) -> None:
    """Check the keys and types of the contract's list."""
    optional = (str, type(None))
    types: dict[str, Any] = {
        "job_id": str,
        "api_name": str,
        "kind": str,
        "workers": int,
        "config": dict,
        "api_id": str,
        "timeout": (float, int, type(None)),
        "status": str,
        "batches_in_queue": int,
        "total_batch_count": int,
        "batch_metrics": dict,
        "worker_counts": dict,
        "created_time": str,
        "start_time": optional,
        "end_time": optional,
    }
    for key, kind in types.items():
        assert isinstance(document[key], kind), (key, document[key])
        assert not isinstance(document[key], bool), key
    assert set(document["batch_metrics"]) == {"succeeded", "failed", "avg_time_per_batch"}
    assert isinstance(document["batch_metrics"]["succeeded"], int)
    assert isinstance(document["batch_metrics"]["failed"], int)
    assert isinstance(document["batch_metrics"]["avg_time_per_batch"], (float, type(None)))
    assert set(document["worker_counts"]) == {"pending", "initializing", "running", "succeeded", "failed", "stalled"}
    assert all(type(count) is int and count >= 0 for count in document["worker_counts"].values())
    assert sum(document["worker_counts"].values()) <= document["workers"]
    for key in ("created_time", "start_time", "end_time"):
        if document[key] is not None:
            assert datetime.fromisoformat(document[key]).utcoffset() is not None
    ended = document["status"] not in ("enqueuing", "running")
    assert (document["end_time"] is not None) == ended
