from __future__ import annotations

import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import pytest

from cortex_dask.errors import StorageError
from cortex_dask.io.store import remote, retry
from cortex_dask.io.store.errors import explain, is_transient
from cortex_dask.io.store.store import Store
from tests.conftest import follow_environment
from tests.support.faulty_s3 import FaultyS3
from tests.support.s3 import SIGNED
from tests.support.stores import BLOCK, StoreSuite, killed_while_staging, one_winner

pytestmark = pytest.mark.s3


class TestS3Store(StoreSuite):
    @pytest.fixture
    def store(self, s3: str, monkeypatch: pytest.MonkeyPatch) -> Store:
        monkeypatch.setattr(remote, "_BLOCK", BLOCK)
        return Store(f"{s3}/deep/store")


def test_a_whole_bucket_is_a_store(s3: str) -> None:
    target = Store(s3)
    assert target.names() == target.children() == []
    target.create("a", b"1")
    target.write("b/c", b"2")
    target.publish("b/c", "b/d", 1)
    assert target.names() == ["a", "b/d"]
    assert target.names("b") == ["b/d"]
    assert target.children() == ["a", "b"]
    assert target.exists()
    target.delete_tree()
    assert target.names() == []


# processes


def test_create_from_many_processes_has_one_winner(s3: str) -> None:
    one_winner(f"{s3}/store")


def test_a_process_killed_while_staging_leaves_nothing_visible(s3: str) -> None:
    killed_while_staging(f"{s3}/store")


FORK = """
import os, sys
from cortex_dask.io.store.store import Store
store = Store(sys.argv[1])
store.write("parent", b"1")
child = os.fork()
if child == 0:
    store.write("child", store.read("parent") + b"2")
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
assert store.read("child") == b"12"
"""


def test_a_store_works_on_both_sides_of_a_fork(s3: str) -> None:
    subprocess.run([sys.executable, "-c", FORK, s3], check=True, timeout=60)


# unfinished uploads


def uploads(url: str) -> list[str]:
    fs, bucket = Store(url).fs, url.removeprefix("s3://").partition("/")[0]
    return [upload["Key"] for upload in fs.call_s3("list_multipart_uploads", Bucket=bucket).get("Uploads", [])]


def test_a_discarded_upload_is_aborted(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "_BLOCK", BLOCK)
    with Store(s3).stage("part") as file:
        file.write(bytes(BLOCK))
        assert uploads(s3) == ["part"]
    assert uploads(s3) == []


def test_delete_tree_aborts_what_the_killed_left(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "_BLOCK", BLOCK)
    files = [Store(s3).stage(name) for name in ("staging/a", "staging-of-others/b")]
    for file in files:
        file.write(bytes(BLOCK))
    Store(s3).delete_tree("staging")
    assert uploads(s3) == ["staging-of-others/b"]
    for file in files:
        file.discard()


def test_a_small_file_is_one_request(faulty_s3: FaultyS3) -> None:
    target = Store(faulty_s3.bucket)
    for operation in (
        lambda: target.write("file", b"x"),
        lambda: target.read("file"),
        lambda: target.create("other", b"x"),
        lambda: target.delete("other", "file"),
        lambda: target.names(),
    ):
        faulty_s3.heal()
        operation()
        assert len(faulty_s3.requests) == 1, faulty_s3.requests
    faulty_s3.heal()
    with target.stage("part") as file:
        file.write(b"x")
        file.commit()
    assert [request.method for request in faulty_s3.requests] == ["PUT"]


# faults: every request of every operation, before and after it took effect


@dataclass(frozen=True)
class Operation:
    """An operation, what must be there before, and what must be there in the end."""

    name: str
    run: Callable[[Store], object]
    before: dict[str, bytes]
    after: dict[str, bytes]
    result: object = None
    writes: bool = True


def stage_small(target: Store) -> int:
    with target.stage("part") as file:
        file.write(b"rows")
        return file.commit()


def stage_large(target: Store) -> int:
    with target.stage("part") as file:
        for _ in range(2):
            file.write(bytes(BLOCK))
        file.write(b"end")
        return file.commit()


