"""A job that fills a small disk; run in a mount name space of its own, where it may mount one.

It ends with exit code 77 where mounting is not allowed.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from cortex_dask.runtime.coordinator import lost_split
from tests.faults.checks import committed_only, exactly_once
from tests.faults.jobs import make_job

NOT_ALLOWED = 77


def main(folder: Path) -> None:
    disk = folder / "disk"
    disk.mkdir()
    # six pages: some parts fit, not all
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24k", "tmpfs", str(disk)], check=False).returncode:
        raise SystemExit(NOT_ALLOWED)
    lost_split._STORAGE_DELAY = 0.05
    job = make_job(str(folder / "store"), folder / "marks", output=f"{disk}/out")

    document = job.try_to_run()
    assert document["status"] == "worker error", document
    assert "no space" in document["status_reason"].lower(), document
    assert committed_only(job), "something fitted"

    subprocess.run(["mount", "-o", "remount,size=16m", str(disk)], check=True)
    job.run()
    exactly_once(job, status="succeeded")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
