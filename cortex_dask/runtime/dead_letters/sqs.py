"""Dead letters in an SQS queue, in the form in which Cortex sent them there: a message for each batch.

The body is the batch's payload as JSON, a list of samples (the rows of a dataset as records). The attributes say where
it comes from: ``job_id``, ``api_name``, ``batch_id``, ``cause``, ``attempts``, ``error``, ``rows``. What does not fit
into a message, or could not be read, stays in the job directory; the body is then a mapping that says where, and the
attribute ``pointer`` is there.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

from cortex_dask.errors import SpecError, StorageError
from cortex_dask.runtime.dead_letters.target import DeadLetterTarget, Letter, read_letters

if TYPE_CHECKING:
    from cortex_dask.io.job.directory import JobDirectory
    from cortex_dask.io.job.settings import JobSettings

#: Bytes of one message, and of all messages of one request, with attributes. Queues take 1 MiB nowadays; those that
#: were not told so, and most servers that speak the protocol, take 256 KiB.
SIZE_LIMIT = 256 * 1024
_ENTRIES = 10  # messages in a request: SQS' own limit
_WAVE = 100  # letters that are sent before a receipt is written; also bounds the payloads in memory
_ERROR = 1_000  # characters of the error in an attribute
_PLACES = 100  # of the input, in a message that only points to its payload
_SENDS = 4  # tries for messages that the queue did not take, through no fault of theirs

Entry = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Origin:
    """The job that letters come from."""

    job_id: str
    api_name: str
    url: str  # of the job directory


class SqsQueue(DeadLetterTarget):
    """A queue, named by its ARN; endpoint and credentials come from the environment, as for every AWS client.

    Parameters
    ----------
    arn : str
        ``arn:aws:sqs:<region>:<account>:<name>``.
    job : JobDirectory
        Where the letters lie.
    settings : JobSettings
        Names the job.
    """

    def __init__(self, arn: str, job: JobDirectory, settings: JobSettings) -> None:
        super().__init__(f"the queue {arn}")
        self._arn = arn
        self._store = job.store
        self._origin = Origin(settings.job_id, settings.api_name, job.url)
        _, _, _, self._region, self._account, self._name = arn.split(":")
        self._context: Any = None
        self._client: Any = None
        self._url = ""

    @property
    def _fifo(self) -> bool:
        return self._name.endswith(".fifo")

    def key(self, file: str, batch_id: str) -> str:
        """Return what a receipt names: a batch is delivered once, also if a retry of it fails again."""
        return batch_id

    def check(self) -> None:
        """Look the queue up."""
        try:
            self._run(self._connect())
        except StorageError as error:
            raise SpecError(f"sqs_dead_letter_queue.arn: {error}") from error

    def deliver(self, files: Mapping[str, Collection[str]]) -> Iterator[list[str]]:
        """Send the letters; yields the ids of those that the queue has taken, after each wave."""
        letters = (
            message(letter, self._origin, file, fifo=self._fifo)
            for file, wanted in files.items()
            for letter in read_letters(self._store, file, wanted)
        )
        while wave := list(islice(letters, _WAVE)):
            taken, error = self._run(self._send(wave))
            yield taken
            if error is not None:
                raise StorageError(self._explained(error)) from error

    def close(self) -> None:
        """Close the connection."""
        if self._context is not None:
            context, self._context, self._client = self._context, None, None
            self._run(context.__aexit__(None, None, None))

    # in fsspec's event loop, which has a thread of its own -----------------------------------------------------------

    def _run(self, coroutine: Any) -> Any:
        from botocore.exceptions import BotoCoreError, ClientError
        from fsspec.asyn import get_loop

        try:
            return asyncio.run_coroutine_threadsafe(coroutine, get_loop()).result()
        except (ClientError, BotoCoreError, OSError) as error:
            raise StorageError(self._explained(error)) from error

    def _explained(self, error: BaseException) -> str:
        return _explain(error, f"the queue {self._name} of account {self._account} in {self._region}")

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
        """Send messages; returns the ids of those that the queue took, and what went wrong with the others."""
        client = await self._connect()
        taken: list[str] = []
        calls = [self._request(client, group, taken) for group in requests(wave)]
        if not self._fifo:
            errors: list[Any] = await asyncio.gather(*calls, return_exceptions=True)
        else:  # one after the other, to keep the order
            errors = [(await asyncio.gather(call, return_exceptions=True))[0] for call in calls]
        return taken, next((error for error in errors if error is not None), None)

    async def _request(self, client: Any, entries: Sequence[Entry], taken: list[str]) -> None:
        """Send one request's messages, again those that the queue could not take through no fault of theirs."""
        left = {entry["Id"]: entry for entry in entries}
        for number in range(_SENDS):
            answer = await client.send_message_batch(QueueUrl=self._url, Entries=list(left.values()))
            for done in answer.get("Successful", ()):
                del left[done["Id"]]
                taken.append(done["Id"])
            for failed in answer.get("Failed", ()):
                if failed.get("SenderFault") or number == _SENDS - 1:
                    del left[failed["Id"]]
                    reason = failed.get("Message") or failed.get("Code") or "no reason given"
                    self.refused(f"it refuses the batch {failed['Id']}: {reason}")
            if not left:
                return
            await asyncio.sleep(0.2 * 2**number)


