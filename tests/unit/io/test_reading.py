"""What readers of both formats promise: values that travel, errors that name the file, and a change that is noticed."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cortex_dask.errors import StorageError
from cortex_dask.io.batch import BadLine, Batch, Position
from cortex_dask.io.job.splits import DatasetInput, Plan
from cortex_dask.io.planning.plan import plan
from cortex_dask.io.reading import read_split
from cortex_dask.io.store.source import UnreadableInput, tag_of, translated


@pytest.fixture
def memory() -> fsspec.AbstractFileSystem:
    fs = fsspec.filesystem("memory")
    fs.store.clear()
    return fs


def rows_of(made: Plan) -> list[dict[str, object]]:
    found: list[dict[str, object]] = []
    for split in made:
        for item in read_split(split, made.header):
            assert isinstance(item, Batch)
            found += item.data if isinstance(item.data, list) else item.data.to_pylist()
    return found


def test_values_that_leave_the_reader_can_be_pickled() -> None:
    for value in (
        UnreadableInput("a.parquet", "is damaged: x"),
        BadLine("a", 1, 0, "x", "not JSON"),
        Batch(0, [{"a": 1}], 1, (Position("a", "bytes", 0, 9),)),
    ):
        again = pickle.loads(pickle.dumps(value))
        assert repr(again) == repr(value)
        assert str(again) == str(value)


def test_both_formats_come_from_any_file_system(memory: fsspec.AbstractFileSystem, tmp_path: Path) -> None:
    pq.write_table(pa.table({"n": range(10)}), tmp_path / "x.parquet", row_group_size=3)
    memory.pipe("/in/k=1/x.parquet", (tmp_path / "x.parquet").read_bytes())
    memory.pipe("/lines/x.jsonl", b"".join(b'{"n": %d}\n' % n for n in range(1000)))
    for split in plan(DatasetInput(("memory://in/k=1/x.parquet",), batch_size=4), workers=2):
        assert all(piece.path == "memory://in/k=1/x.parquet" for piece in split.pieces)
    made = plan(DatasetInput(("memory://in/",), batch_size=4), workers=2)
    assert rows_of(made) == [{"n": n, "k": 1} for n in range(10)]
    made = plan(DatasetInput(("memory://lines/*.jsonl",), batch_size=4), workers=2)
    assert len(made.splits) > 5
    assert rows_of(made) == [{"n": n} for n in range(1000)]


def test_a_remote_file_that_changed_is_refused(memory: fsspec.AbstractFileSystem) -> None:
    memory.pipe("/in/x.jsonl", b'{"n": 1}\n')
    made = plan(DatasetInput(("memory://in/",)), workers=1)
    assert rows_of(made) == [{"n": 1}]
    memory.pipe("/in/x.jsonl", b'{"n": 2}\n')
    with pytest.raises(UnreadableInput, match=r"^memory://in/x\.jsonl has changed since the job was planned"):
        rows_of(made)
    memory.rm("/in/x.jsonl")
    with pytest.raises(UnreadableInput, match="is gone since the job was planned"):
        rows_of(made)


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (FileNotFoundError(2, "no"), UnreadableInput, "is gone"),
        (PermissionError(13, "no"), StorageError, "access to x is denied"),
        (ConnectionResetError(104, "reset"), StorageError, "x failed again and again"),
        (EOFError("ended before"), UnreadableInput, "is truncated or damaged: ended before"),
        (pa.ArrowInvalid("bad\npage"), UnreadableInput, "is damaged: bad page"),
        (OSError("Corrupt snappy compressed data."), UnreadableInput, "is damaged: Corrupt snappy"),
        (MemoryError("full"), MemoryError, "full"),
        (KeyError("a bug"), KeyError, "a bug"),
    ],
)
def test_what_goes_wrong_is_either_the_file_or_the_store(
    error: BaseException, kind: type[BaseException], message: str
) -> None:
    with pytest.raises(kind, match=message), translated("x"):
        raise error


def test_the_tag_is_the_same_however_a_file_system_writes_it() -> None:
    assert tag_of({"ETag": '"abc"', "LastModified": 1}) == "etag:abc"
    assert tag_of({"etag": "abc"}) == "etag:abc"
    assert tag_of({"size": 3}) == ""


def test_reading_lines_does_not_import_what_it_does_not_need() -> None:
    """The start-up time of a handler process is the start-up time of a small job."""
    code = (
        "import sys, cortex_dask.io.json.reader\n"
        "print(*{name.partition('.')[0] for name in sys.modules} & {'pandas', 'fsspec', 'pyarrow', 'dask'})\n"
        "import cortex_dask.io.parquet.reader\n"
        "print(*{name.partition('.')[0] for name in sys.modules} & {'pandas', 'fsspec', 'dask'})\n"
    )
    done = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True, check=True)
    assert done.stdout == "\n\n"