def stage_and_discard(target: Store) -> None:
    with target.stage("part") as file:
        file.write(bytes(BLOCK))


def create_what_is_there(target: Store) -> str:
    try:
        target.create("a", b"other")
    except FileExistsError:
        return "refused"
    return "created"


OPERATIONS = [
    Operation("read", lambda target: target.read("a"), {"a": b"1"}, {"a": b"1"}, b"1", writes=False),
    Operation(
        "read_range", lambda target: target.read_range("a", 1, 3), {"a": b"1234"}, {"a": b"1234"}, b"23", writes=False
    ),
    Operation("write", lambda target: target.write("a", b"new"), {"a": b"old"}, {"a": b"new"}),
    Operation("create", lambda target: target.create("a", b"new"), {}, {"a": b"new"}),
    Operation("create refused", create_what_is_there, {"a": b"1"}, {"a": b"1"}, "refused", writes=False),
    Operation("exists", lambda target: target.exists("a"), {"a": b"1"}, {"a": b"1"}, True, writes=False),
    Operation("exists not", lambda target: target.exists("b"), {"a": b"1"}, {"a": b"1"}, False, writes=False),
    Operation("size", lambda target: target.size("a"), {"a": b"1"}, {"a": b"1"}, 1, writes=False),
    Operation(
        "names",
        lambda target: target.names("a"),
        {"a/1": b"1", "b": b""},
        {"a/1": b"1", "b": b""},
        ["a/1"],
        writes=False,
    ),
    Operation("children", lambda target: target.children(), {"a/1": b"1"}, {"a/1": b"1"}, ["a"], writes=False),
    Operation("delete one", lambda target: target.delete("a"), {"a": b"1", "b": b""}, {"b": b""}),
    Operation("delete many", lambda target: target.delete("a", "b"), {"a": b"", "b": b"", "c": b""}, {"c": b""}),
    Operation("delete_tree", lambda target: target.delete_tree("a"), {"a/1": b"", "a/2": b"", "b": b""}, {"b": b""}),
    Operation("publish", lambda target: target.publish("a", "b", 4), {"a": b"rows"}, {"b": b"rows"}),
    Operation("publish again", lambda target: target.publish("a", "b", 4), {"b": b"rows"}, {"b": b"rows"}),
    Operation("stage small", stage_small, {"part": b"old"}, {"part": b"rows"}, 4),
    Operation("stage large", stage_large, {}, {"part": bytes(2 * BLOCK) + b"end"}, 2 * BLOCK + 3),
    Operation("discard", stage_and_discard, {"part": b"old"}, {"part": b"old"}),
]


