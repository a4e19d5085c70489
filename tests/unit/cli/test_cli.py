"""The command line without jobs: parsing, help, errors and exit codes."""

import errno
import re
import subprocess
import sys

import click
import pytest
from click.testing import CliRunner

import cortex_dask
from cortex_dask import errors
from cortex_dask.cli import main, options
from cortex_dask.cli.exit_codes import Commands, exit_code
from cortex_dask.cli.output import job_table
from cortex_dask.io.job.status import FINAL_STATUSES


def run(*arguments, **keywords):
    return CliRunner().invoke(main, arguments, **keywords)


def failing(error):
    group = Commands("cortex-dask")

    @group.command()
    def fail():
        raise error

    return CliRunner().invoke(group, ["fail"])


class TestHelp:
    def test_every_command_is_listed_with_what_it_does(self):
        shown = run("--help").output

        for name in ("init", "submit", "get", "logs", "stop", "resume", "retry", "version", "completion"):
            assert re.search(rf"^  {name} +[A-Z]", shown, re.MULTILINE), name
        assert "124 timed out" in shown

    def test_help_imports_nothing_heavy(self):
        heavy = ("dask", "distributed", "pandas", "pyarrow", "pydantic", "rich", "orjson", "fsspec", "jinja2", "yaml")
        code = (
            "import sys; from cortex_dask.cli import main\n"
            "try: main(['submit', '--help'])\n"
            f"finally: print([name for name in {heavy!r} if name in sys.modules])"
        )

        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)

        assert done.stdout.strip().splitlines()[-1] == "[]"

    def test_version(self):
        assert run("version").output == f"cortex-dask {cortex_dask.__version__}\n"

    @pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
    def test_completion_names_the_command(self, shell, monkeypatch):
        shown = run("completion", shell)

        assert shown.exit_code == 0, shown.output
        assert "_CORTEX_DASK_COMPLETE" in shown.output


class TestExitCodes:
    def test_every_final_status_has_one(self):
        codes = {status: exit_code(status) for status in FINAL_STATUSES}

        assert codes == {
            "succeeded": 0,
            "worker error": 1,
            "out of memory": 1,
            "failed while enqueuing": 2,
            "completed with failures": 3,
            "timed out": 124,
            "stopped": 130,
        }

    @pytest.mark.parametrize(
        ("error", "code"),
        [
            (errors.SpecError("batch_size: found 0"), 2),
            (errors.DatasetError("nothing there"), 2),
            (errors.StorageError("the bucket does not exist"), 2),
            (errors.JobNotFoundError("no such job"), 2),
            (errors.JobRunningError("it runs elsewhere"), 1),
            (errors.JobFailedError("it failed"), 1),
            (errors.JobTimedOutError("too long", status="timed out"), 124),
            (errors.JobStoppedError("stopped", status="stopped"), 130),
        ],
    )
    def test_an_error_is_one_sentence_on_standard_error(self, error, code):
        found = failing(error)

        assert (found.exit_code, found.stdout, found.stderr) == (code, "", f"Error: {error}\n")

    def test_a_missing_file_is_named(self):
        found = failing(FileNotFoundError(errno.ENOENT, "No such file or directory", "conf.yaml"))

        assert (found.exit_code, found.stderr) == (2, "Error: conf.yaml: no such file or directory\n")

    def test_an_unexpected_exception_says_that_it_is_a_bug(self, monkeypatch):
        monkeypatch.delenv("CORTEX_DASK_DEBUG", raising=False)

        found = failing(ZeroDivisionError("division by zero"))

        assert found.exit_code == 1
        assert found.stderr == (
            "Error: ZeroDivisionError: division by zero "
            "(this is a bug; run again with CORTEX_DASK_DEBUG=1 for the traceback)\n"
        )

    def test_debugging_shows_the_traceback(self, monkeypatch):
        monkeypatch.setenv("CORTEX_DASK_DEBUG", "1")

        assert "Traceback (most recent call last)" in failing(ZeroDivisionError("division by zero")).stderr

    @pytest.mark.parametrize(
        "arguments",
        [("sumbit",), ("submit",), ("submit", ".", "--workers", "many"), ("retry", "api", "job"), ("get", "-o", "xml")],
    )
    def test_wrong_usage_is_2(self, arguments):
        found = run(*arguments)

        assert found.exit_code == 2
        assert "Error: " in found.stderr


