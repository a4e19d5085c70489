"""The machine at hand, in the conformance suite."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from tests.clusters.backend import Backend

__all__ = ["LocalBackend"]

_ONE_PROCESS = "the coordinator's threads are the workers here, with no scheduler between them"


class LocalBackend(Backend):
    """``--cluster local``."""

    name = "local"
    cannot: ClassVar[Mapping[str, str]] = {
        "lose a worker": _ONE_PROCESS,
        "lose the scheduler": _ONE_PROCESS,
        "scale": _ONE_PROCESS,
    }

    @property
    def cluster(self) -> str:
        return "local"
