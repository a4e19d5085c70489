"""Jobs of the conformance suite: submitted with the command line in processes of their own, seen in the store."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
import yaml

from cortex_dask.io.job.directory import JobDirectory, jobs_prefix
from cortex_dask.io.job.status import FINAL_STATUSES
from cortex_dask.io.store.store import Store
from tests.clusters.backend import Backend, kill
from tests.faults.checks import Result, exactly_once
from tests.faults.jobs import ROOT, FaultJob, make_input
from tests.support.waiting import lives, until

__all__ = ["Call", "ClusterJob", "Submission", "make_job"]

_API = "conformance"
_HANDLER = {"type": "python", "path": "handler.py"}
_MAIN = "from cortex_dask.cli import main; main()"
#: Ends without a word as soon as the command has done its work: no exit handlers, no connections closed in good order.
_KILLED = """\
import os, signal
from cortex_dask.cli import main
try:
    main(standalone_mode=False)
finally:
    os.kill(os.getpid(), signal.SIGKILL)
"""


@dataclass(frozen=True)
class Call:
    """A call of ``handle_batch``, as the handler noted it."""

    pid: int
    worker: int  # the parent's process id: the Dask worker's
    host: str
    ids: tuple[int, ...]
    time: float


class Submission:
    """A command of ``cortex-dask`` in a process of its own."""

    def __init__(
        self, arguments: Sequence[str], environment: dict[str, str], log: Path, *, killed: bool = False
    ) -> None:
        self._log = log
        code = _KILLED if killed else _MAIN
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-c", code, *arguments],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=ROOT,
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def said(self) -> str:
        """Return what it has written."""
        return self._log.read_text(errors="replace")

    def wait(self, seconds: float) -> int:
        """Wait for its end, and return the exit code."""
        try:
            return self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"the command has not ended after {seconds:g} s; it said: {self.said()}") from None

    def kill(self) -> None:
        """SIGKILL it."""
        self._process.kill()
        self._process.wait()


class ClusterJob(FaultJob):
    """A job on a backend; :meth:`submit` submits it."""

    backend: Backend
    folder: Path
    store: Store

    def __init__(
        self, backend: Backend, folder: Path, *, files: int = 4, api: Mapping[str, Any] | None = None, **config: Any
    ) -> None:
        store = Store(backend.store_url(folder))
        self.job_id = f"job-{uuid.uuid4().hex[:8]}"
        self.backend, self.folder, self.store = backend, folder, store
        self.signals = store.child("marks")
        self._config = {"marks": self.signals.url, **config}
        self._commands: list[Submission] = []
        self._project = folder / "project"
        self._project.mkdir(parents=True)
        spec = {"name": _API, "kind": "BatchAPI", "handler": _HANDLER, **backend.api, **(api or {})}
        (self._project / "cortex.yaml").write_text(yaml.safe_dump([spec]))
        (self._project / "handler.py").write_text(Path(__file__).with_name("project_handler.py").read_text())
        super().__init__(
            store.child(jobs_prefix(_API, self.job_id)).url, folder, make_input(store.child("in"), files=files)
        )

    # what users do --------------------------------------------------------------------------------------------------

    @property
    def environment(self) -> dict[str, str]:
        """The variables of the commands."""
        return {
            **os.environ,
            "PYTHONPATH": ROOT,
            "COLUMNS": "200",
            "DASK_CORTEX_DASK__STORE": self.store.url,
            **self.backend.environment,
        }

    @property
    def _where(self) -> list[str]:
        pairs = [f"{name}={json.dumps(value)}" for name, value in self.backend.options.items()]
        return ["--cluster", self.backend.cluster, *(word for pair in pairs for word in ("--cluster-option", pair))]

    def command(self, *arguments: str, killed: bool = False) -> Submission:
        """Begin any command of ``cortex-dask``; ``killed``: it gets SIGKILL as soon as it has done its work."""
        log = self.folder / f"command-{len(self._commands)}-{arguments[0]}.log"
        self._commands.append(Submission(arguments, self.environment, log, killed=killed))
        return self._commands[-1]

    def submit(self, *options: str, workers: str = "2", killed: bool = False) -> Submission:
        """Begin to submit the job; again: the same job once more."""
        config = [f"{name}={json.dumps(value)}" for name, value in self._config.items()]
        return self.command(
            *("submit", str(self._project), "--input", f"{self.store.url}/in", "--output", f"{self.store.url}/out"),
            *("--job-id", self.job_id, "--batch-size", "50", "--batch-format", "pyarrow", "--workers", workers),
            *(word for pair in config for word in ("--config", pair)),
            *self._where,
            *options,
            killed=killed,
        )

    def resume(self) -> Submission:
        """Begin to go on with it on the same kind of cluster."""
        return self.command("resume", _API, self.job_id, *self._where)

    def stop(self) -> Submission:
        """Begin to stop it."""
        return self.command("stop", _API, self.job_id)

    # what can be seen -----------------------------------------------------------------------------------------------

    def calls(self) -> list[Call]:  # type: ignore[override]  # with the host as well
        """Return the calls of ``handle_batch`` so far, in the order in which they began."""
        notes = [orjson.loads(self.signals.read(name)) for name in self.signals.names("calls/")]
        calls = [Call(note["pid"], note["worker"], note["host"], tuple(note["ids"]), note["time"]) for note in notes]
        return sorted(calls, key=lambda call: call.time)

    def completions(self) -> int:
        return len(self.signals.names("completions/"))

    def mark(self, name: str) -> None:
        self.signals.write(name, b"")

    def status(self) -> dict[str, Any]:
        """Return the status document; an empty one before there is any."""
        return JobDirectory(self.url).read_json("status.json") or {"status": "enqueuing"}

    def until_final(self) -> dict[str, Any]:
        """Wait until the job has ended, whoever runs it, and return its status document."""

        def ended() -> dict[str, Any] | None:
            document = self.status()
            return document if document["status"] in FINAL_STATUSES else None

        try:
            document: dict[str, Any] = until(ended, "the job to end", self.backend.seconds)
        except AssertionError as error:
            raise AssertionError(f"{error}: {self.status()}; {self.said()}") from None
        return document

    def until_calls(self, count: int = 1) -> list[Call]:
        """Wait until so many batches have been begun."""

        def begun() -> list[Call]:
            calls = self.calls()
            assert self.status()["status"] not in FINAL_STATUSES, (self.status(), self.said())
            return calls if len(calls) >= count else []

        calls: list[Call] = until(begun, f"{count} calls", self.backend.seconds)
        return calls

    def check(self, status: str = "succeeded") -> Result:
        """Check that every row is there exactly once, and that status and ledger agree with it."""
        assert self.status()["status"] == status, (self.status(), self.said())
        result = exactly_once(self, status=status)
        assert self.completions() == 1
        return result

    def said(self) -> str:
        """Return what all commands have written."""
        return "\n".join(f"--- {number}: {command.said()}" for number, command in enumerate(self._commands))

    # the end --------------------------------------------------------------------------------------------------------

    def leftovers(self) -> list[str]:
        """Return what is left of the job although it has ended."""
        found = [f"command {number}" for number, command in enumerate(self._commands) if command.alive]
        here = os.uname().nodename
        found += sorted({f"handler {call.pid}" for call in self.calls() if call.host == here and lives(call.pid)})
        who = self.status().get("coordinator") or {}
        if who.get("host") == here and lives(who["pid"]):
            found.append(f"coordinator {who['pid']}")
        if JobDirectory(self.url).read_json("cluster.json") is not None and not self.backend.keeps_record(self):
            found.append("cluster.json")
        return found + self.backend.leftovers(self)

    def close(self) -> None:
        """End what a failed test has left of it."""
        for command in self._commands:
            if command.alive:
                command.kill()
        who = self.status().get("coordinator") or {}
        if who.get("host") == os.uname().nodename and lives(who["pid"]):
            JobDirectory(self.url).request_stop("stopped", "the test is over")
            with contextlib.suppress(AssertionError):
                until(lambda: not lives(who["pid"]), "the coordinator to stop", 10)
            kill(who["pid"])


def make_job(backend: Backend, folder: Path, **config: Any) -> ClusterJob:
    """Make a project and an input; the job is not submitted yet."""
    return ClusterJob(backend, folder, **config)
