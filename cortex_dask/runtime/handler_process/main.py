"""The handler process: where a user's ``Handler`` lives, once per slot, for the whole job.

Its supervisor (:mod:`cortex_dask.runtime.worker.supervisor`) starts it, tells it which splits to run, watches it, and
kills it when it has to. It reads its input and writes its output itself, so no row ever crosses a pipe. It has the
project directory as working directory, its own environment and import path, and nothing of dask: that import alone
would cost more than a small job takes.
"""

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import os
import signal
import sys
import traceback
from importlib import import_module
from pathlib import Path
from typing import Any

from cortex_dask.io.job.directory import JobDirectory
from cortex_dask.io.job.settings import JobSettings
from cortex_dask.io.store.store import Store
from cortex_dask.runtime import job_context
from cortex_dask.runtime.failures import one_line
from cortex_dask.runtime.frames import (
    Aborted,
    Close,
    Complete,
    Completed,
    Done,
    InitFailed,
    PlanKnown,
    Ready,
    RunSplit,
    SchemaAsked,
    Setup,
    Spent,
)
from cortex_dask.runtime.handler_process import log, memory
from cortex_dask.runtime.handler_process.connection import Connection
from cortex_dask.runtime.handler_process.handler import LoadedHandler, LoadedJob, job_spec, load_class
from cortex_dask.runtime.metrics import MetricsClient
from cortex_dask.runtime.progress_cell import Phase

_LARGE = 32 << 20  # bytes: what a handler has to take for it to be worth a look at what it has freed again
_ANSWER_SECONDS = 60.0  # longer than the supervisor waits for an answer itself


def main() -> None:
    """Set the process up, load the handler, then do what the supervisor asks for."""
    connection = Connection(*map(int, sys.argv[1:4]))
    for descriptor in sys.argv[4:]:
        os.set_inheritable(int(descriptor), False)  # they are this process' own, and not of those that it starts
    sys.argv[1:] = []
    setup = connection.commands.get()
    assert isinstance(setup, Setup)
    settings = setup.settings
    log.install(connection.send_log, setup.labels, settings.handler.log_level)
    faulthandler.register(signal.SIGUSR2, file=2)  # the supervisor asks what hangs before it kills
    job_context.enter(setup.context, setup.variables)
    metrics = MetricsClient()
    try:
        _enter_project(settings, setup.directory)
        handler_class, signature = load_class(settings, JobDirectory(setup.job_url), setup.directory)
        # The number of batches is known when the job is planned; a handler that does not ask for it is made before
        # that.
        plan = _wait_for_plan(connection) if "job_spec" in signature.init else None
        before = memory.resident()
        spec = None if plan is None else _spec(settings, plan)
        handler = LoadedHandler.construct(handler_class, signature, settings, spec, metrics, setup.directory)
    except BaseException as error:  # noqa: BLE001 - the job ends with it, and reports it
        _report_failed_start(connection, error)
        sys.exit(1)
    if memory.resident() - before > _LARGE:
        memory.trim()
    connection.send(Ready(signature.on_job_complete))
    _warm_up(settings)
    connection.cell.set_phase(Phase.IDLE)
    job: LoadedJob | None = None
    while True:
        command = plan if plan is not None and job is None else connection.commands.get()
        match command:
            case PlanKnown():
                job = _make_job(setup, command, handler, metrics, connection)
            case RunSplit():
                assert job is not None
                _run_split(connection, job, command)
            case Complete():
                _run_completion(connection, handler, metrics)
            case Close():
                _exit_in_order()


# setting up ---------------------------------------------------------------------------------------------------------


def _enter_project(settings: JobSettings, directory: str | None) -> None:
    """Set the working directory, the import path and the environment that the handler expects."""
    handler = settings.handler
    if directory is not None:
        if Path(directory, ".env").exists():
            from cortex_dask.project.dotenv import read_dotenv

            os.environ.update(read_dotenv(directory))
        os.chdir(directory)
        place = str(Path(directory, handler.python_path or "").resolve())
        first, last = [place], []
        # for the Python processes that the handler may start
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [place, os.environ.get("PYTHONPATH")]))
    else:
        if handler.cwd is not None and Path(handler.cwd).is_dir():
            os.chdir(handler.cwd)
        missing = [entry or (handler.cwd or "") for entry in handler.sys_path if entry not in sys.path]
        missing = [entry for entry in missing if entry and Path(entry).exists()]
        # A script's own folder comes first, as it does for the script; another interpreter's library never does.
        first = [entry for entry in missing if not _is_library(entry)]
        last = [entry for entry in missing if _is_library(entry)]
    sys.path[:0] = first
    sys.path += last
    job_context.offer_names()


def _is_library(entry: str) -> bool:
    return any(part in ("site-packages", "dist-packages") or part.startswith("python3") for part in Path(entry).parts)


def _wait_for_plan(connection: Connection) -> PlanKnown:
    while not isinstance(command := connection.commands.get(), PlanKnown):
        if isinstance(command, Close):
            _exit_in_order()
    return command


