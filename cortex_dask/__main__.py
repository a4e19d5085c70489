"""``python -m cortex_dask``: the command line, where the script is not on the path."""

from __future__ import annotations

from cortex_dask.cli import main

if __name__ == "__main__":
    main(prog_name="cortex-dask")
