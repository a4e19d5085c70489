"""CONTRACT 6, structured logging: each clause through a job of a project that Cortex would run unchanged."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from datetime import datetime
from pathlib import Path

import dask.config
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import cortex_dask as cx
from cortex_dask.job import Job

HANDLER = """\
import logging
import os
import subprocess
import sys
import warnings

from cortex_internal.lib.log import logger as cortex_logger


class Unprintable:
    def __str__(self):
        raise RuntimeError("no text")


class Handler:
    def __init__(self, config):
        assert isinstance(cortex_logger, logging.Logger)
        cortex_logger.info("loading")

    def handle_batch(self, payload, batch_id):
        cortex_logger.info("completed processing batch", extra={"confidence": 0.97, "batch_id": batch_id})
        cortex_logger.info("nested", extra={"a": {"b": {"c": 1}}, "list": [1, {"d": 2}], "none": None})
        reserved = {"asctime": "never", "levelname": "never", "message": "never", "process": "never", "labels": "never"}
        cortex_logger.warning("reserved", extra={**reserved, "free": 1})
        record = {"name": "x", "msg": "y", "args": "z", "exc_info": "e", "lineno": -1, "taskName": "t", "module": "m"}
        cortex_logger.info("of a record", extra=record)
        odd = {"object": Unprintable(), "bytes": b"\\xff", "set": {1}, 3: "three", "nan": float("nan"), "big": 2**70}
        odd["circle"] = odd
        cortex_logger.info("odd", extra={**odd, "surrogate": "\\ud800"})
        cortex_logger.info("%d of %s", 3, "four")
        cortex_logger.info("%d", "no number")
        cortex_logger.info("two\\nlines \\u2713")
        cortex_logger.info("large", extra={"text": "x" * (5 * 1024 * 1024)})
        cortex_logger.info("nearly large", extra={"text": "x" * (5 * 1024 * 1024 - 4096)})
        try:
            raise ValueError("caught")
        except ValueError:
            cortex_logger.exception("failed")
        for level in ("debug", "info", "warning", "error", "critical"):
            getattr(cortex_logger, level)("level " + level)
        print("printed", 1)
        print("printed to stderr", file=sys.stderr)
        logging.getLogger("mine").info("plain logging")
        logging.getLogger("mine").debug("plain debugging")
        warnings.warn("a warning")
        os.write(1, b"native to stdout\\n")
        os.write(2, b"native to stderr\\n")
        subprocess.run(["echo", "of a child process"], check=True)
        sys.stdout.write("without a line feed")
"""


def submit(folder: Path, level: str | None = None, handler: str = HANDLER, **files: str) -> Job:
    project = folder / "project"
    project.mkdir()
    (project / "handler.py").write_text(handler)
    for name, text in files.items():
        (project / f"{name}.py").write_text(text)
    line = "" if level is None else f"\n    log_level: {level}"
    (project / "cortex.yaml").write_text(
        f"- name: logging\n  kind: BatchAPI\n  handler:\n    type: python\n    path: handler.py{line}\n"
    )
    pq.write_table(pa.table({"x": range(4)}), folder / "in.parquet")
    with dask.config.set({"cortex-dask.store": str(folder / "store")}):
        return cx.run(project, folder / "in.parquet", batch_size=4, workers=1, progress=False)


def lines_of(job: Job) -> list[dict]:
    """Return the log as it is stored: every line of every chunk."""
    texts = [path.read_bytes() for path in sorted(Path(job.url, "logs").rglob("*")) if path.is_file()]
    assert texts
    return [json.loads(line) for text in texts for line in text.splitlines()]


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    return submit(tmp_path_factory.mktemp("logging"))


@pytest.fixture(scope="module")
def lines(job: Job) -> list[dict]:
    return lines_of(job)


def find(lines: list[dict], message: str) -> dict:
    (found,) = [line for line in lines if line["message"] == message]
    return found


def test_nothing_that_is_logged_breaks_a_batch(job: Job) -> None:
    assert (job.status, job.describe()["batch_metrics"]["failed"]) == ("succeeded", 0)


def test_a_record_is_one_line_of_json(lines: list[dict]) -> None:
    line = find(lines, "completed processing batch")
    assert set(line) == {"asctime", "levelname", "message", "process", "batch_id", "confidence", "labels"}
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3}", line["asctime"])
    datetime.strptime(line["asctime"], "%Y-%m-%d %H:%M:%S,%f")
    assert line["levelname"] == "INFO"
    assert isinstance(line["process"], int)
    assert line["confidence"] == 0.97
    assert find(lines, "two\nlines \u2713")
    assert find(lines, "3 of four")


def test_extra_is_flattened_by_one_level(lines: list[dict]) -> None:
    line = find(lines, "nested")
    assert line["a"] == {"b": {"c": 1}}
    assert (line["list"], line["none"]) == ([1, {"d": 2}], None)
    assert "extra" not in line


def test_labels_carry_the_metadata(job: Job, lines: list[dict]) -> None:
    for line in lines:
        labels = line["labels"]
        assert set(labels) >= {"apiName", "apiKind", "apiID", "jobID", "workerID"}
        assert (labels["apiName"], labels["apiKind"]) == ("logging", "BatchAPI")
        assert (labels["apiID"], labels["jobID"]) == (job.settings.api_id, job.job_id)
    (worker,) = {line["labels"]["workerID"] for line in lines if line["message"].startswith("level ")}
    assert worker


def test_reserved_keys_never_override_the_metadata(job: Job, lines: list[dict]) -> None:
    line = find(lines, "reserved")
    assert (line["levelname"], line["free"]) == ("WARNING", 1)
    assert line["labels"]["jobID"] == job.job_id
    assert "never" not in json.dumps(line)


def test_keys_of_python_s_own_records_are_harmless(lines: list[dict]) -> None:
    line = find(lines, "of a record")
    assert {key: line[key] for key in ("name", "msg", "args", "lineno", "module")} == {
        "name": "x",
        "msg": "y",
        "args": "z",
        "lineno": -1,
        "module": "m",
    }


def test_values_that_json_does_not_know_are_written_as_text(lines: list[dict]) -> None:
    line = find(lines, "odd")
    assert (line["object"], line["3"], line["nan"]) == ("<Unprintable>", "three", None)
    assert {"bytes", "set", "big", "circle", "surrogate"} <= set(line)
    assert [line for line in lines if "no number" in line["message"]]


def test_a_line_over_5_mb_is_dropped_and_the_drop_is_logged_with_its_size(lines: list[dict]) -> None:
    assert not [line for line in lines if line["message"] == "large"]
    (dropped,) = [line for line in lines if "was dropped" in line["message"]]
    (size,) = re.findall(r"a log line of ([\d,]+) bytes was dropped", dropped["message"])
    assert 5 * 1024 * 1024 < int(size.replace(",", "")) < 5 * 1024 * 1024 + 4096
    assert dropped["labels"]["apiName"] == "logging"
    assert len(find(lines, "nearly large")["text"]) == 5 * 1024 * 1024 - 4096


def test_exceptions_are_logged_with_their_traceback(lines: list[dict]) -> None:
    line = find(lines, "failed")
    assert line["levelname"] == "ERROR"
    assert line["exc_info"].startswith("Traceback")
    assert line["exc_info"].endswith("ValueError: caught")


@pytest.mark.parametrize("message", ["printed 1", "printed to stderr", "plain logging"])
def test_prints_and_plain_logging_appear_with_their_batch(lines: list[dict], message: str) -> None:
    line = find(lines, message)
    assert set(line["labels"]) >= {"apiName", "jobID", "workerID"}
    assert line["batch_id"] == find(lines, "completed processing batch")["batch_id"]


@pytest.mark.parametrize(
    "message", ["native to stdout", "native to stderr", "of a child process", "without a line feed"]
)
def test_native_output_appears(lines: list[dict], message: str) -> None:
    assert set(find(lines, message)["labels"]) >= {"apiName", "jobID", "workerID"}


def test_warnings_appear(lines: list[dict]) -> None:
    assert [line for line in lines if "a warning" in line["message"]]


@pytest.mark.parametrize(("level", "least"), [("debug", 0), (None, 1), ("info", 1), ("warning", 2), ("error", 3)])
def test_log_level_sets_the_level(tmp_path: Path, level: str | None, least: int) -> None:
    handler = """\
