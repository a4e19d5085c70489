"""The ``handler.py`` of the suite's project: it triples a column, and waits where it is told to.

Notes of its calls and the marks that it looks for lie in the job's own store, as a pod sees nothing else.
"""

import os
import socket
import time
import uuid

import orjson
import pyarrow as pa

from cortex_dask.io.store.store import Store


class Handler:
    """Its ``config``: ``marks``, a folder in a store; ``gate``, a mark that batches wait for; ``seconds`` of each.

    With ``gate_from`` only batches wait that have rows from this id on: a job sends many splits at a time when the
    first rows of the first one have settled the schema of its output.
    """

    def __init__(self, config):
        self._config = config
        self._marks = Store(config["marks"])

    def handle_batch(self, payload, batch_id):
        ids = payload["id"].to_pylist()
        note = {
            "pid": os.getpid(),
            "worker": os.getppid(),
            "host": socket.gethostname(),
            "batch_id": batch_id,
            "ids": ids,
            "time": time.time(),
        }
        self._marks.write(f"calls/{uuid.uuid4().hex}.json", orjson.dumps(note))
        gate = self._config.get("gate")
        deadline = time.monotonic() + 300
        while (
            gate
            and ids[-1] >= self._config.get("gate_from", 0)
            and not self._marks.exists(gate)
            and time.monotonic() < deadline
        ):
            time.sleep(0.05)
        time.sleep(self._config.get("seconds", 0))
        return pa.table({"id": ids, "answer": [number * 3 + 1 for number in ids]})

    def on_job_complete(self):
        self._marks.write(f"completions/{uuid.uuid4().hex}", b"")
