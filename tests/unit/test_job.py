"""The handle on a job, over job directories made by hand."""

import os
import socket
import threading
import time
from datetime import UTC, datetime

import orjson
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cortex_dask.cli.output import job_table
from cortex_dask.display import summary
from cortex_dask.errors import InputError, JobFailedError, JobNotFoundError, JobStoppedError, JobTimedOutError
from cortex_dask.io.arrow.schema import encode_schema
from cortex_dask.io.job.directory import JobDirectory
from cortex_dask.io.job.ledger import Ledger
from cortex_dask.io.job.records import BatchFailure, Part, SplitRecord
from cortex_dask.io.job.settings import HandlerSettings, JobSettings, OutputSettings
from cortex_dask.io.job.splits import DatasetInput, Piece, Split, batch_id, part_name
from cortex_dask.job import Job

JOB = "job-1"
SCHEMA = pa.schema([("x", pa.int64()), ("label", pa.string())])


@pytest.fixture
def directory(tmp_path):
    return JobDirectory(str(tmp_path / "jobs/digits/job-1"))


def make(directory, tmp_path, *, output_format="parquet", output=True, compression=None, **changes):
    settings = JobSettings(
        job_id=JOB,
        api_name="digits",
        api_id="digits-1",
        created_time=datetime.now(UTC).isoformat(),
        handler=HandlerSettings(kind="class"),
        dataset=DatasetInput(paths=("in",)),
        output=OutputSettings(str(tmp_path / "out"), format=output_format, compression=compression) if output else None,
        **changes,
    )
    directory.create(settings)
    return Job(directory.url)


def end(directory, status, **changes):
    directory.write_json("status.json", {**Job(directory.url).describe(), "status": status, **changes})


def record(split, part=None, failures=(), failures_file=None):
    return SplitRecord(split, f"attempt-{split}", part, 2, 2 - len(failures), failures, failures_file)


def write_part(job, split, table):
    name = part_name(JOB, split, job.settings.output.suffix)
    path = os.path.join(job.output, name)
    os.makedirs(job.output, exist_ok=True)
    pq.write_table(table, path)
    return Part(name, f"_temporary/{name}", table.num_rows, os.path.getsize(path))


def letter(split, index, **changes):
    identity = batch_id(JOB, split, index)
    return {
        "batch_id": identity,
        "split": split,
        "batch": index,
        "rows": 1,
        "attempts": 3,
        "cause": "exception",
        **changes,
    }


def failure(split, index):
    return BatchFailure(index, batch_id(JOB, split, index), 1, 3, "exception", "ValueError: no")


class TestStatus:
    def test_a_job_that_does_not_exist_says_where(self, directory):
        with pytest.raises(JobNotFoundError, match=directory.url):
            _ = Job(directory.url).status

    def test_a_new_job_is_enqueuing(self, directory, tmp_path):
        job = make(directory, tmp_path)

        assert job.status == "enqueuing"
        assert job.describe()["job_id"] == JOB
        assert repr(job) == "<Job digits/job-1: enqueuing>"

    def test_a_job_whose_coordinator_is_gone_says_how_to_go_on(self, directory, tmp_path):
        job = make(directory, tmp_path)
        dead = {"id": "x", "host": socket.gethostname(), "pid": os.getpid(), "heartbeat": time.time() - 3600}
        end(directory, "running", coordinator=dead)

        document = job.describe()
        assert document["status"] == job.status == "running"
        reason = document["status_reason"]
        assert reason.startswith("no process runs this job (no coordinator is alive, the last sign of one was 1 h")
        assert reason.endswith("go on with: cortex-dask resume digits job-1")
        assert "no coordinator is alive" in job._repr_html_()
        assert "cortex-dask resume digits job-1" in summary(document)
        assert "no process runs it" in repr(job)
        assert "running (no coordinator)" in job_table([document])
        with pytest.raises(JobFailedError, match="no process runs this job"):
            job.wait()

    def test_a_job_that_another_process_runs_is_live(self, directory, tmp_path):
        job = make(directory, tmp_path)
        alive = {"id": "x", "host": socket.gethostname(), "pid": os.getpid(), "heartbeat": time.time()}
        end(directory, "running", coordinator=alive, batches_done=3, total_batch_count=4, total_batch_count_exact=True)

        assert job.is_live()
        assert job.progress.share == 0.75
        with pytest.raises(TimeoutError, match="it goes on"):
            job.wait(timeout=0.01)

    def test_the_html_shows_the_status(self, directory, tmp_path):
        assert "enqueuing" in make(directory, tmp_path)._repr_html_()

    def test_a_handle_on_nothing_has_a_repr(self, directory):
        assert "cannot be read" in repr(Job(directory.url))


