"""The exactly-once property, checked on output, ledger and dead letters together, from what lies in the stores."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import orjson
import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet

from cortex_dask.io.job.failures import to_frame
from cortex_dask.io.job.records import CAUSES, SplitRecord
from cortex_dask.io.job.splits import Split, batch_id
from cortex_dask.io.store.store import Store
from tests.faults.handlers import answer
from tests.faults.jobs import GROUP, FaultJob

__all__ = ["Result", "committed_only", "exactly_once", "output_ids", "visible"]


@dataclass(frozen=True)
class Result:
    """What a finished job has made."""

    status: dict[str, Any]
    letters: list[dict[str, Any]]  # the dead letters that stand
    records: dict[int, SplitRecord]
    parts: dict[str, list[int]]  # the ids in each part, in order
    splits: dict[int, Split]
    batches: list[list[int]]  # the ids in each planned batch; empty for JSON, where the plan does not know

    def sharing_a_batch(self, ids: Collection[int]) -> list[int]:
        """Return the ids that are in a batch with one of these."""
        return sorted(number for batch in self.batches if not set(ids).isdisjoint(batch) for number in batch)

    @property
    def dead_ids(self) -> list[int]:
        """The ids in the payloads of the dead letters."""
        return sorted(
            row["id"] for letter in self.letters if letter["batch"] is not None for row in letter["payload"] or ()
        )


def exactly_once(job: FaultJob, *, status: str | None = None, unread: int = 0) -> Result:
    """Check a finished job, and return what it has made.

    Parameters
    ----------
    job : FaultJob
        The job.
    status : str, optional
        The status that it must have; None: ``succeeded`` or ``completed with failures``, as its dead letters say.
    unread : int
        How many ids are in batches that could not be read, so that their dead letters have no payload.
    """
    store, output = job.directory.store, job.output
    header = job.directory.plan_header()
    assert header is not None
    splits = _splits(job)
    records = _ledger(store)
    assert records.keys() == splits.keys(), "a record for each split"

    parts = _check_parts(job, records)
    letters = _dead_letters(store, job, records, splits)
    _check_letters(job, letters)
    found = _check_rows(job, parts, letters, unread)
    _check_order(job, records, splits, parts)

    for number, record in records.items():
        failed = sum(1 for failure in record.failures if failure.batch is not None)
        assert record.succeeded + failed == record.batches, record
        assert record.rows_out == (record.part.rows if record.part else 0)
        if splits[number].batches is not None:
            assert record.batches == splits[number].batches
    if header.batches_exact:
        planned = [record for number, record in records.items() if splits[number].base is None]
        assert sum(record.batches for record in planned) == header.batches

    document = job.status()
    failed_batches = len(letters)
    assert document["status"] == (status or ("completed with failures" if failed_batches else "succeeded")), document
    assert document["failed_batches"] == failed_batches
    assert document["batches_in_queue"] == 0
    assert document["batches_done"] == document["total_batch_count"]
    assert document["rows_out"] == len(found)
    assert document["parts"] == len(parts)
    assert document["end_time"] is not None
    _check_seal(job, output, records, document, complete=not failed_batches)

    frame = to_frame(job.directory)
    assert sorted(frame["batch_id"]) == sorted(letter["batch_id"] for letter in letters)
    batches = [batch for split in splits.values() if split.base is None for batch in _batches(job, split)]
    return Result(document, letters, records, parts, splits, batches)


def committed_only(job: FaultJob) -> int:
    """Check the output of a job that has not ended well; returns how many parts its ledger has.

    What a reader sees is whole, is in the ledger, and is there once.
    """
    committed = {record.part.name: record.part for record in _ledger(job.directory.store).values() if record.part}
    sizes = job.output.sizes()
    for name in visible(job.output):
        assert sizes[name] == committed[name].bytes
    ids = output_ids(job.output)
    assert len(set(ids)) == len(ids)
    assert not job.output.exists("_SUCCESS")
    return len(committed)


def visible(output: Store) -> list[str]:
    """Return the files that a reader of the directory sees."""
    return [name for name in output.names() if not any(piece.startswith(("_", ".")) for piece in name.split("/"))]


def output_ids(output: Store, format: str = "parquet") -> list[int]:
    """Read the ids in an output directory as any reader would, sorted."""
    if not visible(output):
        return []
    dataset = pyarrow.dataset.dataset(output.path(), filesystem=output.fs, format=format)
    return sorted(dataset.to_table(columns=["id"])["id"].to_pylist())


def _splits(job: FaultJob) -> dict[int, Split]:
    store = job.directory.store
    names = [name for name in store.names("plan/") if name.endswith(".jsonl")]
    found = [Split.from_json(orjson.loads(line)) for name in names for line in store.read(name).splitlines()]
    splits = {split.number: split for split in found}
    assert len(splits) == len(found)
    return splits


def _ledger(store: Store) -> dict[int, SplitRecord]:
    names = store.names("ledger/")
    assert names == [f"ledger/{number:010d}.jsonl" for number in range(len(names))], "segments without a gap"
    found = [SplitRecord.from_json(orjson.loads(line)) for name in names for line in store.read(name).splitlines()]
    records = {record.split: record for record in found}
    assert len(records) == len(found), "one record for each split"
    return records


def _check_parts(job: FaultJob, records: dict[int, SplitRecord]) -> dict[str, list[int]]:
    """Check that the parts in the output are those in the ledger, and return their ids in order."""
    output, settings = job.output, job.settings.output
    assert settings is not None
    sizes = output.sizes()
    stated = {record.part.name: record.part for record in records.values() if record.part is not None}
    own = set(visible(output)) - _foreign(job)
    assert own == stated.keys(), "the visible parts are those in the ledger"
    parts: dict[str, list[int]] = {}
    for name, part in stated.items():
        assert sizes[name] == part.bytes
        table = _read(output, name, settings.format)
        assert table.num_rows == part.rows > 0
        ids = table["id"].to_pylist()
        assert table["answer"].to_pylist() == [answer(number) for number in ids], "the answers are to these ids"
        parts[name] = ids
    return parts


def _foreign(job: FaultJob) -> set[str]:
    """Return the parts of earlier jobs, of which an append keeps all."""
    assert job.settings.output is not None
    if job.settings.output.mode != "append":
        return set()
    replaces = set(job.directory.read_json("plan/replaces.json"))
    assert replaces <= set(visible(job.output)), "appending keeps what was there"
    return replaces


def _read(output: Store, name: str, format: str) -> pa.Table:
    """Read a part with another reader than the whole directory."""
    data = output.read(name)
    if format == "parquet":
        return pyarrow.parquet.read_table(io.BytesIO(data))
    return pa.Table.from_pylist([orjson.loads(line) for line in data.splitlines()])


def _dead_letters(
    store: Store, job: FaultJob, records: dict[int, SplitRecord], splits: dict[int, Split]
) -> list[dict[str, Any]]:
    """Return the dead letters that stand, found without the engine's own reader."""
    standing: dict[str, dict[str, Any]] = {}
    for number in sorted(records):  # a retry has a higher number than what it repeats
        record, split = records[number], splits[number]
        for index in split.only or () if split.base is not None else ():
            del standing[batch_id(job.settings.job_id, split.origin, index)]
        letters = {}
        if record.failures_file is not None:
            lines = store.read(record.failures_file).splitlines()
            letters = {letter["batch_id"]: letter for letter in map(orjson.loads, lines)}
            assert len(letters) == len(lines)
        assert letters.keys() == {failure.batch_id for failure in record.failures}
        for failure in record.failures:
            letter = letters[failure.batch_id]
            assert (letter["batch"], letter["cause"], letter["attempts"], letter["rows"]) == (
                failure.batch,
                failure.cause,
                failure.attempts,
                failure.rows,
            )
        standing.update(letters)
    return list(standing.values())


