"""Jobs from the command line and from Python, with real handler processes."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import dask.config
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

import cortex_dask as cx
from cortex_dask.cli import main
from cortex_dask.testing import run_inline
from tests.support.waiting import until

CORTEX_YAML = """\
- name: doubler
  kind: BatchAPI
  handler:
    type: python
    path: handler.py
    config: {unlucky: -1, seconds: 0, hurry: nowhere}
"""

HANDLER = """\
import json
import os
import time
from pathlib import Path


class Handler:
    def __init__(self, config):
        self.config = config
        print("loaded", json.loads(Path("values.json").read_text()))
        if config.get("broken"):
            raise RuntimeError("no model here")

    def handle_batch(self, payload, batch_id):
        if (payload["x"] == self.config["unlucky"]).any() and not os.path.exists(self.config.get("cured", "")):
            raise ValueError("an unlucky batch")
        if payload["x"].min() >= 100:  # the first file is always quick
            deadline = time.monotonic() + self.config["seconds"]
            while time.monotonic() < deadline and not Path(self.config["hurry"]).exists():
                time.sleep(0.01)
        return payload.assign(y=payload["x"] * 2)
"""


@pytest.fixture
def folder(tmp_path, tmp_path_factory, monkeypatch):
    """A folder with a project and an input of 400 rows in 4 files, and an environment of its own."""
    project = tmp_path / "project"
    project.mkdir()
    (project / "cortex.yaml").write_text(CORTEX_YAML)
    (project / "handler.py").write_text(HANDLER)
    (project / "values.json").write_text('{"a": 1}')
    (tmp_path / "in").mkdir()
    for number in range(4):
        pq.write_table(pa.table({"x": range(number * 100, number * 100 + 100)}), tmp_path / f"in/{number}.parquet")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DASK_CORTEX_DASK__STORE", str(tmp_path / "store"))
    monkeypatch.setenv("DASK_CORTEX_DASK__CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
    monkeypatch.setenv("PYTHONPATH", str(Path(cx.__file__).parents[1]), prepend=os.pathsep)
    with dask.config.set({"cortex-dask.store": str(tmp_path / "store")}):
        yield tmp_path


def command(*arguments):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def submit(*arguments):
    return command(
        "submit", "project", "--input", "in", "--output", "out", "--batch-size", 25, "--workers", 2, *arguments
    )


def start(*arguments, **keywords):
    """Start the command line in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "cortex_dask", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A suite that was started with nohup would hand its deafness on.
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),
        **keywords,
    )


def rows(path="out"):
    return sorted(pd.read_parquet(path)["y"].tolist()) if list(Path(path).glob("*.parquet")) else []


EVERY_ROW = [2 * x for x in range(400)]


def documents(folder):
    return [json.loads(path.read_text()) for path in folder.glob("store/jobs/*/*/status.json")]


