"""A queue on the test server, which serves SQS at the same endpoint as S3."""

from __future__ import annotations

import json
import os
import uuid
from types import TracebackType
from typing import Any, Self

__all__ = ["Queue"]


class Queue:
    """A queue with a fresh name; a context manager that deletes it. The environment says where the server is.

    Attributes
    ----------
    arn : str
        Its name for submissions.
    """

    def __init__(self, *, fifo: bool = False) -> None:
        import boto3  # it takes a moment

        self._name = f"dead-{uuid.uuid4().hex[:12]}{'.fifo' if fifo else ''}"
        self._fifo = fifo
        self._client = boto3.session.Session().client(
            "sqs", region_name="us-east-1", endpoint_url=os.environ["AWS_ENDPOINT_URL"]
        )
        self._url = ""
        self.create()
        attributes = self._client.get_queue_attributes(QueueUrl=self._url, AttributeNames=["QueueArn"])
        self.arn: str = attributes["Attributes"]["QueueArn"]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.delete()
        self._client.close()

    def create(self) -> None:
        """Make the queue, also again."""
        attributes = {"FifoQueue": "true"} if self._fifo else {}
        self._url = self._client.create_queue(QueueName=self._name, Attributes=attributes)["QueueUrl"]

    def delete(self) -> None:
        """Delete the queue, with what is in it."""
        self._client.delete_queue(QueueUrl=self._url)

    def receive(self) -> list[dict[str, Any]]:
        """Take all messages: their attributes by name, and the parsed ``body``."""
        found = []
        while messages := self._client.receive_message(
            QueueUrl=self._url, MaxNumberOfMessages=10, MessageAttributeNames=["All"], WaitTimeSeconds=0
        ).get("Messages"):
            for item in messages:
                attributes = {name: value["StringValue"] for name, value in item["MessageAttributes"].items()}
                found.append({**attributes, "body": json.loads(item["Body"])})
                self._client.delete_message(QueueUrl=self._url, ReceiptHandle=item["ReceiptHandle"])
        return found