def _check_letters(job: FaultJob, letters: list[dict[str, Any]]) -> None:
    for letter in letters:
        assert letter["cause"] in CAUSES
        assert letter["error"]
        assert letter["attempts"] >= 1
        if letter["batch"] is None:
            assert letter["cause"] == "malformed input"
            assert letter["payload"]
            continue
        assert letter["batch_id"] == batch_id(job.settings.job_id, letter["split"], letter["batch"])
        if letter["cause"] == "exception":
            assert letter["error"].partition(":")[0] in letter["traceback"]
        if letter["cause"] != "unreadable input":
            assert len(letter["payload"]) == letter["rows"]
            assert letter["position"]


def _check_rows(job: FaultJob, parts: dict[str, list[int]], letters: list[dict[str, Any]], unread: int) -> list[int]:
    """Check that every id of the input is in the output once, or in the dead letter; returns those in the output."""
    output, settings = job.output, job.settings.output
    assert settings is not None
    everything = Counter(output_ids(output, settings.format))
    found = Counter(number for ids in parts.values() for number in ids)
    assert everything == found + Counter(job.earlier), "a reader of the directory sees these parts and earlier data"
    assert not [number for number, count in found.items() if count > 1], "no row twice"
    dead = Counter(row["id"] for letter in letters if letter["batch"] is not None for row in letter["payload"] or ())
    assert not dead & found, "no row both in the output and in the dead letter"
    assert not [number for number, count in dead.items() if count > 1]
    missing = job.ids - found.keys() - dead.keys()
    assert len(missing) == unread, f"lost: {sorted(missing)[:20]}"
    assert found.keys() | dead.keys() | missing == job.ids, "no row from nowhere"
    if missing:
        rows = sum(letter["rows"] for letter in letters if letter["batch"] is not None and not letter["payload"])
        assert rows == unread
    return list(found)


