"""``make demo``: run the main job on the digits data with 4 workers, and show what came out.

It does what a newcomer would type; each command is printed before it runs. Everything goes to ``demo-output/``, which
the next run replaces.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "demo-output"
PROJECT = FOLDER / "digits"
#: The variable that tells where jobs are kept: the demo leaves the user's own folder alone.
STORE = "DASK_CORTEX_DASK__STORE"


def main() -> None:
    """Run as a command."""
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir()
    run("init", shown(PROJECT))
    output = PROJECT / "predictions"
    run("submit", shown(PROJECT / "cortex.yaml"), "--output", shown(output), "--workers", "4", "--batch-size", "128")
    show_predictions(output)
    print(f"\noutput   {shown(output)}/")
    print("logs     " + command("logs", "digits", "latest"))
    print("status   " + command("get", "digits", "latest"))
    print("         (the variable makes the demo keep its jobs in its own folder)")


def run(*arguments: str) -> None:
    """Run ``cortex-dask`` as a user does; the demo ends with its exit code when it fails."""
    print(f"\n$ cortex-dask {shlex.join(arguments)}", flush=True)
    program = Path(sys.executable).with_name("cortex-dask")
    environment = {**os.environ, STORE: str(FOLDER / "store")}
    code = subprocess.run([program, *arguments], cwd=ROOT, env=environment).returncode
    if code:
        sys.exit(code)


def command(*arguments: str) -> str:
    """Return the command line with which the reader looks further."""
    program = Path(sys.executable).with_name("cortex-dask")
    return f"{STORE}={shown(FOLDER / 'store')} {shown(program)} {shlex.join(arguments)}"


def show_predictions(output: Path) -> None:
    """Print some predictions, and how many are right on images that the model has not seen."""
    import pyarrow.compute as pc
    import pyarrow.dataset as ds

    table = ds.dataset(output, format="parquet").to_table().sort_by("id")
    odd = table.filter(pc.equal(pc.bit_wise_and(table["id"], 1), 1))
    right = pc.equal(odd["digit"], odd["target"])
    print(f"\n{table.num_rows:,} predictions, some of them:\n")
    print("    id  digit  confidence  written")
    for row in odd.slice(0, 5).to_pylist():
        remark = "" if row["digit"] == row["target"] else "  <- wrong"
        print(f"{row['id']:>6}{row['digit']:>7}{row['confidence']:>12.2f}{row['target']:>9}{remark}")
    share = pc.mean(right).as_py()
    print(f"\naccuracy {share:.1%} on the {len(odd):,} images that the model was not trained on")


def shown(path: Path) -> str:
    """Return a path as short as it can be typed here."""
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)


if __name__ == "__main__":
    main()
