"""Plan JSON files: how many rows they hold is known only when they are read, so a sample tells roughly.

The estimate: bytes per record and compression ratio of the first 256 KiB (1 MiB decompressed) of up to 16 files, spread
evenly over the input, hold for all. Filters are not taken into account.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import orjson

from cortex_dask.errors import CortexDaskError, DatasetError
from cortex_dask.io.input.files import InputFile, infer_keys
from cortex_dask.io.input.filters import Filters, columns_of, plain_filters, unknown_column
from cortex_dask.io.job.splits import DatasetInput, Piece, Plan, PlanHeader, Split
from cortex_dask.io.json.file import JsonFile
from cortex_dask.io.json.reader import parse_line
from cortex_dask.io.planning.packing import Load, pack
from cortex_dask.io.store.errors import explain
from cortex_dask.io.store.source import UnreadableInput, translated

_FILES = 16
_PLAIN, _COMPRESSED = 256 << 10, 1 << 20  # bytes of each
_ENDINGS = (".gz", ".bz2", ".zst", ".zstd")
_ENOUGH = 10  # lines of which none is JSON: then the files are something else


@dataclass(frozen=True, slots=True)
class FileSample:
    """The first records of a file."""

    path: str
    cuttable: bool  # plain lines
    ratio: float  # decompressed bytes for each byte of the file
    bytes: int  # of the records, decompressed
    rows: int
    malformed: int
    keys: frozenset[str]
    whole: bool  # nothing is left out


def plan_json(
    dataset: DatasetInput,
    files: Sequence[InputFile],
    filters: Filters | None,
    workers: int,
    *,
    keep: Sequence[str],
    any_json: bool,
    sink: Callable[[Split], None] | None = None,
) -> Plan:
    """Plan the splits of JSON files; see :func:`cortex_dask.io.planning.plan.plan`."""
    from cortex_dask.io.planning.packing import assemble, finer_weight, target_weight

    filled = [file for file in files if file.size]
    if not filled:
        raise DatasetError(f"the input has no rows: all of its {len(files)} files are empty, such as {files[0].path}")
    samples = _samples(filled[:: -(-len(filled) // _FILES)], any_json=any_json)
    everything = len(samples) == len(filled) and all(sample.whole for sample in samples)
    rows, size = sum(sample.rows for sample in samples), sum(sample.bytes for sample in samples)
    if everything and not rows and not any(sample.malformed for sample in samples):
        raise DatasetError(f"the input has no rows: {filled[0].path} holds nothing but white space or an empty array")
    keys = {} if any_json else infer_keys(files)
    warnings = [] if any_json else _check_names(dataset, filters, keep, samples, keys, everything=everything)
    row_bytes = size / rows if rows else max(1.0, size)
    packed_ratios = [sample.ratio for sample in samples if sample.ratio != 1]
    ratio = sum(packed_ratios) / len(packed_ratios) if packed_ratios else 1.0
    known = {sample.path: sample for sample in samples}
    weights = [_weight(file, known, ratio) for file in filled]
    target = max(target_weight(sum(weights), workers), row_bytes * dataset.batch_size)
    large = [
        file
        for file, weight in zip(filled, weights, strict=True)
        if weight > 1.5 * target and file.path not in known and not file.path.endswith(_ENDINGS)
    ]
    known |= {sample.path: sample for sample in _samples(large, any_json=any_json)}
    loads = []
    for file, weight in zip(filled, weights, strict=True):
        sample = known.get(file.path)
        cuttable = sample is not None and sample.cuttable
        cuts = max(1, round(weight / target)) if cuttable and weight > 1.5 * target else 1
        if not cuttable and weight > 4 * target and sum(weights) > 4 * target:
            warnings.append(
                f"{file.path} is read by one worker alone, because it is compressed or an array: "
                "write it as plain JSON lines or as several files to read it in parallel"
            )
        for cut in range(cuts):
            start, stop = file.size * cut // cuts, file.size * (cut + 1) // cuts
            piece = Piece(file.path, start, stop, None, None, file.size, file.tag, () if any_json else file.keys)
            share = max(1, weight // cuts)
            loads.append(Load(piece, max(1, round(share / row_bytes)), share, share, None))
    header = PlanHeader(
        format="json",
        batch_size=dataset.batch_size,
        schema=None,
        columns=dataset.columns,
        filters=plain_filters(filters, exact=False),
        files=len(files),
        splits=0,
        batches=0,
        batches_exact=False,
        rows=0,
        bytes=0,
        warnings=tuple(warnings[:20]),
        keys=dict(keys),
        any_json=any_json,
    )
    finer_from = finer_weight(sum(weights), target, workers)
    packed = pack(loads, target=target, batch_size=dataset.batch_size, align=False, finer_from=finer_from)
    return assemble(header, packed, sink)


def refuse_other_formats(files: Sequence[InputFile]) -> None:
    """Look into some of the files.

    Raises
    ------
    DatasetError
        If none of their first lines is JSON: they are something else.
    """
    filled = [file for file in files if file.size]
    _samples(filled[:: max(1, -(-len(filled) // _FILES))], any_json=True)


def _weight(file: InputFile, known: dict[str, FileSample], ratio: float) -> int:
    sample = known.get(file.path)
    if sample is not None:
        return int(file.size * sample.ratio)
    return int(file.size * ratio) if file.path.endswith(_ENDINGS) else file.size


def _samples(files: Sequence[InputFile], *, any_json: bool) -> list[FileSample]:
    from cortex_dask.io.store.source import in_parallel, local_path

    if not files:
        return []
    local = local_path(files[0].path) is not None
    samples: list[FileSample] = list(in_parallel(lambda file: _sample(file, any_json=any_json), files, local=local))
    malformed = sum(sample.malformed for sample in samples)
    if malformed >= _ENOUGH and not any(sample.rows for sample in samples):
        what = "JSON" if any_json else "a JSON object"
        raise DatasetError(
            f"{samples[0].path} does not hold JSON lines: none of the first {malformed} lines of the input is {what}; "
            "check the paths, or give the input's format"
        )
    return samples


def _sample(file: InputFile, *, any_json: bool) -> FileSample:
    try:
        with translated(file.path), JsonFile(file.path, file.size, file.tag) as opened:
            data, consumed, whole = opened.sample(_COMPRESSED if opened.is_compressed else _PLAIN)
            array, compressed = opened.is_array and not any_json, opened.is_compressed
    except (UnreadableInput, CortexDaskError) as error:
        raise DatasetError(f"the input cannot be read: {error}") from error
    except OSError as error:
        raise DatasetError(f"the input cannot be read: {explain(error, file.path)}") from error
    records, malformed, size = _array_records(data, whole=whole) if array else _line_records(data, whole=whole)
    if malformed and not records and b"\0" in data:
        raise DatasetError(f"{file.path} holds binary data, not JSON: check the path, or give the input's format")
    if not any_json:
        objects = [record for record in records if isinstance(record, dict)]
        malformed += len(records) - len(objects)
        records = objects
        if malformed and not records and whole and not array:
            _refuse_document(file.path, data)
    keys = frozenset[str]().union(*(record for record in records if isinstance(record, dict)))
    ratio = len(data) / consumed if compressed and consumed else 1.0
    return FileSample(file.path, not array and not compressed, ratio, size, len(records), malformed, keys, whole)


def _line_records(data: bytes, *, whole: bool) -> tuple[list[Any], int, int]:
    if not whole and b"\n" in data:
        data = data[: data.rfind(b"\n") + 1]
    lines = data.split(b"\n")
    if not lines[-1]:
        lines.pop()
    try:
        return list(map(orjson.loads, lines)), 0, len(data)  # the values themselves do not matter here
    except orjson.JSONDecodeError:
        pass  # some line is blank, malformed or for the other parser
    records, malformed = [], 0
    for line in lines:
        if line.strip():
            try:
                records.append(parse_line(line))
            except (ValueError, RecursionError):
                malformed += 1
    return records, malformed if whole or b"\n" in data else 0, len(data)


def _array_records(data: bytes, *, whole: bool) -> tuple[list[Any], int, int]:
    text = data.decode("utf-8", errors="replace")
    parse = json.JSONDecoder().raw_decode
    at = text.index("[") + 1
    records = []
    while True:
        while at < len(text) and text[at] in " \t\r\n,":
            at += 1
        try:
            value, at = parse(text, at)
        except (ValueError, RecursionError):  # the end of the array or of the sample; the reader tells which
            break
        records.append(value)
    return records, 0, at


def _refuse_document(path: str, data: bytes) -> None:
    """Say so if the whole file is one object over several lines."""
    try:
        document = json.loads(data)
    except (ValueError, RecursionError):
        return
    if isinstance(document, dict):
        raise DatasetError(
            f"{path} is one JSON object over several lines: write each record on one line, or all as an array"
        )


def _check_names(
    dataset: DatasetInput,
    filters: Filters | None,
    keep: Sequence[str],
    samples: list[FileSample],
    keys: dict[str, str],
    *,
    everything: bool,
) -> list[str]:
    """Look for the columns in the sample; as records may differ, a missing one is an error only if it holds all."""
    known = dict.fromkeys(sorted({key for sample in samples for key in sample.keys}) + list(keys))
    warnings = []
    for where, names in (("columns", dataset.columns or ()), ("filters", columns_of(filters)), ("keep", keep)):
        for name in names:
            if name not in known:
                error = unknown_column(name, known, where)
                if everything and known:
                    raise error
                warnings.append(f"{error} in the records that were looked at")
    return warnings