class TestOptions:
    @pytest.mark.parametrize(
        ("text", "comparison"),
        [
            ("x > 5", ("x", ">", 5)),
            ("x>=5.5", ("x", ">=", 5.5)),
            ("label = 'cat'", ("label", "=", "cat")),
            ('label == "a, b"', ("label", "==", "a, b")),
            ("label != cat", ("label", "!=", "cat")),
            ("day >= 2026-01-31", ("day", ">=", "2026-01-31")),
            ("code = '01'", ("code", "=", "01")),
            ("ok = true", ("ok", "=", True)),
            ("y in [1, 2]", ("y", "in", [1, 2])),
            ("y not in (a, 'b, c')", ("y", "not in", ["a", "b, c"])),
            ("y in a,b", ("y", "in", ["a", "b"])),
            ("`a column` < 1", ("a column", "<", 1)),
        ],
    )
    def test_a_filter_is_a_comparison(self, text, comparison):
        assert options.filters([text]) == [comparison]

    @pytest.mark.parametrize("text", ["x", "x >", "> 5", "x ~ 5", "inside [1]"])
    def test_what_is_no_comparison_is_refused(self, text):
        with pytest.raises(click.BadParameter, match="write a comparison such as"):
            options.filters([text])

    def test_config_is_merged_deeply_and_later_ones_win(self, tmp_path):
        file = tmp_path / "config.yaml"
        file.write_text("model: {name: a, depth: 3}\nlabels: [x]\n")

        found = options.config([f"@{file}", "model.depth=4", "threshold=0.5", '{"model": {"name": "b"}}', "text=a=b"])

        assert found == {"model": {"name": "b", "depth": 4}, "labels": ["x"], "threshold": 0.5, "text": "a=b"}

    @pytest.mark.parametrize(
        ("text", "message"), [("threshold", "give key=value"), ("{a", "does not parse"), ("=1", "give key=value")]
    )
    def test_config_that_is_none_is_refused(self, text, message):
        with pytest.raises(click.BadParameter, match=message):
            options.config([text])

    def test_a_config_file_must_hold_a_mapping(self, tmp_path):
        file = tmp_path / "config.yaml"
        file.write_text("- 1\n")

        with pytest.raises(click.BadParameter, match="holds a list; it must be a mapping"):
            options.config([f"@{file}"])

    def test_what_is_left_out_stays_out(self):
        assert (options.columns(None), options.keep(None), options.max_failed(None)) == (None, None, None)
        assert (options.filters([]), options.config([])) == (None, None)

    def test_lists_of_columns(self):
        assert options.columns("a, b") == ["a", "b"]
        assert options.keep("all") is True
        assert options.keep("a") == ["a"]
        with pytest.raises(click.BadParameter, match="with commas between"):
            options.columns("a,,b")

    def test_failures_are_a_number_or_a_share(self):
        assert options.max_failed("10") == 10
        assert options.max_failed("5%") == "5%"
        with pytest.raises(click.BadParameter, match="a number of batches"):
            options.max_failed("few")


def test_the_table_has_a_line_for_each_job():
    document = {
        "api_name": "digits",
        "job_id": "job-1",
        "status": "completed with failures",
        "total_batch_count": 40,
        "batches_done": 40,
        "failed_batches": 2,
        "rows_in": 40960,
        "start_time": "2026-01-31T12:00:00+00:00",
        "end_time": "2026-01-31T12:01:05+00:00",
    }

    heading, line = click.unstyle(job_table([document])).splitlines()

    assert heading.split() == ["API", "JOB", "STATUS", "BATCHES", "FAILED", "ROWS", "STARTED", "TOOK"]
    assert re.split(r" {2,}", line)[:6] == ["digits", "job-1", "completed with failures", "40 of 40", "2", "40,960"]
    assert line.endswith("1 min 5 s")
