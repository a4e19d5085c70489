"""Where models lie, which versions there are, and their copy on a host."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from cortex_dask.errors import InputError, StorageError
from cortex_dask.io.cache import prune
from cortex_dask.io.store.store import Store
from cortex_dask.tensorflow import models
from cortex_dask.tensorflow.models import Model, Models


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of its own."""
    monkeypatch.setenv("DASK_CORTEX_DASK__CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def save(store: Store, content: bytes = b"graph", *, variables: bytes = b"numbers") -> None:
    """Put files there as a SavedModel has them."""
    store.write("saved_model.pb", content)
    store.write("variables/variables.index", b"index")
    store.write("variables/variables.data-00000-of-00001", variables)


def content(folder: str) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


WHOLE = {
    "saved_model.pb": b"graph",
    "variables/variables.index": b"index",
    "variables/variables.data-00000-of-00001": b"numbers",
}


# versions -------------------------------------------------------------------------------------------------------------


def test_a_model_without_versions(store_url: str) -> None:
    save(Store(store_url))
    model = Model(None, store_url)
    assert model.version() == model.version("1") == model.version(1) == "1"
    assert content(model.local_folder()) == WHOLE


def test_the_latest_version_is_the_highest_number(store_url: str) -> None:
    store = Store(store_url)
    for number in ("2", "10", "9"):
        save(store.child(number), number.encode())
    store.write("notes.txt", b"")
    store.write("tmp/saved_model.pb", b"")
    model = Model("m", store_url)
    assert [model.version(), model.version("2"), model.version(9), model.version("010")] == ["10", "2", "9", "10"]
    assert content(model.local_folder())["saved_model.pb"] == b"10"
    assert content(model.local_folder("2"))["saved_model.pb"] == b"2"
    with pytest.raises(
        InputError, match=r"^the model m \(.*\) has no version '3'; it has 2, 9, 10, and latest is the "
    ):
        model.version("3")


def test_a_process_keeps_to_one_latest_version(tmp_path: Path) -> None:
    save(Store(str(tmp_path)).child("1"))
    model = Model(None, str(tmp_path))
    assert model.version() == "1"
    save(Store(str(tmp_path)).child("2"))
    assert model.version() == "1"
    assert Model(None, str(tmp_path)).version() == "2"


def test_an_incomplete_version_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save(Store(str(tmp_path)).child("1"))
    Store(str(tmp_path)).write("2/variables/variables.index", b"")
    assert Model(None, str(tmp_path)).version() == "1"
    assert [record.getMessage() for record in caplog.records] == [
        f"the model {tmp_path}: no saved_model.pb in 2, so not used as a version"
    ]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], "is not there, or empty; it should hold saved_model.pb, or folders 1, 2, … that do"),
        (
            ["model.onnx", "1/readme"],
            "holds neither saved_model.pb nor folders 1, 2, … that do; it holds 1, model.onnx",
        ),
        (["saved_model.pb", "3/saved_model.pb"], "holds a saved_model.pb and the versions 3; move the first into a"),
    ],
)
def test_a_folder_that_is_no_model(tmp_path: Path, files: list[str], message: str) -> None:
    for name in files:
        Store(str(tmp_path / "m")).write(name, b"x")
    with pytest.raises(InputError, match=re.escape(f"the model {tmp_path}/m {message}")):
        Model(None, str(tmp_path / "m")).version()


# the configuration ----------------------------------------------------------------------------------------------------


def test_one_model_has_no_name(tmp_path: Path) -> None:
    found = Models.from_settings({"path": "export", "signature_key": "s"}, str(tmp_path))
    assert found.get(None) is found.get("whatever") is found.only
    assert (found.only.url, found.only.signature_key) == (str(tmp_path / "export"), "s")


def test_listed_models(tmp_path: Path) -> None:
    entries = [{"name": "a", "path": "s3://b/a", "signature_key": "own"}, {"name": "b", "path": "/b"}]
    found = Models.from_settings({"paths": entries, "signature_key": "shared"}, str(tmp_path))
    assert found.only is None
    assert [found.get(name).signature_key for name in "ab"] == ["own", "shared"]
    assert [found.get(name).url for name in "ab"] == ["s3://b/a", "/b"]
    with pytest.raises(InputError, match=r"^model_name is missing: the models are a, b$"):
        found.get(None)
    with pytest.raises(InputError, match=r"^there is no model 'c'; the models are a, b$"):
        found.get("c")


def test_a_folder_of_models(store_url: str) -> None:
    for name in ("a/1", "b"):
        save(Store(store_url).child(name))
    found = Models.from_settings({"dir": store_url})
    found.check()
    assert found.get("a").version() == "1"
    assert found.get("a") is found.get("a")
    with pytest.raises(InputError, match=r"^model_name is missing: the models are a, b$"):
        found.get(None)
    for name in ("c", "../a", "a/1", ""):
        with pytest.raises(InputError, match=re.escape(f"there is no model {name!r}; the models are a, b")):
            found.get(name)


@pytest.mark.parametrize(
    "settings", [{"path": "x"}, {"paths": [{"name": "a", "path": "x"}]}, {"dir": "x"}], ids=["path", "paths", "dir"]
)
def test_a_missing_model_is_found_before_any_batch(tmp_path: Path, settings: dict) -> None:
    with pytest.raises(InputError, match=re.escape(f"{tmp_path}/x") + r"\)? is not there, or empty; it should hold"):
        Models.from_settings(settings, str(tmp_path)).check()


