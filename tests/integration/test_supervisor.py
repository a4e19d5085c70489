"""Handler processes under supervision: real processes, real signals, real limits."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pytest

from cortex_dask.io.job.records import Metrics, NoOutput, SchemaProposed, SplitProgress
from cortex_dask.io.job.splits import batch_id
from cortex_dask.runtime.worker import slots, supervisor, watch
from tests.support.jobs import TestJob, make_job
from tests.support.waiting import lives, until

Make = Callable[..., TestJob]


@pytest.fixture(scope="module", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DASK_CORTEX_DASK__CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    """Makes jobs, and ends their processes."""
    jobs: list[TestJob] = []

    def make_one(*arguments: Any, **options: Any) -> TestJob:
        jobs.append(make_job(tmp_path, *arguments, **options))
        return jobs[-1]

    yield make_one
    for job in jobs:
        job.close()


def numbers(job: TestJob, record: Any) -> list[int]:
    return [row["n"] for row in job.rows(record)]


POISON = """
class Handler:
    def __init__(self, config):
        self.calls = 0
    def handle_batch(self, payload, batch_id):
        if payload[0]["n"] == 30:
            {action}
        return payload
"""


# exceptions ---------------------------------------------------------------------------------------------------------


def test_a_batch_that_raises_is_tried_again_and_then_dead_lettered(make: Make) -> None:
    job = make(POISON.format(action="raise ValueError('not 30')"), limits={"max_attempts": 2})
    record = job.record()
    assert numbers(job, record) == [n for n in range(100) if not 30 <= n < 40]
    assert (record.batches, record.succeeded, record.failed_attempts, record.rows_in, record.rows_out) == (
        10,
        9,
        2,
        100,
        90,
    )
    (letter,) = job.letters(record)
    assert letter["batch_id"] == batch_id(job.settings.job_id, 0, 3)
    assert (letter["split"], letter["batch"], letter["rows"], letter["attempts"]) == (0, 3, 10, 2)
    assert (letter["cause"], letter["error"]) == ("exception", "ValueError: not 30")
    assert "raise ValueError('not 30')" in letter["traceback"]
    assert letter["payload"] == [{"n": n} for n in range(30, 40)]
    (place,) = letter["position"]
    assert place[1:] == ["rows", 30, 40]
    (failure,) = record.failures
    assert (failure.batch, failure.cause, failure.error) == (3, "exception", "ValueError: not 30")


def test_system_exit_and_keyboard_interrupt_are_exceptions_too(make: Make) -> None:
    for action in ("sys.exit(4)", "raise KeyboardInterrupt"):
        record = make(POISON.format(action=action)).record()
        assert [failure.cause for failure in record.failures] == ["exception"]


def test_a_batch_that_recovers_counts_its_failed_attempts(make: Make) -> None:
    job = make(POISON.format(action="self.calls += 1\n            assert self.calls > 2, self.calls"))
    record = job.record()
    assert numbers(job, record) == list(range(100))
    assert (record.failures, record.failed_attempts, record.succeeded) == ((), 2, 10)


def test_a_result_that_cannot_be_used_is_a_failed_attempt(make: Make) -> None:
    job = make(POISON.format(action="return payload[:3]"), output={"keep": ("n",)})
    record = job.record()
    (failure,) = record.failures
    assert failure.cause == "exception"
    assert "3" in failure.error
    assert "10" in failure.error


@pytest.mark.parametrize("batch_format", ["pandas", "numpy", "records"])
@pytest.mark.parametrize("kind", ["parquet", "json"])
def test_every_attempt_gets_a_fresh_payload(make: Make, batch_format: str, kind: str) -> None:
    handler = """
    class Handler:
        def __init__(self, config):
            self.failed = set()
        def handle_batch(self, payload, batch_id):
            rows = payload if isinstance(payload, list) else None
            values = [row["n"] for row in rows] if rows else [int(n) for n in payload["n"]]
            assert all(n >= 0 for n in values), "an earlier attempt's changes"
            if rows:
                for row in rows:
                    row["n"] = -1
                    row["x"].append(9) if "x" in row else None
            else:
                payload["n"][:] = -1
            if batch_id not in self.failed:
                self.failed.add(batch_id)
                raise ValueError("once")
            if values[0] == 10:
                raise ValueError("always")
            return {"m": values}
    """
    lines = b"".join(b'{"n": %d, "x": [1]}\n' % n for n in range(20)) if kind == "json" else None
    job = make(
        handler, rows=20, lines=lines, batch_format=batch_format, output={"keep": ("n",)}, limits={"max_attempts": 2}
    )
    record = job.record()
    assert job.rows(record) == [{"n": n, "m": n} for n in range(10)]
    (letter,) = job.letters(record)
    assert [row["n"] for row in letter["payload"]] == list(range(10, 20))
    if kind == "json":
        assert letter["payload"][0]["x"] == [1]


# crashes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("action", "words"),
    [
        ("os._exit(3)", "exited with code 3"),
        ("os.kill(os.getpid(), signal.SIGSEGV)", "SIGSEGV (segmentation fault)"),
        ("os.kill(os.getpid(), signal.SIGKILL)", "SIGKILL"),
    ],
)
def test_a_crash_costs_the_batch_in_hand_its_attempts_and_nobody_else(make: Make, action: str, words: str) -> None:
    job = make(POISON.format(action=action), limits={"max_attempts": 2})
    record = job.record()
    assert numbers(job, record) == [n for n in range(100) if not 30 <= n < 40]
    (letter,) = job.letters(record)
    assert (letter["batch"], letter["cause"], letter["attempts"]) == (3, "crash", 2)
    assert words in letter["error"]
    assert letter["payload"] == [{"n": n} for n in range(30, 40)]
    assert record.failed_attempts == 2
    assert record.part is not None
    assert job.staged() == [record.part.staged]
    if "SIGSEGV" in action:
        assert "in handle_batch" in letter["traceback"]


def test_a_crash_is_tried_again(make: Make, tmp_path: Path) -> None:
    flag = tmp_path / "crashed"
    action = f"os.path.exists({str(flag)!r}) or (open({str(flag)!r}, 'w').close(), os._exit(9))"
    job = make(POISON.format(action=action))
    record = job.record()
    assert numbers(job, record) == list(range(100))
    assert (record.failures, record.failed_attempts) == ((), 1)


def test_exceptions_before_a_crash_are_remembered(make: Make) -> None:
    handler = """
    class Handler:
        def __init__(self, config): pass
        def handle_batch(self, payload, batch_id):
            print("handling", payload[0]["n"])
            if payload[0]["n"] == 10: raise ValueError("one")
            if payload[0]["n"] == 50: os._exit(1)
            return payload
    """
    job = make(handler, limits={"max_attempts": 2})
    record = job.record()
    assert {letter["batch"]: (letter["cause"], letter["attempts"]) for letter in job.letters(record)} == {
        1: ("exception", 2),
        5: ("crash", 2),
    }
    assert record.failed_attempts == 4
    job.close()
    assert [line["message"] for line in job.logs()].count("handling 10") == 2


def test_a_reader_that_crashes_costs_the_rest_of_the_split_but_not_what_was_read(make: Make) -> None:
    handler = """
    import cortex_dask.io.parquet.reader as parquet
    import cortex_dask.runtime.handler_process.pipeline as pipeline
    real = pipeline.read_split
    def read_split(split, header, *ahead):
        for item in real(split, header, *ahead):
            if item.index == 6:
                os.kill(os.getpid(), signal.SIGSEGV)
            yield item
    pipeline.read_split = read_split
    class Handler:
        def __init__(self, config): pass
        def handle_batch(self, payload, batch_id):
            return payload
    """
    job = make(handler, limits={"max_attempts": 3})
    record = job.record()
    done, failed = numbers(job, record), {failure.batch for failure in record.failures}
    assert len(done) + 10 * len(failed) == 100
    assert failed >= {6, 7, 8, 9}
    assert done[:40] == list(range(40))
    assert {failure.cause for failure in record.failures} == {"crash"}


# limits -------------------------------------------------------------------------------------------------------------


def test_a_batch_that_hangs_is_killed_and_says_where(make: Make) -> None:
    job = make(POISON.format(action="time.sleep(60)"), limits={"max_attempts": 1, "batch_timeout": 0.3})
    began = time.monotonic()
    record = job.record()
    assert time.monotonic() - began < 15
    (letter,) = job.letters(record)
    assert (letter["batch"], letter["cause"], letter["attempts"]) == (3, "timed out", 1)
    assert "batch_timeout (0.3 s)" in letter["error"]
    assert "in handle_batch" in letter["traceback"]
    assert numbers(job, record) == [n for n in range(100) if not 30 <= n < 40]


def test_native_code_that_holds_the_interpreter_lock_is_killed_too(make: Make) -> None:
    action = "import re; re.match('(a+)+$', 'a' * 60 + 'b')"
    job = make(POISON.format(action=action), limits={"max_attempts": 1, "batch_timeout": 0.3})
    (failure,) = job.record().failures
    assert (failure.batch, failure.cause) == (3, "timed out")


def test_a_split_without_progress_is_killed(make: Make) -> None:
    job = make(POISON.format(action="time.sleep(60)"), limits={"max_attempts": 1, "stall_timeout": 1.5})
    (failure,) = job.record().failures
    assert (failure.batch, failure.cause) == (3, "timed out")
    assert "stall_timeout" in failure.error


def test_a_reader_that_hangs_is_a_stall(make: Make) -> None:
    handler = """
    import cortex_dask.runtime.handler_process.pipeline as pipeline
    real = pipeline.read_split
    def read_split(split, header, *ahead):
        for item in real(split, header, *ahead):
            if item.index == 6:
                time.sleep(60)
            yield item
    pipeline.read_split = read_split
    class Handler:
        def __init__(self, config): pass
        def handle_batch(self, payload, batch_id):
            return payload
    """
    job = make(handler, limits={"max_attempts": 2, "stall_timeout": 1.5})
    record = job.record()
    assert numbers(job, record) == list(range(60))
    assert [failure.batch for failure in record.failures] == [6, 7, 8, 9]
    assert {failure.cause for failure in record.failures} == {"timed out"}


HOG = """
class Handler:
    def __init__(self, config): pass
    def handle_batch(self, payload, batch_id):
        if payload[0]["n"] // 16 == 2:
            hog = []
            for _ in range({mebibytes} * len(payload) // 4):
                hog.append(b"x" * 2**22)
                time.sleep(0.002)
            time.sleep(0.3)
        return payload
"""


def test_a_memory_hog_is_killed_and_succeeds_with_half_its_rows(make: Make) -> None:
    # 16 rows: 640 MiB, 8 rows: 320 MiB, above what the process itself takes (about 150 MiB)
    job = make(HOG.format(mebibytes=40), rows=64, batch_size=16, compute={"memory": 620 * 2**20})
    record = job.record()
    assert numbers(job, record) == list(range(64))
    assert (record.batches, record.failures, record.failed_attempts) == (4, (), 1)
    job.close()
    messages = [line["message"] for line in job.logs()]
    assert any("its limit is 620 MiB" in message and "tried again with 8 rows" in message for message in messages)
    assert any("of the 620 MiB that it may" in message for message in messages)


def test_a_row_that_takes_too_much_memory_is_a_dead_letter(make: Make) -> None:
    job = make(
        HOG.format(mebibytes=600), table=pa.table({"n": range(30, 34)}), batch_size=2, compute={"memory": 400 * 2**20}
    )
    record = job.record()
    assert numbers(job, record) == [30, 31]
    assert [(f.batch, f.cause) for f in record.failures] == [(1, "out of memory")]
    assert all("its limit is 400 MiB" in failure.error for failure in record.failures)


MEMORY_ERROR = """
class OutOfMemoryError(RuntimeError): pass
class Handler:
    def __init__(self, config):
        self.sizes = []
    def handle_batch(self, payload, batch_id):
        self.sizes.append(len(payload))
        if len(payload) > 4 or {bad} in [row["n"] for row in payload]:
            raise {error}
        return payload
    def on_job_complete(self):
        print("sizes", self.sizes)
"""


@pytest.mark.parametrize(
    "error", ["MemoryError()", "OutOfMemoryError('x')", "RuntimeError('CUDA out of memory. Tried to allocate')"]
)
def test_a_memory_error_halves_the_batch_and_the_size_is_kept(make: Make, error: str) -> None:
    job = make(MEMORY_ERROR.format(bad=-1, error=error), rows=32, batch_size=16)
    record = job.record()
    assert numbers(job, record) == list(range(32))
    assert (record.batches, record.failures) == (2, ())
    assert supervisor.run_completion(job.url, job.report).kind == "done"
    job.close()
    (line,) = [line["message"] for line in job.logs() if line["message"].startswith("sizes")]
    assert line == "sizes [16, 8, 4, 4, 8, 4, 4, 4, 4, 4, 4]"


def test_a_memory_error_with_one_row_is_a_dead_letter(make: Make) -> None:
    job = make(MEMORY_ERROR.format(bad=5, error="MemoryError()"), rows=32, batch_size=8)
    record = job.record()
    assert numbers(job, record) == [*range(8, 32)]
    assert [(f.batch, f.rows, f.cause) for f in record.failures] == [(0, 8, "out of memory")]
    assert len(job.letters(record)[0]["payload"]) == 8


# starting -----------------------------------------------------------------------------------------------------------


INIT = "class Handler:\n    def __init__(self, config):\n        {}\n    def handle_batch(self, payload): pass\n"


def test_an_init_that_raises_fails_the_job(make: Make) -> None:
    job = make(INIT.format("raise RuntimeError('no model')"))
    outcome = job.run()
    assert outcome.kind == "worker error"
    assert outcome.message == "the handler cannot be started: RuntimeError: no model"
    job.close()
    assert any("raise RuntimeError('no model')" in line.get("exc_info", "") for line in job.logs())


def test_an_init_without_memory_fails_the_job_as_out_of_memory(make: Make) -> None:
    assert make(INIT.format("raise MemoryError")).run().kind == "out of memory"
    hog = make(INIT.format("self.x = b'x' * 2**30; time.sleep(5)"), compute={"memory": 300 * 2**20})
    outcome = hog.run()
    assert outcome.kind == "out of memory"
    assert "its limit is 300 MiB" in outcome.message


def test_an_init_that_crashes_is_tried_three_times(make: Make) -> None:
    job = make(INIT.format("print('init'); os._exit(7)"))
    outcome = job.run()
    assert outcome.kind == "worker error"
    assert "exited with code 7" in outcome.message
    job.close()
    assert [line["message"] for line in job.logs()].count("init") == 3


def test_a_handler_with_a_wrong_signature_fails_the_job(make: Make) -> None:
    outcome = make(
        "class Handler:\n    def __init__(self, config): pass\n    def handle_batch(self, data): pass\n"
    ).run()
    assert outcome.kind == "worker error"
    assert "data" in outcome.message


def test_prestarted_processes_wait_with_the_handler_loaded(make: Make, tmp_path: Path) -> None:
    handler = """
    class Handler:
        def __init__(self, config, job_spec):
            self.spec = job_spec
            print("loaded")
            open(f"{config['loaded']}/{os.getpid()}", "w").close()
        def handle_batch(self, payload):
            return [self.spec["total_batch_count"]] * len(payload)
    """
    loaded = tmp_path / "loaded"
    loaded.mkdir()
    job = make(handler, job_config={"a": 1}, config={"loaded": str(loaded)})
    slots.prestart(job.url, 2)
    until(lambda: len(list(loaded.iterdir())) == 2, "two processes with the handler loaded", 20)
    record = job.record()
    assert {row["prediction"] for row in job.rows(record)} == {10}
    pids = [int(path.name) for path in loaded.iterdir()]
    assert len(pids) == 2
    assert all(map(lives, pids))
    job.close()
    assert not any(map(lives, pids))
    assert [line["message"] for line in job.logs()].count("loaded") == 2


def test_the_process_has_no_dask_and_no_more_than_it_needs(make: Make) -> None:
    handler = """
    class Handler:
        def __init__(self, config): pass
        def handle_batch(self, payload):
            heavy = "dask distributed pydantic rich click psutil pandas s3fs pyarrow.dataset".split()
            return [",".join(name for name in heavy if name in sys.modules)] * len(payload)
    """
    job = make(handler, rows=1)
    (row,) = job.rows(job.record())
    assert row["prediction"] == ""


# what the handler sees ----------------------------------------------------------------------------------------------


def test_working_directory_import_path_environment_and_config(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    handler = """
    import helper
    class Handler:
        def __init__(self, config):
            config["list"].append(1)
            self.config = config
            self.text = open("values.txt").read()
        def handle_batch(self, payload):
            return [{
                "text": self.text, "helper": helper.NAME, "list": len(self.config["list"]),
                "env": os.environ["FROM_ENV"], "dotenv": os.environ["FROM_DOTENV"],
                "threads": os.environ["OMP_NUM_THREADS"], "gpu": os.environ["CUDA_VISIBLE_DEVICES"],
                "stdin": sys.stdin.read(),
            }] * len(payload)
    """
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    job = make(
        handler,
        rows=1,
        files={"values.txt": "here", "helper.py": "NAME = 'mine'", ".env": "FROM_DOTENV=secret\n"},
        where={"env": {"FROM_ENV": "yes"}},
        config={"list": []},
        compute={"cpu": 3.5, "gpu": 1},
    )
    (row,) = job.rows(job.record())
    assert row == {
        "text": "here",
        "helper": "mine",
        "list": 1,
        "env": "yes",
        "dotenv": "secret",
        "threads": "3",
        "gpu": "5",
        "stdin": "",
    }
    job.close()
    assert "secret" not in str(job.logs())


def test_two_jobs_with_modules_of_the_same_name_do_not_meet(make: Make) -> None:
    handler = """
    import helper
    class Handler:
        def __init__(self, config): pass
        def handle_batch(self, payload):
            time.sleep(0.01)
            return [helper.NAME] * len(payload)
    """
    jobs = [make(handler, files={"helper.py": f"NAME = '{name}'"}) for name in ("a", "b")]
    records: dict[int, Any] = {}
    threads = [threading.Thread(target=lambda n=n: records.update({n: jobs[n].record()})) for n in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for n, name in ((0, "a"), (1, "b")):
        assert {row["prediction"] for row in jobs[n].rows(records[n])} == {name}


def test_a_class_travels_by_value(make: Make) -> None:
    factor = 3

    class Handler:
        def __init__(self, config: Any) -> None: ...

        def handle_batch(self, payload: Any) -> Any:
            return [factor * row["n"] for row in payload]

    import cloudpickle

    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    try:
        job = make(Handler, rows=20)
    finally:
        cloudpickle.unregister_pickle_by_value(sys.modules[__name__])
    assert [row["prediction"] for row in job.rows(job.record())] == [3 * n for n in range(20)]


def test_the_same_instance_handles_all_splits_and_completes_the_job(make: Make) -> None:
    handler = """
    class Handler:
        def __init__(self, config, metrics_client):
            self.rows = 0
            self.metrics = metrics_client
        def handle_batch(self, payload):
            self.rows += len(payload)
            self.metrics.increment("rows", len(payload), tags={"kind": "x"})
        def on_job_complete(self):
            print("handled", self.rows)
            self.metrics.gauge("rows", self.rows)
    """
    job = make(handler)
    first, second = job.record(), job.record()
    assert first.part is None
    assert job.staged() == []
    assert (first.rows_in, first.rows_out, first.batches, first.succeeded) == (100, 0, 10, 10)
    assert (
        first.metrics == second.metrics == [{"metric": "rows", "kind": "counter", "tags": {"kind": "x"}, "value": 100}]
    )
    assert NoOutput(0) in job.events
    assert supervisor.run_completion(job.url, job.report).kind == "done"
    last = job.events[-1]
    assert isinstance(last, Metrics)
    assert last.metrics[0]["value"] == 200
    job.close()
    assert "handled 200" in [line["message"] for line in job.logs()]


def test_a_completion_that_fails_fails_the_job(make: Make) -> None:
    body = INIT.format("pass") + "    def on_job_complete(self): {}\n"
    for action, words in (("1 / 0", "ZeroDivisionError"), ("os._exit(5)", "exited with code 5")):
        outcome = supervisor.run_completion(make(body.format(action)).url, print)
        assert outcome.kind == "worker error"
        assert words in outcome.message


# logs ---------------------------------------------------------------------------------------------------------------


def test_everything_that_a_handler_says_is_in_the_log(make: Make) -> None:
    handler = """
    import ctypes, logging, subprocess, warnings
    from cortex_dask import logger
    class Handler:
        def __init__(self, config): pass
        def handle_batch(self, payload, batch_id):
            print("printed"); print("half a line", end="")
            if payload[0]["n"] == 0:
                return
            print("to stderr", file=sys.stderr)
            os.write(1, b"native\\n")
            libc = ctypes.CDLL(None); libc.puts(b"from C"); libc.fflush(None)
            subprocess.run(["echo", "from a program"])
            if os.fork() == 0:
                print("from a fork"); os._exit(0)
            os.wait()
            warnings.warn("careful")
            logging.getLogger("library").info("plain")
            reserved = {"message": "m", "labels": 1, "process": 2}
            odd = {"deep": {"a": [1]}, "object": object, "huge": 2**70, "name": "n"}
            logger.info("with extra", extra={"confidence": 0.97, **reserved, **odd})
            logger.debug("not shown")
            logger.info("x" * 6_000_000)
            try:
                1 / 0
            except ZeroDivisionError:
                logger.exception("caught")
            os.write(2, b"last words")
            os.kill(os.getpid(), signal.SIGKILL)
    """
    job = make(handler, rows=2, batch_size=1, limits={"max_attempts": 1})
    record = job.record()
    assert [(failure.batch, failure.cause) for failure in record.failures] == [(1, "crash")]
    job.close()
    lines = job.logs()
    by_message = {line["message"]: line for line in lines}
    for message in (
        "printed",
        "half a line",
        "to stderr",
        "native",
        "from C",
        "from a program",
        "from a fork",
        "plain",
        "last words",
    ):
        batch = 0 if message == "half a line" else 1
        found = {line.get("batch_id") for line in lines if line["message"] == message}
        assert batch_id(job.settings.job_id, 0, batch) in found, message
    assert any("UserWarning: careful" in message for message in by_message)
    line = by_message["with extra"]
    assert line["confidence"] == 0.97
    assert line["deep"] == {"a": [1]}
    assert line["object"] == "<class 'object'>"
    assert line["huge"] == 2**70
    assert line["name"] == "n"
    assert line["labels"] == {
        "apiName": "test",
        "apiKind": "BatchAPI",
        "apiID": "test-1",
        "jobID": job.settings.job_id,
        "workerID": record.worker,
    }
    assert isinstance(line["process"], int)
    assert line["process"] != 2
    assert "not shown" not in by_message
    assert any(message.startswith("a log line of 6,000,") for message in by_message)
    assert "ZeroDivisionError" in by_message["caught"]["exc_info"]
    assert any("SIGKILL" in message for message in by_message)


# ending -------------------------------------------------------------------------------------------------------------

SLEEPER = """
import subprocess
class Handler:
    def __init__(self, config): pass
    def handle_batch(self, payload, batch_id):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        child = subprocess.Popen(["sleep", "600"])
        with open({place!r}, "w") as file:
            file.write(f"{{os.getpid()}} {{child.pid}}")
        {action}
"""


def pids(place: Path) -> list[int]:
    return until(lambda: place.exists() and [int(text) for text in place.read_text().split()], "a handler at work", 30)


@pytest.mark.parametrize("how", ["stop_job", "stop.json"])
def test_a_stop_ends_a_handler_that_hangs_within_five_seconds(make: Make, tmp_path: Path, how: str) -> None:
    place = tmp_path / "pids"
    job = make(SLEEPER.format(place=str(place), action="time.sleep(600)"))
    outcomes: list[Any] = []
    thread = threading.Thread(target=lambda: outcomes.append(job.run()))
    thread.start()
    running = pids(place)
    began = time.monotonic()
    if how == "stop_job":
        slots.stop_job(job.url, "enough")
    else:
        job.directory.request_stop("stopped", "enough")
    thread.join(10)
    assert time.monotonic() - began < 5
    assert (outcomes[0].kind, outcomes[0].message) == ("stopped", "enough")
    until(lambda: not any(map(lives, running)), "the handler and its child to end", 10)
    assert job.staged() == []


@pytest.mark.parametrize("action", ["time.sleep(600)", "import re; re.match('(a+)+$', 'a' * 60 + 'b')"])
def test_the_process_goes_when_its_worker_is_killed(make: Make, tmp_path: Path, action: str) -> None:
    place = tmp_path / "pids"
    job = make(SLEEPER.format(place=str(place), action=action))
    code = (
        "import orjson, sys; from cortex_dask.runtime.worker.supervisor import run_split;"
        "from cortex_dask.io.job.records import SplitTask;"
        "run_split(SplitTask.from_json(orjson.loads(sys.argv[1])), lambda event: None)"
    )
    import orjson

    from cortex_dask.io.job.records import SplitTask

    task = orjson.dumps(SplitTask(job.url, job.splits[0], 1, None).to_json()).decode()
    worker = subprocess.Popen([sys.executable, "-c", code, task])
    try:
        running = pids(place)
        worker.send_signal(signal.SIGKILL)
        worker.wait()
        until(lambda: not any(map(lives, running)), "the handler and its child to end", 20)
    finally:
        worker.kill()


def test_an_idle_process_goes_with_its_worker_too(make: Make) -> None:
    job = make("class Handler:\n    def __init__(self, config): pass\n    def handle_batch(self): pass\n")
    code = (
        "import sys; from cortex_dask.runtime.worker.supervisor import run_completion;"
        "run_completion(sys.argv[1], print); from cortex_dask.runtime.worker import slots;"
        "process = slots.lease(sys.argv[1]).__enter__().process(); print(process.pid, flush=True); sys.stdin.read()"
    )
    worker = subprocess.Popen(
        [sys.executable, "-c", code, job.url], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert worker.stdout is not None
    pid = int(worker.stdout.readline())
    assert lives(pid)
    worker.kill()
    until(lambda: not lives(pid), "the handler process to end", 20)
    worker.communicate()


def test_close_runs_what_the_handler_registered_for_the_end(make: Make, tmp_path: Path) -> None:
    flag = tmp_path / "left"
    handler = f"""
    import atexit
    class Handler:
        def __init__(self, config):
            atexit.register(lambda: open({str(flag)!r}, "w").close())
        def handle_batch(self): pass
    """
    job = make(handler)
    job.record()
    job.close()
    assert flag.exists()


# storage and input --------------------------------------------------------------------------------------------------


def test_a_store_that_refuses_gives_the_split_back_with_nothing_left_behind(make: Make) -> None:
    job = make(
        "class Handler:\n    def __init__(self, config): pass\n    def handle_batch(self, payload): return payload\n"
    )
    assert job.settings.output is not None
    out = Path(job.settings.output.url)
    out.rmdir()
    out.write_text("a file where the directory should be")
    outcome = job.run()
    assert outcome.kind == "storage", outcome
    assert str(out) in outcome.message
    out.unlink()
    assert job.run().kind == "done"  # by the same process


def test_an_unreadable_file_keeps_what_was_read_before(make: Make) -> None:
    job = make(
        "class Handler:\n    def __init__(self, config): pass\n    def handle_batch(self, payload): return payload\n"
    )
    file = Path(job.splits[0].pieces[0].path)
    file.write_bytes(b"PAR1 something else")
    record = job.record()
    assert record.part is None
    assert [failure.batch for failure in record.failures] == list(range(10))
    assert {failure.cause for failure in record.failures} == {"unreadable input"}
    assert {letter["rows"] for letter in job.letters(record)} == {10}


def test_malformed_lines_are_dead_letters_and_their_neighbours_go_on(make: Make) -> None:
    lines = b'{"n": 1}\nnot json\n{"n": 2}\n'
    job = make(
        "class Handler:\n    def __init__(self, config): pass\n    def handle_batch(self, payload): return payload\n",
        lines=lines,
    )
    record = job.record()
    assert numbers(job, record) == [1, 2]
    (letter,) = job.letters(record)
    assert (letter["batch"], letter["cause"], letter["payload"]) == (None, "malformed input", ["not json"])
    assert "line 2" in letter["error"]
    assert (record.batches, record.succeeded) == (1, 1)


# schema -------------------------------------------------------------------------------------------------------------


def test_a_schema_that_nobody_settles_gives_the_slot_back(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "SCHEMA_SECONDS", 0.3)
    job = make(
        "class Handler:\n    def __init__(self, config): pass\n    def handle_batch(self, payload): return payload\n"
    )
    monkeypatch.setattr(job.directory, "settle_schema", lambda schema: schema)
    outcome = job.run()
    assert outcome.kind == "needs schema"
    assert outcome.schema is not None
    assert job.staged() == []
    record = job.record(schema=outcome.schema)
    assert numbers(job, record) == list(range(100))


def test_a_schema_is_proposed_when_every_column_has_a_type(make: Make) -> None:
    handler = """
    class Handler:
        def __init__(self, config): pass
        def handle_batch(self, payload):
            n = payload[0]["n"]
            return [{"a": 1 if n >= 20 else None, "b": "x" if n != 50 else 7}] * len(payload)
    """
    job = make(handler)
    record = job.record()
    assert [row["a"] for row in job.rows(record)] == [None] * 20 + [1] * 70
    (failure,) = record.failures
    assert failure.batch == 5
    assert "'b'" in failure.error
    assert [type(event) for event in job.events].count(SchemaProposed) == 1


def test_progress_is_reported_about_every_second(make: Make) -> None:
    handler = """
    class Handler:
        def __init__(self, config): pass
        def handle_batch(self, payload):
            time.sleep(0.25)
    """
    job = make(handler)
    job.record()
    reports = [event for event in job.events if isinstance(event, SplitProgress)]
    assert len(reports) >= 2
    assert reports[-1].batches > 0
    assert reports[-1].rows == reports[-1].batches * 10


def test_processes_that_come_and_go_leave_nothing_behind(make: Make) -> None:
    others = set(threading.enumerate())  # of earlier tests: they, and their files, may go at any time

    def threads() -> list[threading.Thread]:
        return [thread for thread in threading.enumerate() if thread not in others]

    def crash_and_close() -> None:
        job = make(POISON.format(action="os._exit(3)"), limits={"max_attempts": 2})
        assert len(job.record().failures) == 1
        job.close()

    crash_and_close()
    until(lambda: not threads(), "the threads to end", 10)
    before = psutil.Process().num_fds()
    crash_and_close()
    until(lambda: not threads() and psutil.Process().num_fds() <= before, "threads and files to be closed", 10)


def test_kills_at_any_moment_neither_lose_nor_repeat_a_row(make: Make, tmp_path: Path) -> None:
    handler = """
    class Handler:
        def __init__(self, config):
            open(f"{config['loaded']}/{os.getpid()}", "w").close()
        def handle_batch(self, payload):
            time.sleep(0.004)
            return payload
    """
    loaded = tmp_path / "loaded"
    loaded.mkdir()
    config = {"loaded": str(loaded)}
    job = make(handler, rows=20_000, batch_size=100, limits={"max_attempts": 5}, config=config)
    done = threading.Event()
    killed: list[int] = []

    def kill_now_and_then() -> None:
        while len(killed) < 2 and not done.wait(0.3):
            for pid in [int(path.name) for path in loaded.iterdir()]:
                if lives(pid):
                    os.kill(pid, signal.SIGKILL)
                    killed.append(pid)

    job.record()  # started and loaded
    thread = threading.Thread(target=kill_now_and_then)
    thread.start()
    try:
        record = job.record()
    finally:
        done.set()
        thread.join()
    assert len(killed) == 2
    assert numbers(job, record) == list(range(20_000))
    assert record.failures == ()
