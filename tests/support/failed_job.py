"""A job directory whose ledger holds failures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import orjson

from cortex_dask.io.job.directory import JobDirectory
from cortex_dask.io.job.ledger import Ledger
from cortex_dask.io.job.records import BatchFailure, SplitRecord
from cortex_dask.io.job.settings import DeadLetterSettings, HandlerSettings, JobSettings
from cortex_dask.io.job.splits import DatasetInput
from cortex_dask.runtime.dead_letters.delivery import Delivery, make_delivery


def make_failure(number: int = 0, payload: Any = ({"x": 1},), **changes: Any) -> dict[str, Any]:
    """Make a line of a failures file."""
    values = {
        "batch_id": f"00000000-0000-5000-8000-{number:012d}",
        "split": 0,
        "batch": number,
        "position": [["in/0.parquet", "rows", number * 10, number * 10 + 10]],
        "rows": 10,
        "attempts": 3,
        "cause": "exception",
        "error": "ValueError: no",
        "traceback": "Traceback …",
        "payload": payload,
    }
    return {**values, **changes}


class FailedJob:
    """A job directory whose ledger has failures."""

    def __init__(self, folder: Path, dead_letters: DeadLetterSettings | None = None) -> None:
        self.directory = JobDirectory(str(folder / "job"))
        self.settings = JobSettings(
            job_id="job-1",
            api_name="digits",
            api_id="digits-1",
            created_time="2026-01-01T00:00:00Z",
            handler=HandlerSettings("class"),
            dead_letters=dead_letters,
            dataset=DatasetInput(("in",)),
        )
        self.directory.create(self.settings)

    def fail(self, split: int, numbers: range, payload: Any = ({"x": 1},)) -> SplitRecord:
        """Put a split with failed batches into the ledger."""
        lines = [make_failure(number, payload, split=split) for number in numbers]
        file = f"failures/{split:06d}-a.jsonl"
        self.directory.store.write(file, b"".join(orjson.dumps(item) + b"\n" for item in lines))
        failures = tuple(
            BatchFailure(item["batch"], item["batch_id"], 10, 3, "exception", "ValueError: no") for item in lines
        )
        record = SplitRecord(split, "a", None, len(lines), 0, failures, file)
        ledger = Ledger(self.directory.store)
        list(ledger.refresh())
        ledger.append([record])
        return record

    def delivery(self) -> Delivery:
        """Make a delivery as the job's settings ask for it."""
        made = make_delivery(self.directory, self.settings)
        assert made is not None
        return made
