"""What every store must do, whatever it stands on: subclass :class:`StoreSuite` and give it a fixture ``store``."""

from __future__ import annotations

import pickle
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cortex_dask.errors import StorageError
from cortex_dask.io.store.store import Store

#: Names that some layer could take for a pattern, a query, a fragment or an escape.
ODD_NAMES = ["a b.txt", "[x].txt", "100%41.txt", "héllo.txt", "q?.txt", "star*.txt", "#1.txt", "a+b&c=d.txt"]

#: The smallest block of a multipart upload that S3 takes, and a file of more than two.
BLOCK = 5 << 20
LARGE = 2 * BLOCK + 5


class StoreSuite:
    """The conformance suite; ``store`` is an empty store."""

    @pytest.fixture
    def store(self) -> Store:
        raise NotImplementedError

    # reading and writing

    def test_write_then_read(self, store: Store) -> None:
        store.write("deep/down/file.txt", b"content")
        assert store.read("deep/down/file.txt") == b"content"

    def test_write_replaces(self, store: Store) -> None:
        store.write("file", b"a long content")
        store.write("file", b"short")
        assert store.read("file") == b"short"

    def test_write_nothing(self, store: Store) -> None:
        store.write("empty", b"")
        assert store.read("empty") == b""
        assert store.size("empty") == 0

    def test_read_a_missing_file(self, store: Store) -> None:
        with pytest.raises(FileNotFoundError):
            store.read("nothing/here")

    def test_read_range(self, store: Store) -> None:
        store.write("file", b"0123456789")
        assert store.read_range("file", 2, 5) == b"234"
        assert store.read_range("file", 8, 99) == b"89"
        assert store.read_range("file", 4, 4) == b""
        assert store.read_range("file", 20, 30) == b""

    @pytest.mark.parametrize("name", ODD_NAMES)
    def test_odd_names(self, store: Store, name: str) -> None:
        store.write(f"folder/{name}", b"odd")
        store.write("folder/x.txt", b"bystander")
        assert store.read(f"folder/{name}") == b"odd"
        assert store.names() == sorted([f"folder/{name}", "folder/x.txt"])
        with store.stage("staged") as file:
            file.write(b"new")
            size = file.commit()
        store.publish("staged", f"folder/{name}", size)
        assert store.read(f"folder/{name}") == b"new"
        store.delete(f"folder/{name}")
        assert store.names() == ["folder/x.txt"]

    @pytest.mark.parametrize("name", ["../outside", "a/../../outside", "/outside"])
    def test_a_name_cannot_leave_the_store(self, store: Store, name: str) -> None:
        with pytest.raises(ValueError, match="below a store"):
            store.write(name, b"")

    # creating

    def test_create(self, store: Store) -> None:
        store.create("ledger/0", b"first")
        with pytest.raises(FileExistsError):
            store.create("ledger/0", b"second")
        assert store.read("ledger/0") == b"first"

    def test_create_again_with_the_same_content(self, store: Store) -> None:
        store.create("file", b"same")
        store.create("file", b"same")
        assert store.read("file") == b"same"

    def test_create_from_many_threads_has_one_winner(self, store: Store) -> None:
        barrier = Barrier(8)

        def create(number: int, name: str) -> bool:
            barrier.wait(timeout=30)
            try:
                store.create(name, b"%d" % number)
            except FileExistsError:
                return False
            return True

        with ThreadPoolExecutor(8) as threads:
            for turn in range(5):
                name = f"turn-{turn}"
                won = list(threads.map(create, range(8), [name] * 8))
                assert sum(won) == 1
                assert store.read(name) == b"%d" % won.index(True)

    # looking

    def test_exists_and_size(self, store: Store) -> None:
        store.write("folder/file", b"12345")
        assert store.exists("folder/file")
        assert store.exists("folder")
        assert store.exists()
        assert not store.exists("folder/other")
        assert not store.exists("folder/file/below")
        assert store.size("folder/file") == 5
        assert store.size("folder") is None
        assert store.size("other") is None

    def test_an_empty_store(self, store: Store) -> None:
        assert store.names() == []
        assert store.sizes() == {}
        assert store.children() == []
        assert store.children("folder") == []

    def test_names_and_sizes(self, store: Store) -> None:
        for number, name in enumerate(["b/2", "a", "b/1", "b/c/3", "bb"]):
            store.write(name, bytes(number))
        assert store.names() == ["a", "b/1", "b/2", "b/c/3", "bb"]
        assert store.names("b/") == ["b/1", "b/2", "b/c/3"]
        assert store.names("b") == ["b/1", "b/2", "b/c/3", "bb"]
        assert store.names("b/c/3") == ["b/c/3"]
        assert store.names("c") == []
        assert store.names("c/d") == []
        assert store.sizes("b/") == {"b/1": 2, "b/2": 0, "b/c/3": 3}
        assert store.child("b").names() == ["1", "2", "c/3"]

    def test_children(self, store: Store) -> None:
        for name in ["b/2", "a", "b/1", "b/c/3"]:
            store.write(name, b"")
        assert store.children() == ["a", "b"]
        assert store.children("b") == store.children("b/") == ["1", "2", "c"]
        assert store.children("a") == []

    def test_listings_are_never_stale(self, store: Store) -> None:
        other = Store(store.url)
        for number in range(3):
            assert len(store.names("folder/")) == len(store.children("folder")) == number
            assert not store.exists(f"folder/{number}")
            assert store.size(f"folder/{number}") is None
            other.write(f"folder/{number}", b"x")
            assert store.exists(f"folder/{number}")
            assert store.size(f"folder/{number}") == 1
        other.delete("folder/0", "folder/1", "folder/2")
        assert store.names() == []

    # deleting

    def test_delete(self, store: Store) -> None:
        for name in ["a", "b/1", "b/2"]:
            store.write(name, b"")
        store.delete("a")
        store.delete("a", "b/1", "never/there")
        assert store.names() == ["b/2"]
        store.delete()
        assert store.names() == ["b/2"]

    def test_delete_tree(self, store: Store) -> None:
        for name in ["a/1", "a/b/2", "ab/3", "c"]:
            store.write(name, b"")
        store.delete_tree("a")
        assert store.names() == ["ab/3", "c"]
        store.delete_tree("a")
        store.delete_tree("never/there")
        store.delete_tree()
        assert store.names() == []

    # staging and publishing

    def test_stage_and_commit(self, store: Store) -> None:
        with store.stage("folder/part") as file:
            assert file.writable()
            assert file.write(b"abc") == 3
            file.write(memoryview(b"defg"))
            file.flush()
            assert file.tell() == 7
            assert store.names() == []
            assert file.commit() == 7
            assert file.commit() == 7
            file.discard()  # too late, does nothing
        assert store.read("folder/part") == b"abcdefg"
        assert file.closed

    def test_stage_an_empty_file(self, store: Store) -> None:
        with store.stage("empty") as file:
            assert file.commit() == 0
        assert store.size("empty") == 0

    def test_stage_a_large_file(self, store: Store) -> None:
        chunk = bytes(range(256)) * 4096  # 1 MiB
        with store.stage("large") as file:
            while file.tell() < LARGE:
                file.write(chunk[: LARGE - file.tell()])
            assert store.names() == []
            assert file.commit() == LARGE
        assert store.size("large") == LARGE
        assert store.read_range("large", 5, 9) == bytes([5, 6, 7, 8])
        assert store.read_range("large", LARGE - 5, LARGE) == bytes([0, 1, 2, 3, 4])

    @pytest.mark.parametrize("size", [10, LARGE])
    def test_an_exception_publishes_nothing(self, store: Store, size: int) -> None:
        def fail() -> None:
            with file:
                file.write(bytes(size))
                raise ZeroDivisionError

        file = store.stage("part")
        with pytest.raises(ZeroDivisionError):
            fail()
        assert store.names() == []
        with pytest.raises(ValueError, match="discarded"):
            file.commit()

    def test_leaving_without_a_commit_publishes_nothing(self, store: Store) -> None:
        with store.stage("part") as file:
            file.write(b"abc")
        assert store.names() == []
        with pytest.raises(ValueError, match="discarded"):
            file.write(b"d")

    def test_a_discarded_file_leaves_an_older_one_alone(self, store: Store) -> None:
        store.write("part", b"old")
        with store.stage("part") as file:
            file.write(b"new")
            assert store.read("part") == b"old"
        assert store.read("part") == b"old"

    def test_close_ends_writing_and_a_commit_may_follow(self, store: Store) -> None:
        with store.stage("part") as file:
            file.write(b"abc")
            file.close()
            with pytest.raises(ValueError, match="closed"):
                file.write(b"d")
            assert file.commit() == 3
        assert store.read("part") == b"abc"

    def test_a_staged_file_is_a_sink_for_pyarrow(self, store: Store) -> None:
        table = pa.table({"x": list(range(1000)), "y": ["text"] * 1000})
        with store.stage("part") as file:
            with pq.ParquetWriter(pa.PythonFile(file, mode="w"), table.schema) as writer:
                for batch in table.to_batches(max_chunksize=100):
                    writer.write_batch(batch)
            size = file.commit()
        data = store.read("part")
        assert len(data) == size
        assert pq.read_table(pa.BufferReader(data)) == table

    def test_publish(self, store: Store) -> None:
        store.write("_temporary/part", b"rows")
        store.publish("_temporary/part", "key=1/part.parquet", 4)
        assert store.names() == ["key=1/part.parquet"]
        store.publish("_temporary/part", "key=1/part.parquet", 4)
        assert store.read("key=1/part.parquet") == b"rows"

    def test_publish_what_is_nowhere(self, store: Store) -> None:
        with pytest.raises(StorageError, match="has vanished"):
            store.publish("staged", "final", 4)
        store.write("final", b"too long")
        with pytest.raises(StorageError, match="has vanished"):
            store.publish("staged", "final", 4)

    def test_publish_from_many_threads(self, store: Store) -> None:
        store.write("staged", b"rows")
        with ThreadPoolExecutor(8) as threads:
            for published in [threads.submit(store.publish, "staged", "final", 4) for _ in range(8)]:
                published.result()
        assert store.names() == ["final"]
        assert store.read("final") == b"rows"

    # values

    def test_a_store_travels_by_its_url(self, store: Store) -> None:
        store.write("a/b", b"x")
        other = pickle.loads(pickle.dumps(store))
        assert other == store == Store(store.url)
        assert hash(other) == hash(store)
        assert other.child("a").read("b") == b"x"
        assert store.child("a").url == f"{store.url}/a"

    def test_fs_and_path(self, store: Store) -> None:
        store.write("a/b", b"x")
        assert store.fs.cat_file(store.path("a/b")) == b"x"