def message(letter: Letter, origin: Origin, file: str, *, fifo: bool = False) -> Entry:
    """Return a letter as an entry of ``SendMessageBatch``, with the batch's id as its id.

    Parameters
    ----------
    letter : dict
        The dead letter, as it lies in the job directory.
    origin : Origin
        The job.
    file : str
        The letter's file in the job directory, for messages that only point there.
    fifo : bool, default False
        Whether the queue is a FIFO queue, which wants a group and keeps batches that are sent again apart.
    """
    values = {
        "job_id": origin.job_id,
        "api_name": origin.api_name,
        "batch_id": letter["batch_id"],
        "cause": letter["cause"],
        "attempts": letter["attempts"],
        "rows": letter["rows"],
        "error": _text(letter["error"][:_ERROR]) or "-",
    }
    attributes: dict[str, dict[str, str]] = {
        name: {"DataType": "Number" if isinstance(value, int) else "String", "StringValue": str(value)}
        for name, value in values.items()
    }
    body = "" if letter["payload"] is None else _json(letter["payload"])
    if not body or _size(body, attributes) > SIZE_LIMIT:
        attributes["pointer"] = {"DataType": "String", "StringValue": "true"}
        size = len(body.encode())
        body = _json(
            {
                **{name: value for name, value in values.items() if name != "error"},
                "error": letter["error"][:_ERROR],
                "job": origin.url,
                "failures_file": file,
                "position": (letter["position"] or [])[:_PLACES],
                "reason": f"the payload of {size:,} bytes is larger than a message" if size else "there is no payload",
            }
        )
    entry: Entry = {"Id": letter["batch_id"], "MessageBody": body, "MessageAttributes": attributes}
    if fifo:
        entry["MessageGroupId"] = origin.job_id
        entry["MessageDeduplicationId"] = letter["batch_id"]
    return entry


def requests(entries: Sequence[Entry]) -> Iterator[list[Entry]]:
    """Group messages so that each group fits into one request."""
    group: list[Entry] = []
    used = 0
    for entry in entries:
        size = _size(entry["MessageBody"], entry["MessageAttributes"])
        if group and (len(group) == _ENTRIES or used + size > SIZE_LIMIT):
            yield group
            group, used = [], 0
        group.append(entry)
        used += size
    if group:
        yield group


def _size(body: str, attributes: Mapping[str, Mapping[str, str]]) -> int:
    """Return what SQS counts: the body, and the name, type and value of each attribute."""
    named = sum(
        len(name) + len(value["DataType"]) + len(value["StringValue"].encode()) for name, value in attributes.items()
    )
    return len(body.encode()) + named


def _json(value: Any) -> str:
    """Return JSON with no character that SQS refuses: those that XML does not have."""
    try:
        text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
        text.encode()
    except UnicodeEncodeError:  # a lone surrogate
        return json.dumps(value, separators=(",", ":"))
    return text.replace("\ufffe", "\\ufffe").replace("\uffff", "\\uffff")


def _text(value: str) -> str:
    """Return plain text with no character that SQS refuses."""
    return re.sub("[^\t\n\r -\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "\ufffd", value)


def _explain(error: BaseException, queue: str) -> str:
    """Return one sentence, without what botocore says of credentials."""
    response = getattr(error, "response", None)
    if isinstance(response, Mapping):
        said = response.get("Error", {})
        code = str(said.get("Code", "")).rpartition(".")[2]
        if code in ("NonExistentQueue", "QueueDoesNotExist"):
            return f"there is no {queue.removeprefix('the ')}: make it, or correct the ARN"
        if any(word in code for word in ("AccessDenied", "Token", "Signature", "NotAuthorized", "Forbidden", "OptIn")):
            return f"access to {queue} is denied ({code}): the credentials need sqs:GetQueueUrl and sqs:SendMessage"
        return f"{queue} cannot be used ({code}: {said.get('Message', 'no reason given')})"
    kind = type(error).__name__
    if "Credentials" in kind:
        return f"no usable AWS credentials were found for {queue}: set them as for every AWS tool"
    return f"{queue} cannot be reached ({kind}): check the network, the region, and AWS_ENDPOINT_URL if it is set"
