"""What a handler process has imported by the end of a job: this is start-up time of every worker."""

from __future__ import annotations

from pathlib import Path

import dask.config
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import cortex_dask as cx

NEVER = ("dask", "distributed", "pydantic", "click", "rich", "s3fs", "jinja2", "IPython")


class Handler:
    def __init__(self, config):
        self.config = config

    def handle_batch(self, payload):
        return payload

    def on_job_complete(self):
        import sys

        found = [name for name in self.config["names"] if name in sys.modules]
        Path(self.config["report"]).write_text(" ".join(found))


@pytest.mark.parametrize(
    ("batch_format", "absent"),
    [
        ("pandas", (*NEVER, "polars")),
        ("numpy", (*NEVER, "polars", "pandas", "pyarrow.compute")),
        ("pyarrow", (*NEVER, "polars", "pandas", "pyarrow.compute")),
        ("records", (*NEVER, "polars", "pandas", "pyarrow.compute")),
    ],
)
def test_handler_process_imports_only_what_its_format_needs(
    tmp_path: Path, batch_format: str, absent: tuple[str, ...]
) -> None:
    (tmp_path / "in").mkdir()
    pq.write_table(pa.table({"a": range(4)}), tmp_path / "in" / "a.parquet")
    report = tmp_path / "report"
    with dask.config.set({"cortex-dask.store": str(tmp_path / "store")}):
        job = cx.run(
            Handler,
            tmp_path / "in",
            tmp_path / "out",
            batch_size=2,
            batch_format=batch_format,
            config={"names": list(absent), "report": str(report)},
            progress=False,
        )
    assert job.to_arrow().num_rows == 4
    assert report.read_text() == ""
