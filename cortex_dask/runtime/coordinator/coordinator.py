"""The coordinator: it plans a job, keeps splits in flight, commits what comes back, and seals the output.

All that it knows lies in the job directory, so that it can be killed at any moment and started again, anywhere, to
continue where the ledger ends. The story of a job is :meth:`Coordinator.run`; what a worker does with a split is in
:mod:`cortex_dask.runtime.worker.supervisor`.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial

from cortex_dask.errors import CortexDaskError, InputError, JobRunningError
from cortex_dask.io.job.directory import JobDirectory
from cortex_dask.io.job.ledger import Ledger
from cortex_dask.io.job.records import (
    NoOutput,
    Outcome,
    Part,
    SchemaProposed,
    SplitEvent,
    SplitProgress,
    SplitRecord,
    SplitTask,
)
from cortex_dask.io.job.splits import PlanHeader, Split
from cortex_dask.io.job.status import COMPLETE_STATUSES, FINAL_STATUSES
from cortex_dask.io.output.directory import OutputDirectory
from cortex_dask.runtime.cluster import Cluster, WorkerLost
from cortex_dask.runtime.coordinator.committer import Committer
from cortex_dask.runtime.coordinator.completion import complete
from cortex_dask.runtime.coordinator.heartbeat import Heartbeat, running_elsewhere
from cortex_dask.runtime.coordinator.limits import STOP_CHECK, STOP_GRACE, Ended, Limits, Overtaken
from cortex_dask.runtime.coordinator.lost_split import LostSplits
from cortex_dask.runtime.coordinator.retries import plan_retries, read_retries
from cortex_dask.runtime.coordinator.schema_election import SchemaElection
from cortex_dask.runtime.coordinator.split_queue import SplitQueue
from cortex_dask.runtime.coordinator.status_board import Document, Listener, StatusBoard
from cortex_dask.runtime.coordinator.totals import JobTotals
from cortex_dask.runtime.coordinator.window import Attempt, Backups, Window
from cortex_dask.runtime.dead_letters.delivery import make_delivery

_log = logging.getLogger(__name__)  # of the process that runs the coordinator; the job's own log is the handlers'


def run_job(job_url: str, cluster: Cluster, *, on_status: Listener | None = None, force: bool = False) -> Document:
    """Run a job, or continue one that was interrupted, stopped or failed; return the final status document.

    A complete job is left as it is. ``on_status`` is called about once a second with the status document, from another
    thread. With ``force`` it runs although another coordinator seems to be alive: the output is right, but work is done
    twice.

    Raises :class:`InputError` if the input cannot be planned or the output cannot be written, :class:`JobRunningError`
    if another coordinator runs the job, and :class:`StorageError` if a store fails after all retries.
    """
    return Coordinator(JobDirectory(job_url), cluster, on_status).run(force=force)


def retry_failed(job_url: str, cluster: Cluster, *, on_status: Listener | None = None, force: bool = False) -> Document:
    """Handle exactly the failed batches again, and add their rows to the output; otherwise as :func:`run_job`."""
    return Coordinator(JobDirectory(job_url), cluster, on_status).run(force=force, retry=True)


class Coordinator:
    """One run of one job."""

    def __init__(self, job: JobDirectory, cluster: Cluster, on_status: Listener | None = None) -> None:
        self._job = job
        self._cluster = cluster
        settings = self._settings = job.settings()
        self._totals = JobTotals()
        self._board = StatusBoard(settings, self._totals, cluster.notice)
        self._heartbeat = Heartbeat(job, self._board, on_status)
        self._limits = Limits(job, settings.limits, self._heartbeat, self._totals)
        self._ledger = Ledger(job.store)
        self._output = OutputDirectory(settings.output, settings.job_id) if settings.output else None
        self._delivery = make_delivery(job, settings)
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()  # what other threads report
        self._retries: dict[int, Split] = {}  # the splits that repeat failed batches
        self._queue = SplitQueue(self._splits(), self._ledger.__contains__)
        self._election = SchemaElection(needed=self._output is not None, is_done=self._ledger.__contains__)
        self._committer = Committer(job, self._ledger, self._output, self._delivery, self._report_commit)
        self._window = Window()
        self._backups = Backups(self._window, settings.workers)
        self._lost = LostSplits(job, self._queue)
        self._last_suspect = -1  # the number of the last split that was sent to run alone

    # the story ------------------------------------------------------------------------------------------------------

    def run(self, *, force: bool = False, retry: bool = False) -> Document:
        """Run the job to its end and return the final status document."""
        previous: Document | None = self._job.read_json("status.json")
        other = running_elsewhere(previous, self._board.coordinator_id)
        if other and not force:
            runner = f"process {other['pid']} on {other['host']}"
            raise JobRunningError(
                f"the job {self._settings.job_id} is being run by {runner}: wait for it or stop it first",
                host=other["host"],
                pid=other["pid"],
            )
        if previous and previous["status"] in COMPLETE_STATUSES and not (retry and previous["failed_batches"]):
            if not previous.get("undelivered"):
                return previous
            retry = False
        self._board.resume(previous)
        self._job.clear_stop()
        with self._heartbeat, self._final_status():
            with self._closing():
                header = self._plan()
                self._replay(header, retry=retry)
                self._start_running()
                self._cluster.start(self._job.url, self._settings, self._on_event, self._limits.check_end)
                self._process()
                status, reason = self._seal()
            if self._output is not None:
                self._output.clean()  # not before the handlers have ended: late attempts may have run until here
            self._board.end(status, reason)
        return self._heartbeat.overtaken or self._board.document()

    @contextlib.contextmanager
    def _final_status(self) -> Iterator[None]:
        """Set the final status of a job that ends early."""
        try:
            yield
        except Ended as ended:
            self._board.end(ended.status, ended.reason)
        except Overtaken as error:
            self._leave_to_other(error.document)
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

    def _leave_to_other(self, document: Document) -> None:
        """Leave the job to the coordinator that has it now."""
        if document["status"] not in FINAL_STATUSES:
            other = document["coordinator"]
            raise JobRunningError(
                f"the job {self._settings.job_id} was taken over by process {other['pid']} on {other['host']}, as this "
                "process gave no sign of life; nothing is lost",
                host=other["host"],
                pid=other["pid"],
            )
        if self._output is not None and document["status"] in COMPLETE_STATUSES:
            self._output.clean()  # of the attempts that our own handlers ran

    @contextlib.contextmanager
    def _closing(self) -> Iterator[None]:
        """Close the cluster, then the delivery; release the output if the job ends early with nothing committed.

        Who corrects a mistake in the input or the handler submits a new job, with the same output.
        """
        try:
            with contextlib.ExitStack() as stack:
                if self._delivery is not None:
                    stack.callback(self._delivery.close)
                stack.callback(self._cluster.close)
                yield
        except BaseException:
            if self._heartbeat.overtaken is None:
                with contextlib.suppress(OSError):  # the store may be what failed
                    if self._output is not None and self._ledger.is_empty():
                        self._output.release()
            raise

    # planning -------------------------------------------------------------------------------------------------------

    def _plan(self) -> PlanHeader:
        """Plan the splits, unless an earlier run has, while the cluster comes up."""
        if self._delivery is not None:
            self._delivery.check()
        header = self._job.plan_header()
        # An earlier run that committed nothing has released the output.
        output = self._output
        if output is not None and (header is None or (not output.is_reserved() and self._ledger.is_empty())):
            self._job.write_json("plan/replaces.json", output.reserve())
        self._cluster.prepare(self._job.url, self._settings)
        if header is None:
            header = self._make_plan()
            for warning in header.warnings:
                _log.warning(warning)
        return header

    def _make_plan(self) -> PlanHeader:
        """Plan the splits and write the plan."""
        settings = self._settings
        if settings.samples is not None:
            from cortex_dask.io.planning.samples import enqueue  # pyarrow's readers, for new jobs only

            made = enqueue(self._job.store, settings, self._limits.check_stop)
            self._job.write_plan(made.header, made.splits)
            return made.header
        from cortex_dask.io.planning.plan import plan  # pyarrow's readers, for new jobs only

        writer, check = self._job.plan_writer(), self._limits.check_stop
        made = plan(settings.dataset, workers=settings.workers, keep=settings.kept, sink=writer.add, check=check)
        writer.finish(made.header)
        return made.header

    def _replay(self, header: PlanHeader, *, retry: bool) -> None:
        """Add up what the ledger holds, and plan splits that repeat the failed batches if they are to be retried."""
        self._retries.update(read_retries(self._job))
        self._totals.set_plan(header, self._retries)
        for record in self._ledger.refresh():
            self._totals.add(record)
        if self._ledger.count:
            self._count_completion()
        if retry:
            added = plan_retries(self._job, header, self._totals, self._ledger, self._retries)
            self._retries.update(added)
            self._totals.add_retries(added)

    def _start_running(self) -> None:
        """Start the clock, and find the output's schema if it is known before any row."""
        self._limits.start_clock()
        schema = None if self._output is None else (self._job.schema() or self._declared_schema())
        if schema is not None:
            self._election.decide(schema)
        self._board.start_running()
        self._heartbeat.beat_soon()  # a handler that asks for its own job finds it running

    def _declared_schema(self) -> str | None:
        """Return the schema that the submission declares, or that the data has to which the job appends."""
        settings = self._settings.output
        if settings is None or self._output is None:
            return None
        schema = settings.schema
        if schema is None and settings.mode == "append":
            schema = (self._output.manifest() or {}).get("schema")
        return None if schema is None else self._job.settle_schema(schema)

    # sending --------------------------------------------------------------------------------------------------------

    def _process(self) -> None:
        """Keep the window full until every split is in the ledger."""
        self._committer.start()
        try:
            while self._totals.splits_left > 0:
                # A straggler needs a second slot, also where there are no more slots than splits that are left.
                left = max(self._totals.splits_left, len(self._window))
                self._cluster.scale(left + len(self._backups.waiting))
                self._fill_window()
                if not self._window:
                    self._committer.flush()
                self._limits.check()
                self._wait()
            self._limits.check_failures()  # the last splits may have ended all at once
            self._await_window()  # late attempts, so that no handler works when the job is sealed
        except BaseException as error:
            self._halt(error)
            raise
        finally:
            self._committer.close()
            self._drain()

    def _splits(self) -> Iterator[Split]:
        """Yield all splits of the job that are not in the ledger, as the queue needs them."""
        yield from self._job.splits(self._ledger.__contains__)
        yield from self._retries.values()

    def _fill_window(self) -> None:
        """Send as many splits as there is room for, and those again that take far too long."""
        slots = max(self._cluster.slots(), 1)  # without slots one split waits, so that the cluster sees the need
        if not self._cluster.is_ready():
            return
        if self._lost.suspects or self._last_suspect in self._window:
            if not self._window:
                suspect = self._lost.suspects.pop(0)
                self._last_suspect = suspect.number
                self._send([suspect])
            return
        size = slots + self._cluster.queue_depth()
        room = min(size, self._election.limit_window(size)) - len(self._window)
        splits: list[Split] = []
        while len(splits) < room and (split := self._queue.next(in_order=self._election.is_open)) is not None:
            splits.append(split)
        self._send(splits)
        self._window.assign_slots(slots, time.monotonic())
        if len(splits) < room:
            self._send_backups(max(slots - len(self._window), 0))

    def _send(self, splits: Sequence[Split], *, elsewhere: bool = False) -> None:
        """Send splits; ``elsewhere``: they run already, and are to run on other workers too."""
        now = time.monotonic()
        tasks = []
        for split in splits:
            attempt = self._window.add(split, now)
            task = SplitTask(self._job.url, split, attempt.number, self._election.schema, self._totals.rows_limit)
            tasks.append((task, partial(self._report_end, attempt)))
        if tasks:
            self._cluster.submit(tasks, elsewhere=elsewhere)

    def _send_backups(self, free: int) -> None:
        """Start splits a second time that run far longer than their siblings, in slots that have nothing to do."""
        done, total = self._totals.records, self._totals.total_splits
        splits = self._backups.due(free, time.monotonic(), done=done, total=total, lost=self._lost.workers)
        for split in splits:
            _log.info("split %d takes far longer than others: it is started a second time", split.number)
        self._send(splits, elsewhere=True)

    # what other threads report --------------------------------------------------------------------------------------

    def _on_event(self, event: SplitEvent) -> None:
        """Record an event of a running split."""
        match event:
            case SplitProgress(split) if split in self._ledger:
                return  # of an attempt that came too late: its batches are counted
            case SchemaProposed(split, schema):
                self._inbox.put(lambda: self._propose(split, schema))
            case NoOutput():
                self._inbox.put(self._election.report_no_output)
        self._board.add_event(event)

    def _report_end(self, attempt: Attempt, result: Outcome | Exception) -> None:
        self._inbox.put(partial(self._on_end, attempt, result))

    def _report_commit(self, result: SplitRecord | Exception) -> None:
        self._inbox.put(partial(self._on_commit, result))

    def _wait(self) -> None:
        """Process what was reported; wait for something when nothing was."""
        delay = self._queue.delay
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

    # what becomes of a split ----------------------------------------------------------------------------------------

    def _on_end(self, attempt: Attempt, result: Outcome | Exception) -> None:
        """Decide what becomes of a split whose attempt has ended."""
        split = attempt.split
        is_late = self._window.is_done(split.number)
        done = isinstance(result, Outcome) and result.kind == "done"
        has_other = not self._window.remove(attempt, time.monotonic(), done=done)
        self._board.remove_attempt(split.number, attempt.number)
        if is_late and not done:
            return  # another attempt has succeeded
        if isinstance(result, WorkerLost):
            record = self._lost.worker_vanished(split, result, has_other=has_other)
            if record is not None:
                self._commit(record)
        elif isinstance(result, Exception):
            raise Ended("worker error", f"split {split.number} could not be run: {type(result).__name__}: {result}")
        elif result.kind == "done" and result.record is not None:
            self._commit(result.record)  # also of a late one: the committer removes what it staged
        elif has_other and result.kind in ("needs schema", "storage", "stopped"):
            self._limits.expect_stop()  # another attempt is in flight
        elif result.kind == "needs schema":
            self._election.propose(split.number, result.schema)
            self._queue.put_back(split)
        elif result.kind == "storage":
            self._backups.pause(time.monotonic())
            self._lost.storage_failed(split, result.message)
        elif result.kind == "stopped":
            self._queue.put_back(split, delay=STOP_CHECK)  # if the job is to stop, the limits end it before
            self._limits.expect_stop()
        else:
            raise Ended(result.kind, result.message)
        self._elect()

    def _commit(self, record: SplitRecord) -> None:
        self._window.mark_done(record.split)
        self._election.finish(record.split)
        self._committer.commit(record)

    def _on_commit(self, result: SplitRecord | Exception) -> None:
        """Count a record that has got into the ledger."""
        if isinstance(result, Exception):
            raise result
        self._totals.add(result)
        was_ours = self._window.is_done(result.split)
        if self._window.mark_done(result.split):  # another attempt at it is in vain
            self._board.remove_split(result.split)
            # Not where another coordinator was faster: to end handlers for each of its splits would cost more than to
            # let them finish.
            if was_ours:
                self._cluster.cancel(result.split)

    def _propose(self, split: int, schema: str) -> None:
        self._election.propose(split, schema)
        self._elect()

    def _elect(self) -> None:
        """Decide the output schema when the first split that has output is known."""
        winner = self._election.winner()
        if winner is not None:
            self._election.decide(self._job.settle_schema(winner))

    # ending early ---------------------------------------------------------------------------------------------------

    def _halt(self, error: BaseException) -> None:
        """End the running splits, and keep what they had finished."""
        if isinstance(error, Overtaken):
            return  # a request to stop would hit the other coordinator's
        if self._window:
            self._request_stop(error)
        self._await_window(Ended, CortexDaskError)  # the job ends for the first reason

    def _await_window(self, *ignored: type[Exception]) -> None:
        """Wait a moment until all attempts in flight have ended."""
        deadline = time.monotonic() + STOP_GRACE
        while self._window and time.monotonic() < deadline:
            with contextlib.suppress(queue.Empty, *ignored):
                self._inbox.get(timeout=0.1)()

    def _request_stop(self, error: BaseException) -> None:
        """Have all workers stop the job's splits."""
        status = error.status if isinstance(error, Ended) else "stopped"
        with contextlib.suppress(OSError):  # the store may be what failed; the cluster is told directly as well
            self._job.request_stop(status, str(error) or type(error).__name__)
        self._cluster.stop(str(error))

    # sealing --------------------------------------------------------------------------------------------------------

    def _seal(self) -> tuple[str, str]:
        """Publish and list the output, call ``on_job_complete``, seal, and return the final status and its reason."""
        failed, total = self._totals.failed_batches, self._totals.total_batches
        status = "completed with failures" if failed else "succeeded"
        reason = f"{failed} of {total} batches failed for good" if failed else ""
        if failed > total:  # malformed lines count as well, and belong to no batch
            reason = f"{failed} batches or malformed lines failed for good"
        if self._output is not None:
            self._output.publish_missing(self._parts(), self._totals.total_splits)
            replaced = self._job.read_json("plan/replaces.json") or []
            self._output.write_manifest(self._parts(), self._job.schema(), status, replaced)
        if self._delivery is not None:
            undelivered = self._delivery.finish()
            self._board.set_undelivered(self._delivery.undelivered)
            reason = "; ".join(filter(None, (reason, undelivered)))
        if complete(self._job, self._cluster, self._limits, stop=self._request_stop):
            self._count_completion()
        if self._output is not None and not failed:
            self._output.seal()
        return status, reason

    def _parts(self) -> Iterator[Part]:
        return (record.part for record in self._ledger.records() if record.part is not None)

    def _count_completion(self) -> None:
        """Add what ``on_job_complete`` pushed to the metrics; it is in no record of the ledger."""
        self._totals.metrics.add((self._job.read_json("completed.json") or {}).get("metrics", ()))
