"""Dead letters on their way to a queue or a folder: the messages, the receipts, and targets that fail."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson
import pytest

from cortex_dask.errors import SpecError
from cortex_dask.io.job.directory import JobDirectory
from cortex_dask.io.job.ledger import Ledger
from cortex_dask.io.job.records import BatchFailure, SplitRecord
from cortex_dask.io.job.settings import HandlerSettings, JobSettings
from cortex_dask.io.job.splits import DatasetInput
from cortex_dask.io.store.store import Store
from cortex_dask.runtime.dead_letters.delivery import Delivery, make_delivery
from cortex_dask.runtime.dead_letters.sqs import SIZE_LIMIT, Origin, message, requests
from cortex_dask.runtime.dead_letters.target import read_letters
from tests.support.faulty_s3 import FaultyS3
from tests.support.sqs import Queue

ORIGIN = Origin("job-1", "digits", "/jobs/job-1")


def letter(number: int = 0, payload: Any = ({"x": 1},), **changes: Any) -> dict[str, Any]:
    values = {
        "batch_id": f"00000000-0000-5000-8000-{number:012d}",
        "split": 0,
        "batch": number,
        "position": [["in/0.parquet", "rows", number * 10, number * 10 + 10]],
        "rows": 10,
        "attempts": 3,
        "cause": "exception",
        "error": "ValueError: no",
        "traceback": "Traceback …",
        "payload": payload,
    }
    return {**values, **changes}


class TestMessage:
    def test_the_body_is_the_payload_and_the_attributes_say_where_it_comes_from(self) -> None:
        entry = message(letter(payload=[{"x": 1, "text": "grün"}]), ORIGIN, "failures/a.jsonl")

        assert json.loads(entry["MessageBody"]) == [{"x": 1, "text": "grün"}]
        assert {name: value["StringValue"] for name, value in entry["MessageAttributes"].items()} == {
            "job_id": "job-1",
            "api_name": "digits",
            "batch_id": letter()["batch_id"],
            "cause": "exception",
            "attempts": "3",
            "rows": "10",
            "error": "ValueError: no",
        }
        assert entry["MessageAttributes"]["attempts"]["DataType"] == "Number"
        assert "MessageGroupId" not in entry

    def test_a_fifo_queue_gets_a_group_and_tells_repetitions_by_the_batch(self) -> None:
        entry = message(letter(), ORIGIN, "failures/a.jsonl", fifo=True)
        assert (entry["MessageGroupId"], entry["MessageDeduplicationId"]) == ("job-1", letter()["batch_id"])

    @pytest.mark.parametrize(
        ("payload", "reason"), [(None, "there is no payload"), (["x" * SIZE_LIMIT], "larger than a message")]
    )
    def test_what_has_no_place_in_a_message_is_pointed_to(self, payload: Any, reason: str) -> None:
        entry = message(letter(payload=payload), ORIGIN, "failures/a.jsonl")

        body = json.loads(entry["MessageBody"])
        assert (body["batch_id"], body["failures_file"]) == (letter()["batch_id"], "failures/a.jsonl")
        assert (body["job"], body["rows"]) == ("/jobs/job-1", 10)
        assert reason in body["reason"]
        assert entry["MessageAttributes"]["pointer"]["StringValue"] == "true"

    def test_the_limit_counts_bytes_and_attributes(self) -> None:
        empty = message(letter(payload=[""]), ORIGIN, "f")
        attributes = sum(
            len(name) + len(value["DataType"]) + len(value["StringValue"])
            for name, value in empty["MessageAttributes"].items()
        )
        room = SIZE_LIMIT - attributes - len('[""]')
        fits, too_long = (message(letter(payload=["é" * (count // 2)]), ORIGIN, "f") for count in (room, room + 2))
        assert isinstance(json.loads(fits["MessageBody"]), list)
        assert "pointer" in too_long["MessageAttributes"]

    def test_characters_that_a_queue_refuses_are_escaped(self) -> None:
        strange = "\x00 \x1f \ufffe \uffff \ud800"
        entry = message(letter(payload=[strange], error=f"ValueError: {strange}"), ORIGIN, "f")
        assert json.loads(entry["MessageBody"]) == [strange]
        texts = [entry["MessageBody"], entry["MessageAttributes"]["error"]["StringValue"]]
        assert not any(character in text for text in texts for character in "\x00\x1f\ufffe\uffff\ud800")

    def test_an_error_without_words_still_has_an_attribute(self) -> None:
        assert message(letter(error=""), ORIGIN, "f")["MessageAttributes"]["error"]["StringValue"] == "-"


class TestRequests:
    def test_ten_messages_at_most(self) -> None:
        entries = [message(letter(number), ORIGIN, "f") for number in range(25)]
        groups = list(requests(entries))
        assert [len(group) for group in groups] == [10, 10, 5]
        assert [entry for group in groups for entry in group] == entries

    def test_no_more_bytes_than_a_request_may_have(self) -> None:
        entries = [message(letter(number, ["x" * 100_000]), ORIGIN, "f") for number in range(5)]
        assert [len(group) for group in requests(entries)] == [2, 2, 1]


class TestLetters:
    def test_only_those_that_are_wanted_however_the_file_is_cut(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        letters = [letter(number, [{"x": "y" * number}]) for number in range(20)]
        store = Store(str(tmp_path))
        store.write("f", b"".join(orjson.dumps(item) + b"\n" for item in letters))
        for size in (1, 7, 400, 1_000_000):
            monkeypatch.setattr("cortex_dask.runtime.dead_letters.target._CHUNK", size)
            wanted = [item["batch_id"] for item in letters[::3]]
            assert list(read_letters(store, "f", wanted)) == letters[::3]


# delivering ----------------------------------------------------------------------------------------------------------


class FailedJob:
    """A job directory whose ledger has failures."""

    def __init__(self, folder: Path, **extra: Any) -> None:
        self.directory = JobDirectory(str(folder / "job"))
        self.settings = JobSettings(
            job_id="job-1",
            api_name="digits",
            api_id="digits-1",
            created_time="2026-01-01T00:00:00Z",
            handler=HandlerSettings("class", extra=extra),
            dataset=DatasetInput(("in",)),
        )
        self.directory.create(self.settings)

    def fail(self, split: int, numbers: range, payload: Any = ({"x": 1},)) -> SplitRecord:
        """Put a split with failed batches into the ledger."""
        letters = [letter(number, payload, split=split) for number in numbers]
        file = f"failures/{split:06d}-a.jsonl"
        self.directory.store.write(file, b"".join(orjson.dumps(item) + b"\n" for item in letters))
        failures = tuple(
            BatchFailure(item["batch"], item["batch_id"], 10, 3, "exception", "ValueError: no") for item in letters
        )
        record = SplitRecord(split, "a", None, len(letters), 0, failures, file)
        ledger = Ledger(self.directory.store)
        list(ledger.refresh())
        ledger.append([record])
        return record

    def delivery(self) -> Delivery:
        made = make_delivery(self.directory, self.settings)
        assert made is not None
        return made


@pytest.fixture
def queue(s3: str) -> Iterator[Queue]:
    with Queue() as made:
        yield made


@pytest.mark.s3
class TestQueue:
    def test_every_letter_arrives_once_whoever_delivers(self, tmp_path: Path, queue: Queue) -> None:
        job = FailedJob(tmp_path, sqs_dead_letter_queue={"arn": queue.arn, "max_receive_count": 3})
        first = job.delivery()
        first.check()
        first.offer(job.fail(0, range(125)))
        job.fail(1, range(125, 150))  # by another coordinator
        assert first.settle() == ""
        first.close()
        second = job.delivery()
        second.check()
        job.fail(2, range(150, 155))
        assert second.settle() == ""
        second.close()

        got = queue.receive()
        assert sorted(item["batch_id"] for item in got) == [letter(number)["batch_id"] for number in range(155)]
        assert {(item["job_id"], item["api_name"], item["attempts"]) for item in got} == {("job-1", "digits", "3")}
        assert got[0]["body"] == [{"x": 1}]
        assert first.undelivered == second.undelivered == 0

    def test_large_payloads_arrive_by_their_size(self, tmp_path: Path, queue: Queue) -> None:
        job = FailedJob(tmp_path, sqs_dead_letter_queue={"arn": queue.arn, "max_receive_count": 3})
        job.fail(0, range(3), ["x" * 150_000])
        job.fail(1, range(3, 4), ["x" * 300_000])
        delivery = job.delivery()
        delivery.check()
        assert delivery.settle() == ""
        delivery.close()
        bodies = sorted((item["body"] for item in queue.receive()), key=str)
        assert [body for body in bodies if isinstance(body, list)] == [["x" * 150_000]] * 3
        (pointer,) = (body for body in bodies if isinstance(body, dict))
        assert pointer["failures_file"] == "failures/000001-a.jsonl"

    def test_fifo(self, tmp_path: Path, s3: str) -> None:
        with Queue(fifo=True) as queue:
            job = FailedJob(tmp_path, sqs_dead_letter_queue={"arn": queue.arn, "max_receive_count": 3})
            job.fail(0, range(12))
            for _ in range(2):  # without a receipt between them, as after a kill in the wrong moment
                delivery = job.delivery()
                delivery.check()
                assert delivery.settle() == ""
                delivery.close()
                job.directory.store.delete_tree("delivered")
            assert [item["batch_id"] for item in queue.receive()] == [
                letter(number)["batch_id"] for number in range(12)
            ]

    def test_a_queue_that_does_not_exist(self, tmp_path: Path, s3: str) -> None:
        arn = "arn:aws:sqs:eu-west-1:123456789012:nobody"
        delivery = FailedJob(tmp_path, sqs_dead_letter_queue={"arn": arn, "max_receive_count": 3}).delivery()
        with pytest.raises(SpecError, match=r"^sqs_dead_letter_queue\.arn: there is no queue nobody of account .*ARN$"):
            delivery.check()
        delivery.close()

    def test_nobody_answers(self, tmp_path: Path, s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
        arn = "arn:aws:sqs:eu-west-1:123456789012:nobody"
        delivery = FailedJob(tmp_path, sqs_dead_letter_queue={"arn": arn, "max_receive_count": 3}).delivery()
        with pytest.raises(SpecError, match=r"cannot be reached \(EndpointConnectionError\): check the network"):
            delivery.check()
        delivery.close()

    def test_no_credentials(self, tmp_path: Path, s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("AWS_ACCESS_KEY_ID")
        monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
        arn = "arn:aws:sqs:eu-west-1:123456789012:nobody"
        delivery = FailedJob(tmp_path, sqs_dead_letter_queue={"arn": arn, "max_receive_count": 3}).delivery()
        with pytest.raises(SpecError, match="no usable AWS credentials were found"):
            delivery.check()
        delivery.close()

    def test_a_queue_that_goes_away_leaves_the_letters_and_takes_them_later(self, tmp_path: Path, queue: Queue) -> None:
        job = FailedJob(tmp_path, sqs_dead_letter_queue={"arn": queue.arn, "max_receive_count": 3})
        delivery = job.delivery()
        delivery.check()
        queue.delete()
        delivery.offer(job.fail(0, range(15)))
        problem = delivery.settle()
        delivery.close()
        assert problem.startswith("15 of them could not be delivered to the queue arn:aws:sqs:us-east-1:")
        assert "there is no queue" in problem
        assert delivery.undelivered == 15

        queue.create()
        later = job.delivery()
        later.check()
        assert later.settle() == ""
        later.close()
        assert len(queue.receive()) == 15


class TestFolder:
    def test_files_are_those_of_the_job_directory(self, tmp_path: Path) -> None:
        job = FailedJob(tmp_path, dead_letter={"path": str(tmp_path / "dead"), "max_receive_count": 3})
        delivery = job.delivery()
        delivery.check()
        delivery.offer(job.fail(0, range(3)))
        job.fail(7, range(3, 5))
        assert delivery.settle() == ""
        delivery.close()
        copies = {path.name: path.read_bytes() for path in (tmp_path / "dead/job-1").iterdir()}
        assert copies == {
            "000000-a.jsonl": job.directory.store.read("failures/000000-a.jsonl"),
            "000007-a.jsonl": job.directory.store.read("failures/000007-a.jsonl"),
        }

    def test_a_folder_that_cannot_be_written_is_found_before_the_first_batch(self, tmp_path: Path) -> None:
        (tmp_path / "dead").write_text("a file")
        job = FailedJob(tmp_path, dead_letter={"path": str(tmp_path / "dead"), "max_receive_count": 3})
        with pytest.raises(SpecError, match=r"^dead_letter\.path: "):
            job.delivery().check()

    @pytest.mark.s3
    def test_a_store_that_fails_leaves_the_letters(self, tmp_path: Path, faulty_s3: FaultyS3) -> None:
        folder = f"{faulty_s3.bucket}/dead"
        job = FailedJob(tmp_path, dead_letter={"path": folder, "max_receive_count": 3})
        job.fail(0, range(3))
        delivery = job.delivery()
        delivery.check()
        faulty_s3.fail(how="403 AccessDenied", count=None)
        problem = delivery.settle()
        delivery.close()
        assert delivery.undelivered == 3
        assert f"could not be delivered to the folder {folder}" in problem
        faulty_s3.heal()
        assert delivery.settle() == ""
        assert Store(folder).names() == ["job-1/000000-a.jsonl"]


def test_without_a_place_to_deliver_to_there_is_nothing_to_do(tmp_path: Path) -> None:
    job = FailedJob(tmp_path)
    assert make_delivery(job.directory, job.settings) is None
