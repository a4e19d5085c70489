"""Showing a job: a bar in a terminal, HTML in a notebook, plain lines elsewhere.

A display receives the status document about every second, and once more at the end. By default it writes to standard
error, as standard output is for results.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Protocol, TextIO

from cortex_dask.formatting import count, duration, moment, plural, rate
from cortex_dask.io.job.status import Progress

if TYPE_CHECKING:
    from rich.progress import Progress as Bars
    from rich.progress import TaskID

Status = Mapping[str, Any]

_SECONDS_BETWEEN_LINES = 10.0  # often enough to see that a job is alive, seldom enough for a log file
_SHARE_BETWEEN_LINES = 0.10
_RESUMABLE = ("worker error", "out of memory", "timed out", "stopped", "failed while enqueuing")


class Display(Protocol):
    """Shows a running job."""

    def update(self, status: Status) -> None:
        """Show this status document."""

    def finish(self, status: Status) -> None:
        """Show the last status document and release the terminal."""

    def close(self) -> None:
        """Release the terminal and show nothing more; may be called after :meth:`finish`."""


def choose(
    stream: TextIO | None = None,
    *,
    final: TextIO | None = None,
    progress: bool = True,
    environment: str | None = None,
) -> Display:
    """Return the display for a stream (standard error by default), with the summary at the end on another one if given.

    The commands in the summary name ``environment``, unless it is None, the default one.
    """
    stream = stream or sys.stderr
    if not progress:
        return SilentDisplay()
    if in_notebook():
        return NotebookDisplay(environment=environment)
    if stream.isatty():
        return TerminalDisplay(stream, final=final, environment=environment)
    return PlainDisplay(stream, final=final, environment=environment)


def in_notebook() -> bool:
    """Tell whether this process is a Jupyter kernel."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return type(shell).__name__ == "ZMQInteractiveShell"


class SilentDisplay:
    """Shows nothing."""

    def update(self, status: Status) -> None:
        """Do nothing."""

    def finish(self, status: Status) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""


class PlainDisplay:
    """Writes a line when the status changes, every tenth of the batches, and every ten seconds."""

    def __init__(
        self,
        stream: TextIO,
        *,
        final: TextIO | None = None,
        environment: str | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._stream = stream
        self._final = final or stream
        self._environment = environment
        self._clock = clock
        self._shown: tuple[str, float, float] | None = None  # status, share and time of the last line
        self._notice = ""

    def update(self, status: Status) -> None:
        """Write a line if one is due."""
        progress = Progress.from_status(status)
        if (notice := notice_of(status)) != self._notice:
            self._notice = notice
            if notice:
                self._stream.write(f"{time.strftime('%H:%M:%S')} {status.get('api_name', 'job')}: {notice}\n")
        share, now = progress.share or 0.0, self._clock()
        if self._shown is not None:
            word, last_share, last_time = self._shown
            soon = now - last_time < _SECONDS_BETWEEN_LINES and share - last_share < _SHARE_BETWEEN_LINES
            if word == progress.status and soon:
                return
        self._shown = (progress.status, share, now)
        if not progress.over:  # the end is in the summary
            self._stream.write(f"{time.strftime('%H:%M:%S')} {progress_line(status)}\n")
            self._stream.flush()

    def finish(self, status: Status) -> None:
        """Write the summary."""
        _write_summary(self._final, status, self._environment)

    def close(self) -> None:
        """Do nothing: each line is complete."""


class TerminalDisplay:
    """Draws a progress bar with rich."""

    def __init__(self, stream: TextIO, *, final: TextIO | None = None, environment: str | None = None) -> None:
        self._stream = stream
        self._final = final or stream
        self._environment = environment
        self._bars: Bars | None = None
        self._task: TaskID | None = None
        self._notice = ""

    def update(self, status: Status) -> None:
        """Update the bar."""
        progress = Progress.from_status(status)
        if progress.over:
            return
        bars, task = self._start_bar(status)
        if (notice := notice_of(status)) != self._notice:
            self._notice = notice
            if notice:
                bars.console.print(notice, markup=False, highlight=False, soft_wrap=True)
        total = progress.batches_total
        bars.update(
            task,
            completed=progress.batches_done,
            total=None if total is None else max(total, progress.batches_done, 1),
            words=_words(progress, beside_bar=True),
        )

    def finish(self, status: Status) -> None:
        """Remove the bar and write the summary in its place."""
        self.close()
        _write_summary(self._final, status, self._environment)

    def close(self) -> None:
        """Remove the bar."""
        if self._bars is not None:
            self._bars.stop()
            self._bars = None

    def _start_bar(self, status: Status) -> tuple[Bars, TaskID]:
        if self._bars is None or self._task is None:
            from rich.console import Console
            from rich.progress import BarColumn, SpinnerColumn, TextColumn
            from rich.progress import Progress as Bars

            # The columns show names and reasons of users, which are not rich's markup.
            self._bars = Bars(
                SpinnerColumn(),
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=24),
                TextColumn("{task.fields[words]}", markup=False),
                console=Console(file=self._stream),
                transient=True,
                redirect_stdout=False,
                redirect_stderr=False,
            )
            self._task = self._bars.add_task(str(status.get("api_name", "")), total=None, words="")
            self._bars.start()
        return self._bars, self._task


