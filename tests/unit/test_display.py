"""Displays, and the words in them."""

import io

import pytest

from cortex_dask import display
from cortex_dask.display import PlainDisplay, SilentDisplay, TerminalDisplay, choose


def document(status="running", done=0, total=40, **changes):
    return {
        "job_id": "job-1",
        "api_name": "digits",
        "status": status,
        "status_reason": "",
        "total_batch_count": total,
        "total_batch_count_exact": True,
        "batches_done": done,
        "failed_batches": 0,
        "batch_metrics": {"succeeded": done, "failed": 0, "avg_time_per_batch": 0.1},
        "worker_counts": {"running": 4},
        "rows_in": done * 1024,
        "rows_out": done * 1024,
        "rows_per_second": 5210.0,
        "eta": 12.0,
        "output": "/data/out",
        "start_time": "2026-01-31T12:00:00.000+00:00",
        "end_time": None,
        **changes,
    }


class Terminal(io.StringIO):
    def isatty(self):
        return True


class TestPlainDisplay:
    def test_it_writes_when_the_status_changes_every_tenth_and_every_ten_seconds(self):
        now = 0.0
        stream = io.StringIO()
        shown = PlainDisplay(stream, clock=lambda: now)
        steps = [(0, 0), (1, 0), (2, 3), (3, 4), (4, 5), (15, 5), (16, 6)]

        written = []
        for now, done in steps:  # noqa: B007 - the clock reads it
            before = len(stream.getvalue())
            shown.update(document(done=done))
            written.append(len(stream.getvalue()) > before)

        assert written == [True, False, False, True, False, True, False]

    def test_a_line_says_how_far_the_job_is(self):
        stream = io.StringIO()

        PlainDisplay(stream).update(document(done=12, failed_batches=1))

        line = stream.getvalue()
        assert "digits: running, 12 of 40 batches (30 %), 5,210 rows/s, 1 failed, 12 s left, 4 workers\n" in line

    def test_the_summary_goes_where_it_is_wanted(self):
        progress_stream, final = io.StringIO(), io.StringIO()
        shown = PlainDisplay(progress_stream, final=final)

        shown.update(document("succeeded", done=40))
        shown.finish(document("succeeded", done=40, end_time="2026-01-31T12:00:08.000+00:00"))

        assert progress_stream.getvalue() == ""
        assert "40,960 in, 40,960 out" in final.getvalue()


class TestSummary:
    def test_a_success_names_output_time_and_logs(self):
        text = display.summary(document("succeeded", done=40, end_time="2026-01-31T12:00:08.000+00:00"))

        assert text.splitlines() == [
            "job      digits job-1",
            "status   succeeded",
            "batches  40 of 40",
            "rows     40,960 in, 40,960 out",
            "took     8.0 s, 5,210 rows/s",
            "output   /data/out",
            "logs     cortex-dask logs digits job-1",
        ]

    @pytest.mark.parametrize(
        ("status", "command"),
        [
            ("completed with failures", "cortex-dask retry -e prod digits job-1 --failed"),
            ("stopped", "cortex-dask resume -e prod digits job-1"),
            ("worker error", "cortex-dask resume -e prod digits job-1"),
        ],
    )
    def test_what_comes_next_is_a_command_for_the_environment(self, status, command):
        assert command in display.summary(document(status), environment="prod")


class TestTerminalDisplay:
    def test_the_bar_goes_and_the_summary_stays(self):
        stream = Terminal()
        shown = TerminalDisplay(stream)

        shown.update(document("enqueuing", total=None))
        shown.update(document(done=12, api_name="[red]digits[/red]"))
        shown.finish(document("succeeded", done=40))

        assert stream.getvalue().endswith(display.summary(document("succeeded", done=40)) + "\n")

    def test_closing_twice_does_no_harm(self):
        shown = TerminalDisplay(Terminal())
        shown.update(document(done=1))

        shown.close()
        shown.close()


class TestChoice:
    def test_a_terminal_gets_a_bar_and_a_file_gets_lines(self):
        assert isinstance(choose(Terminal()), TerminalDisplay)
        assert isinstance(choose(io.StringIO()), PlainDisplay)
        assert isinstance(choose(Terminal(), progress=False), SilentDisplay)


class TestHtml:
    def test_it_escapes_what_users_named(self):
        html = display.status_html(document("worker error", status_reason="<script>alert(1)</script>"))

        assert "<script>" not in html
        assert "&lt;script&gt;" in html

    def test_it_loads_nothing_and_fixes_no_background(self):
        html = display.status_html(document(done=10))

        assert "http" not in html
        assert "url(" not in html
        assert "color: inherit" in html
        assert 'aria-valuenow="25"' in html
