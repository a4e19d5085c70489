from __future__ import annotations

import errno
import importlib.util
import os
import stat
import subprocess
import sys
import uuid
from pathlib import Path

import pytest

from cortex_dask.errors import CortexDaskError, InputError, StorageError
from cortex_dask.io.store import errors
from cortex_dask.io.store.errors import explain, is_transient
from cortex_dask.io.store.store import Store
from tests.support.stores import StoreSuite, killed_while_staging, one_winner, python


class TestLocalStore(StoreSuite):
    @pytest.fixture
    def store(self, tmp_path: Path) -> Store:
        return Store(str(tmp_path / "store"))


class TestMemoryStore(StoreSuite):
    @pytest.fixture
    def store(self) -> Store:
        return Store(f"memory://{uuid.uuid4().hex}")


# imports


def test_a_local_store_imports_nothing_heavy(tmp_path: Path) -> None:
    script = """
import sys
from cortex_dask.io.store.store import Store
assert "cortex_dask.io.store.remote" not in sys.modules
store = Store(sys.argv[1])
store.create("a", b"x"); store.write("b", b"y"); store.names()
with store.stage("c") as file:
    file.write(b"z"); file.commit()
heavy = {"fsspec", "s3fs", "botocore", "aiohttp", "pyarrow", "pandas", "numpy", "dask", "asyncio"} & sys.modules.keys()
assert not heavy, heavy
"""
    process = python(script, str(tmp_path))
    process.communicate(timeout=60)
    assert process.returncode == 0


# URLs


@pytest.mark.parametrize(
    ("url", "normalised"),
    [
        ("/data/out/", "/data/out"),
        ("/data/./x/../out", "/data/out"),
        ("file:///data/out", "/data/out"),
        ("local:///data/out", "/data/out"),
        ("s3://bucket/out/", "s3://bucket/out"),
        ("s3://bucket", "s3://bucket"),
        ("S3://Bucket/Out", "s3://Bucket/Out"),
        ("memory:///x/y", "memory:///x/y"),
    ],
)
def test_urls_are_normalised(url: str, normalised: str) -> None:
    store = Store(url)
    assert store.url == normalised
    assert Store(store.url).url == normalised
    assert store.is_local == normalised.startswith("/")


def test_relative_and_home_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert Store("out").url == str(tmp_path / "out")
    assert Store("~/out").url == str(tmp_path / "home" / "out")


def test_an_empty_url_is_refused() -> None:
    with pytest.raises(InputError, match="empty"):
        Store(" ")


def test_a_password_in_a_url_is_refused_and_not_shown() -> None:
    with pytest.raises(InputError, match="password") as caught:
        Store("sftp://ann:hunter2@host/data")
    assert "hunter2" not in str(caught.value)
    assert "sftp://host/data" in str(caught.value)


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("s3://key:se/cr@bucket/x", "s3://key:se/cr@bucket/x"),  # not a user info: it cannot hold a slash
        ("sftp://ann:secret@host/data", "sftp://host/data"),
        ("ftp://ann:se@cret@host/data", "ftp://host/data"),
        ("abfs://container@account.dfs.core.windows.net/x", "abfs://container@account.dfs.core.windows.net/x"),
        ("https://host/file?X-Amz-Signature=secret", "https://host/file"),
        ("/data/a:b@c", "/data/a:b@c"),
    ],
)
def test_what_is_shown_of_a_url(url: str, shown: str) -> None:
    assert errors.shown_url(url) == shown


# local files