class TestWait:
    @pytest.mark.parametrize(
        ("status", "error"),
        [("stopped", JobStoppedError), ("timed out", JobTimedOutError), ("worker error", JobFailedError)],
    )
    def test_a_job_without_a_complete_result_raises_what_it_ended_with(self, directory, tmp_path, status, error):
        job = make(directory, tmp_path)
        end(directory, status, status_reason="because.")

        with pytest.raises(error, match=f"ended with the status '{status}': because. See its log with") as caught:
            job.wait()
        assert caught.value.status == status
        assert "cortex-dask resume digits job-1" in str(caught.value)

    def test_a_job_with_failed_batches_warns_and_says_how_to_retry(self, directory, tmp_path):
        job = make(directory, tmp_path)
        end(directory, "completed with failures", failed_batches=2)

        with pytest.warns(UserWarning, match=r"2 batches failed for good .* cortex-dask retry digits job-1 --failed"):
            assert job.wait() is job

    def test_one_failed_batch_is_said_in_the_singular(self, directory, tmp_path):
        job = make(directory, tmp_path)
        end(directory, "completed with failures", failed_batches=1)

        with pytest.warns(UserWarning, match="but 1 batch failed for good"):
            job.wait()

    def test_waiting_ends_when_another_process_ends_the_job(self, directory, tmp_path):
        job = make(directory, tmp_path)
        alive = {"id": "x", "host": socket.gethostname(), "pid": os.getpid(), "heartbeat": time.time()}
        end(directory, "running", coordinator=alive)
        other = threading.Timer(0.2, lambda: end(directory, "succeeded"))
        other.start()

        assert job.wait(timeout=10) is job
        other.join()


class TestStop:
    def test_a_job_that_nobody_runs_is_stopped_at_once(self, directory, tmp_path):
        job = make(directory, tmp_path)
        dead = {"id": "x", "host": socket.gethostname(), "pid": os.getpid(), "heartbeat": 0.0}
        end(directory, "running", coordinator=dead)

        job.stop()

        assert job.status == "stopped"
        assert job.describe()["end_time"] is not None

    def test_a_job_that_has_ended_stays_as_it_is(self, directory, tmp_path):
        job = make(directory, tmp_path)
        end(directory, "succeeded")

        job.stop()

        assert job.status == "succeeded"
        assert directory.stop_request() is None


