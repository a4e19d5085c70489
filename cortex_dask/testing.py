"""``run_inline``: a handler in the unit tests of its author, in the calling thread, through the code of a job.

::

    from cortex_dask.testing import run_inline

    def test_large_values_are_marked():
        result = run_inline(Handler, [{"value": 1}, {"value": 9}], config={"threshold": 5}, batch_format="records")

        assert result.to_pandas()["large"].tolist() == [False, True]
        assert result.failures.empty

Batching, conversion, the output's schema and the handling of failures are those of a job, so a handler that passes here
does not meet them for the first time on a cluster. Breakpoints work.
"""

from __future__ import annotations

import contextlib
import logging
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from cortex_dask.display import SilentDisplay
from cortex_dask.io.job.directory import JobDirectory
from cortex_dask.io.job.logs import to_frame
from cortex_dask.job import Job, create_directory
from cortex_dask.project.dotenv import read_dotenv
from cortex_dask.runtime.handler_process.log import JsonHandler
from cortex_dask.spec import resolution
from cortex_dask.spec.resolution import ResolvedJob
from cortex_dask.spec.submission import Options

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Result:
    """The result of a handler on some data.

    Attributes
    ----------
    status : str
        ``"succeeded"`` or ``"completed with failures"``.
    table : pyarrow.Table
        The rows that came back, in input order.
    failures : pandas.DataFrame
        A row for each batch that failed, as :meth:`cortex_dask.Job.failures` returns it.
    logs : pandas.DataFrame
        What the handler logged, as :meth:`cortex_dask.Job.logs` returns it.
    description : dict
        The job's status document.
    """

    status: str
    table: pa.Table = field(repr=False)
    failures: pd.DataFrame = field(repr=False)
    logs: pd.DataFrame = field(repr=False)
    description: dict[str, Any] = field(repr=False)

    def to_pandas(self) -> pd.DataFrame:
        """Return the rows that came back as a pandas DataFrame."""
        frame: pd.DataFrame = self.table.to_pandas(ignore_metadata=True)
        return frame

    def to_pylist(self) -> list[dict[str, Any]]:
        """Return the rows that came back as dicts."""
        rows: list[dict[str, Any]] = self.table.to_pylist()
        return rows


def run_inline(
    handler: type | str | Path,
    data: pd.DataFrame | pa.Table | list[dict[str, Any]] | str | Path,
    **options: Unpack[Options],
) -> Result:
    """Run a handler over data in the calling thread; no files are kept.

    Parameters
    ----------
    handler : class, str or Path
        What :func:`cortex_dask.run` takes: a class, a project directory or a ``cortex.yaml``.
    data : DataFrame, pyarrow.Table, list of dict, str or Path
        The rows, or files of them. A list of dicts is handled as a JSON-lines file is, all else as Parquet.
    **options
        The keywords of :func:`cortex_dask.run`; ``max_attempts`` is 1 unless it is given.

    Returns
    -------
    Result
        Also when batches failed: look at :attr:`Result.failures`.

    Raises
    ------
    InputError
        If something that was given cannot be used.
    JobFailedError
        If the handler does not load, or ``on_job_complete`` raises.
    """
    given: dict[str, Any] = {"max_attempts": 1, **{name: value for name, value in options.items() if value is not None}}
    with tempfile.TemporaryDirectory(prefix="cortex-dask-testing-") as folder:
        source = _write_data(data, Path(folder))
        resolved = resolution.resolve(handler, input=source, output=str(Path(folder) / "output"), **given)
        directory = JobDirectory(str(Path(folder) / "job"))
        create_directory(directory, resolved)
        lines: list[bytes] = []
        with _project_environment(resolved), _captured_logs(lines, resolved.settings.handler.log_level):
            job = Job(directory.url, cluster="inline").start()
        document = job.watch(SilentDisplay())
        job.raise_unless_complete(warn=False)
        logs = to_frame(orjson.loads(line) for line in lines)
        return Result(str(document["status"]), job.to_arrow(), job.failures(), logs, document)


@contextlib.contextmanager
def _project_environment(resolved: ResolvedJob) -> Iterator[None]:
    """Set the working directory and variables that a project's handler has in the process of a job."""
    if resolved.archive is None:
        yield
        return
    before = dict(os.environ)
    os.environ.update({**read_dotenv(resolved.archive.directory), **resolved.settings.handler.env})
    try:
        with contextlib.chdir(resolved.archive.directory):
            yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@contextlib.contextmanager
def _captured_logs(lines: list[bytes], level: str) -> Iterator[None]:
    """Collect what is logged, as the lines of a job's log; standard output is left alone."""
    root = logging.getLogger()
    handler = JsonHandler(lines.append, {})
    before = root.level
    root.addHandler(handler)
    root.setLevel(level.upper())
    try:
        yield
    finally:
        root.setLevel(before)
        root.removeHandler(handler)


def _write_data(data: Any, folder: Path) -> str:
    """Write data where a job can read it, and return the path."""
    if isinstance(data, str | Path):
        return str(data)
    if isinstance(data, list):
        path = folder / "data.jsonl"
        path.write_bytes(b"".join(orjson.dumps(row) + b"\n" for row in data))
        return str(path)
    path = folder / "data.parquet"
    pq.write_table(data if isinstance(data, pa.Table) else pa.Table.from_pandas(data, preserve_index=False), path)
    return str(path)