class NotebookDisplay:
    """Shows the HTML summary in the cell's output and keeps it up to date."""

    def __init__(self, *, environment: str | None = None) -> None:
        self._environment = environment
        self._handle: Any = None

    def update(self, status: Status) -> None:
        """Replace the shown document by this one."""
        from IPython.display import HTML, display

        html = HTML(status_html(status))
        if self._handle is None:
            self._handle = display(html, display_id=True)
        else:
            self._handle.update(html)

    def finish(self, status: Status) -> None:
        """Show the last document."""
        self.update(status)

    def close(self) -> None:
        """Do nothing: the last document remains."""


def notice_of(status: Status) -> str:
    """Return what delays a running job, e.g. that no node has room for its workers."""
    over = status.get("abandoned") or Progress.from_status(status).over
    return "" if over else str(status.get("status_reason") or "")


def progress_line(status: Status) -> str:
    """Return one line about a running job, e.g. ``"digits: running, 12 of 40 batches (30 %), 5,210 rows/s, …"``."""
    words = _words(Progress.from_status(status)) + (", no process runs it" if status.get("abandoned") else "")
    return f"{status.get('api_name', 'job')}: {words}"


def _words(progress: Progress, *, beside_bar: bool = False) -> str:
    """Return what is known, in order of importance; without the share beside a bar, which shows it."""
    words = [] if beside_bar and progress.status == "running" else [progress.status]
    if progress.status != "enqueuing":
        share = "" if progress.share is None or beside_bar else f" ({progress.share:.0%})".replace("%", " %")
        words.append(progress.batches_words() + share)
        if progress.rows_per_second:
            words.append(rate(progress.rows_per_second))
        if progress.failed_batches:
            words.append(f"{count(progress.failed_batches)} failed")
        if progress.eta is not None and not progress.over:
            words.append(f"{duration(progress.eta)} left")
        if progress.workers and not progress.over:
            words.append(plural(progress.workers, "worker"))
    return ", ".join(words)


def summary(status: Status, *, environment: str | None = None) -> str:
    """Return the facts about a job as lines, with the commands that come next."""
    rows = [
        ("job", f"{status.get('api_name')} {status.get('job_id')}"),
        ("status", str(status.get("status"))),
        *_facts(status),
        *next_commands(status, environment=environment),
    ]
    return "\n".join(f"{name:<9}{value}" for name, value in rows)


def _write_summary(stream: TextIO, status: Status, environment: str | None) -> None:
    stream.write(summary(status, environment=environment) + "\n")
    stream.flush()


def next_commands(status: Status, *, environment: str | None = None) -> list[tuple[str, str]]:
    """Return the commands that are useful for a job in this state, each with a word for what it does."""
    flag = f" -e {environment}" if environment else ""
    job = f"{status.get('api_name')} {status.get('job_id')}"
    commands = [("logs", f"cortex-dask logs{flag} {job}")]
    if status.get("status") == "completed with failures":
        commands.append(("retry", f"cortex-dask retry{flag} {job} --failed"))
    elif status.get("abandoned") or status.get("status") in _RESUMABLE:
        commands.append(("resume", f"cortex-dask resume{flag} {job}"))
    return commands


def _facts(status: Status) -> list[tuple[str, str]]:
    progress = Progress.from_status(status)
    facts = []
    if status.get("status_reason"):
        facts.append(("reason", str(status["status_reason"])))
    failed = f", {count(progress.failed_batches)} failed" if progress.failed_batches else ""
    facts.append(("batches", progress.batches_words().removesuffix(" batches") + failed))
    facts.append(("rows", f"{count(progress.rows_in)} in, {count(progress.rows_out)} out"))
    if progress.seconds is not None:
        facts.append(("took", f"{duration(progress.seconds)}, {rate(progress.rows_per_second)}"))
    if status.get("output"):
        facts.append(("output", str(status["output"])))
    return facts


def status_html(status: Status) -> str:
    """Return a status document as a compact piece of HTML that loads nothing."""
    from importlib.resources import files

    import jinja2

    progress = Progress.from_status(status)
    facts = [(name, value) for name, value in _facts(status) if name != "reason"]
    if not progress.over:
        facts += [("workers", str(progress.workers)), ("left", duration(progress.eta))]
    facts.append(("started", moment(status.get("start_time"))))
    template = jinja2.Environment(autoescape=True).from_string(
        files("cortex_dask").joinpath("job.html.j2").read_text(encoding="utf-8")
    )
    return template.render(
        api_name=status.get("api_name"),
        job_id=status.get("job_id"),
        status=progress.status,
        reason=status.get("status_reason"),
        percent=None if progress.share is None else round(100 * progress.share),
        rows=facts,
    )