def _check_order(
    job: FaultJob, records: dict[int, SplitRecord], splits: dict[int, Split], parts: dict[str, list[int]]
) -> None:
    """Check that each part holds its split's rows in input order."""
    for number, record in records.items():
        ids = parts[record.part.name] if record.part else []
        batches = _batches(job, splits[number])
        if not batches:  # JSON: byte ranges, one file after the other
            assert ids == sorted(ids)
            continue
        failed = {failure.batch for failure in record.failures}
        only = splits[number].only
        wanted = [batch for index, batch in enumerate(batches) if only is None or index in only]
        indexes = range(len(batches)) if only is None else only
        kept = [batch for index, batch in zip(indexes, wanted, strict=True) if index not in failed]
        assert ids == [row for batch in kept for row in batch]


def _batches(job: FaultJob, split: Split) -> list[list[int]]:
    """Return the ids in each batch of a split, as the plan has it."""
    if any(piece.group is None for piece in split.pieces):
        return []
    rows: list[int] = []
    for piece in split.pieces:
        first = job.firsts[piece.path] + (piece.group or 0) * GROUP
        rows += range(first + piece.start, first + piece.stop)
    size = job.settings.dataset.batch_size
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def _check_seal(
    job: FaultJob, output: Store, records: dict[int, SplitRecord], document: dict[str, Any], *, complete: bool
) -> None:
    names = output.names()
    assert ("_SUCCESS" in names) == complete
    assert not [name for name in names if name.startswith("_temporary")], "nothing staged is left"
    manifest = orjson.loads(output.read("_manifest.json"))
    listed = {item["name"]: item for item in manifest["parts"]}
    assert len(listed) == len(manifest["parts"])
    assert listed.keys() == set(visible(output))
    for record in records.values():
        if record.part is not None:
            item = listed[record.part.name]
            assert (item["rows"], item["bytes"]) == (record.part.rows, record.part.bytes)
    assert manifest["rows"] == sum(item["rows"] for item in manifest["parts"])
    assert manifest["bytes"] == sum(item["bytes"] for item in manifest["parts"])
    assert manifest["status"] == document["status"]
    assert manifest["job_id"] == job.settings.job_id
