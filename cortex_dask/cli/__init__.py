"""The command line: ``cortex-dask``, and ``dask cortex``.

The modules here import click and nothing heavier; what a command needs is imported when it runs, so that ``--help`` and
completion are quick.
"""

from __future__ import annotations

import click

from cortex_dask.cli.apis import delete, deploy
from cortex_dask.cli.clusters import clusters
from cortex_dask.cli.environments import env
from cortex_dask.cli.exit_codes import Commands
from cortex_dask.cli.jobs import get, logs, resume, retry, stop
from cortex_dask.cli.manifest import manifest
from cortex_dask.cli.project import completion, init, version
from cortex_dask.cli.submit import submit


@click.group(
    name="cortex",  # the word after ``dask``
    cls=Commands,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    epilog="Exit codes: 0 succeeded, 1 failed, 2 wrong usage or bad input, 3 completed with failures, 124 timed out, "
    "130 stopped.",
)
def main() -> None:
    """Batch processing on Dask: map a Handler over a dataset, every row exactly once."""


for _command in (
    init,
    deploy,
    submit,
    get,
    logs,
    stop,
    resume,
    retry,
    delete,
    clusters,
    manifest,
    env,
    version,
    completion,
):
    main.add_command(_command)
