"""Interpreters that have the library of an example: this one, or one made for it and kept."""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import os
import site
import subprocess
import sys
import sysconfig
import time
import venv
from pathlib import Path

import pytest

__all__ = ["EXAMPLES", "interpreter"]

EXAMPLES = Path(__file__).parents[2] / "examples"

#: Where the environments are made; without it, only what is installed anyway is used.
VARIABLE = "CORTEX_DASK_EXAMPLES"
#: A registry that does not answer must not hold up everything else.
_SECONDS = 300.0

#: What training and the handler import that is no dependency of cortex_dask.
_MODULES = {
    "scikit-learn": ("sklearn",),
    "pytorch": ("torch",),
    "onnxruntime": ("onnxruntime", "skl2onnx"),
    "xgboost": ("xgboost",),
    "tensorflow": ("tensorflow",),
}


def interpreter(example: str) -> str:
    """Return a Python that has what an example needs, or skip the test and say why."""
    missing = [module for module in _MODULES[example] if importlib.util.find_spec(module) is None]
    if not missing:
        return sys.executable
    what = f"{' and '.join(missing)} for examples/{example}"
    root = os.environ.get(VARIABLE)
    if not root:
        pytest.skip(f"{what} not installed here; make test-examples installs it, as {VARIABLE}=<folder> does")
    wanted = EXAMPLES / example / "requirements-train.txt"
    if not wanted.exists():
        wanted = EXAMPLES / example / "requirements.txt"
    texts = "".join(path.read_text() for path in sorted((EXAMPLES / example).glob("requirements*.txt")))
    key = hashlib.sha256(f"{sys.version}{sys.prefix}{texts}".encode()).hexdigest()[:12]
    folder = Path(root).absolute() / f"{example}-{key}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "whole").exists():
            _make(folder, wanted, what)
    return str(folder / "bin" / "python")


def _make(folder: Path, requirements: Path, what: str) -> None:
    """Make an environment on top of this one, with what the file asks for."""
    started = time.monotonic()
    venv.create(folder, with_pip=True, clear=True, symlinks=True)
    library = sysconfig.get_path("purelib", "venv", {"base": str(folder), "platbase": str(folder)})
    ours = site.getsitepackages()
    Path(library, "zz-parent.pth").write_text("".join(f"import site; site.addsitedir({place!r})\n" for place in ours))
    # pip and not uv: it minds what lies below, and where this machine has its packages from
    pip = [folder / "bin" / "python", "-m", "pip", "install", "--disable-pip-version-check", "--retries", "2"]
    command = [*pip, "--requirement", requirements]
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=_SECONDS)
    except subprocess.TimeoutExpired:
        pytest.skip(f"NOT TESTED: {what} could not be installed in {_SECONDS:.0f} s")
    if done.returncode != 0:
        last = next(
            (line for line in reversed(done.stdout.splitlines()) if line.startswith("ERROR")), "see pip's output"
        )
        pytest.skip(f"NOT TESTED: {what} could not be installed: {last}")
    (folder / "whole").write_text(f"{time.monotonic() - started:.0f} s\n")