def test_unfinished_files_are_hidden_and_then_gone(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    with store.stage("part") as file:
        assert file.local_path is not None
        assert Path(file.local_path).parent == tmp_path
        assert len(list(tmp_path.iterdir())) == 1
        assert store.names() == store.children() == []
    assert list(tmp_path.iterdir()) == []


def test_a_writer_may_use_the_local_path(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    with store.stage("part") as file:
        assert file.local_path is not None
        Path(file.local_path).write_bytes(b"native")
        assert file.commit() == 6
    assert store.read("part") == b"native"


def test_files_have_the_permissions_that_the_user_asked_for(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    before = os.umask(0o027)
    try:
        store.write("a", b"")
        store.create("b", b"")
        with store.stage("c") as file:
            file.commit()
    finally:
        os.umask(before)
    for name in "abc":
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o640


def test_publish_refuses_a_staged_file_that_was_changed(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    store.write("staged", b"1234")
    with pytest.raises(StorageError, match="4 bytes, but 5"):
        store.publish("staged", "final", 5)
    assert store.names() == ["staged"]


def test_links_to_files_are_listed_and_links_to_folders_not_followed(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    store.write("a/file", b"x")
    (tmp_path / "loop").symlink_to(tmp_path)
    (tmp_path / "link").symlink_to(tmp_path / "a" / "file")
    assert [name for name in store.names() if name != "loop"] == ["a/file", "link"]


def test_create_from_many_processes_has_one_winner(tmp_path: Path) -> None:
    one_winner(str(tmp_path))
    assert len(list(tmp_path.iterdir())) == 1


def test_a_process_killed_while_staging_leaves_nothing_visible(tmp_path: Path) -> None:
    killed_while_staging(str(tmp_path))


def test_create_where_links_are_not_supported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:  # what FAT and some network file systems answer; none can be mounted here
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", refuse)
    store = Store(str(tmp_path))
    store.create("file", b"first")
    with pytest.raises(FileExistsError):
        store.create("file", b"second")
    store.create("file", b"first")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    TestLocalStore().test_create_from_many_threads_has_one_winner(store.child("threads"))


FULL = """
import sys
from cortex_dask.errors import StorageError
from cortex_dask.io.store.store import Store
store = Store(sys.argv[1])
store.write("small", b"kept")
def stage():
    with store.stage("staged") as file:
        file.write(bytes(3 << 20))
        file.commit()
def stage_slowly():
    with store.stage("staged") as file:
        for _ in range(3 << 10):
            file.write(bytes(1 << 10))
        file.commit()
def write():
    store.write("small", bytes(3 << 20))
def create():
    store.create("new", bytes(3 << 20))
for attempt in (write, create, stage, stage_slowly):
    try:
        attempt()
    except StorageError as error:
        assert sys.argv[2] in str(error), error
        assert error.errno == int(sys.argv[3])
    else:
        raise SystemExit("it was written")
    assert store.names() == ["small"], store.names()
    import os
    assert os.listdir(store.url) == ["small"], os.listdir(store.url)
assert store.read("small") == b"kept"
"""


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path) -> None:
    shell = 'mount -t tmpfs -o size=1m none "$1" && shift && exec "$@"'
    unshare = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", shell, "sh", str(tmp_path)]
    try:
        subprocess.run([*unshare, "true"], check=True, capture_output=True)
    except (FileNotFoundError, subprocess.CalledProcessError):
        pytest.skip("this system lets nobody mount a small file system")
    command = [*unshare, sys.executable, "-c", FULL, str(tmp_path), "no space is left", str(errno.ENOSPC)]
    subprocess.run(command, check=True, timeout=60)


def test_a_file_over_the_size_limit_leaves_nothing_behind(tmp_path: Path) -> None:
    limit = "import resource, signal\nresource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))\n"
    ignore = "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
    command = [sys.executable, "-c", limit + ignore + FULL, str(tmp_path), "larger than", str(errno.EFBIG)]
    subprocess.run(command, check=True, timeout=60)


# explanations


def explained(url: str, error: Exception) -> str:
    found = explain(error, url)
    assert isinstance(found, CortexDaskError)
    assert "\n" not in str(found)
    return str(found)


def test_a_file_in_the_place_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(StorageError, match="a file, not a directory"):
        Store(str(tmp_path / "file")).write("below", b"")
    with pytest.raises(StorageError, match="a file, not a directory"):
        Store(str(tmp_path / "file")).stage("below")


def test_a_folder_in_the_place_of_a_file(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="is a directory"):
        Store(str(tmp_path.parent)).write(tmp_path.name, b"")
    with pytest.raises(StorageError, match="is a directory"):
        Store(str(tmp_path.parent)).read(tmp_path.name)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(PermissionError, match=r"access to .* is denied") as caught:
            Store(str(tmp_path)).write("file", b"")
        assert isinstance(caught.value, StorageError)
    finally:
        tmp_path.chmod(0o700)


def test_a_read_only_file_system() -> None:
    text = explained("/mnt/x", OSError(errno.EROFS, os.strerror(errno.EROFS)))
    assert text == "/mnt/x is on a read-only file system: choose another place"


def test_an_unknown_protocol_suggests_a_known_one() -> None:
    with pytest.raises(InputError, match="unknown protocol 's3n4'") as caught:
        Store("s3n4://bucket/x").read("y")
    assert "did you mean s3" in str(caught.value)


def test_a_protocol_whose_package_is_missing() -> None:
    packages = {"gs": "gcsfs", "abfs": "adlfs", "oci": "ocifs", "oss": "ossfs"}
    protocol = next((key for key, name in packages.items() if importlib.util.find_spec(name) is None), None)
    if protocol is None:
        pytest.skip("every file system is installed here")
    with pytest.raises(InputError, match=f"pip install {packages[protocol]}"):
        Store(f"{protocol}://bucket/x").read("y")


def test_an_explained_error_is_left_alone() -> None:
    error = StorageError("it is so")
    assert explain(error, "s3://bucket") is error


def test_an_unknown_error_is_shown_on_one_line_without_a_password() -> None:
    text = explained("s3://bucket/x", RuntimeError("bad\n  thing at http://ann:secret@host/y"))
    assert text == "s3://bucket/x cannot be used: bad thing at http://host/y"


@pytest.mark.parametrize(
    ("error", "transient"),
    [
        (ConnectionResetError(errno.ECONNRESET, "reset"), True),
        (TimeoutError("slow"), True),
        (OSError(errno.ESTALE, "stale"), True),
        (OSError(errno.ENOSPC, "full"), False),
        (FileNotFoundError(errno.ENOENT, "none"), False),
        (PermissionError(errno.EACCES, "no"), False),
        (ValueError("x"), False),
        (KeyError("x"), False),
    ],
)
def test_transient_errors(error: Exception, transient: bool) -> None:
    assert is_transient(error) is transient
    wrapped = StorageError("explained")
    wrapped.__cause__ = error
    assert is_transient(wrapped) is transient


def test_errors_of_a_program_keep_their_class(tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        Store(str(tmp_path)).write("file", "text")  # type: ignore[arg-type]  # the error under test
    assert list(tmp_path.iterdir()) == []