@pytest.fixture
def quick_retries(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave retrying to the store alone, and let it wait little."""
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    follow_environment()
    monkeypatch.setattr(remote, "_S3FS_TRIES", 1)
    monkeypatch.setattr(retry, "RETRY_DELAYS", (0.01,) * 4)
    monkeypatch.setattr(remote, "_BLOCK", BLOCK)


@pytest.mark.usefixtures("quick_retries")
@pytest.mark.parametrize("how", ["drop", "503"])
@pytest.mark.parametrize(
    ("when", "operation"),
    [
        pytest.param(when, operation, id=f"{operation.name}-{when}")
        for operation in OPERATIONS
        for when in ("before", "after")
        if when == "before" or operation.writes
    ],
)
def test_a_fault_at_any_request(
    faulty_s3: FaultyS3, operation: Operation, when: Literal["before", "after"], how: str
) -> None:
    number = 0
    while True:
        target = Store(f"{faulty_s3.bucket}/{number}")
        faulty_s3.heal()
        for name, data in operation.before.items():
            target.write(name, data)
        faulty_s3.heal()
        faulty_s3.fail(number, when=when, how=how)
        assert operation.run(target) == operation.result
        if number and not faulty_s3.failed:  # the operation makes fewer requests
            break
        found = {name: target.read(name) for name in target.names()}
        assert found == operation.after, f"after a fault {when} request {number}: {faulty_s3.requests}"
        number += 1
    assert number > 1  # no fault at all, and at least one


@pytest.mark.usefixtures("quick_retries")
def test_a_fault_that_stays_is_explained(faulty_s3: FaultyS3) -> None:
    target = Store(faulty_s3.bucket)
    faulty_s3.fail(1, how="503", count=None)
    with pytest.raises(StorageError, match="failed again and again") as caught:
        target.write("a", b"x")
    assert is_transient(caught.value)
    assert len(faulty_s3.requests) >= 5
    faulty_s3.heal()
    assert target.names() == []


@pytest.mark.usefixtures("quick_retries")
@pytest.mark.parametrize("match", ["PUT .*partNumber=2", "POST .*uploadId="])
def test_a_large_file_whose_upload_fails_for_good_is_not_there(faulty_s3: FaultyS3, match: str) -> None:
    target = Store(faulty_s3.bucket)
    faulty_s3.fail(1, how="503", count=None, match=match)
    with pytest.raises(StorageError, match="failed again and again"):
        stage_large(target)
    faulty_s3.heal()
    assert target.names() == []
    assert uploads(faulty_s3.bucket) == []


@pytest.mark.usefixtures("quick_retries")
def test_a_large_file_with_a_lost_block_cannot_be_committed(faulty_s3: FaultyS3) -> None:
    faulty_s3.fail(1, how="503", count=None, match="PUT .*partNumber=2")
    with Store(faulty_s3.bucket).stage("part") as file:
        file.write(bytes(BLOCK))
        with pytest.raises(StorageError, match="failed again and again"):
            file.write(bytes(BLOCK))
        faulty_s3.heal()
        with pytest.raises(StorageError, match="discard it"):
            file.write(bytes(BLOCK))
        with pytest.raises(StorageError, match="discard it"):
            file.commit()
    assert Store(faulty_s3.bucket).names() == uploads(faulty_s3.bucket) == []


@pytest.mark.usefixtures("quick_retries")
def test_an_upload_that_was_completed_by_a_lost_request(faulty_s3: FaultyS3) -> None:
    """What servers answer that do not remember completed uploads."""
    faulty_s3.fail(1, when="after", how="404 NoSuchUpload", match="POST .*uploadId=", count=None)
    assert stage_large(Store(faulty_s3.bucket)) == 2 * BLOCK + 3
    assert faulty_s3.failed == 1


@pytest.mark.usefixtures("quick_retries")
def test_an_upload_that_was_aborted_by_somebody_else(s3: str) -> None:
    target = Store(s3)
    with target.stage("folder/part") as file:
        file.write(bytes(BLOCK))
        Store(s3).delete_tree("folder")
        with pytest.raises(StorageError, match="aborted by somebody else"):
            file.commit()
    assert target.names() == []


def test_the_default_settings_survive_a_fault(faulty_s3: FaultyS3) -> None:
    faulty_s3.fail(1, when="after", how="drop", match="PUT")
    faulty_s3.fail(3, when="before", how="503", match="PUT")
    target = Store(faulty_s3.bucket)
    target.create("a", b"1")
    target.create("b", b"2")
    assert target.names() == ["a", "b"]
    assert faulty_s3.failed == 2


def test_the_user_may_set_how_often_botocore_tries(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def attempts() -> int:
        fs = Store(s3).fs
        fs.exists(s3)
        return int(fs.s3.meta.config.retries["total_max_attempts"])

    assert attempts() == 3
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "7")
    follow_environment()
    assert attempts() == 7


# explanations


def refused(target: str, operation: Callable[[Store], object] = lambda target: target.write("a", b"")) -> StorageError:
    with pytest.raises(StorageError) as caught:
        operation(Store(target))
    text = str(caught.value)
    assert "\n" not in text
    assert "testing" not in text  # the secret key of the test server
    return caught.value


@pytest.mark.parametrize(
    "operation",
    [
        lambda target: target.read("a"),
        lambda target: target.write("a", b""),
        lambda target: target.create("a", b""),
        lambda target: target.names(),
        lambda target: target.children(),
        lambda target: target.size("a"),
        lambda target: target.exists("a"),
        lambda target: target.publish("a", "b", 1),
        lambda target: target.delete("a"),
        lambda target: target.delete("a", "b"),
        lambda target: target.delete_tree("a"),
        stage_small,
        stage_large,
    ],
)
def test_a_bucket_that_does_not_exist(s3: str, operation: Callable[[Store], object]) -> None:
    error = refused(f"{s3}-no", operation)
    assert str(error).startswith(f"the bucket {s3.removeprefix('s3://')}-no does not exist")
    assert not isinstance(error, FileNotFoundError)


def test_a_bucket_name_that_is_impossible(s3: str) -> None:
    assert "not a possible bucket name" in str(refused("s3://No_Bucket!/x"))


def test_no_credentials(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    follow_environment()
    error = refused(s3)
    assert str(error).startswith(f"there are no credentials for {s3}")
    assert "AWS_ACCESS_KEY_ID" in str(error)
    assert isinstance(error, PermissionError)


@pytest.mark.parametrize(
    ("code", "sentence"),
    [
        ("InvalidAccessKeyId", "were refused"),
        ("SignatureDoesNotMatch", "were refused"),
        ("ExpiredToken", "were refused"),
        ("AccessDenied", "access to .* is denied"),
        ("RequestTimeTooSkewed", "clock"),
    ],
)
def test_wrong_credentials_and_permissions(faulty_s3: FaultyS3, code: str, sentence: str) -> None:
    faulty_s3.fail(1, how=f"403 {code}", count=None)
    for operation in (stage_small, lambda target: target.read("a"), lambda target: target.names()):
        faulty_s3.requests.clear()
        with pytest.raises(PermissionError, match=sentence) as caught:
            operation(Store(faulty_s3.bucket))
        assert isinstance(caught.value, StorageError)
        assert len(faulty_s3.requests) == 1, "it was tried again"
    with pytest.raises(PermissionError, match=r"is denied \(403\)"):  # an answer to HEAD has no code
        Store(faulty_s3.bucket).size("a")


def test_another_region(faulty_s3: FaultyS3) -> None:
    faulty_s3.fail(1, how="400 AuthorizationHeaderMalformed", count=None)
    assert "AWS_DEFAULT_REGION" in str(refused(faulty_s3.bucket))


def test_a_full_store(faulty_s3: FaultyS3) -> None:
    faulty_s3.fail(1, how="507 XMinioStorageFull", count=None)
    assert "no space is left" in str(refused(faulty_s3.bucket))


@pytest.mark.usefixtures("quick_retries")
def test_an_endpoint_that_nobody_listens_at(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as held:  # bound, not listening: the port is refused and nobody else gets it
        held.bind(("127.0.0.1", 0))
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{held.getsockname()[1]}")
        follow_environment()
        assert "cannot be reached" in str(refused(s3))


def test_an_endpoint_that_is_no_url(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "localhost-without-scheme")
    follow_environment()
    assert "is not a URL" in str(refused(s3))


def test_an_error_of_s3fs_itself_is_explained(s3: str) -> None:
    """The errors of inputs that other modules read straight through fsspec."""
    with pytest.raises(FileNotFoundError) as caught:
        Store(f"{s3}-no").fs.ls(f"{s3}-no")
    assert "does not exist" in str(explain(caught.value, f"{s3}-no/x"))


# the proxy itself


def test_the_proxy_fails_the_requests_it_was_told_to(faulty_s3: FaultyS3) -> None:
    faulty_s3.fail(2, match="GET .*/a", how="503", count=2)
    Store(faulty_s3.bucket).write("a", b"1")
    url = f"{faulty_s3.url}/{faulty_s3.bucket.removeprefix('s3://')}/a"
    request = urllib.request.Request(url, headers={"Authorization": SIGNED})
    statuses = []
    for _ in range(5):
        try:
            with urllib.request.urlopen(request, timeout=10) as answer:
                statuses.append(answer.status)
        except urllib.error.HTTPError as error:
            statuses.append(error.code)
            error.close()
    assert statuses == [200, 503, 503, 200, 200]
    assert faulty_s3.failed == 2