class TestSubmit:
    def test_it_runs_and_says_where_everything_is(self, folder):
        done = submit()

        assert done.exit_code == 0, done.output
        assert rows() == EVERY_ROW
        assert re.search(r"^status +succeeded$", done.stdout, re.MULTILINE)
        assert re.search(r"^rows +400 in, 400 out$", done.stdout, re.MULTILINE)
        assert f"output   {folder}/out" in done.stdout
        assert "doubler: enqueuing" in done.stderr

        listed = command("get").stdout.splitlines()
        assert listed[0].split()[:3] == ["API", "JOB", "STATUS"]
        assert listed[1].split()[0] == "doubler"
        shown = json.loads(command("get", "doubler", "latest", "-o", "json").stdout)
        assert (shown["status"], shown["rows_out"], shown["total_batch_count"]) == ("succeeded", 400, 16)
        assert shown["job_id"] in command("get", "doubler", shown["job_id"][:12]).stdout
        assert "loaded {'a': 1}" in command("logs", "doubler").stdout
        assert "loaded" not in command("logs", "doubler", "--level", "error").stdout
        line = json.loads(command("logs", "doubler", "latest", "-f", "-o", "json").stdout.splitlines()[0])
        assert line["labels"]["jobID"] == shown["job_id"]

        stopped = command("stop", "doubler", "latest")
        assert (stopped.exit_code, stopped.stderr) == (0, "The job has ended already: succeeded.\n")
        assert command("resume", "doubler", "latest").exit_code == 0
        assert rows() == EVERY_ROW

    def test_json_is_all_that_standard_output_holds(self, folder):
        done = submit("-o", "json")

        assert done.exit_code == 0, done.output
        assert json.loads(done.stdout)["status"] == "succeeded"

    def test_failed_batches_are_3_and_can_be_retried(self, folder):
        done = submit("--config", "unlucky=77", "--config", f"cured={folder}/cured", "--max-attempts", 1)

        assert done.exit_code == 3, done.output
        assert len(rows()) == 375
        job = cx.Client().get_job("doubler", "latest")
        failures = job.failures()
        assert failures["cause"].tolist() == ["exception"]
        assert failures["payload"][0] == [{"x": x} for x in range(75, 100)]
        assert "an unlucky batch" in failures["traceback"][0]
        assert len(job.logs(batch=failures["batch_id"][0], level="warning")) >= 1

        (folder / "cured").touch()
        again = command("retry", "doubler", "latest", "--failed")

        assert again.exit_code == 0, again.output
        assert rows() == EVERY_ROW
        assert job.failures().empty
        assert job.to_pandas()["x"].nunique() == 400

    def test_a_handler_that_does_not_load_is_1_and_says_why(self, folder):
        done = submit("--config", "broken=true")

        assert done.exit_code == 1
        assert "no model here" in done.output
        assert "Traceback" not in done.output

    def test_a_timeout_is_124(self, folder):
        done = submit("--config", "seconds=30", "--timeout", 1)

        assert done.exit_code == 124, done.output
        assert "cortex-dask resume doubler" in done.stdout

    def test_too_many_failures_stop_early(self, folder):
        done = submit("--config", '{"unlucky": 10, "seconds": 0.3}', "--max-failed-batches", 0, "--max-attempts", 1)

        assert done.exit_code == 1, done.output
        assert "max_failed_batches" in done.output

    def test_too_many_failures_at_the_very_end_count_as_well(self, folder):
        done = submit("--config", "unlucky=10", "--batch-size", 400, "--max-failed-batches", 0, "--max-attempts", 1)

        assert done.exit_code == 1, done.output
        assert "max_failed_batches" in done.output
        assert command("resume", "doubler", "latest").exit_code == 3

    def test_the_same_job_id_again_is_the_same_job(self, folder):
        first = submit("--job-id", "nightly", "-o", "json")
        second = submit("--job-id", "nightly", "-o", "json")

        assert (first.exit_code, second.exit_code) == (0, 0), second.output
        assert json.loads(first.stdout)["end_time"] == json.loads(second.stdout)["end_time"]
        other = submit("--job-id", "nightly", "--batch-size", 30)
        assert other.exit_code == 2
        assert "dataset.batch_size was 25, is 30" in other.stderr

    def test_a_dry_run_writes_nothing(self, folder):
        before = sorted(folder.rglob("*"))
        done = submit("--dry-run")
        told = json.loads(submit("--dry-run", "-o", "json").stdout)

        assert done.exit_code == 0, done.output
        assert "4 files, parquet" in done.stdout
        assert (told["rows"], told["batches"], len(told["files"])) == (400, 16, 4)
        assert [name for name, _ in told["project"]] == ["handler.py", "values.json"]
        assert sorted(folder.rglob("*")) == before

    def test_a_sample_shows_what_would_come_out(self, folder):
        before = sorted(folder.rglob("*"))
        told = json.loads(submit("--sample", 3, "-o", "json").stdout)

        assert (told["batches"], told["rows_in"], told["total_rows"]) == (3, 75, 400)
        assert told["schema"] == [["x", "int64"], ["y", "int64"]]
        assert told["first_rows"][1] == {"x": 1, "y": 2}
        assert told["projected_seconds"] > 0
        assert sorted(folder.rglob("*")) == before

    def test_a_sample_of_a_handler_that_raises_says_so(self, folder):
        done = submit("--sample", 1, "--config", "unlucky=3")

        assert done.exit_code == 0, done.output
        assert "ValueError: an unlucky batch" in done.stdout


