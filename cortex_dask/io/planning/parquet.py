"""Splits of Parquet files: stretches of row groups.

The same input, planned for as many workers, always gives the same splits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from cortex_dask.errors import DatasetError
from cortex_dask.io.input.files import HIVE_NULL, InputFile, infer_keys
from cortex_dask.io.input.filters import (
    Bounds,
    Filters,
    Verdict,
    bind,
    columns_of,
    judge,
    plain_filters,
    unknown_column,
)
from cortex_dask.io.job.splits import DatasetInput, Piece, Plan, PlanHeader
from cortex_dask.io.planning.packing import Load, Sink, assemble, check_keep, finer_weight, pack, target_weight

if TYPE_CHECKING:
    import pyarrow as pa

    from cortex_dask.io.parquet.footer import Footer, RowGroup

#: What pieces of row groups may decode again for each worker (bytes), so that they are as small as other splits: about
#: a tenth of a second. A handler that is slow makes it up by a shorter tail.
_DECODED_AGAIN = 32 << 20

#: Beyond that a row group is cut inside only if it is more than this share of a worker's work.
_PIECES_PER_WORKER = 3

#: A row weighs at least this much, and this much per column: encoded sizes of dictionaries and runs say little.
_ROW_WEIGHT, _VALUE_WEIGHT = 16, 4


@dataclass(slots=True)
class _Group:
    """A row group that may hold rows that pass."""

    file: InputFile
    number: int
    rows: int
    bytes: int
    weight: int
    verdict: Verdict


class ParquetPlanner:
    """Cuts Parquet files into splits: stretches of row groups."""

    def __init__(
        self,
        dataset: DatasetInput,
        files: list[InputFile],
        filters: Filters | None,
        workers: int,
        keep: Sequence[str],
    ) -> None:
        self._dataset, self._files, self._workers, self._keep = dataset, files, workers, keep
        self._keys = infer_keys(files)
        self._unbound = filters
        self._filters: Filters | None = None

    def plan(self, sink: Sink | None, check: Callable[[], None]) -> Plan:
        """Read the footers, decide the schema, leave out what cannot match, and pack the rest."""
        from cortex_dask.io.parquet.footer import read_footers

        wanted = self._dataset.columns
        filter_columns = columns_of(self._unbound)
        read = None if wanted is None else {*wanted, *filter_columns}
        in_files = [name for name in filter_columns if name not in self._keys]
        footers = read_footers(self._files, read, in_files, check)
        header = self._header(footers, read)
        groups = list(self._groups(footers, len(header.columns or ())))
        counted = sum(group.rows for footer in footers for group in footer.groups)
        if not counted:
            count = len(self._files)
            where = self._files[0].path if count == 1 else f"each of the {count} files, such as {self._files[0].path},"
            raise DatasetError(f"the input has no rows: {where} is empty")
        del footers
        total = sum(group.weight for group in groups)
        loads = self._loads(groups, header, total)
        target = target_weight(total, self._workers)
        finer_from = finer_weight(total, target, self._workers)
        packed = pack(loads, target=target, batch_size=self._dataset.batch_size, finer_from=finer_from)
        made = assemble(replace(header, columns=self._dataset.columns), packed, sink)
        if not made.header.splits:
            raise DatasetError(
                f"none of the {counted} rows in {len(self._files)} files passes the filters "
                f"{plain_filters(self._unbound)!r}: check the filters"
            )
        return made

    def _header(self, footers: list[Footer], read: set[str] | None) -> PlanHeader:
        """Decide the schema; the totals come later."""
        import pyarrow as pa

        from cortex_dask.io.arrow.schema import encode_schema, unify

        distinct: dict[int, tuple[str, pa.Schema]] = {}
        for file, footer in zip(self._files, footers, strict=True):
            distinct.setdefault(id(footer.schema), (file.path, footer.schema))
        names = dict.fromkeys(name for _, schema in distinct.values() for name in schema.names)
        known = dict.fromkeys([*(name for name in names if name not in self._keys), *self._keys])
        for name in self._dataset.columns or ():
            if name not in known:
                raise unknown_column(name, known, "columns")
        for name in columns_of(self._unbound):
            if name not in known:
                raise unknown_column(name, known, "filters")
        check_keep(self._keep, known, self._dataset.columns)
        needed = known if read is None else read
        unified = unify((path, _selected(schema, needed, self._keys)) for path, schema in distinct.values())
        fields = {field.name: field for field in unified}
        fields |= {key: pa.field(key, kind) for key, kind in self._keys.items()}
        output = [name for name in self._dataset.columns or fields if name not in self._keys]
        output += [key for key in self._keys if self._dataset.columns is None or key in self._dataset.columns]
        filter_schema = None
        if self._unbound is not None:
            filtered = pa.schema([fields[name] for name in columns_of(self._unbound)])
            self._filters = bind(self._unbound, filtered)
            filter_schema = encode_schema(filtered)
        both = [key for key in self._keys if key in names and key in needed]
        return PlanHeader(
            format="parquet",
            batch_size=self._dataset.batch_size,
            schema=encode_schema(pa.schema([fields[name] for name in output])),
            columns=tuple(output),
            filters=plain_filters(self._filters),
            files=len(self._files),
            splits=0,
            batches=0,
            batches_exact=True,
            rows=0,
            bytes=0,
            warnings=tuple(
                f"the column {key!r} is in the files and in the names of their folders: the folders' values are used"
                for key in both
            ),
            keys=dict(self._keys),
            filter_schema=filter_schema,
        )

    def _groups(self, footers: Sequence[Footer], columns: int) -> Iterator[_Group]:
        """Yield the row groups that may hold rows that pass."""
        row_weight = max(_ROW_WEIGHT, _VALUE_WEIGHT * columns)
        for file, footer in zip(self._files, footers, strict=True):
            keys = dict(file.keys)
            for number, group in enumerate(footer.groups):
                if not group.rows:
                    continue
                verdict = "all" if self._filters is None else judge(self._filters, self._bounds(group, keys))
                if verdict != "none":
                    weight = max(group.bytes, group.rows * row_weight)
                    yield _Group(file, number, group.rows, group.bytes, weight, verdict)

    def _bounds(self, group: RowGroup, keys: dict[str, str]) -> Callable[[str], Bounds]:
        def bounds(name: str) -> Bounds:
            if name not in self._keys:
                assert group.bounds is not None
                return group.bounds[name]
            text = keys.get(name, HIVE_NULL)
            if text == HIVE_NULL:
                return Bounds(None, None, group.rows, group.rows)
            value = int(text) if self._keys[name] == "int64" else text
            return Bounds(value, value, 0, group.rows)

        return bounds

    def _loads(self, groups: list[_Group], header: PlanHeader, total: int) -> Iterator[Load]:
        """Yield the pieces of the row groups: one each, or several where one row group is too much for one worker."""
        target = target_weight(total, self._workers)
        cuts = [_cuts(group.weight, target / 2) for group in groups]  # most are joined again, by twos
        # Each split decodes its row group up to where it stops, so on average half of it.
        again = sum(group.bytes * cut // 4 for group, cut in zip(groups, cuts, strict=True) if cut > 1)
        if again > _DECODED_AGAIN * self._workers:
            share = max(target, total / (self._workers * _PIECES_PER_WORKER))
            cuts = [_cuts(group.weight, share) for group in groups]
        counted = self._counted(groups, cuts, header)
        for group, cut in zip(groups, cuts, strict=True):
            if group.verdict == "some":
                stretches, cost = next(counted), None
            else:
                stretches = self._even(group.rows, cut)
                cost = 0 if cut > 1 else group.weight
            for start, stop, rows in stretches:
                size = group.bytes * (stop - start) // group.rows
                weight = group.weight * (stop - start) // group.rows
                yield Load(_piece(group, start, stop, rows), rows, size, weight, cost)

    def _even(self, rows: int, cuts: int) -> list[tuple[int, int, int]]:
        """Cut rows into stretches of whole batches: start, stop, rows that pass."""
        step = self._step(rows, cuts)
        return [(start, min(start + step, rows), min(step, rows - start)) for start in range(0, rows, step)]

    def _step(self, rows: int, cuts: int) -> int:
        size = self._dataset.batch_size
        return rows if cuts == 1 else max(size, -(-rows // cuts // size) * size)

    def _counted(
        self, groups: list[_Group], cuts: list[int], header: PlanHeader
    ) -> Iterator[list[tuple[int, int, int]]]:
        """Read the filters' columns where statistics prove nothing, and yield the stretches of these row groups."""
        jobs: dict[str, list[tuple[_Group, int]]] = {}
        for group, cut in zip(groups, cuts, strict=True):
            if group.verdict == "some":
                jobs.setdefault(group.file.path, []).append((group, cut))
        if not jobs:
            return
        from cortex_dask.io.store.source import in_parallel, local_path

        local = local_path(groups[0].file.path) is not None
        work = [job for group_jobs in jobs.values() for job in _portions(group_jobs)]
        for stretches in in_parallel(lambda job: self._count(job, header), work, local=local):
            yield from stretches

    def _count(self, job: list[tuple[_Group, int]], header: PlanHeader) -> list[list[tuple[int, int, int]]]:
        from cortex_dask.io.parquet.reader import RowReader
        from cortex_dask.io.store.source import UnreadableInput

        reader = RowReader(header)
        found = []
        try:
            for group, cut in job:
                passing = reader.passing_rows(_piece(group, 0, group.rows, None))
                stretches = []
                start, step = 0, self._step(max(1, len(passing)), cut)
                for at in range(0, len(passing), step):
                    last = at + step >= len(passing)
                    stop = group.rows if last else int(passing[at + step])
                    stretches.append((start, stop, min(step, len(passing) - at)))
                    start = stop
                found.append(stretches)
        except UnreadableInput as error:
            raise DatasetError(f"the input cannot be read: {error}") from error
        finally:
            reader.close()
        return found


def _cuts(weight: int, share: float) -> int:
    return max(1, round(weight / share)) if weight > 1.5 * share else 1


def _portions(jobs: list[tuple[_Group, int]]) -> Iterator[list[tuple[_Group, int]]]:
    """Cut the row groups of one file into portions that threads can share."""
    for at in range(0, len(jobs), 8):
        yield jobs[at : at + 8]


def _piece(group: _Group, start: int, stop: int, rows: int | None) -> Piece:
    file = group.file
    return Piece(file.path, start, stop, rows, group.number, file.size, file.tag, file.keys)


def _selected(schema: pa.Schema, names: object, keys: dict[str, str]) -> pa.Schema:
    """Return the schema with only the columns that are read, so that others may contradict each other."""
    import pyarrow as pa

    assert isinstance(names, (dict, set))
    return pa.schema([field for field in schema if field.name in names and field.name not in keys])
