"""Messages about new recordings to recordings as the store has them now; and which message waits for which work."""

from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from types import MappingProxyType
from typing import Any, NamedTuple

import apache_beam as beam
from apache_beam.coders import registry

from af3pipe import storage
from af3pipe.schemas import MIX, DeadLetter, Recording, RecordingRow, channel_text, stream_index
from af3pipe.transforms import metrics
from af3pipe.transforms.coders import RowTupleCoder
from af3pipe.transforms.inputs.messages import Message, as_message, parse_notification
from af3pipe.transforms.inputs.read import StatDoFn
from af3pipe.transforms.outcome import DEAD_LETTERS, Outcome, join_dead_letters, recording_of

WAITING = "waiting"
"""Tag of the output that says which message waits for what."""


class Waiting(NamedTuple):
    """A delivery that may be acknowledged once this work, and all other work of its message, is durable.

    Attributes:
        work: Of `work_name`; empty where the message asks for none.
        subscription: With the next two as of `Message`.
        item: Which of the message's recordings, from 0.
        items: How many it names; 0 where there is nothing to wait for.
    """

    work: str
    subscription: str
    message_id: str
    ack_id: str
    item: int
    items: int


class _Item(NamedTuple):
    recording: Recording
    waiting: Waiting


for _row_class in (Message, Waiting, _Item):
    registry.register_coder(_row_class, RowTupleCoder)


def work_name(recording_id: str, content_identity: str) -> str:
    """Names what is done about a recording as long as its bytes stay the same."""
    return f"{recording_id} {content_identity}"


def version_of(found: Recording | RecordingRow | DeadLetter) -> tuple[str, str]:
    """Id and content identity of a recording, or of the one that a result or a dead letter is about."""
    version = recording_of(found.input) if isinstance(found, DeadLetter) else found
    return found.recording_id, version.content_identity


def work_of(found: Recording | DeadLetter) -> str:
    """`work_name` of a recording, or of the one that a dead letter is about."""
    return work_name(*version_of(found))


class _ParseDoFn(beam.DoFn):
    def __init__(self, allow_prefixes: tuple[str, ...], channel: str, stream: int | None) -> None:
        self._chosen: dict[str, Any] = {"allow_prefixes": allow_prefixes, "channel": channel, "stream": stream}

    def process(self, element: Any) -> Iterator[Any]:
        message = as_message(element)
        metrics.count("notifications")
        found = parse_notification(message, **self._chosen)
        if not found:
            metrics.count("notifications_ignored")
            yield from _waiting(Waiting("", message.subscription, message.message_id, message.ack_id, 0, 0))
        for number, item in enumerate(found):
            waiting = Waiting("", message.subscription, message.message_id, message.ack_id, number, len(found))
            if isinstance(item, DeadLetter):
                yield beam.pvalue.TaggedOutput(DEAD_LETTERS, item)
                yield from _waiting(waiting._replace(work=work_of(item)))
            else:
                yield _Item(item, waiting)


def _waiting(waiting: Waiting) -> Iterator[Any]:
    if waiting.ack_id:
        yield beam.pvalue.TaggedOutput(WAITING, waiting)


class _StatItemDoFn(StatDoFn):
    """Asks the store for the object as it is now: the message tells how it was once."""

    def submit(self, item: Any) -> "Future[Recording | DeadLetter]":
        return super().submit(item.recording)

    def emit(self, item: Any, future: "Future[Recording | DeadLetter]") -> Iterator[Any]:
        yield from super().emit(item.recording, future)
        yield from _waiting(item.waiting._replace(work=work_of(future.result())))


class Notified(NamedTuple):
    """What messages named: as an `Outcome`, and which delivery `Waiting` for which work, to be acknowledged."""

    good: Any
    dead_letters: Any
    waiting: Any


class ParseNotification(beam.PTransform):
    """Reads what messages name. Gives an `Outcome` of `Recording`, with size and etag or time as they are now.

    Takes a PCollection of messages: bytes, `PubsubMessage`, or (key, value) pairs as ReadFromKafka gives them. A
    message may be a notification of Google Cloud Storage, Amazon S3 (plain, or through SNS or EventBridge) or MinIO;
    URIs, one a line; or JSON objects with a manifest's columns, one, a list, or one a line. Attributes ride along.

    What is no news of audio (a deletion, a test event, an object with another extension) is counted as
    `notifications_ignored`. What cannot be read is a dead letter whose `input` holds it.

    Args:
        allow_prefixes: URLs below which messages may name audio, and folders of this machine: nothing else is read,
            since whoever may publish could have any file read that the workers may read.
        channel: What is heard of each recording; a message's `channel` goes before it. So does `stream`.
        stream: As of `ReadRecordings`.
        storage_options: As of `ReadRecordings`.

    Raises:
        ValueError: No prefix, or no such channel or stream.
    """

    def __init__(
        self,
        *,
        allow_prefixes: Sequence[str],
        channel: str | int = MIX,
        stream: int | None = None,
        storage_options: storage.StorageOptions = MappingProxyType({}),
    ) -> None:
        super().__init__()
        if isinstance(allow_prefixes, str) or not any(allow_prefixes):
            raise ValueError(
                f"allow_prefixes is {allow_prefixes!r}; list what messages may name, for example ['gs://archive']"
            )
        self._parse = _ParseDoFn(tuple(allow_prefixes), channel_text(channel), stream_index(stream))
        self._storage_options = dict(storage_options)

    def expand(self, messages: Any) -> Any:
        notified = self.notified(messages)
        return Outcome(notified.good, notified.dead_letters)

    def notified(self, messages: Any) -> Notified:
        """The same with what waits to be acknowledged, where messages were pulled."""
        tags = {DEAD_LETTERS: DeadLetter, WAITING: Waiting}
        parsed = messages | "Parse" >> beam.ParDo(self._parse).with_output_types(_Item, **tags).with_outputs(
            *tags, main="items"
        )
        found = parsed.items | "Stat" >> beam.ParDo(_StatItemDoFn(self._storage_options)).with_output_types(
            Recording, **tags
        ).with_outputs(*tags, main="recordings")
        waiting = (parsed[WAITING], found[WAITING]) | "AllWaiting" >> beam.Flatten()
        letters = join_dead_letters(found[DEAD_LETTERS], (parsed[DEAD_LETTERS],))
        return Notified(found.recordings, letters, waiting)
