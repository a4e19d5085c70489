"""Plan a job over samples: the input kinds ``item_list``, ``file_path_lister`` and ``delimited_files``.

All three become splits of JSON lines, which handler processes read as they read any: items and file paths are written
to the job directory, delimited files are read where they are. Everything is counted beforehand, so batches are exact
before the first one runs, and the splits end at whole batches: only the very last batch of a job is short.

A line of a delimited file that is no JSON becomes a dead letter when it is read. It keeps its place in its batch, which
is one sample shorter; the numbers of batches and their ids do not depend on it.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import orjson

from cortex_dask.errors import DatasetError
from cortex_dask.io.input.files import InputFile, list_prefixes
from cortex_dask.io.job.settings import JobSettings, SampleInput
from cortex_dask.io.job.splits import Piece, Plan, PlanHeader, Split
from cortex_dask.io.planning.items import BATCH_LIMIT, LineChunks, batch_warning, items_folder
from cortex_dask.io.planning.json import refuse_other_formats
from cortex_dask.io.planning.line_counts import CountedFile, count_files
from cortex_dask.io.store.store import Store

#: Splits per worker that are aimed at, so that no worker idles long at the end.
_SPLITS_PER_WORKER = 8
#: No split has more text than this, unless one batch has.
_LARGEST = 64 << 20
#: No split has more batches than this where nothing is returned: what a handler writes itself it would write again
#: when a crash has its split done again.
_MOST_BATCHES = 100
#: But there are never more splits than this; each is a task.
_MOST_SPLITS = 10_000


@dataclass(frozen=True, slots=True)
class SampleSurvey:
    """What a job over samples would process.

    Attributes
    ----------
    files : tuple of (InputFile, int)
        The files, and how many samples each gives; none for an ``item_list``.
    """

    files: tuple[tuple[InputFile, int], ...]
    samples: int
    bytes: int
    splits: int
    batches: int
    warnings: tuple[str, ...]


def enqueue(store: Store, settings: JobSettings, check: Callable[[], None] = lambda: None) -> Plan:
    """List, count, and plan the splits of a job over samples.

    Parameters
    ----------
    store : Store
        The job directory; file lists are written to it, and an ``item_list`` is there already.
    settings : JobSettings
        The job's.
    check : callable
        Called now and then; planning ends with what it raises.

    Raises
    ------
    DatasetError
        If no file matches, the files hold nothing, or one cannot be read.
    """
    given = settings.samples
    assert given is not None
    warnings: list[str] = []
    if given.kind == "delimited_files":
        files = _listed(settings, given, check)
        refuse_other_formats(files)
    elif given.kind == "file_path_lister":
        files, warnings = _write_paths(store, settings, given, check)
    else:
        files = _stored(store, items_folder(given.digest or ""))
    counted = [file for file in count_files(files, check) if file.samples]
    rows, size = sum(file.samples for file in counted), sum(file.bytes for file in counted)
    if not rows:
        raise DatasetError(_empty(files))
    if given.kind == "item_list" and rows != given.items:
        raise DatasetError(f"{store.url} holds {rows} items, but {given.items} were submitted: submit the job again")
    if given.kind == "delimited_files":
        warnings += _large_batches(rows, size, settings)
    per_split = _rows_per_split(rows, size, settings)
    splits = tuple(_splits(counted, per_split, settings))
    return Plan(_header(settings, len(files), splits, rows, size, warnings), splits)


def survey(settings: JobSettings) -> SampleSurvey:
    """List and count what a job over samples would process; nothing is written.

    Raises
    ------
    DatasetError
        As for :func:`enqueue`.
    """
    given = settings.samples
    assert given is not None
    batch_size = settings.dataset.batch_size
    warnings: list[str] = []
    listed: tuple[tuple[InputFile, int], ...] = ()
    if given.kind == "item_list":
        rows, size = given.items or 0, given.size
    elif given.kind == "file_path_lister":
        cutter = LineChunks(batch_size)
        listed = tuple((file, 1) for file in _listed(settings, given, lambda: None))
        for _ in cutter.cut(orjson.dumps(file.path) for file, _ in listed):
            pass
        rows, size, warnings = cutter.count, cutter.size, _large_lists(cutter)
    else:
        files = _listed(settings, given, lambda: None)
        refuse_other_formats(files)
        counted = {file.file.path: file for file in count_files(files, lambda: None) if file.samples}
        rows, size = sum(file.samples for file in counted.values()), sum(file.bytes for file in counted.values())
        listed = tuple((file, counted[file.path].samples if file.path in counted else 0) for file in files)
        if not rows:
            raise DatasetError(_empty(files))
        warnings = _large_batches(rows, size, settings)
        per_split = _rows_per_split(rows, size, settings)
        splits = sum(1 for _ in cut_pieces(counted.values(), per_split, batch_size, settings.workers))
        return SampleSurvey(listed, rows, size, splits, -(-rows // batch_size), tuple(warnings))
    splits = -(-rows // _rows_per_split(rows, size, settings))
    return SampleSurvey(listed, rows, size, splits, -(-rows // batch_size), tuple(warnings))


# files ----------------------------------------------------------------------------------------------------------------


def _listed(settings: JobSettings, given: SampleInput, check: Callable[[], None]) -> list[InputFile]:
    return list(_checked(list_prefixes(settings.dataset.paths, given.includes, given.excludes), check))


def _checked(files: Iterable[InputFile], check: Callable[[], None]) -> Iterator[InputFile]:
    for number, file in enumerate(files):
        if number % 1000 == 0:
            check()
        yield file


def _write_paths(
    store: Store, settings: JobSettings, given: SampleInput, check: Callable[[], None]
) -> tuple[list[InputFile], list[str]]:
    """Write the paths of the files that match, as they are listed, under a name that no other attempt writes to."""
    folder = items_folder(uuid.uuid4().hex[:16])
    cutter = LineChunks(settings.dataset.batch_size)
    found = _checked(list_prefixes(settings.dataset.paths, given.includes, given.excludes), check)
    names = []
    for number, chunk in enumerate(cutter.cut(orjson.dumps(file.path) for file in found)):
        names.append((f"{folder}/items-{number:05d}.jsonl", len(chunk)))
        store.write(names[-1][0], chunk)
    return [_file(store, name, size) for name, size in names], _large_lists(cutter)


def _stored(store: Store, folder: str) -> list[InputFile]:
    return [_file(store, name, store.size(name) or 0) for name in store.names(folder)]


def _file(store: Store, name: str, size: int) -> InputFile:
    return InputFile(f"{store.url.rstrip('/')}/{name}", size, "")


def _empty(files: Sequence[InputFile]) -> str:
    if len(files) == 1:
        return f"the input has no samples: {files[0].path} holds nothing but white space"
    return f"the input has no samples: each of the {len(files)} files, such as {files[0].path}, is empty"


def _large_lists(cutter: LineChunks) -> list[str]:
    return [batch_warning("file_path_lister", cutter.largest_batch)] if cutter.largest_batch > BATCH_LIMIT else []


def _large_batches(rows: int, size: int, settings: JobSettings) -> list[str]:
    mean = size * min(settings.dataset.batch_size, rows) // rows
    return [batch_warning("delimited_files", mean, "about ")] if mean > BATCH_LIMIT else []


# splits ---------------------------------------------------------------------------------------------------------------


def _rows_per_split(rows: int, size: int, settings: JobSettings) -> int:
    """Return how many samples a split has: a multiple of the batch size."""
    batch_size = settings.dataset.batch_size
    batches = -(-rows // batch_size)
    wanted = -(-batches // (settings.workers * _SPLITS_PER_WORKER))
    wanted = min(wanted, max(1, _LARGEST * batches // max(1, size)))
    if settings.output is None:
        wanted = min(wanted, _MOST_BATCHES)
    return batch_size * max(wanted, -(-batches // _MOST_SPLITS))


def _splits(files: Iterable[CountedFile], per_split: int, settings: JobSettings) -> Iterator[Split]:
    sizes: dict[str, float] = {}
    batch_size = settings.dataset.batch_size

    def noted() -> Iterator[CountedFile]:
        for file in files:
            sizes[file.file.path] = file.bytes / file.samples
            yield file

    for number, pieces in enumerate(cut_pieces(noted(), per_split, batch_size, settings.workers)):
        rows = sum(piece.rows or 0 for piece in pieces)
        size = int(sum((piece.rows or 0) * sizes[piece.path] for piece in pieces))
        yield Split(number, tuple(pieces), rows, -(-rows // batch_size), size)


def cut_pieces(files: Iterable[CountedFile], per_split: int, batch_size: int, workers: int) -> Iterator[list[Piece]]:
    """Yield the pieces of each split: ``per_split`` samples, more where a compressed file does not let itself be cut.

    To begin a piece inside of a compressed file, its reader decompresses all that lies before. So such a file is cut
    into no more parts than there are workers to read them at the same time, or just behind its start, to fill up the
    last batch of the split that ends there.

    Parameters
    ----------
    files : iterable of CountedFile
        In input order.
    per_split : int
        A multiple of ``batch_size``; so are the samples of every split but the last.
    batch_size, workers : int
        The job's.
    """
    pieces: list[Piece] = []
    room = per_split
    for file in files:
        share = -(-file.samples // workers // batch_size) * batch_size
        at = 0
        while at < file.samples:
            rest = file.samples - at
            take = min(rest, room)
            if file.is_compressed and rest > room:
                if pieces:
                    take = room = room % batch_size
                else:
                    take = min(rest, max(room, share))
                    room = take + -take % batch_size
            if take:
                pieces.append(file.piece(at, take))
                at, room = at + take, room - take
            if not room:
                yield pieces
                pieces, room = [], per_split
    if pieces:
        yield pieces


def _header(
    settings: JobSettings, files: int, splits: Sequence[Split], rows: int, size: int, warnings: Sequence[str]
) -> PlanHeader:
    return PlanHeader(
        format="json",
        batch_size=settings.dataset.batch_size,
        schema=None,
        columns=None,
        filters=None,
        files=files,
        splits=len(splits),
        batches=-(-rows // settings.dataset.batch_size),
        batches_exact=True,
        rows=rows,
        bytes=size,
        warnings=tuple(warnings),
        any_json=True,
    )
