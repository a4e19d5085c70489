"""``StagedFile``: a file that appears whole with its commit, or never."""

from __future__ import annotations

import io
from types import TracebackType
from typing import TYPE_CHECKING, Literal, Self

from cortex_dask.io.store.errors import shown_url
from cortex_dask.io.store.retry import persist

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer


class StagedFile(io.BufferedIOBase):
    """A binary file that is being written and that nobody sees before :meth:`commit`.

    Leaving its ``with`` block without a commit, by an exception or not, discards it; so does the death of the process.
    """

    #: Where the bytes lie meanwhile, for writers that want to open the file themselves; None for remote stores.
    local_path: str | None = None

    def __init__(self, url: str) -> None:
        self.url = url
        self._state: Literal["open", "committed", "discarded"] = "open"

    def __repr__(self) -> str:
        return f"<{self._state} staged file {shown_url(self.url)!r}>"

    def writable(self) -> bool:
        """Return True: this is a file to write."""
        return True

    def write(self, data: ReadableBuffer, /) -> int:
        """Append bytes."""
        if self._state != "open" or self.closed:
            raise ValueError(f"write to a {'closed' if self._state == 'open' else self._state} staged file")
        return persist(lambda: self._write(memoryview(data).cast("B")), self.url, writes=True, once=True)

    def commit(self) -> int:
        """Make the file appear under its name, whole; return its size in bytes."""
        if self._state == "discarded":
            raise ValueError("commit of a discarded staged file")
        if self._state == "open":
            self._size = persist(self._commit, self.url, writes=True)
            self._state = "committed"
            super().close()
        return self._size

    def discard(self) -> None:
        """Forget what was written; after a commit, do nothing."""
        if self._state == "open":
            self._state = "discarded"
            try:
                self._discard()
            finally:
                super().close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.discard()

    def _write(self, data: memoryview) -> int:
        raise NotImplementedError

    def _commit(self) -> int:
        raise NotImplementedError

    def _discard(self) -> None:
        raise NotImplementedError
