"""The samples of an ``item_list`` or a file list as JSON lines in the job directory: encoded, checked, cut into files.

::

    items = encode_items(["a", {"b": 1}], batch_size=1)    # when the job is submitted
    items.write(job.store)                                 # input/<digest>/items-00000.jsonl …

Items never travel in a task: handler processes read them from there, as they read any JSON lines.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import orjson

from cortex_dask.formatting import shown
from cortex_dask.io.json.encoder import dumps
from cortex_dask.io.store.store import Store

#: What Cortex refuses to take, in bytes; here it is worth a warning, no more.
BATCH_LIMIT, REQUEST_LIMIT = 256 << 10, 10 << 20

_CHUNK = 8 << 20  # bytes of a file: written and read in one request each
_PLAIN = orjson.OPT_PASSTHROUGH_DATACLASS | orjson.OPT_PASSTHROUGH_DATETIME | orjson.OPT_PASSTHROUGH_SUBCLASS
_MAYBE_NOT_FINITE = b"null"  # what orjson writes for NaN and the infinities, too
_SCALARS = (str, bool, type(None))


@dataclass(frozen=True, slots=True)
class EncodedItems:
    """Items as JSON lines, checked, on their way to the job directory."""

    count: int
    digest: str  # of all lines
    size: int  # bytes
    largest_batch: int  # bytes
    objects: bool  # whether every item is an object
    chunks: tuple[bytes, ...] = field(repr=False)

    def write(self, store: Store) -> None:
        """Write them to a job directory; writing them again changes nothing."""
        folder = items_folder(self.digest)
        for number, chunk in enumerate(self.chunks):
            store.write(f"{folder}/items-{number:05d}.jsonl", chunk)

    @property
    def warnings(self) -> tuple[str, ...]:
        """What is larger than Cortex allows."""
        found = []
        if self.size > REQUEST_LIMIT:
            found.append(
                f"item_list.items: the items are {self.size / 2**20:.0f} MiB of JSON, Cortex takes 10 MiB in a "
                "request; nothing stops here, but delimited_files reads many samples from files"
            )
        if self.largest_batch > BATCH_LIMIT:
            found.append(batch_warning("item_list", self.largest_batch))
        return tuple(found)


def batch_warning(kind: str, size: int, about: str = "") -> str:
    """Return the warning about batches that Cortex would not take."""
    return (
        f"{kind}.batch_size: the largest batch has {about}{size / 2**10:.0f} KiB, Cortex takes 256 KiB; nothing stops "
        "here, but a smaller batch_size runs there as well"
    )


def items_folder(digest: str) -> str:
    """Return where items lie in the job directory."""
    return f"input/{digest}"


class LineChunks:
    """Cuts lines into chunks of some megabytes, and measures batches on the way.

    Parameters
    ----------
    batch_size : int
        Lines in a batch.
    """

    def __init__(self, batch_size: int) -> None:
        self._batch_size = batch_size
        self._batch = 0
        self.count = self.size = self.largest_batch = 0

    def cut(self, lines: Iterable[bytes]) -> Iterator[bytes]:
        """Yield the chunks; lines come without their ends."""
        held = bytearray()  # not lines: each of orjson's holds on to the kilobyte that it was made in
        for line in lines:
            if self.count % self._batch_size == 0:
                self._batch = 0
            self.count += 1
            self._batch += len(line)
            self.size += len(line) + 1
            self.largest_batch = max(self.largest_batch, self._batch)
            held += line
            held += b"\n"
            if len(held) >= _CHUNK:
                yield bytes(held)
                held.clear()
        if held:
            yield bytes(held)


def encode_items(items: Iterable[Any], batch_size: int, *, path: str = "item_list.items") -> EncodedItems:
    """Encode items.

    Parameters
    ----------
    items : iterable
        JSON values; NumPy scalars, tuples, paths and dates are taken for what they are in JSON.
    batch_size : int
        Items in a batch.
    path : str
        How messages call the list.

    Raises
    ------
    ValueError
        If an item is no JSON value: NaN, an infinity, or an object that JSON has no form for.
    """
    digest = hashlib.sha256()
    cutter = LineChunks(batch_size)
    objects = True

    def lines() -> Iterator[bytes]:
        nonlocal objects
        for number, item in enumerate(items):
            objects = objects and isinstance(item, Mapping)
            yield _encode(item, f"{path}[{number}]")

    chunks = []
    for chunk in cutter.cut(lines()):
        digest.update(chunk)
        chunks.append(chunk)
    return EncodedItems(
        cutter.count, digest.hexdigest()[:16], cutter.size, cutter.largest_batch, objects, tuple(chunks)
    )


def _encode(item: Any, path: str) -> bytes:
    try:
        line = orjson.dumps(item, option=_PLAIN)
        if _MAYBE_NOT_FINITE not in line:
            return line
    except TypeError:
        pass  # what is wrong with it, if anything, is said below
    try:
        return dumps(_plain(item, path))
    except RecursionError:
        raise ValueError(f"{path}: is nested too deeply") from None


def _plain(value: Any, path: str) -> Any:
    """Return a value as JSON has it."""
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            raise ValueError(f"{path}: found text with half of a surrogate pair, which is no text") from None
        return str(value)
    if isinstance(value, _SCALARS):
        return value
    if isinstance(value, Mapping):
        wrong = next((key for key in value if not isinstance(key, str)), None)
        if wrong is not None or None in value:
            raise ValueError(f"{path}: found the key {shown(wrong)}; keys must be text, put it in quotes")
        return {_plain(key, path): _plain(entry, f"{path}.{key}") for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry, f"{path}[{number}]") for number, entry in enumerate(value)]
    if hasattr(value, "__fspath__"):
        return _plain(value.__fspath__(), path)
    if hasattr(value, "isoformat"):
        return value.isoformat()
    if not isinstance(value, int | float):
        if hasattr(value, "tolist"):  # arrays and scalars of NumPy
            return _plain(value.tolist(), path)
        raise ValueError(
            f"{path}: found a value of type {type(value).__name__}; allowed are JSON values: text, numbers, true, "
            "false, null, lists and mappings"
        )
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{path}: found the number {value}; allowed are JSON values, which are finite")
    return int(value) if isinstance(value, int) else float(value)
