"""An SQS queue as target of dead letters, in the form of Cortex: a message for each failed batch.

The body is the batch's payload as JSON, a list of samples (the rows of a dataset as records). The attributes describe
the failure: ``job_id``, ``api_name``, ``batch_id``, ``cause``, ``attempts``, ``error``, ``rows``. A payload that does
not fit into a message, or could not be read, stays in the job directory; the body is then a mapping that points to it,
and the message has the attribute ``pointer``.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from cortex_dask.errors import SpecError, StorageError
from cortex_dask.io.job.directory import JobDirectory
from cortex_dask.io.job.settings import JobSettings
from cortex_dask.runtime.dead_letters.target import DeadLetterTarget, Failure, read_failures

#: Bytes of one message, and of all messages of one request, with attributes. Queues of AWS may be configured for 1 MiB
#: nowadays; others, and most servers that implement the protocol, accept 256 KiB.
SIZE_LIMIT = 256 * 1024
_MAX_ENTRIES = 10  # messages in a request: the limit of SQS
_WAVE = 100  # messages that are sent before a receipt is written; also bounds the payloads in memory
_ERROR_LENGTH = 1_000  # characters of the error in an attribute
_MAX_POSITIONS = 100  # in a message that only points to its payload
_MAX_SENDS = 4  # of a message that the queue did not accept for a reason that may pass

#: An entry of the request ``SendMessageBatch``.
Entry = dict[str, Any]


@dataclass(frozen=True, slots=True)
class FailureOrigin:
    """The job that failures come from."""

    job_id: str
    api_name: str
    job_url: str


class SqsTarget(DeadLetterTarget):
    """A queue, named by its ARN; endpoint and credentials come from the environment, as for every AWS client."""

    def __init__(self, arn: str, job: JobDirectory, settings: JobSettings) -> None:
        super().__init__(f"the queue {arn}")
        self._store = job.store
        self._origin = FailureOrigin(settings.job_id, settings.api_name, job.url)
        _, _, _, self._region, self._account, self._name = arn.split(":")
        self._context: Any = None
        self._client: Any = None
        self._url = ""

    @property
    def _is_fifo(self) -> bool:
        return self._name.endswith(".fifo")

    def receipt_key(self, file: str, batch_id: str) -> str:
        """Return the batch's id: a batch is delivered once, also if a retry of it fails again."""
        return batch_id

    def check(self) -> None:
        """Ask for the queue's URL."""
        try:
            self._await(self._connect())
        except StorageError as error:
            raise SpecError(f"sqs_dead_letter_queue.arn: {error}") from error

    def deliver(self, files: Mapping[str, Collection[str]]) -> Iterator[list[str]]:
        """Send the failures; yield the ids of those that the queue accepted, after each wave."""
        messages = (
            make_message(failure, self._origin, file, fifo=self._is_fifo)
            for file, batch_ids in files.items()
            for failure in read_failures(self._store, file, batch_ids)
        )
        while wave := list(islice(messages, _WAVE)):
            accepted, error = self._await(self._send(wave))
            yield accepted
            if error is not None:
                raise StorageError(self._sentence(error)) from error

    def close(self) -> None:
        """Close the connection."""
        if self._context is not None:
            context, self._context, self._client = self._context, None, None
            self._await(context.__aexit__(None, None, None))

    # in fsspec's event loop, which has a thread of its own -----------------------------------------------------------

    def _await(self, coroutine: Any) -> Any:
        from botocore.exceptions import BotoCoreError, ClientError
        from fsspec.asyn import get_loop

        try:
            return asyncio.run_coroutine_threadsafe(coroutine, get_loop()).result()
        except (ClientError, BotoCoreError, OSError) as error:
            raise StorageError(self._sentence(error)) from error

    def _sentence(self, error: BaseException) -> str:
        return _error_sentence(error, f"the queue {self._name} of account {self._account} in {self._region}")

    async def _connect(self) -> Any:
        if self._client is None:
            from aiobotocore.config import AioConfig  # type: ignore[import-untyped]  # it has no stubs
            from aiobotocore.session import get_session  # type: ignore[import-untyped]  # it has no stubs

            config = AioConfig(
                connect_timeout=5, read_timeout=20, retries={"total_max_attempts": 4, "mode": "standard"}
            )
            context = get_session().create_client("sqs", region_name=self._region, config=config)
            client = await context.__aenter__()
            try:
                answer = await client.get_queue_url(QueueName=self._name, QueueOwnerAWSAccountId=self._account)
            except BaseException:
                await context.__aexit__(None, None, None)
                raise
            self._context, self._client, self._url = context, client, answer["QueueUrl"]
        return self._client

    async def _send(self, wave: Sequence[Entry]) -> tuple[list[str], BaseException | None]:
        """Send messages; return the ids of those that the queue accepted, and the error that stopped the others."""
        client = await self._connect()
        accepted: list[str] = []
        calls = [self._send_request(client, group, accepted) for group in group_into_requests(wave)]
        if not self._is_fifo:
            errors: list[Any] = await asyncio.gather(*calls, return_exceptions=True)
        else:  # one after the other keeps the order
            errors = [(await asyncio.gather(call, return_exceptions=True))[0] for call in calls]
        return accepted, next((error for error in errors if error is not None), None)

    async def _send_request(self, client: Any, entries: Sequence[Entry], accepted: list[str]) -> None:
        """Send the messages of one request; repeat those that were not accepted for a reason that may pass."""
        left = {entry["Id"]: entry for entry in entries}
        for number in range(_MAX_SENDS):
            answer = await client.send_message_batch(QueueUrl=self._url, Entries=list(left.values()))
            for done in answer.get("Successful", ()):
                del left[done["Id"]]
                accepted.append(done["Id"])
            for failed in answer.get("Failed", ()):
                if failed.get("SenderFault") or number == _MAX_SENDS - 1:
                    del left[failed["Id"]]
                    reason = failed.get("Message") or failed.get("Code") or "no reason given"
                    self.record_refusal(f"it refuses the batch {failed['Id']}: {reason}")
            if not left:
                return
            await asyncio.sleep(0.2 * 2**number)