import logging

from cortex_internal.lib.log import logger as cortex_logger


class Handler:
    def __init__(self, config):
        pass

    def handle_batch(self, payload):
        for number, name in enumerate(("debug", "info", "warning", "error", "critical")):
            getattr(cortex_logger, name)("ours %d", number)
            getattr(logging.getLogger("mine"), name)("theirs %d", number)
"""
    messages = {line["message"] for line in lines_of(submit(tmp_path, level, handler))}
    assert {text for text in messages if text.startswith(("ours", "theirs"))} == {
        f"{whose} {number}" for whose in ("ours", "theirs") for number in range(least, 5)
    }


# where the names are ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["cortex", "cortex_internal", "cortex_internal.lib.log"])
def test_cortex_is_not_importable_outside_of_the_handler_process(name: str) -> None:
    code = (
        "import importlib.util, sys, cortex_dask, cortex_dask.client, cortex_dask.cli\n"
        f"try:\n    import {name}\nexcept ModuleNotFoundError as error:\n    sys.exit(error.name)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr.strip()) == (1, name.partition(".")[0])


def test_cortex_is_not_importable_after_a_job_in_the_callers_own_process() -> None:
    from cortex_dask.testing import run_inline

    class Handler:
        def __init__(self, config):
            pass

        def handle_batch(self, payload):
            import cortex
            from cortex_internal.lib.log import logger

            logger.info("%s", cortex.__name__)
            return [{"file": cortex.__file__}]

    (row,) = run_inline(Handler, [{"x": 1}], batch_format="records").to_pylist()
    assert "compat" in row["file"]
    assert not {"cortex", "cortex_internal"} & set(sys.modules)
    with pytest.raises(ModuleNotFoundError):
        import cortex  # noqa: F401


NAMES = """\
import cortex
from cortex_internal.lib.log import logger


class Handler:
    def __init__(self, config):
        logger.info("cortex is %s", getattr(cortex, "WHOSE", "cortex_dask"))

    def handle_batch(self, payload):
        pass
"""


def test_a_module_of_the_project_s_own_wins(tmp_path: Path) -> None:
    lines = lines_of(submit(tmp_path, handler=NAMES, cortex='WHOSE = "the project"\n'))
    assert find(lines, "cortex is the project")


def test_an_installed_client_of_cortex_does_not_win(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed = tmp_path / "site-packages" / "cortex"
    (installed / "binary").mkdir(parents=True)
    (installed / "__init__.py").write_text('WHOSE = "an operator"\n')
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site-packages"), prepend=":")
    lines = lines_of(submit(tmp_path, handler=NAMES))
    assert find(lines, "cortex is cortex_dask")
