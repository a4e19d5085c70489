"""Small files that are not local: each is fetched whole with one request, before its reader comes to it.

A pack of a thousand tiny files read one after the other would cost three round trips a file (is it the planned one,
where is what, the rows). On S3 the answer to one ``GET`` says all of that; other file systems are asked once more for
the file's tag.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from cortex_dask.io.job.splits import Piece
from cortex_dask.io.store.listing import is_s3
from cortex_dask.io.store.remote import connect
from cortex_dask.io.store.source import local_path, tag_of

if TYPE_CHECKING:
    from concurrent.futures import Future

#: Fetching so many bytes at once takes no longer than a second round trip would.
_SMALL = 1 << 20
#: Files that are fetched together, while those before them are read: so many requests are in flight.
_TOGETHER, _BYTES_TOGETHER = 32, 16 << 20


class Planned(Protocol):
    """A file as it was planned: a piece of it, or an input file."""

    @property
    def path(self) -> str: ...  # noqa: D102
    @property
    def size(self) -> int: ...  # noqa: D102
    @property
    def tag(self) -> str: ...  # noqa: D102


_Group = Sequence[Planned]
_Job = tuple[Any, list[str], list[int]]  # a file system, what it calls files of the group, and their places there


def is_small(file: Planned) -> bool:
    """Tell whether a file is best fetched whole: it is not local, and not large."""
    return file.size <= _SMALL and local_path(file.path) is None


def fetch_whole(files: Sequence[Planned]) -> list[bytes | None]:
    """Fetch small files at the same time; None for one that is not the planned one, or that could not be fetched."""
    try:
        return _fetch(files).result()
    except Exception:  # noqa: BLE001 - opening them in the usual way tells what is wrong
        return [None] * len(files)


class SmallFiles:
    """The small files among those that will be read.

    Parameters
    ----------
    pieces : sequence of Piece
        What will be read, in order.
    """

    def __init__(self, pieces: Sequence[Piece]) -> None:
        self._groups = _grouped(pieces)
        self._here: dict[str, bytes] = {}
        self._coming: tuple[_Group, Future[list[bytes | None]]] | None = None
        self._waiting: _Group | None = next(self._groups, None)

    def take(self, piece: Piece) -> bytes | None:
        """Return the file of a piece, verified to be the planned one.

        None where it is local or large, or where something went wrong: opening it in the usual way tells what.
        """
        while piece.path not in self._here and self._expects(piece.path):
            self._advance()
        return self._here.pop(piece.path, None)

    def close(self) -> None:
        """Give up what is on its way."""
        if self._coming is not None:
            self._coming[1].cancel()
        self._coming, self._waiting = None, None
        self._here.clear()

    def _expects(self, path: str) -> bool:
        """Whether a file is in the group that is on its way, or in the one after it."""
        groups = (self._coming[0] if self._coming else [], self._waiting or [])
        return any(piece.path == path for group in groups for piece in group)

    def _advance(self) -> None:
        """Take what was on its way, and send for the next."""
        self._here.clear()  # what was not asked for in time is not needed any more
        coming, group = self._coming, self._waiting
        self._coming = None
        if group is not None:
            self._coming = (group, _fetch(group))
            self._waiting = next(self._groups, None)
        if coming is not None:
            try:
                found = coming[1].result()
            except Exception:  # noqa: BLE001 - as below
                return
            self._here = {piece.path: data for piece, data in zip(coming[0], found, strict=True) if data is not None}


def _grouped(pieces: Sequence[Piece]) -> Iterator[_Group]:
    group: list[Piece] = []
    size, last = 0, ""
    for piece in pieces:
        if piece.path == last or not is_small(piece):
            continue
        last = piece.path
        group.append(piece)
        size += piece.size
        if len(group) == _TOGETHER or size > _BYTES_TOGETHER:
            yield group
            group, size = [], 0
    if group:
        yield group


def _fetch(group: _Group) -> Future[list[bytes | None]]:
    """Send for files, on the event loop that fsspec runs in a thread of its own."""
    import asyncio  # takes long to import, and local files do without
    from concurrent.futures import Future

    jobs: list[_Job] = []
    with contextlib.suppress(Exception):  # whoever opens the files finds out what is wrong
        jobs = [job for job in remote_names([piece.path for piece in group]) if getattr(job[0], "async_impl", False)]
    if not jobs:
        nothing: Future[list[bytes | None]] = Future()
        nothing.set_result([None] * len(group))
        return nothing
    return asyncio.run_coroutine_threadsafe(_gathered(group, jobs), jobs[0][0].loop)


async def _gathered(group: _Group, jobs: list[_Job]) -> list[bytes | None]:
    import asyncio

    wanted = {
        place: _whole(fs, name, group[place])
        for fs, names, places in jobs
        for name, place in zip(names, places, strict=True)
    }
    answers = dict(zip(wanted, await asyncio.gather(*wanted.values(), return_exceptions=True), strict=True))
    return [answer if isinstance(answer := answers.get(place), bytes) else None for place in range(len(group))]


async def _whole(fs: Any, name: str, file: Planned) -> bytes | None:
    """Fetch a file; None if it is not the planned one."""
    if is_s3(fs, file.path):
        bucket, key, version = fs.split_path(name)
        asked = {"VersionId": version} if version else {}
        info = await fs._call_s3("get_object", Bucket=bucket, Key=key, **asked, **fs.req_kw)
        async with info["Body"] as body:
            data = bytes(await body.read())
    else:
        data = bytes(await fs._cat_file(name))
        fs.invalidate_cache(name)
        info = await fs._info(name)  # after the content: what was replaced in between is seen
    tag = tag_of(info)
    same_kind = tag.partition(":")[0] == file.tag.partition(":")[0]
    return data if len(data) == file.size and (tag == file.tag or not file.tag or not same_kind) else None


def read_ranges(wanted: Sequence[tuple[str, int, int]], *, at_once: int) -> list[bytes | None]:
    """Read a stretch of each of several files that are not local: one request each, on one event loop if possible.

    A thread for each request would take twice the time of the processor. What failed is None:
    :func:`read_range` tries it again, or says what is wrong.

    Parameters
    ----------
    wanted : sequence of (str, int, int)
        Files, and from where to where.
    at_once : int
        Requests in flight.
    """
    found: list[bytes | None] = [None] * len(wanted)
    for fs, names, places in remote_names([path for path, _, _ in wanted]):
        if not getattr(fs, "async_impl", False):
            continue  # a file system with one connection gains nothing
        starts, stops = [wanted[place][1] for place in places], [wanted[place][2] for place in places]
        try:
            answers = fs.cat_ranges(names, starts, stops, batch_size=at_once, on_error="return")
        except Exception:  # noqa: BLE001, S112 - the same request is made again, one by one
            continue
        for place, answer in zip(places, answers, strict=True):
            if not isinstance(answer, BaseException):
                found[place] = bytes(answer)
    return found


def remote_names(paths: Sequence[str]) -> Iterator[tuple[Any, list[str], list[int]]]:
    """Yield file systems, what they call the files that they hold, and where those stand among the paths."""
    groups: dict[str, list[int]] = {}
    for place, path in enumerate(paths):
        protocol, _, rest = path.partition("://")
        server = path if "::" in path else f"{protocol}://{rest.partition('/')[0]}"
        groups.setdefault(server, []).append(place)
    for places in groups.values():
        fs, first = connect(paths[places[0]])
        yield fs, [first, *(fs._strip_protocol(paths[place]) for place in places[1:])], places
