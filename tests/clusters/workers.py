"""Schedulers and workers for tests of what differs between hosts: each a program of its own, with its own packages."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path

from distributed import Client
from distributed.versions import VersionMismatchWarning

import cortex_dask
from tests.faults.jobs import ROOT
from tests.support.waiting import until

__all__ = ["another_cortex_dask", "another_version", "count", "worker"]

_WORKER = """
import asyncio, json, sys
from distributed import Worker
async def serve():
    async with Worker(sys.argv[1], host="127.0.0.1", nthreads=1, memory_limit=0, local_directory=sys.argv[2],
                      dashboard_address="127.0.0.1:0", resources=json.loads(sys.argv[3])) as worker:
        await worker.finished()
asyncio.run(serve())
"""
#: Put before a worker's program: a host that has no cortex_dask.
WITHOUT = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name == "cortex_dask":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Blocker())
"""


@contextlib.contextmanager
def worker(
    address: str,
    folder: Path,
    *,
    before: str = "",
    path: Path | None = None,
    resources: str = "{}",
    environment: Mapping[str, str] | None = None,
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a worker that finds packages first in ``path``; it has come when the block begins."""
    had = count(address)
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "worker.log"
    with log.open("ab") as output:
        process = subprocess.Popen(
            [sys.executable, "-c", before + _WORKER, address, str(folder), resources],
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join([*([str(path)] if path else []), ROOT]),
                **(environment or {}),
            },
            stdout=output,
            stderr=output,
            cwd=folder,
        )
    try:

        def has_come() -> bool:
            assert process.poll() is None, log.read_text()
            return count(address) > had

        until(has_come, "a worker to come")
        yield process
    finally:
        process.kill()
        process.wait()


def count(address: str) -> int:
    """Return how many workers a scheduler has."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", VersionMismatchWarning)
        with Client(address, set_as_default=False) as client:
            return len(client.nthreads())


def another_cortex_dask(folder: Path, version: str) -> Path:
    """Return a folder with this package in another version."""
    source = Path(cortex_dask.__file__).parent
    shutil.copytree(source, folder / "cortex_dask", ignore=shutil.ignore_patterns("__pycache__", "template"))
    file = folder / "cortex_dask" / "__init__.py"
    text, replaced = re.subn(r'__version__ = "[^"]*"', f'__version__ = "{version}"', file.read_text())
    assert replaced == 1
    file.write_text(text)
    return folder


def another_version(folder: Path, package: str, version: str) -> Path:
    """Return a folder in which a package says that it is installed in another version."""
    info = folder / f"{package}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n")
    return folder