def make_message(failure: Failure, origin: FailureOrigin, file: str, *, fifo: bool = False) -> Entry:
    """Return a failure as a message; one that is too large only points to the failures file.

    A FIFO queue requires a group, and recognises a batch that is sent again by its id.
    """
    values = {
        "job_id": origin.job_id,
        "api_name": origin.api_name,
        "batch_id": failure["batch_id"],
        "cause": failure["cause"],
        "attempts": failure["attempts"],
        "rows": failure["rows"],
        "error": _without_refused_characters(failure["error"][:_ERROR_LENGTH]) or "-",
    }
    attributes: dict[str, dict[str, str]] = {
        name: {"DataType": "Number" if isinstance(value, int) else "String", "StringValue": str(value)}
        for name, value in values.items()
    }
    body = "" if failure["payload"] is None else _to_json(failure["payload"])
    if not body or _size(body, attributes) > SIZE_LIMIT:
        attributes["pointer"] = {"DataType": "String", "StringValue": "true"}
        size = len(body.encode())
        body = _to_json(
            {
                **{name: value for name, value in values.items() if name != "error"},
                "error": failure["error"][:_ERROR_LENGTH],
                "job": origin.job_url,
                "failures_file": file,
                "position": (failure["position"] or [])[:_MAX_POSITIONS],
                "reason": f"the payload of {size:,} bytes is larger than a message" if size else "there is no payload",
            }
        )
    entry: Entry = {"Id": failure["batch_id"], "MessageBody": body, "MessageAttributes": attributes}
    if fifo:
        entry["MessageGroupId"] = origin.job_id
        entry["MessageDeduplicationId"] = failure["batch_id"]
    return entry


def group_into_requests(entries: Sequence[Entry]) -> Iterator[list[Entry]]:
    """Group messages so that each group fits into one request."""
    group: list[Entry] = []
    used = 0
    for entry in entries:
        size = _size(entry["MessageBody"], entry["MessageAttributes"])
        if group and (len(group) == _MAX_ENTRIES or used + size > SIZE_LIMIT):
            yield group
            group, used = [], 0
        group.append(entry)
        used += size
    if group:
        yield group


def _size(body: str, attributes: Mapping[str, Mapping[str, str]]) -> int:
    """Return a message's size as SQS counts it: the body, and the name, type and value of each attribute."""
    attribute_bytes = sum(
        len(name) + len(value["DataType"]) + len(value["StringValue"].encode()) for name, value in attributes.items()
    )
    return len(body.encode()) + attribute_bytes


def _to_json(value: Any) -> str:
    """Return JSON without the characters that SQS refuses, which are those that XML lacks."""
    try:
        text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
        text.encode()
    except UnicodeEncodeError:  # a lone surrogate
        return json.dumps(value, separators=(",", ":"))
    return text.replace("\ufffe", "\\ufffe").replace("\uffff", "\\uffff")


def _without_refused_characters(value: str) -> str:
    """Return text with the characters that SQS refuses replaced."""
    return re.sub("[^\t\n\r -\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "\ufffd", value)


def _error_sentence(error: BaseException, queue: str) -> str:
    """Return one sentence, without botocore's own words on credentials."""
    response = getattr(error, "response", None)
    if isinstance(response, Mapping):
        details = response.get("Error", {})
        code = str(details.get("Code", "")).rpartition(".")[2]
        if code in ("NonExistentQueue", "QueueDoesNotExist"):
            return f"there is no {queue.removeprefix('the ')}: make it, or correct the ARN"
        if any(word in code for word in ("AccessDenied", "Token", "Signature", "NotAuthorized", "Forbidden", "OptIn")):
            return f"access to {queue} is denied ({code}): the credentials need sqs:GetQueueUrl and sqs:SendMessage"
        return f"{queue} cannot be used ({code}: {details.get('Message', 'no reason given')})"
    kind = type(error).__name__
    if "Credentials" in kind:
        return f"no usable AWS credentials were found for {queue}: set them as for every AWS tool"
    return f"{queue} cannot be reached ({kind}): check the network, the region, and AWS_ENDPOINT_URL if it is set"
