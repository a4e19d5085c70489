"""Exit codes, and errors as one sentence."""

import errno

import pytest
from click.testing import CliRunner

from cortex_dask import errors
from cortex_dask.cli.exit_codes import Commands, exit_code
from cortex_dask.io.job.status import FINAL_STATUSES


def failing(error):
    group = Commands("cortex-dask")

    @group.command()
    def fail():
        raise error

    return CliRunner().invoke(group, ["fail"])


def test_every_final_status_has_one():
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
def test_an_error_is_one_sentence_on_standard_error(error, code):
    found = failing(error)

    assert (found.exit_code, found.stdout, found.stderr) == (code, "", f"Error: {error}\n")


def test_a_missing_file_is_named():
    found = failing(FileNotFoundError(errno.ENOENT, "No such file or directory", "conf.yaml"))

    assert (found.exit_code, found.stderr) == (2, "Error: conf.yaml: no such file or directory\n")


def test_an_unexpected_exception_says_that_it_is_a_bug(monkeypatch):
    monkeypatch.delenv("CORTEX_DASK_DEBUG", raising=False)

    found = failing(ZeroDivisionError("division by zero"))

    assert found.exit_code == 1
    assert found.stderr == (
        "Error: ZeroDivisionError: division by zero "
        "(this is a bug; run again with CORTEX_DASK_DEBUG=1 for the traceback)\n"
    )


def test_debugging_shows_the_traceback(monkeypatch):
    monkeypatch.setenv("CORTEX_DASK_DEBUG", "1")

    assert "Traceback (most recent call last)" in failing(ZeroDivisionError("division by zero")).stderr
