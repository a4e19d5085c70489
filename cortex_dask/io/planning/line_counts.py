"""How many samples files of JSON lines hold, and where: counted in parallel, in bounded memory, before a job runs.

A sample is a line that holds more than white space. Counting reads every byte once, and notes every quarter of a
megabyte how far it has come (a *mark*), so that a split can begin at any sample without anybody reading the file up to
there. A compressed file has only one mark, at its start.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from cortex_dask.errors import CortexDaskError, DatasetError
from cortex_dask.io.input.files import InputFile
from cortex_dask.io.input.prefetch import fetch_whole, is_small
from cortex_dask.io.job.splits import Piece
from cortex_dask.io.json.file import JsonFile
from cortex_dask.io.store.errors import explain
from cortex_dask.io.store.source import UnreadableInput, in_parallel, local_path, translated

_RANGE = 64 << 20  # bytes of a file that one thread counts
_MARK = 256 << 10  # bytes between two marks: what the reader of a split may have to skip
_TOGETHER = 4096  # tasks that are under way at a time
#: Ranges that are read at the same time from elsewhere, a block of 4 MiB of each: as many as keep some cores counting.
_READERS = 16
_SMALL_TOGETHER = 8  # small files that each of them fetches at once

_Range = tuple[InputFile, int, bool]  # a file, where the range starts in it, and whether it is the last one


@dataclass(frozen=True, slots=True)
class CountedFile:
    """A file and its samples.

    Attributes
    ----------
    marks : array of int
        Byte offsets at which lines begin, the first one where the first line does, the last one behind the last line.
    before : array of int
        How many samples lie before each of the marks.
    bytes : int
        The size of its text, decompressed.
    """

    file: InputFile
    is_compressed: bool
    marks: Sequence[int]
    before: Sequence[int]
    bytes: int

    @property
    def samples(self) -> int:
        """How many samples it holds."""
        return self.before[-1]

    def piece(self, start: int, count: int) -> Piece:
        """Return the piece with ``count`` samples from number ``start`` on."""
        file = self.file
        if self.is_compressed:
            return Piece(file.path, 0, file.size, count, size=file.size, tag=file.tag, skip=start)
        first = bisect_right(self.before, start) - 1
        last = bisect_left(self.before, start + count)
        return Piece(
            file.path,
            self.marks[first],
            self.marks[last],
            count,
            size=file.size,
            tag=file.tag,
            skip=start - self.before[first],
        )


def count_files(files: Sequence[InputFile], check: Callable[[], None]) -> Iterator[CountedFile]:
    """Count the samples of files.

    Parameters
    ----------
    files : sequence of InputFile
        Files of JSON lines, plain or compressed.
    check : callable
        Called now and then; counting ends with what it raises.

    Raises
    ------
    DatasetError
        If a file cannot be read.
    """
    if not files:
        return
    local = local_path(files[0].path) is not None
    found: list[_LineRange] = []
    for group in _grouped(_tasks(files), _TOGETHER):
        for task, stretches in zip(group, in_parallel(_count_all, group, local=local, threads=_READERS), strict=True):
            check()
            for (file, _, is_last), stretch in zip(task, stretches, strict=True):
                found.append(stretch)
                if is_last:
                    yield _joined(file, found)
                    found = []


def _tasks(files: Sequence[InputFile]) -> Iterator[list[_Range]]:
    """Yield what a thread does at a time: one range of a file, or some small files that are fetched together."""
    small: list[_Range] = []
    for file in files:
        if is_small(file):
            if file.size:
                small.append((file, 0, True))
            if len(small) == _SMALL_TOGETHER:
                yield small
                small = []
            continue
        if small:
            yield small
            small = []
        for start in range(0, file.size, _RANGE):
            yield [(file, start, start + _RANGE >= file.size)]
    if small:
        yield small


def _grouped(items: Iterator[Any], size: int) -> Iterator[list[Any]]:
    group = []
    for item in items:
        group.append(item)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group


@dataclass(slots=True)
class _LineRange:
    """What one range of a file holds."""

    is_compressed: bool
    marks: array[int]
    counts: array[int]
    bytes: int


def _joined(file: InputFile, stretches: list[_LineRange]) -> CountedFile:
    first = stretches[0]
    if first.is_compressed:
        return CountedFile(file, True, (0, file.size), (0, sum(first.counts)), first.bytes)
    marks, before, total = array("q"), array("q"), 0
    for stretch in stretches:
        marks.extend(stretch.marks)
        for count in stretch.counts:
            before.append(total)
            total += count
    marks.append(file.size)
    before.append(total)
    return CountedFile(file, False, marks, before, sum(stretch.bytes for stretch in stretches))


def _count_all(task: list[_Range]) -> list[_LineRange]:
    files = [file for file, _, _ in task]
    contents = fetch_whole(files) if is_small(files[0]) else [None]
    return [_count(item, data) for item, data in zip(task, contents, strict=True)]


def _count(item: _Range, content: bytes | None) -> _LineRange:
    """Count the samples in one range of a file, or in all of it if it is compressed."""
    file, start, _ = item
    marks, counts, size = array("q"), array("q"), 0
    try:
        with translated(file.path), JsonFile(file.path, file.size, file.tag, content) as opened:
            if opened.is_compressed and start:
                return _LineRange(True, marks, counts, 0)  # the range at its start counts it all
            for block in opened.blocks(start, min(start + _RANGE, file.size)):
                for at, data in _cut(block.offset, block.data):
                    marks.append(at)
                    counts.append(_samples_in(data))
                size += len(block.data)
            return _LineRange(opened.is_compressed, marks, counts, size)
    except (UnreadableInput, CortexDaskError) as error:
        raise DatasetError(f"the input cannot be read: {error}") from error
    except OSError as error:
        raise DatasetError(f"the input cannot be read: {explain(error, file.path)}") from error


def _cut(offset: int, data: bytes) -> Iterator[tuple[int, bytes]]:
    """Cut whole lines into stretches of whole lines, about as long as marks are apart."""
    at = 0
    while len(data) - at > _MARK:
        newline = data.find(b"\n", at + _MARK - 1)
        if newline < 0:
            break
        yield offset + at, data[at : newline + 1]
        at = newline + 1
    if at < len(data):
        yield offset + at, data[at:] if at else data


def _samples_in(data: bytes) -> int:
    """Count the lines that hold more than white space."""
    import numpy as np

    text = np.frombuffer(data, np.uint8)
    ends = np.flatnonzero(text == 10)  # of lines; NumPy lets other threads run meanwhile, bytes.count does not
    starts = text[ends[:-1] + 1] if text[-1] == 10 else text[ends + 1]
    if text[0] <= 32 or (starts <= 32).any():  # a line begins with white space: is that all it holds?
        return sum(1 for line in data.split(b"\n") if line.strip())
    return len(starts) + 1
