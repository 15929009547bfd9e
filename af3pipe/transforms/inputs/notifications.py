"""Reads recordings from notifications, looks them up in the store, and tracks which message waits for which work."""

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
"""Tag of the output of `Waiting`s."""


class Waiting(NamedTuple):
    """Is a delivery that waits for the rows of one recording; it is acknowledged when no recording is missing.

    Attributes:
        work: Result of `work_name`; empty if the message has no recording.
        subscription: See `Message`.
        message_id: See `Message`.
        ack_id: See `Message`.
        item: Index of the recording in the message.
        items: Number of recordings in the message; 0 if there is nothing to wait for.
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
    """Returns the key of the work on one version of a recording."""
    return f"{recording_id} {content_identity}"


def version_of(found: Recording | RecordingRow | DeadLetter) -> tuple[str, str]:
    """Returns id and content identity of a recording, also from its row or dead letter."""
    version = recording_of(found.input) if isinstance(found, DeadLetter) else found
    return found.recording_id, version.content_identity


def work_of(found: Recording | DeadLetter) -> str:
    """Returns the `work_name` of a recording, also from its dead letter."""
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
    """Looks up the current version of the object in the store, as the message may be outdated."""

    def submit(self, item: Any) -> "Future[Recording | DeadLetter]":
        return super().submit(item.recording)

    def emit(self, item: Any, future: "Future[Recording | DeadLetter]") -> Iterator[Any]:
        yield from super().emit(item.recording, future)
        yield from _waiting(item.waiting._replace(work=work_of(future.result())))


class Notified(NamedTuple):
    """Has the recordings and dead letters of messages (as `Outcome`), and the `Waiting` deliveries to acknowledge."""

    good: Any
    dead_letters: Any
    waiting: Any


class ParseNotification(beam.PTransform):
    """Parses messages into recordings, with the object's current size and etag or modification time.

    The input is a PCollection of messages: bytes, `PubsubMessage`, or (key, value) pairs from ReadFromKafka; the
    output is an `Outcome` of `Recording`. A message is a notification of Google Cloud Storage, Amazon S3 (plain, or
    through SNS or EventBridge) or MinIO; URIs, one per line; or JSON objects with a manifest's columns: one, a list,
    or one per line. Message attributes become metadata.

    Messages about no new audio (a deletion, a test event, an object with another extension) are counted as
    `notifications_ignored`. An invalid message becomes a dead letter whose `input` contains it.

    Args:
        allow_prefixes: URLs, or folders of this machine, below which messages may reference audio. Nothing else is
            read, since anyone who may publish could otherwise read any file that the workers can.
        channel: See `ReadRecordings`; a message's `channel` takes precedence.
        stream: See `ReadRecordings`; a message's `stream` takes precedence.
        storage_options: See `ReadRecordings`.

    Raises:
        ValueError: There is no prefix, or no such channel or stream.
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
        """Parses pulled messages, like `expand`, but also returns the deliveries to acknowledge."""
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