class TestOutput:
    def test_only_the_parts_of_the_ledger_are_read_in_input_order(self, directory, tmp_path):
        job = make(directory, tmp_path)
        tables = [pa.table({"x": [number], "label": [str(number)]}, schema=SCHEMA) for number in range(3)]
        parts = [write_part(job, number, table) for number, table in enumerate(tables)]
        Ledger(directory.store).append([record(1, parts[1]), record(0, parts[0])])  # split 2 is a zombie's
        directory.settle_schema(encode_schema(SCHEMA))
        end(directory, "succeeded")

        assert job.to_arrow().to_pydict() == {"x": [0, 1], "label": ["0", "1"]}
        assert job.to_pandas()["x"].tolist() == [0, 1]
        lazy = job.to_dask()
        assert lazy.npartitions == 2
        # dask has its own kind of text column
        pd.testing.assert_frame_equal(lazy.compute().reset_index(drop=True), job.to_pandas(), check_dtype=False)
        assert lazy["x"].compute().tolist() == [0, 1]

    def test_an_output_that_is_not_complete_is_refused_unless_asked_for(self, directory, tmp_path):
        job = make(directory, tmp_path)
        first = write_part(job, 0, pa.table({"x": [1], "label": ["a"]}, schema=SCHEMA))
        not_published = Part(part_name(JOB, 1, ".parquet"), "_temporary/1", 1, 10)
        Ledger(directory.store).append([record(0, first), record(1, not_published)])
        directory.settle_schema(encode_schema(SCHEMA))

        with pytest.raises(InputError, match="has no complete output: its status is 'enqueuing'"):
            job.to_pandas()
        assert job.to_pandas(partial=True)["x"].tolist() == [1]

    def test_a_job_without_output_says_so(self, directory, tmp_path):
        job = make(directory, tmp_path, output=False)
        end(directory, "succeeded")

        assert job.output is None
        with pytest.raises(InputError, match="writes no output"):
            job.to_pandas()

    def test_a_job_that_returned_nothing_has_an_empty_output(self, directory, tmp_path):
        job = make(directory, tmp_path)
        Ledger(directory.store).append([record(0)])
        end(directory, "succeeded")

        assert job.to_arrow().num_rows == 0
        assert len(job.to_dask()) == 0

    @pytest.mark.parametrize("compression", [None, "gzip"])
    def test_json_lines_come_back_with_the_schema_of_the_job(self, directory, tmp_path, compression):
        import gzip

        job = make(directory, tmp_path, output_format="json", compression=compression)
        name = part_name(JOB, 0, job.settings.output.suffix)
        data = b'{"x":1,"label":"01234"}\n{"x":2,"label":"2026-01-31"}\n{"x":null,"label":null}\n'
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / name).write_bytes(gzip.compress(data) if compression else data)
        Ledger(directory.store).append([record(0, Part(name, "s", 3, 1))])
        directory.settle_schema(encode_schema(SCHEMA))
        end(directory, "succeeded")

        assert job.to_arrow().schema == SCHEMA
        assert job.to_arrow().to_pydict() == {"x": [1, 2, None], "label": ["01234", "2026-01-31", None]}


class TestFailures:
    def test_they_are_those_of_the_ledger(self, directory, tmp_path):
        job = make(directory, tmp_path)
        directory.store.write("failures/a.jsonl", orjson.dumps(letter(0, 1, payload=[{"x": 1}])))
        directory.store.write("failures/zombie.jsonl", orjson.dumps(letter(0, 0)))
        Ledger(directory.store).append([record(0, None, (failure(0, 1),), "failures/a.jsonl")])

        found = job.failures()

        assert found["batch"].tolist() == [1]
        assert found["payload"].tolist() == [[{"x": 1}]]
        assert found["cause"].tolist() == ["exception"]

    def test_a_batch_that_a_retry_has_handled_is_gone_and_one_that_failed_again_is_there_once(
        self, directory, tmp_path
    ):
        job = make(directory, tmp_path)
        letters = b"\n".join(orjson.dumps(letter(0, index, attempts=3)) for index in (0, 1))
        directory.store.write("failures/first.jsonl", letters)
        directory.store.write("failures/again.jsonl", orjson.dumps(letter(0, 1, attempts=6)))
        repeat = Split(1, (Piece("in/a", 0, 2, 2),), 2, 2, 10, base=0, only=(0, 1))
        directory.store.write("plan/retry-0000.jsonl", orjson.dumps(repeat.to_json()))
        ledger = Ledger(directory.store)
        ledger.append([record(0, None, (failure(0, 0), failure(0, 1)), "failures/first.jsonl")])
        ledger.append([record(1, None, (failure(0, 1),), "failures/again.jsonl")])

        found = job.failures()

        assert found[["batch", "attempts"]].values.tolist() == [[1, 6]]

    def test_without_failures_there_is_an_empty_table_with_the_same_columns(self, directory, tmp_path):
        found = make(directory, tmp_path).failures()

        assert found.empty
        assert {"batch_id", "cause", "error", "traceback", "position", "payload"} <= set(found.columns)


def test_logs_are_a_table(directory, tmp_path):
    from cortex_dask.runtime.log_line import line

    job = make(directory, tmp_path)
    directory.store.write("logs/w-1-1-00000.jsonl", line("INFO", "hello", {"workerID": "w-1"}) + b"\n")

    assert job.logs(level="info")["message"].tolist() == ["hello"]
    assert job.logs(level="error").empty
