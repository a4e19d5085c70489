"""The job directory: one folder of a store that holds everything about a job.

========================  ====================================================================================
``job.json``              the resolved submission (:class:`~cortex_dask.io.job.settings.JobSettings`), written once
``project/<hash>.tar.gz`` the packed project, or ``handler.pkl``, a class pickled by value
``plan/plan.json``        the plan's header; ``plan/splits-00000.jsonl`` …: the splits, a chunk of lines each
``schema.json``           the output's schema, once settled (``{"schema": <base64 of Arrow IPC>}``)
``ledger/<n>.jsonl``      finished splits, see :mod:`cortex_dask.io.job.ledger`
``failures/…``            dead letters: one JSON line per failed batch, with its payload
``delivered/…``           which dead letters have been delivered to where the submission says
``completed.json``        ``on_job_complete`` has succeeded; with the metrics that it pushed
``logs/…``                chunks of log lines
``status.json``           the status document, refreshed while the job runs, with the coordinator's heartbeat
``metrics.json``          what the handler pushed
``control/stop.json``     a request to stop: ``{"status": "stopped" | "timed out", "reason": …}``
========================  ====================================================================================
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import orjson

from cortex_dask.errors import JobNotFoundError
from cortex_dask.io.job.settings import JobSettings
from cortex_dask.io.job.splits import PlanHeader, Split
from cortex_dask.io.store.store import Store

if TYPE_CHECKING:
    pass

_BEGINS = re.compile(rb'\{"number":(\d+),')  # a split's line, as it is written
#: A chunk is some MB, read and written in one request each; splits of many small files have a long text.
_SPLITS_PER_CHUNK, _CHUNK = 20_000, 8 << 20


def jobs_prefix(api_name: str, job_id: str) -> str:
    """Return where in an environment's store a job directory lies."""
    return f"jobs/{api_name}/{job_id}"


class PlanWriter:
    """Writes the splits as they come, then the header that makes the plan whole."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._chunk: list[bytes] = []
        self._size = 0
        self._names: set[str] = set()

    def add(self, split: Split) -> None:
        """Take the next split."""
        self._chunk.append(orjson.dumps(split))  # as of to_json(), which takes sixteen times as long
        self._size += len(self._chunk[-1])
        if len(self._chunk) == _SPLITS_PER_CHUNK or self._size >= _CHUNK:
            self._flush()

    def finish(self, header: PlanHeader) -> None:
        """Write the rest, and the header."""
        self._flush()
        # An attempt that was interrupted may have cut more splits, of an input that was larger then.
        self._store.delete(*(set(self._store.names("plan/splits-")) - self._names))
        self._store.write("plan/plan.json", orjson.dumps(header.to_json(), option=orjson.OPT_INDENT_2))

    def _flush(self) -> None:
        if self._chunk:
            name = f"plan/splits-{len(self._names):05d}.jsonl"
            self._store.write(name, b"\n".join(self._chunk))
            self._names.add(name)
            self._chunk, self._size = [], 0


class JobDirectory:
    """Typed access to a job directory.

    Parameters
    ----------
    url : str
        The folder, on any fsspec URL or as a local path.
    """

    def __init__(self, url: str) -> None:
        self.store = Store(url)
        self.url = self.store.url

    def __repr__(self) -> str:
        return f"JobDirectory({self.url!r})"

    # job.json -------------------------------------------------------------------------------------------------------

    def create(self, settings: JobSettings) -> None:
        """Write ``job.json``; this makes the job exist.

        Raises
        ------
        FileExistsError
            If the directory holds a job already.
        """
        self.store.create("job.json", orjson.dumps(settings.to_json(), option=orjson.OPT_INDENT_2))

    def settings(self) -> JobSettings:
        """Read ``job.json``.

        Raises
        ------
        JobNotFoundError
            If there is none.
        """
        try:
            return JobSettings.from_json(orjson.loads(self.store.read("job.json")))
        except FileNotFoundError:
            raise JobNotFoundError(f"there is no job at {self.url}: it has no job.json") from None

    def move(self, settings: JobSettings) -> None:
        """Write ``job.json`` anew, with another cluster; everything else about a job stays as it was submitted."""
        self.write_json("job.json", settings.to_json())

    # plan -----------------------------------------------------------------------------------------------------------

    def write_plan(self, header: PlanHeader, splits: Iterable[Split]) -> None:
        """Write a plan whose splits are there."""
        writer = self.plan_writer()
        for split in splits:
            writer.add(split)
        writer.finish(header)

    def plan_writer(self) -> PlanWriter:
        """Return what writes a plan while it is made."""
        return PlanWriter(self.store)

    def plan_header(self) -> PlanHeader | None:
        """Read the plan's header; None while the job has not been planned."""
        value = self.read_json("plan/plan.json")
        return None if value is None else PlanHeader.from_json(value)

    def splits(self, is_done: Callable[[int], bool] = lambda number: False) -> Iterator[Split]:
        """Yield the planned splits in input order, a chunk in memory at a time.

        Parameters
        ----------
        is_done : callable, optional
            Tells from a split's number whether it can be left out; such are not even decoded.
        """
        number = 0
        while (data := self._read_or_none(f"plan/splits-{number:05d}.jsonl")) is not None:
            for line in data.splitlines():
                begins = _BEGINS.match(line)
                if begins is None or not is_done(int(begins[1])):
                    yield Split.from_json(orjson.loads(line))
            number += 1

    # small documents ------------------------------------------------------------------------------------------------

    def read_json(self, name: str) -> Any:
        """Read a JSON document; None where it does not exist."""
        data = self._read_or_none(name)
        return None if data is None else orjson.loads(data)

    def write_json(self, name: str, value: Any) -> None:
        """Write a JSON document, whole or not at all."""
        self.store.write(name, orjson.dumps(value, option=orjson.OPT_INDENT_2 | orjson.OPT_NON_STR_KEYS))

    def schema(self) -> str | None:
        """Return the settled output schema (base64 of Arrow IPC), or None."""
        value = self.read_json("schema.json")
        return None if value is None else value["schema"]

    def settle_schema(self, schema: str) -> str:
        """Settle the output schema; the first one stands. Returns the one that stands."""
        try:
            self.store.create("schema.json", orjson.dumps({"schema": schema}))
        except FileExistsError:
            return self.schema() or schema
        return schema

    def request_stop(self, status: str, reason: str) -> None:
        """Ask every process of the job to stop."""
        self.write_json("control/stop.json", {"status": status, "reason": reason})

    def stop_request(self) -> dict[str, str] | None:
        """Return the request to stop, if there is one."""
        value: dict[str, str] | None = self.read_json("control/stop.json")
        return value

    def clear_stop(self) -> None:
        """Take a request to stop back (before a job is resumed)."""
        self.store.delete("control/stop.json")

    def _read_or_none(self, name: str) -> bytes | None:
        try:
            return self.store.read(name)
        except FileNotFoundError:
            return None