# with processes


def python(script: str, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-c", script, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


CREATE = """
import sys
from cortex_dask.io.store.store import Store
store = Store(sys.argv[1])
store.names()
print("ready", flush=True)
sys.stdin.readline()
try:
    store.create("file", sys.argv[2].encode() * 10_000)
    print("won", flush=True)
except FileExistsError:
    print("lost", flush=True)
"""


def one_winner(url: str, processes: int = 4) -> None:
    """Let processes create the same file at once and check that one of them did."""
    running = [python(CREATE, url, str(number)) for number in range(processes)]
    for process in running:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in running:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    answers = [process.communicate(timeout=60)[0] for process in running]
    assert sorted(answers) == ["lost\n"] * (processes - 1) + ["won\n"]
    assert Store(url).read("file") == str(answers.index("won\n")).encode() * 10_000
    assert Store(url).names() == ["file"]


KILLED = """
import os, signal, sys
from cortex_dask.io.store.store import Store
store = Store(sys.argv[1])
with store.stage("folder/part") as file:
    file.write(bytes(40 << 20))
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)
"""


def killed_while_staging(url: str) -> None:
    """Let a process die in the middle of writing and check that nobody sees a file."""
    process = python(KILLED, url)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    assert Store(url).names() == []
    Store(url).delete_tree("folder")
    assert not Store(url).exists("folder")
