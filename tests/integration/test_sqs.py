"""An SQS queue as target of dead letters: its messages and requests, and deliveries to a real queue."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cortex_dask.errors import SpecError
from cortex_dask.io.job.settings import DeadLetterSettings
from cortex_dask.runtime.dead_letters.sqs import SIZE_LIMIT, FailureOrigin, group_into_requests, make_message
from tests.support.failed_job import FailedJob, make_failure
from tests.support.sqs import Queue

ORIGIN = FailureOrigin("job-1", "digits", "/jobs/job-1")


class TestMessage:
    def test_the_body_is_the_payload_and_the_attributes_say_where_it_comes_from(self) -> None:
        entry = make_message(make_failure(payload=[{"x": 1, "text": "grün"}]), ORIGIN, "failures/a.jsonl")

        assert json.loads(entry["MessageBody"]) == [{"x": 1, "text": "grün"}]
        assert {name: value["StringValue"] for name, value in entry["MessageAttributes"].items()} == {
            "job_id": "job-1",
            "api_name": "digits",
            "batch_id": make_failure()["batch_id"],
            "cause": "exception",
            "attempts": "3",
            "rows": "10",
            "error": "ValueError: no",
        }
        assert entry["MessageAttributes"]["attempts"]["DataType"] == "Number"
        assert "MessageGroupId" not in entry

    def test_a_fifo_queue_gets_a_group_and_tells_repetitions_by_the_batch(self) -> None:
        entry = make_message(make_failure(), ORIGIN, "failures/a.jsonl", fifo=True)
        assert (entry["MessageGroupId"], entry["MessageDeduplicationId"]) == ("job-1", make_failure()["batch_id"])

    @pytest.mark.parametrize(
        ("payload", "reason"), [(None, "there is no payload"), (["x" * SIZE_LIMIT], "larger than a message")]
    )
    def test_a_payload_that_is_too_large_is_pointed_to(self, payload: Any, reason: str) -> None:
        entry = make_message(make_failure(payload=payload), ORIGIN, "failures/a.jsonl")

        body = json.loads(entry["MessageBody"])
        assert (body["batch_id"], body["failures_file"]) == (make_failure()["batch_id"], "failures/a.jsonl")
        assert (body["job"], body["rows"]) == ("/jobs/job-1", 10)
        assert reason in body["reason"]
        assert entry["MessageAttributes"]["pointer"]["StringValue"] == "true"

    def test_the_limit_counts_bytes_and_attributes(self) -> None:
        empty = make_message(make_failure(payload=[""]), ORIGIN, "f")
        attributes = sum(
            len(name) + len(value["DataType"]) + len(value["StringValue"])
            for name, value in empty["MessageAttributes"].items()
        )
        room = SIZE_LIMIT - attributes - len('[""]')
        fits, too_long = (
            make_message(make_failure(payload=["é" * (count // 2)]), ORIGIN, "f") for count in (room, room + 2)
        )
        assert isinstance(json.loads(fits["MessageBody"]), list)
        assert "pointer" in too_long["MessageAttributes"]

    def test_characters_that_a_queue_refuses_are_escaped(self) -> None:
        strange = "\x00 \x1f \ufffe \uffff \ud800"
        entry = make_message(make_failure(payload=[strange], error=f"ValueError: {strange}"), ORIGIN, "f")
        assert json.loads(entry["MessageBody"]) == [strange]
        texts = [entry["MessageBody"], entry["MessageAttributes"]["error"]["StringValue"]]
        assert not any(character in text for text in texts for character in "\x00\x1f\ufffe\uffff\ud800")

    def test_an_error_without_words_still_has_an_attribute(self) -> None:
        assert make_message(make_failure(error=""), ORIGIN, "f")["MessageAttributes"]["error"]["StringValue"] == "-"


class TestRequests:
    def test_ten_messages_at_most(self) -> None:
        entries = [make_message(make_failure(number), ORIGIN, "f") for number in range(25)]
        groups = list(group_into_requests(entries))
        assert [len(group) for group in groups] == [10, 10, 5]
        assert [entry for group in groups for entry in group] == entries

    def test_no_more_bytes_than_a_request_may_have(self) -> None:
        entries = [make_message(make_failure(number, ["x" * 100_000]), ORIGIN, "f") for number in range(5)]
        assert [len(group) for group in group_into_requests(entries)] == [2, 2, 1]


@pytest.fixture
def queue(s3: str) -> Iterator[Queue]:
    with Queue() as made:
        yield made


@pytest.mark.s3
class TestQueue:
    def test_every_failure_arrives_once_from_any_coordinator(self, tmp_path: Path, queue: Queue) -> None:
        job = FailedJob(tmp_path, DeadLetterSettings(3, queue_arn=queue.arn))
        first = job.delivery()
        first.check()
        first.add(job.fail(0, range(125)))
        job.fail(1, range(125, 150))  # by another coordinator
        assert first.finish() == ""
        first.close()
        second = job.delivery()
        second.check()
        job.fail(2, range(150, 155))
        assert second.finish() == ""
        second.close()

        got = queue.receive()
        assert sorted(item["batch_id"] for item in got) == [make_failure(number)["batch_id"] for number in range(155)]
        assert {(item["job_id"], item["api_name"], item["attempts"]) for item in got} == {("job-1", "digits", "3")}
        assert got[0]["body"] == [{"x": 1}]
        assert first.undelivered == second.undelivered == 0

    def test_large_payloads_arrive_by_their_size(self, tmp_path: Path, queue: Queue) -> None:
        job = FailedJob(tmp_path, DeadLetterSettings(3, queue_arn=queue.arn))
        job.fail(0, range(3), ["x" * 150_000])
        job.fail(1, range(3, 4), ["x" * 300_000])
        delivery = job.delivery()
        delivery.check()
        assert delivery.finish() == ""
        delivery.close()
        bodies = sorted((item["body"] for item in queue.receive()), key=str)
        assert [body for body in bodies if isinstance(body, list)] == [["x" * 150_000]] * 3
        (pointer,) = (body for body in bodies if isinstance(body, dict))
        assert pointer["failures_file"] == "failures/000001-a.jsonl"

    def test_fifo(self, tmp_path: Path, s3: str) -> None:
        with Queue(fifo=True) as queue:
            job = FailedJob(tmp_path, DeadLetterSettings(3, queue_arn=queue.arn))
            job.fail(0, range(12))
            for _ in range(2):  # without a receipt between them, as after a kill in the wrong moment
                delivery = job.delivery()
                delivery.check()
                assert delivery.finish() == ""
                delivery.close()
                job.directory.store.delete_tree("delivered")
            assert [item["batch_id"] for item in queue.receive()] == [
                make_failure(number)["batch_id"] for number in range(12)
            ]

    def test_a_queue_that_does_not_exist(self, tmp_path: Path, s3: str) -> None:
        arn = "arn:aws:sqs:eu-west-1:123456789012:nobody"
        delivery = FailedJob(tmp_path, DeadLetterSettings(3, queue_arn=arn)).delivery()
        with pytest.raises(SpecError, match=r"^sqs_dead_letter_queue\.arn: there is no queue nobody of account .*ARN$"):
            delivery.check()
        delivery.close()

    def test_a_server_that_does_not_answer(self, tmp_path: Path, s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
        arn = "arn:aws:sqs:eu-west-1:123456789012:nobody"
        delivery = FailedJob(tmp_path, DeadLetterSettings(3, queue_arn=arn)).delivery()
        with pytest.raises(SpecError, match=r"cannot be reached \(EndpointConnectionError\): check the network"):
            delivery.check()
        delivery.close()

    def test_no_credentials(self, tmp_path: Path, s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("AWS_ACCESS_KEY_ID")
        monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
        arn = "arn:aws:sqs:eu-west-1:123456789012:nobody"
        delivery = FailedJob(tmp_path, DeadLetterSettings(3, queue_arn=arn)).delivery()
        with pytest.raises(SpecError, match="no usable AWS credentials were found"):
            delivery.check()
        delivery.close()

    def test_failures_stay_while_a_queue_is_deleted_and_are_delivered_later(self, tmp_path: Path, queue: Queue) -> None:
        job = FailedJob(tmp_path, DeadLetterSettings(3, queue_arn=queue.arn))
        delivery = job.delivery()
        delivery.check()
        queue.delete()
        delivery.add(job.fail(0, range(15)))
        problem = delivery.finish()
        delivery.close()
        assert problem.startswith("15 of them could not be delivered to the queue arn:aws:sqs:us-east-1:")
        assert "there is no queue" in problem
        assert delivery.undelivered == 15

        queue.create()
        later = job.delivery()
        later.check()
        assert later.finish() == ""
        later.close()
        assert len(queue.receive()) == 15