def _spec(settings: JobSettings, plan: PlanKnown) -> dict[str, Any]:
    return job_spec(settings, total_batch_count=plan.header.batches, start_time=plan.start_time)


def _report_failed_start(connection: Connection, error: BaseException) -> None:
    log.logger.error("the handler cannot be started: %s", one_line(error), exc_info=error)
    log.finish_lines()
    message = f"the handler cannot be started: {one_line(error)}"
    connection.send(InitFailed("out of memory" if memory.is_out_of_memory(error) else "worker error", message))


def _warm_up(settings: JobSettings) -> None:
    """Import what the first split needs; it may still be planned meanwhile."""
    import pyarrow as pa

    from cortex_dask.runtime.handler_process import pipeline  # noqa: F401 - for its own imports

    threads = settings.compute.threads
    pa.set_cpu_count(threads)
    pa.set_io_thread_count(max(threads, 4))  # they wait for storage more than they work
    pa.allocate_buffer(64)  # the first one maps a gigabyte and clears a huge page, which may take 10 ms
    if settings.output is not None:
        from cortex_dask.io.output import part as output_part  # noqa: F401 - as above

        with contextlib.suppress(Exception):  # the split that needs the store says what is wrong with it
            _ = Store(settings.output.url).fs if "://" in settings.output.url else None
    if settings.batch_format == "pandas":
        import pandas  # noqa: F401 - as above
    elif settings.batch_format == "polars":
        with contextlib.suppress(ImportError):  # the batch that needs it says what is missing
            import polars  # noqa: F401 - as above


# splits -------------------------------------------------------------------------------------------------------------


def _make_job(
    setup: Setup, plan: PlanKnown, handler: LoadedHandler, metrics: MetricsClient, connection: Connection
) -> LoadedJob:
    settings, header = setup.settings, plan.header
    import_module("cortex_dask.io.parquet.reader" if header.format == "parquet" else "cortex_dask.io.json.reader")
    return LoadedJob(settings, header, Store(setup.job_url), handler, metrics, connection.cell)


def _run_split(connection: Connection, job: LoadedJob, command: RunSplit) -> None:
    """Run a split, and report how it ended."""
    from cortex_dask.errors import StorageError
    from cortex_dask.runtime.handler_process.attempts import ProcessSpent, SplitRun
    from cortex_dask.runtime.handler_process.part import NeedsSchema
    from cortex_dask.runtime.handler_process.pipeline import run_attempt

    run = command.run
    connection.cell.start_run(run)
    if command.rows_limit is not None:
        job.handler.limit_rows(command.rows_limit)
    job.handler.set_patience(command.patience)
    split_run = SplitRun(command.task, command.attempt_id, command.history)
    ended: Done | Spent | Aborted
    try:
        record = run_attempt(job, split_run, _SupervisorSchema(connection), connection.send)
        ended = Done(run, record, job.handler.exhausted)
    except NeedsSchema as error:
        ended = Aborted(run, "needs schema", schema=error.schema)
    except ProcessSpent as error:
        ended = Spent(run, str(error))
    except StorageError as error:
        ended = Aborted(run, "storage", message=str(error))
    except Exception as error:  # noqa: BLE001 - a fault of ours, not of a batch: the job must not continue
        log.logger.error("the split cannot be run: %s", one_line(error), exc_info=error)
        ended = Aborted(run, "worker error", message=f"a split cannot be run: {one_line(error)}")
    log.finish_lines()
    connection.cell.set_phase(Phase.IDLE)
    connection.send(ended)


class _SupervisorSchema:
    """The output's schema, as the supervisor knows it."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._answer: str | None = None
        self._answered = False
        while not connection.answers.empty():
            connection.answers.get()  # to a question of an earlier split, which did not wait for it

    def propose(self, schema: str) -> None:
        """Send what the first rows make of it."""
        self._connection.send(SchemaAsked(schema))

    def answer(self, *, wait: bool) -> str | None:
        """Return what was decided."""
        import queue

        if not self._answered:
            try:
                command = self._connection.answers.get(block=wait, timeout=_ANSWER_SECONDS if wait else None)
            except queue.Empty:
                return None
            self._answer, self._answered = command.schema, True
        return self._answer


# the end ------------------------------------------------------------------------------------------------------------


def _run_completion(connection: Connection, handler: LoadedHandler, metrics: MetricsClient) -> None:
    """Call ``on_job_complete``."""
    message = ""
    try:
        handler.complete()
    except BaseException as error:  # noqa: BLE001 - it is the user's code, and its failure is the job's
        log.logger.error("on_job_complete failed: %s", one_line(error), exc_info=error)
        message = f"on_job_complete failed: {one_line(error)}"
    log.finish_lines()
    connection.send(Completed(message, metrics.collect()))


def _exit_in_order() -> None:
    """End in good order: what the handler registered with :mod:`atexit` is run; its threads are not waited for."""
    try:
        atexit._run_exitfuncs()
    except BaseException:  # noqa: BLE001 - the process ends in any case
        traceback.print_exc()
    log.finish_lines()
    os._exit(0)


if __name__ == "__main__":
    main()
