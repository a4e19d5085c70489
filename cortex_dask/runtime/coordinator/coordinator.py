"""The coordinator: it plans a job, keeps a window of splits in flight, commits what comes back, and seals the output.

It is disposable. Everything that it knows lies in the job directory, so that it can be killed at any moment and be
started again, anywhere, and goes on where the ledger ends. The story of a job, top to bottom: :func:`run_job` →
:meth:`Coordinator.run` → ``_enqueue`` → ``_process`` → ``_seal``.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import queue
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from cortex_dask.errors import CortexDaskError, InputError, JobRunningError
from cortex_dask.io.job.directory import JobDirectory
from cortex_dask.io.job.ledger import Ledger
from cortex_dask.io.job.records import Outcome, Part, SplitRecord, SplitTask
from cortex_dask.io.job.splits import PlanHeader, Split
from cortex_dask.io.job.status import COMPLETE_STATUSES, FINAL_STATUSES
from cortex_dask.io.output.directory import OutputDirectory
from cortex_dask.runtime.cluster import Cluster
from cortex_dask.runtime.coordinator.committer import Committer
from cortex_dask.runtime.coordinator.completion import complete
from cortex_dask.runtime.coordinator.heartbeat import Heartbeat, running_elsewhere
from cortex_dask.runtime.coordinator.limits import STOP_CHECK, STOP_GRACE, Ended, Limits, Overtaken
from cortex_dask.runtime.coordinator.retries import plan_retries, read_retries
from cortex_dask.runtime.coordinator.schema_election import SchemaElection
from cortex_dask.runtime.coordinator.split_queue import SplitQueue
from cortex_dask.runtime.coordinator.status_board import Document, StatusBoard
from cortex_dask.runtime.coordinator.totals import JobTotals
from cortex_dask.runtime.coordinator.window import Attempt, Backups, Window
from cortex_dask.runtime.dead_letters.delivery import make_delivery

_log = logging.getLogger(__name__)  # of whoever runs the coordinator; the job's own log is the handlers'

#: How often a split may lose its worker before its batches are given up. A vanished host is not the batch's fault, so
#: this is larger than ``max_attempts``; it is finite so that a batch that takes whole hosts down cannot do so for ever.
WORKER_LOST_BUDGET = 10
#: After so many, a split is run alone: if it is the one that takes workers down, no other split is on them.
SUSPICIOUS = 3
#: How often a split is sent again because a store failed (each time after the store's own retries).
STORAGE_BUDGET = 5
_STORAGE_DELAY = 1.0  # seconds before the first of those, doubled each time


def run_job(
    job_url: str,
    cluster: Cluster,
    *,
    on_status: Callable[[Document], None] | None = None,
    force: bool = False,
) -> Document:
    """Run a job, or go on with one that was interrupted, stopped or failed.

    Parameters
    ----------
    job_url : str
        The job directory.
    cluster : Cluster
        Where the splits run.
    on_status : callable, optional
        Called about once a second with the status document, from another thread.
    force : bool, default False
        Run although another coordinator seems to be alive; the output is right all the same, but work is done twice.

    Returns
    -------
    dict
        The final status document. A job that is complete already is left as it is.

    Raises
    ------
    InputError
        If the input cannot be planned or the output cannot be written; the status says ``failed while enqueuing``.
    JobRunningError
        If another coordinator runs the job.
    StorageError
        If the job directory or the output fails after all retries; the job can be resumed.
    """
    return Coordinator(JobDirectory(job_url), cluster, on_status).run(force=force)


def retry_failed(
    job_url: str,
    cluster: Cluster,
    *,
    on_status: Callable[[Document], None] | None = None,
    force: bool = False,
) -> Document:
    """Handle the batches in the dead letter again, exactly those, and add their rows to the output.

    Takes and returns what :func:`run_job` does.
    """
    return Coordinator(JobDirectory(job_url), cluster, on_status).run(force=force, retry=True)


class Coordinator:
    """One run of one job.

    Parameters
    ----------
    job : JobDirectory
        The job.
    cluster : Cluster
        Where the splits run.
    on_status : callable, optional
        Called about once a second with the status document.
    """

    def __init__(
        self, job: JobDirectory, cluster: Cluster, on_status: Callable[[Document], None] | None = None
    ) -> None:
        self._job = job
        self._cluster = cluster
        self._settings = job.settings()
        self._board = StatusBoard(self._settings)
        self._board.notice = cluster.notice
        self._pulse = Heartbeat(job, self._board, on_status)
        self._limits = Limits(job, self._settings.limits, self._pulse)
        self._ledger = Ledger(job.store)
        self._output = OutputDirectory(self._settings.output, self._settings.job_id) if self._settings.output else None
        self._delivery = make_delivery(job, self._settings)
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._window = Window()
        self._backups = Backups(self._window, self._settings.workers)
        self._lost: dict[int, int] = {}
        self._suspects: list[Split] = []
        self._alone = -1  # the last suspect that was sent
        self._storage_faults: dict[int, int] = {}
        self._retries: dict[int, Split] = {}
        self._counted = 0  # splits whose records have been added up

    # the story ------------------------------------------------------------------------------------------------------

    def run(self, *, force: bool = False, retry: bool = False) -> Document:
        """Run the job to its end and return the final status document."""
        previous: Document | None = self._job.read_json("status.json")
        other = running_elsewhere(previous, self._board.coordinator_id)
        if other and not force:
            raise JobRunningError(
                f"the job {self._settings.job_id} is being run by process {other['pid']} on {other['host']}: "
                "wait for it or stop it first"
            )
        if previous and previous["status"] in COMPLETE_STATUSES and not (retry and previous["failed_batches"]):
            if not previous.get("undelivered"):
                return previous
            retry = False
        if previous:
            self._board.start_time = _seconds(previous.get("start_time"))
        self._job.clear_stop()
        self._pulse.start()
        ended = False
        try:
            self._board.end(*self._outcome(retry))
        except Overtaken as error:
            self._leave(error.document)
        except InputError as error:
            self._board.end("worker error" if self._board.status == "running" else "failed while enqueuing", str(error))
            raise
        except KeyboardInterrupt:
            self._board.end("stopped", "interrupted")
            raise
        except CortexDaskError as error:
            resumable = "" if "can be resumed" in str(error) else " (the job can be resumed)"
            self._board.end("worker error", f"{error}{resumable}")
            raise
        except BaseException as error:
            self._board.end("worker error", f"the coordinator failed: {type(error).__name__}: {error}")
            raise
        else:
            ended = True
        finally:
            with contextlib.nullcontext() if ended else contextlib.suppress(OSError):
                self._pulse.stop()  # what failed before is what is raised, and not that the store fails again
        return self._pulse.overtaken or self._board.document()

    def _leave(self, document: Document) -> None:
        """Leave the job to the coordinator that has it now."""
        if document["status"] not in FINAL_STATUSES:
            who = document["coordinator"]
            raise JobRunningError(
                f"the job {self._settings.job_id} was taken over by process {who['pid']} on {who['host']}, as this "
                "process gave no sign of life; nothing is lost"
            )
        if self._output is not None and document["status"] in COMPLETE_STATUSES:
            self._output.clean()  # of the attempts that our own handlers were at

    def _outcome(self, retry: bool) -> tuple[str, str]:
        """Run the job; return its status and the reason for it."""
        try:
            return self._run(retry)
        except Ended as ended:
            return ended.status, ended.reason

    def _run(self, retry: bool) -> tuple[str, str]:
        ended: tuple[str, str] | None = None
        try:
            if self._delivery is not None:
                self._delivery.check()
            planned = self._job.plan_header()
            if planned is not None:
                self._reserve_again()
                self._cluster.prepare(self._job.url, self._settings)
            header = planned or self._enqueue()
            self._replay(header)
            if retry:
                added = plan_retries(self._job, header, self._tally, self._ledger, self._retries)
                self._retries.update(added)
                self._tally.add_retries(added)
            self._begin(header)
            self._cluster.start(self._job.url, self._settings, self._on_event, self._limits.check_end)
            self._process(header)
            ended = self._seal()
        finally:
            self._cluster.close()
            if self._delivery is not None:
                self._delivery.close()
            if ended is None and self._pulse.overtaken is None:
                self._release()
        if self._output is not None:
            # Only now that the handlers have ended: an attempt that lost against another coordinator's may have run
            # until here.
            self._output.clean()
        return ended

    def _reserve_again(self) -> None:
        """Mark the output as the job's if an earlier run, which committed nothing, has released it."""
        if self._output is not None and not self._output.is_reserved() and self._ledger.is_empty():
            self._job.write_json("plan/replaces.json", self._output.reserve())

    def _release(self) -> None:
        """Leave the output to others when nothing was committed, as after a mistake in the input or the handler.

        Whoever corrects the mistake submits a new job, with the same output.
        """
        with contextlib.suppress(OSError):  # the store may be what failed
            if self._output is not None and self._ledger.is_empty():
                self._output.release()

    def _enqueue(self) -> PlanHeader:
        """Check the output, plan the splits, and write the plan."""
        if self._output is not None:
            self._job.write_json("plan/replaces.json", self._output.reserve())
        self._cluster.prepare(self._job.url, self._settings)
        if self._settings.samples is not None:
            from cortex_dask.io.planning.samples import enqueue

            made = enqueue(self._job.store, self._settings, self._limits.check_stop)
            self._job.write_plan(made.header, made.splits)
        else:
            from cortex_dask.io.planning.plan import plan

            settings, writer = self._settings, self._job.plan_writer()
            made = plan(
                settings.dataset,
                workers=settings.workers,
                keep=settings.kept,
                sink=writer.add,
                check=self._limits.check_stop,
            )
            writer.finish(made.header)
        for warning in made.header.warnings:
            _log.warning(warning)
        return made.header

    def _replay(self, header: PlanHeader) -> None:
        """Add up what the ledger holds."""
        self._retries = read_retries(self._job)
        self._tally = JobTotals(header, self._retries)
        for record in self._ledger.refresh():
            self._tally.add(record)
        if self._ledger.count:
            self._count_completion()
        self._counted = self._ledger.count

    def _begin(self, header: PlanHeader) -> None:
        output = self._settings.output
        self._header = header
        self._limits.begin(self._tally)
        self._total_splits = header.splits + len(self._retries)
        planned = self._job.splits(self._ledger.__contains__)
        splits = itertools.chain(planned, self._retries.values())
        self._source = SplitQueue(splits, self._ledger.__contains__)
        schema = None if output is None else (self._job.schema() or self._declared_schema())
        self._election = SchemaElection(schema, needed=output is not None, is_done=self._ledger.__contains__)
        self._board.begin(self._tally, header.splits)
        self._pulse.soon()  # a handler that asks for its own job finds it running
        self._committer = Committer(
            self._job,
            self._ledger,
            self._output,
            on_commit=lambda record: self._inbox.put(lambda: self._committed(record)),
            on_error=lambda error: self._inbox.put(lambda: _throw(error)),
            delivery=self._delivery,
        )

    def _declared_schema(self) -> str | None:
        """Return the schema that the submission declares, or that the data has to which the job appends."""
        output = self._settings.output
        if output is None or self._output is None:
            return None
        schema = output.schema
        if schema is None and output.mode == "append":
            schema = (self._output.manifest() or {}).get("schema")
        return None if schema is None else self._job.settle_schema(schema)

    def _process(self, header: PlanHeader) -> None:
        """Keep the window full until every split is in the ledger."""
        try:
            while self._counted < self._total_splits:
                # A straggler needs a second slot, also where there are no more slots than splits that are left.
                left = max(self._total_splits - self._counted, len(self._window))
                self._cluster.scale(left + len(self._backups.waiting))
                self._fill_window()
                if not self._window:
                    self._committer.hurry()
                self._limits.check()
                self._wait()
            self._limits.check_failures()  # the last splits may have ended all at once
            self._await_losers()
        except BaseException as error:
            self._halt(error)
            raise
        finally:
            self._committer.close()
            self._drain()

    def _seal(self) -> tuple[str, str]:
        """Publish what is not yet published, list it, tell the handler, and say that it is complete."""
        failed = self._tally.failed_batches
        status = "completed with failures" if failed else "succeeded"
        total = self._tally.total_batches
        reason = f"{failed} of {total} batches failed for good" if failed else ""
        if failed > total:  # malformed lines count as well, and belong to no batch
            reason = f"{failed} batches or malformed lines failed for good"
        if self._output is not None:
            self._output.publish_missing(self._parts(), self._total_splits)
            replaced = self._job.read_json("plan/replaces.json") or []
            self._output.write_manifest(self._parts(), self._job.schema(), status, replaced)
        if self._delivery is not None:
            undelivered = self._delivery.finish()
            self._board.undelivered = self._delivery.undelivered
            reason = "; ".join(filter(None, (reason, undelivered)))
        if complete(self._job, self._cluster, self._limits, halt=self._tell_to_stop):
            self._count_completion()
        if self._output is not None and not failed:
            self._output.seal()
        return status, reason

    # sending --------------------------------------------------------------------------------------------------------

    def _fill_window(self) -> None:
        slots = max(self._cluster.slots(), 1)  # one waits where there is none, so that others see that there is work
        if not self._cluster.is_ready():
            return
        if self._suspects or self._alone in self._window:
            if not self._window:
                self._alone = self._suspects[0].number
                self._send([self._suspects.pop(0)])
            return
        window = slots + self._cluster.queue_depth()
        room = min(window, self._election.window(window)) - len(self._window)
        splits: list[Split] = []
        while len(splits) < room and (split := self._source.next(in_order=self._election.is_open)) is not None:
            splits.append(split)
        self._send(splits)
        self._window.advance(slots, time.monotonic())
        if len(splits) < room:
            self._send_backups(max(slots - len(self._window), 0))

    def _send(self, splits: Sequence[Split], *, elsewhere: bool = False) -> None:
        """Send splits; ``elsewhere``: each of them runs already, and is to run elsewhere as well."""
        sent = []
        now = time.monotonic()
        for split in splits:
            attempt = self._window.open(split, now)
            task = SplitTask(self._job.url, split, attempt.number, self._election.schema, self._tally.rows_limit)
            sent.append((task, partial(self._report_end, attempt)))
        if sent:
            self._cluster.submit(sent, elsewhere=elsewhere)

    def _report_end(self, attempt: Attempt, ended: Outcome | Exception) -> None:
        self._inbox.put(lambda: self._ended(attempt, ended))

    def _send_backups(self, free: int) -> None:
        """Start splits a second time that run far longer than their siblings, now that slots have nothing to do."""
        total = self._total_splits
        splits = self._backups.take(free, time.monotonic(), done=self._counted, total=total, lost=self._lost)
        for split in splits:
            _log.info("split %d takes far longer than others: it is started a second time", split.number)
        self._send(splits, elsewhere=True)

    # what comes in --------------------------------------------------------------------------------------------------

    def _wait(self) -> None:
        """Do what has come in; wait for something when nothing has."""
        delay = self._source.delay
        timeout = STOP_CHECK if delay is None else min(delay + 0.01, STOP_CHECK)
        with contextlib.suppress(queue.Empty):
            self._inbox.get(timeout=timeout)()
            while True:
                self._inbox.get_nowait()()

    def _drain(self) -> None:
        """Count what was committed at the very end of a job that is ending early."""
        while True:
            try:
                self._inbox.get_nowait()()
            except queue.Empty:
                return
            except (Ended, CortexDaskError):
                continue  # the job is ending already, for the first such reason

    def _on_event(self, event: dict[str, Any]) -> None:
        """Take an event of a running split, in whatever thread it arrives."""
        if event["type"] == "progress" and event["split"] in self._ledger:
            return  # of an attempt that came too late: its batches are counted
        self._board.event(event)
        if event["type"] == "schema":
            self._inbox.put(lambda: self._proposed(event["split"], event["schema"]))
        elif event["type"] == "no output":
            self._inbox.put(self._election.no_output)

    def _proposed(self, split: int, schema: str) -> None:
        self._election.propose(split, schema)
        self._elect()

    def _elect(self) -> None:
        """Settle the output schema when the first split that has output is known."""
        winner = self._election.winner()
        if winner is not None:
            self._election.settle(self._job.settle_schema(winner))

    def _ended(self, attempt: Attempt, ended: Outcome | Exception) -> None:
        """Decide what becomes of a split whose attempt has ended."""
        split = attempt.split
        settled = self._window.is_settled(split.number)
        done = isinstance(ended, Outcome) and ended.kind == "done"
        decided = not self._window.close(attempt, time.monotonic(), done=done)
        self._board.attempt_ended(split.number, attempt.number)
        if settled and not done:
            return  # it has lost, and it does not matter how it has ended
        if isinstance(ended, Exception):
            self._worker_lost(split, ended, decided=decided)
        elif ended.kind == "done" and ended.record is not None:
            self._commit(ended.record)  # also of one that has lost: what it staged is removed by the committer
        elif decided and ended.kind in ("needs schema", "storage", "stopped"):
            self._limits.expect_stop()  # another attempt at it is in flight
        elif ended.kind == "needs schema":
            self._election.propose(split.number, ended.schema)
            self._source.put_back(split)
        elif ended.kind == "storage":
            self._storage_failed(split, ended.message)
        elif ended.kind == "stopped":
            self._source.put_back(split, delay=STOP_CHECK)  # a stop that is ours is found by the limits' checks
            self._limits.expect_stop()
        else:
            raise Ended(ended.kind, ended.message)
        self._elect()

    def _commit(self, record: SplitRecord) -> None:
        self._window.settle(record.split)
        self._election.finished(record.split)
        self._committer.commit(record)

    def _committed(self, record: SplitRecord) -> None:
        """Count a record that has got into the ledger."""
        self._tally.add(record)
        self._counted += 1
        lost = self._window.is_settled(record.split)
        if self._window.settle(record.split):  # another attempt at it is in vain
            self._board.split_done(record.split)
            # Not where it was another coordinator that was faster: to end handlers for each of its splits would cost
            # more than to let them end theirs.
            if lost:
                self._cluster.cancel(record.split)

    def _await_losers(self) -> None:
        """Wait until the attempts have ended that came too late, so that no handler works when the job is sealed."""
        deadline = time.monotonic() + STOP_GRACE
        while self._window and time.monotonic() < deadline:
            with contextlib.suppress(queue.Empty):
                self._inbox.get(timeout=0.1)()

    def _worker_lost(self, split: Split, error: Exception, *, decided: bool) -> None:
        from cortex_dask.runtime.cluster import WorkerLost

        if not isinstance(error, WorkerLost):
            raise Ended("worker error", f"split {split.number} could not be run: {type(error).__name__}: {error}")
        lost = self._lost[split.number] = self._lost.get(split.number, 0) + error.workers
        if decided:
            return  # another attempt at it is in flight
        if lost < SUSPICIOUS:
            self._source.put_back(split)
        elif lost < WORKER_LOST_BUDGET:
            self._suspects.append(split)
        else:
            from cortex_dask.runtime.coordinator.lost_split import (
                abandon_split,  # brings the readers, which are not needed otherwise
            )

            message = f"its worker was lost {lost} times: {error}"
            self._commit(abandon_split(self._job, self._settings, self._header, split, message, attempts=lost))

    def _storage_failed(self, split: Split, message: str) -> None:
        self._backups.storage_failed(time.monotonic())
        faults = self._storage_faults[split.number] = self._storage_faults.get(split.number, 0) + 1
        if faults >= STORAGE_BUDGET:
            raise Ended(
                "worker error", f"{message} (split {split.number} was tried {faults} times; the job can be resumed)"
            )
        self._source.put_back(split, delay=_STORAGE_DELAY * 2 ** (faults - 1))

    # ending early ---------------------------------------------------------------------------------------------------

    def _halt(self, error: BaseException) -> None:
        """End the running splits, and keep what they had finished."""
        if isinstance(error, Overtaken):
            return  # a request to stop would hit the other coordinator's
        if self._window:
            self._tell_to_stop(error)
        deadline = time.monotonic() + STOP_GRACE
        while self._window and time.monotonic() < deadline:
            with contextlib.suppress(queue.Empty, Ended, CortexDaskError):
                self._inbox.get(timeout=0.1)()

    def _tell_to_stop(self, error: BaseException) -> None:
        status = error.status if isinstance(error, Ended) else "stopped"
        with contextlib.suppress(OSError):  # the store may be what failed; the cluster is told directly as well
            self._job.request_stop(status, str(error) or type(error).__name__)
        self._cluster.stop(str(error))

    # sealing --------------------------------------------------------------------------------------------------------

    def _parts(self) -> Iterator[Part]:
        return (record.part for record in self._ledger.records() if record.part is not None)

    def _count_completion(self) -> None:
        """Add what ``on_job_complete`` pushed to the metrics; it is in no record of the ledger."""
        self._tally.metrics.add((self._job.read_json("completed.json") or {}).get("metrics", ()))


def _seconds(text: str | None) -> float | None:
    from datetime import datetime

    return None if text is None else datetime.fromisoformat(text).timestamp()


def _throw(error: Exception) -> None:
    raise error
