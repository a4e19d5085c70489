"""How long it takes from ``cortex-dask submit`` to the first part of the output, and to the end, on one cluster.

::

    python benchmarks/first_output.py local
    python benchmarks/first_output.py tcp://127.0.0.1:8786
    python benchmarks/first_output.py gateway --option worker_cores=1
    python benchmarks/first_output.py kubernetes --folder s3://bucket/first-output --option image=registry/image:tag

The job is small on purpose, 8 files of 1,000 rows for two workers, so that what is measured is the way there: the
command's own start, a cluster that comes up, its workers, their handler processes, the first commit. The folder is one
that this machine and the workers reach; it is emptied first.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HANDLER = """\
class Handler:
    def __init__(self, config):
        self.factor = config["factor"]

    def handle_batch(self, payload):
        return [{"id": row["id"], "scaled": row["x"] * self.factor} for row in payload]
"""
CONFIGURATION = """\
- name: first-output
  kind: BatchAPI
  handler: {path: handler.py, config: {factor: 2}}
  compute: {cpu: 200m, mem: 256Mi}
  job: {batch_size: 250, batch_format: records, workers: 2}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cluster", help="local, gateway, kubernetes or a scheduler's address")
    parser.add_argument("--folder", help="a folder that the workers reach; a temporary one by default")
    parser.add_argument("--option", action="append", default=[], help="KEY=VALUE, for --cluster-option")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        project = Path(folder, "project")
        project.mkdir()
        (project / "handler.py").write_text(HANDLER)
        (project / "cortex.yaml").write_text(CONFIGURATION)
        runs = [_run(options, project, options.folder or f"{folder}/data", number) for number in range(options.repeats)]
    for word, seconds in zip(("first part", "whole command"), zip(*runs, strict=True), strict=True):
        print(f"{word}: {statistics.median(seconds):.1f} s ({min(seconds):.1f} to {max(seconds):.1f})")


def _run(options: argparse.Namespace, project: Path, folder: str, number: int) -> tuple[float, float]:
    """Return the seconds to the first part, and to the end of the command."""
    from cortex_dask.io.store.store import Store

    store = Store(f"{folder.rstrip('/')}/run-{number}")
    store.delete_tree("")
    for file in range(8):
        lines = (b'{"id": %d, "x": %d}' % (row, row % 7) for row in range(file * 1000, file * 1000 + 1000))
        store.write(f"in/{file}.jsonl", b"\n".join(lines))
    command = [sys.executable, "-m", "cortex_dask", "submit", str(project), "--cluster", options.cluster]
    command += [word for option in options.option for word in ("--cluster-option", option)]
    command += ["--input", store.child("in").url, "--output", store.child("out").url, "-o", "json"]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    environment["DASK_CORTEX_DASK__STORE"] = store.child("store").url
    began = time.monotonic()
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    first = None
    while process.poll() is None:
        if first is None and any(name.startswith("part-") for name in store.children("out")):
            first = time.monotonic() - began
        time.sleep(0.02)
    whole = time.monotonic() - began
    if process.returncode:
        raise SystemExit(f"the job ended with exit code {process.returncode}")
    return first or whole, whole


if __name__ == "__main__":
    main()