def test_settings_without_models() -> None:
    with pytest.raises(InputError, match="needs models with one of the keys path, paths and dir"):
        Models.from_settings({})


# the copy on this host ------------------------------------------------------------------------------------------------


def test_a_local_model_is_used_in_place(tmp_path: Path, cache: Path) -> None:
    save(Store(str(tmp_path / "m" / "4")))
    assert Model(None, str(tmp_path / "m")).local_folder() == str(tmp_path / "m" / "4")
    assert not cache.exists()


@pytest.mark.s3
def test_a_model_is_fetched_once(s3: str, cache: Path, counted: Callable[[], int]) -> None:
    url = f"{s3}/m"
    save(Store(url).child("1"))
    first = Model(None, url).local_folder()
    assert content(first) == WHOLE
    assert Path(first).parent == cache / "models"
    assert Path(first).stat().st_mode & 0o077 == 0
    fetched = counted()
    assert fetched == 3
    assert Model("other name", url).local_folder() == first
    assert counted() == fetched


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """How many stretches of files were read so far."""
    count = 0
    read = Store.read_range

    def reading(store: Store, name: str, start: int, stop: int) -> bytes:
        nonlocal count
        count += 1
        return read(store, name, start, stop)

    monkeypatch.setattr(Store, "read_range", reading)
    return lambda: count


@pytest.mark.s3
def test_a_replaced_model_is_fetched_again(s3: str) -> None:
    save(Store(f"{s3}/m"))
    old = Model(None, f"{s3}/m").local_folder()
    save(Store(f"{s3}/m"), variables=b"changed")  # of the same length: only the ETag tells
    new = Model(None, f"{s3}/m").local_folder()
    assert new != old
    assert content(new)["variables/variables.data-00000-of-00001"] == b"changed"
    assert content(old) == WHOLE


@pytest.mark.s3
def test_large_files_are_fetched_in_blocks(
    s3: str, monkeypatch: pytest.MonkeyPatch, counted: Callable[[], int]
) -> None:
    monkeypatch.setattr(models, "BLOCK_SIZE", 1000)
    numbers = bytes(range(256)) * 17  # 4,352 bytes
    save(Store(f"{s3}/m"), variables=numbers)
    assert content(Model(None, f"{s3}/m").local_folder())["variables/variables.data-00000-of-00001"] == numbers
    assert counted() == 2 + 5


@pytest.mark.s3
def test_a_model_that_changes_while_it_is_fetched(s3: str, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    store = Store(f"{s3}/m")
    save(store)
    read = Store.read_range
    changes = 0

    def reading(self: Store, name: str, start: int, stop: int) -> bytes:
        nonlocal changes
        if name == "saved_model.pb" and changes < limit:
            changes += 1
            store.write("saved_model.pb", f"graph{changes}".encode())
        return read(self, name, start, stop)

    monkeypatch.setattr(Store, "read_range", reading)
    limit = 1
    assert content(Model(None, store.url).local_folder())["saved_model.pb"] == b"graph1"
    limit = 100
    store.write("saved_model.pb", b"again")
    with pytest.raises(StorageError, match="was replaced 3 times while it was fetched"):
        Model(None, store.url).local_folder()
    assert len([path for path in (cache / "models").iterdir() if path.is_dir()]) == 1  # nothing half is left


FETCH = """
import json, sys
from cortex_dask.io.store.store import Store
from cortex_dask.tensorflow.models import Model
count, read = 0, Store.read_range
def reading(*arguments):
    global count
    count += 1
    return read(*arguments)
Store.read_range = reading
print(json.dumps([Model(None, sys.argv[1]).local_folder(), count]))
"""


@pytest.mark.s3
def test_one_of_several_processes_fetches(s3: str) -> None:
    save(Store(f"{s3}/m"), variables=os.urandom(1_000_000))

    def run(_: int) -> list:
        command = [sys.executable, "-c", FETCH, f"{s3}/m"]
        return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, timeout=60).stdout)

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(run, range(4)))
    assert len({folder for folder, _ in found}) == 1
    assert sorted(count for _, count in found) == [0, 0, 0, 3]


@pytest.mark.s3
def test_a_fetch_that_fails_leaves_nothing(s3: str, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    save(Store(f"{s3}/m"))

    def failing(store: Store, name: str, start: int, stop: int) -> bytes:
        raise StorageError("the store is gone")

    with monkeypatch.context() as patch:
        patch.setattr(Store, "read_range", failing)
        with pytest.raises(StorageError, match="the store is gone"):
            Model(None, f"{s3}/m").local_folder()
    assert [path for path in (cache / "models").iterdir() if path.is_dir()] == []
    assert content(Model(None, f"{s3}/m").local_folder()) == WHOLE


def test_models_that_are_not_used_are_removed(cache: Path) -> None:
    """In a process of its own: this one would go on using it."""
    script = (
        "import sys; from cortex_dask.io.cache import hold; from pathlib import Path; "
        "print(hold('models', 'ab12', lambda folder: Path(folder, 'saved_model.pb').write_bytes(b'x')))"
    )
    made = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout.strip()
    assert Path(made, "saved_model.pb").exists()
    assert prune() == []
    assert prune(unused_days=-1) == ["ab12"]
    assert not Path(made).exists()


def test_any_file_system_of_fsspec(cache: Path) -> None:
    store = Store("memory://models-of-a-test/m")
    save(store)
    assert content(Model(None, store.url).local_folder()) == WHOLE
    store.delete_tree()
