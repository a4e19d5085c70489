"""What commands print."""

import re

import click

from cortex_dask.cli.output import job_table


def test_the_table_has_a_line_for_each_job():
    document = {
        "api_name": "digits",
        "job_id": "job-1",
        "status": "completed with failures",
        "total_batch_count": 40,
        "batches_done": 40,
        "failed_batches": 2,
        "rows_in": 40960,
        "start_time": "2026-01-31T12:00:00+00:00",
        "end_time": "2026-01-31T12:01:05+00:00",
    }

    heading, line = click.unstyle(job_table([document])).splitlines()

    assert heading.split() == ["API", "JOB", "STATUS", "BATCHES", "FAILED", "ROWS", "STARTED", "TOOK"]
    assert re.split(r" {2,}", line)[:6] == ["digits", "job-1", "completed with failures", "40 of 40", "2", "40,960"]
    assert line.endswith("1 min 5 s")
