"""A small project with one API, as files and as a configuration."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

HANDLER = """\
class Handler:
    def __init__(self, config):
        self.config = config

    def handle_batch(self, payload):
        return payload
"""


def api_document(name: str = "tagger", **keys: Any) -> dict[str, Any]:
    """Return the configuration of the API; keys of ``handler`` go over its own."""
    handler = {"type": "python", "path": "handler.py", **keys.pop("handler", {})}
    return {"name": name, "kind": "BatchAPI", "handler": handler, **keys}


def write_project(folder: Path) -> Path:
    """Write a handler, a large file and an ignored one."""
    folder.mkdir()
    (folder / "handler.py").write_text(HANDLER)
    (folder / "large.bin").write_bytes(os.urandom(2048))
    (folder / ".cortexignore").write_text("*.tmp\n")
    (folder / "left.tmp").write_text("")
    return folder