class TestBadInput:
    @pytest.mark.parametrize(
        ("arguments", "said"),
        [
            (("--input", "nowhere"), "nowhere"),
            (("--batch-size", "0"), "batch_size: found 0"),
            (("--workers", "0"), "workers: found 0"),
            (("--columns", "z"), "z"),
            (("--filter", "z > 1"), "z"),
            (("--job-id", "../x"), "job_id: found"),
            (("--cluster", "moon"), "cluster: 'moon'"),
            (("--api", "tripler"), "no API"),
            (("--env", "mars"), "mars"),
            (("--timeout", "0"), "timeout: found"),
            (("--output", "in"), "holds 4 files already"),
        ],
    )
    def test_it_is_one_sentence_and_2(self, folder, arguments, said):
        base = ["submit", "project", "--output", "out"] + ([] if "--input" in arguments else ["--input", "in"])
        done = command(*base, *arguments)

        assert done.exit_code == 2, done.output
        assert said in done.stderr
        assert done.stderr.splitlines()[-1].startswith("Error: ")
        assert "Traceback" not in done.output
        assert "this is a bug" not in done.output

    def test_a_handler_with_a_syntax_error(self, folder):
        (folder / "project/handler.py").write_text("class Handler:\n  def __init__(self, config) pass\n")

        done = submit()

        assert done.exit_code == 2
        assert "handler.py" in done.stderr

    def test_a_truncated_file_is_named(self, folder):
        whole = (folder / "in/2.parquet").read_bytes()
        (folder / "in/2.parquet").write_bytes(whole[: len(whole) // 2])

        done = submit()

        assert done.exit_code == 2
        assert "in/2.parquet" in done.stderr
        assert (
            json.loads(command("get", "doubler", "latest", "-o", "json").stdout)["status"] == "failed while enqueuing"
        )

    @pytest.mark.parametrize(
        ("arguments", "said"),
        [
            (("get", "nothing"), "no jobs of an API 'nothing'"),
            (("logs", "nothing"), "no jobs of an API 'nothing'"),
            (("stop", "nothing", "job"), "no jobs of an API 'nothing'"),
            (("get", "-e", "mars"), "mars"),
        ],
    )
    def test_a_job_that_is_not_there(self, folder, arguments, said):
        done = command(*arguments)

        assert (done.exit_code, said in done.stderr) == (2, True), done.output

    def test_an_environment_without_jobs_says_how_to_begin(self, folder):
        assert "cortex-dask submit" in command("get").stdout
        assert json.loads(command("get", "-o", "json").stdout) == []


class TestInit:
    def test_the_new_project_runs_as_it_is(self, folder):
        made = command("init", "my-classifier")
        done = command("submit", "my-classifier", "--workers", 2)

        assert (made.exit_code, done.exit_code) == (0, 0), done.output
        assert re.search(r"^rows +1,797 in, 1,797 out$", done.stdout, re.MULTILINE)

    def test_a_directory_that_is_there_already_is_left_alone(self, folder):
        done = command("init", "project")

        assert done.exit_code == 2
        assert done.stderr.startswith("Error: ")
        assert (folder / "project/handler.py").read_text() == HANDLER


class TestInterrupts:
    def begin(self, folder, *arguments):
        """Start a job of which the first file is done soon, and the others when there is a file ``hurry``."""
        process = start(
            *("submit", "project", "--input", "in", "--output", "out", "--batch-size", 25, "--workers", 2),
            *("--config", "seconds=60", "--config", f"hurry={folder}/hurry", *arguments),
            cwd=folder,
        )
        until(lambda: process.poll() is not None or any(doc["splits"]["done"] for doc in documents(folder)), "a split")
        assert process.poll() is None, process.communicate()
        return process

    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
    def test_an_interrupt_stops_the_job_and_it_can_be_resumed(self, folder, number):
        process = self.begin(folder)

        process.send_signal(number)
        out, err = process.communicate(timeout=60)

        assert process.returncode == 130, err
        assert "Stopping the job" in err
        assert "Traceback" not in err, err
        assert "cortex-dask resume doubler" in out
        assert json.loads(command("get", "doubler", "latest", "-o", "json").stdout)["status"] == "stopped"
        assert 0 < len(rows()) < 400
        (folder / "hurry").touch()
        assert command("resume", "doubler", "latest").exit_code == 0
        assert rows() == EVERY_ROW

    def test_a_reader_that_goes_away_stops_the_job(self, folder):
        process = self.begin(folder)
        process.stdout.close()
        process.stderr.close()

        process.wait(timeout=60)

        assert json.loads(command("get", "doubler", "latest", "-o", "json").stdout)["status"] == "stopped"
        (folder / "hurry").touch()
        assert command("resume", "doubler", "latest").exit_code == 0
        assert rows() == EVERY_ROW

    def test_stop_from_another_process_ends_it(self, folder):
        process = self.begin(folder, "-o", "json")

        assert command("stop", "doubler", "latest").exit_code == 0

        out, err = process.communicate(timeout=60)
        assert process.returncode == 130, err
        assert json.loads(out)["status"] == "stopped"

    def test_whoever_only_attached_to_a_job_leaves_it_alone(self, folder):
        runner = self.begin(folder, "--job-id", "nightly")
        visitor = self.begin(folder, "--job-id", "nightly")
        assert "doubler: running" in visitor.stderr.readline()

        visitor.send_signal(signal.SIGINT)
        _, err = visitor.communicate(timeout=60)

        assert visitor.returncode == 130, err
        assert "it goes on. Stop it with: cortex-dask stop doubler nightly" in err
        (folder / "hurry").touch()
        _, err = runner.communicate(timeout=60)
        assert runner.returncode == 0, err
        assert rows() == EVERY_ROW

    def test_a_second_interrupt_kills(self, folder):
        process = self.begin(folder)

        process.send_signal(signal.SIGINT)
        line = ""
        while "Stopping" not in line:
            line = process.stderr.readline()
            assert line, (process.wait(), process.stdout.read())
        process.send_signal(signal.SIGINT)

        assert process.wait(timeout=10) == 130
        process.communicate()

    def test_watching_a_job_ends_with_it(self, folder):
        process = self.begin(folder)
        (folder / "hurry").touch()

        watched = command("get", "doubler", "latest", "-w")

        assert watched.exit_code == 0, watched.output
        assert re.search(r"^status +succeeded$", watched.stdout, re.MULTILINE)
        process.communicate(timeout=60)
        assert process.returncode == 0

    def test_a_script_that_ends_too_early_stops_its_job(self, folder):
        script = (
            "import cortex_dask as cx, os, time\n"
            "config = {'seconds': 60, 'hurry': os.path.abspath('hurry')}\n"
            "job = cx.submit('project', 'in', 'out', batch_size=25, workers=2, config=config)\n"
            "while job.status == 'enqueuing': time.sleep(0.05)\n"
        )

        done = subprocess.run([sys.executable, "-c", script], cwd=folder, capture_output=True, text=True, timeout=60)

        assert done.returncode == 0, done.stderr
        assert "Go on with: cortex-dask resume doubler" in done.stderr
        job = cx.Client().get_job("doubler", "latest")
        assert job.status == "stopped"
        (folder / "hurry").touch()
        job.resume().wait(timeout=60)
        assert rows() == EVERY_ROW


class TestPython:
    def test_run_takes_a_class_that_is_defined_here(self, folder):
        class Tripler:
            def __init__(self, config):
                self.factor = config["factor"]

            def handle_batch(self, payload):
                return {"y": payload["x"] * self.factor}

        job = cx.run(Tripler, "in", "out", batch_size=50, workers=2, config={"factor": 3}, progress=False)

        assert (job.status, job.api_name) == ("succeeded", "tripler")
        assert job.to_pandas()["y"].tolist() == [3 * x for x in range(400)]
        assert job.to_dask()["y"].sum().compute() == sum(3 * x for x in range(400))
        assert job.progress.share == 1.0
        assert "400 in, 400 out" in job._repr_html_()

    def test_submit_returns_at_once_and_wait_waits(self, folder):
        job = cx.submit(folder / "project", folder / "in", folder / "out", batch_size=25, workers=2)

        assert job.status in ("enqueuing", "running", "succeeded")
        assert job.wait(timeout=60) is job
        assert rows() == EVERY_ROW

    def test_stop_and_resume(self, folder):
        config = {"seconds": 60, "hurry": str(folder / "hurry")}
        job = cx.submit("project", "in", "out", batch_size=25, workers=2, config=config)
        until(lambda: job.status == "running", "the job to run")

        job.stop()

        assert job.status == "stopped"
        with pytest.raises(cx.JobStoppedError, match="cortex-dask resume doubler"):
            job.wait()
        (folder / "hurry").touch()
        assert job.resume().wait(timeout=60).status == "succeeded"
        assert rows() == EVERY_ROW

    def test_errors_of_a_submission_are_raised_where_it_is_made(self, folder):
        with pytest.raises(cx.SpecError, match="did you mean batch_size"):
            cx.run("project", "in", "out", batchsize=5)
        with pytest.raises(cx.DatasetError):
            cx.run("project", "nowhere", "out", progress=False)

    def test_a_warning_says_how_many_batches_failed(self, folder):
        with pytest.warns(UserWarning, match="1 batch failed for good"):
            cx.run("project", "in", "out", batch_size=25, max_attempts=1, config={"unlucky": 7}, progress=False)

    def test_a_failed_job_raises(self, folder):
        with pytest.raises(cx.JobFailedError, match=r"no model here.*cortex-dask logs doubler") as caught:
            cx.run("project", "in", "out", config={"broken": True}, progress=False)
        assert caught.value.status == "worker error"

    def test_inline_runs_in_this_thread(self, folder):
        job = cx.submit(PidHandler, "in", "out", batch_size=200, cluster="inline")

        assert job.status == "succeeded"
        assert set(job.to_pandas()["pid"]) == {os.getpid()}

    def test_the_client_finds_jobs(self, folder):
        client = cx.Client()
        first = client.run("project", "in", "a", batch_size=200, job_id="job-a", progress=False)
        client.run("project", "in", "b", batch_size=200, job_id="job-b", progress=False)

        assert [job.job_id for job in client.list_jobs("doubler")] == ["job-b", "job-a"]
        assert client.get_job("doubler", "latest").job_id == "job-b"
        assert client.get_job("doubler", "job-a").describe() == first.describe()
        with pytest.raises(cx.JobNotFoundError, match="2 jobs of doubler begin with 'job-'"):
            client.get_job("doubler", "job-")
        with pytest.raises(cx.JobNotFoundError, match="its jobs are job-a, job-b"):
            client.get_job("doubler", "x")
        assert any("loaded" in line for line in client.stream_job_logs("doubler", "job-a"))


@pytest.mark.s3
def test_everything_may_lie_in_an_object_store(folder, s3):
    with dask.config.set({"cortex-dask.store": f"{s3}/store"}):
        output = {"path": f"{s3}/out", "format": "json", "compression": "gzip"}
        job = cx.run("project", "in", output, batch_size=50, workers=2, progress=False)

        assert sorted(job.to_pandas()["y"]) == EVERY_ROW
        assert job.to_dask()["y"].sum().compute() == sum(EVERY_ROW)
        assert json.loads(command("get", "doubler", "latest", "-o", "json").stdout)["output"] == f"{s3}/out"
        assert "loaded" in command("logs", "doubler").stdout
        assert job.failures().empty

        done = submit("--output", "s3://no-such-bucket/out")

        assert done.exit_code == 2, done.output
        assert "no-such-bucket" in done.stderr


class PidHandler:
    def __init__(self, config):
        pass

    def handle_batch(self, payload):
        return {"pid": [os.getpid()]}


class TestTesting:
    def test_a_handler_is_run_on_dicts(self):
        class Marker:
            def __init__(self, config):
                self.threshold = config["threshold"]

            def handle_batch(self, payload):
                return [{"large": row["value"] > self.threshold} for row in payload]

        result = run_inline(Marker, [{"value": 1}, {"value": 9}], config={"threshold": 5}, batch_format="records")

        assert result.to_pylist() == [{"large": False}, {"large": True}]
        assert result.failures.empty

    def test_failures_and_logs_are_there_to_look_at(self):
        class Fussy:
            def __init__(self, config):
                import logging

                self.logger = logging.getLogger("fussy")

            def handle_batch(self, payload, batch_id):
                self.logger.info("in hand", extra={"rows": len(payload)})
                if (payload["x"] == 3).any():
                    raise ValueError("three")
                return payload

        result = run_inline(Fussy, pd.DataFrame({"x": range(6)}), batch_size=2)

        assert result.status == "completed with failures"
        assert result.to_pandas()["x"].tolist() == [0, 1, 4, 5]
        assert result.failures["error"].tolist() == ["ValueError: three"]
        in_hand = result.logs[result.logs["message"] == "in hand"]
        assert in_hand["rows"].tolist() == [2, 2, 2]
        assert in_hand["batch_id"].nunique() == 3

    def test_a_project_finds_its_files(self, folder):
        result = run_inline(folder / "project", pa.table({"x": [1, 2]}))

        assert result.to_pandas()["y"].tolist() == [2, 4]
        assert Path.cwd() == folder

    def test_a_handler_that_does_not_load_raises(self, folder):
        with pytest.raises(cx.JobFailedError, match="no model here"):
            run_inline("project", [{"x": 1}], config={"broken": True})
