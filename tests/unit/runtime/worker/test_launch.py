"""The command line and the environment variables of child processes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import cortex_dask
from cortex_dask.runtime.worker.launch import python_command, slot_environment

TELL = """\
import atexit, json, sys
atexit.register(lambda: print(json.dumps([sys.modules["cortex_dask"].__file__, sys.path, sys.argv[1:]])))
"""


def test_a_child_process_finds_the_package_where_this_process_has_it(tmp_path: Path) -> None:
    # -S and -E: neither what is installed nor PYTHONPATH helps.
    command = [sys.executable, "-S", "-E", *python_command("gc", "collect", first=TELL), "an argument"]
    told = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True, timeout=60)
    place, path, arguments = json.loads(told.stdout)
    assert place == cortex_dask.__file__
    assert path[-1] == str(Path(cortex_dask.__file__).parents[1])  # it hides no module of the user
    assert path.count(path[-1]) == 1
    assert arguments == ["an argument"]


def test_what_the_user_sets_wins() -> None:
    inherited = {"HOME": "/home/me", "COLOUR": "red", "PYTHONSTARTUP": "x.py", "CUDA_VISIBLE_DEVICES": "0,1"}
    environment = slot_environment(
        inherited, {"COLOUR": "blue", "OMP_NUM_THREADS": "7"}, cpu=1, devices={"CUDA_VISIBLE_DEVICES": "1"}
    )
    assert environment["HOME"] == "/home/me"
    assert environment["COLOUR"] == "blue"
    assert environment["CUDA_VISIBLE_DEVICES"] == "1"
    assert environment["OMP_NUM_THREADS"] == "7"
    assert environment["MKL_NUM_THREADS"] == "1"
    assert "PYTHONSTARTUP" not in environment


def test_a_slot_with_several_cores_does_not_inherit_the_single_thread_of_a_nanny() -> None:
    inherited = {"OMP_NUM_THREADS": "1"}
    assert slot_environment(inherited, {}, cpu=4)["OMP_NUM_THREADS"] == "4"
    assert slot_environment({"OMP_NUM_THREADS": "3"}, {}, cpu=1)["OMP_NUM_THREADS"] == "3"
