"""What the final status of a job means to those who wait for it: a warning about failed batches, or an error."""

from __future__ import annotations

from typing import Any

from cortex_dask.display import next_commands
from cortex_dask.errors import JobFailedError, JobStoppedError, JobTimedOutError

__all__ = ["error_of", "warning_of"]


def warning_of(document: dict[str, Any], environment: str | None) -> str:
    """Return the warning about the failed batches of a job that completed with failures."""
    commands = dict(next_commands(document, environment=environment))
    whose = "its" if document["failed_batches"] == 1 else "their"
    return (
        f"the job {document['job_id']} completed, but {_batches(document['failed_batches'])} failed for good and "
        f"{whose} rows are not in the output. Look at them with job.failures() or {commands['logs']} --level error; "
        f"handle them again with job.retry_failed() or {commands['retry']}"
    )


def error_of(document: dict[str, Any], environment: str | None) -> JobFailedError:
    """Return the error that a job without a complete result ends in."""
    commands = dict(next_commands(document, environment=environment))
    status = str(document["status"])
    reason = str(document.get("status_reason") or "").strip().rstrip(".")
    message = (
        f"the job {document['job_id']} ended with the status {document['status']!r}{f': {reason}' if reason else ''}"
    )
    if "resume" in commands:
        message += f". See its log with: {commands['logs']}. Go on with: {commands['resume']}"
    kind = {"stopped": JobStoppedError, "timed out": JobTimedOutError}.get(status, JobFailedError)
    return kind(message, status=status)


def _batches(number: int) -> str:
    return "1 batch" if number == 1 else f"{number} batches"
