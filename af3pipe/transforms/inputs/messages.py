"""Parses messages about new recordings: object-change notifications of stores, URIs, or rows of a manifest.

No message is dropped silently: it references recordings, or it is ignored on purpose and counted (a deletion, a
store's test event, an object that is not audio), or it becomes a dead letter that contains the message.
"""

import base64
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any, NamedTuple
from urllib.parse import unquote_plus

from af3pipe import storage
from af3pipe.schemas import (
    MIX,
    DeadLetter,
    Reason,
    Recording,
    Rejected,
    Stage,
    channel_text,
    dead_letter_key,
    source_key,
    stream_index,
)
from af3pipe.transforms.inputs.access import check_allowed
from af3pipe.transforms.inputs.manifest import ID_COLUMNS, URI_COLUMNS, Row, is_text, read_row
from af3pipe.transforms.outcome import plain

_GCS_EVENT = frozenset({"eventType", "bucketId", "objectId"})
# These repeat the URI, or do not concern the recording; all other attributes become metadata.
_GCS_OWN = _GCS_EVENT | {"payloadFormat", "notificationConfig"}


class Message(NamedTuple):
    """Is a message as it was delivered.

    Attributes:
        data: Body of the message.
        attributes: Names and values beside the body.
        message_id: Id that is the same for every delivery; empty if the messaging system has none.
        published_at: ISO 8601 text in UTC; empty if unknown.
        subscription: Subscription of the message; empty for messages that this pipeline does not acknowledge.
        ack_id: Id of this delivery; another delivery has another one.
    """

    data: bytes
    attributes: tuple[tuple[str, str], ...] = ()
    message_id: str = ""
    published_at: str = ""
    subscription: str = ""
    ack_id: str = ""

    @property
    def uri(self) -> str:
        """A URI that identifies the message in a dead letter, if it references no recording."""
        if self.message_id:
            return f"pubsub://{self.subscription}#message={self.message_id}"
        digest = hashlib.sha256(repr((self.data, self.attributes)).encode()).hexdigest()
        return f"message://{digest[:20]}"


class _Part(NamedTuple):
    """Is one entry of a message.

    Attributes:
        text: The part of the body with the entry.
        columns: Columns as of a manifest row; None if there is nothing to do.
        extra: Further metadata.
        problem: What is wrong with the entry, as the end of a sentence.
    """

    text: str
    columns: dict[str, Any] | None
    extra: Mapping[str, str]
    problem: str = ""


def as_message(found: Any) -> Message:
    """Converts a message: `Message`, Beam's `PubsubMessage`, a (key, value) pair of Kafka, bytes or text.

    Raises:
        TypeError: It has another type.
    """
    if isinstance(found, Message):
        return found
    if isinstance(found, tuple) and len(found) == 2:
        found = found[1]
    if found is None:  # of a pair: a Kafka tombstone, which deletes the key
        return Message(b"")
    if isinstance(found, str):
        return Message(found.encode(errors="surrogateescape"))
    if isinstance(found, (bytes, bytearray)):
        return Message(bytes(found))
    if not hasattr(found, "data") or not hasattr(found, "attributes"):
        raise TypeError(
            f"{type(found).__name__} is no message; ParseNotification takes bytes, PubsubMessage, or (key, "
            "value) pairs of bytes"
        )
    attributes = tuple(sorted(dict(found.attributes or {}).items()))
    return Message(found.data or b"", attributes, getattr(found, "message_id", None) or "")


def parse_notification(
    message: Any, *, allow_prefixes: Sequence[str], channel: str | int = MIX, stream: int | None = None
) -> list[Recording | DeadLetter]:
    """Parses one message, as ParseNotification does, but without Beam and without accessing the store.

    Args:
        message: Any type that `as_message` supports.
        allow_prefixes: See `ParseNotification`.
        channel: Channel of recordings for which the message has none.
        stream: Stream of recordings for which the message has none.

    Returns:
        Recordings and dead letters in the order of the message; empty if it is to be ignored.
    """
    message = as_message(message)
    chosen: dict[str, Any] = {"channel": channel_text(channel), "stream": stream_index(stream)}
    parts = [part for part in _parts(message) if part.columns is not None or part.problem]
    return [
        _found(part, number, len(parts), message, chosen, tuple(allow_prefixes)) for number, part in enumerate(parts)
    ]


def _found(
    part: _Part, number: int, parts: int, message: Message, chosen: dict[str, Any], allow_prefixes: tuple[str, ...]
) -> Recording | DeadLetter:
    where, name = f"message {message.message_id or message.uri}", message.uri
    if parts > 1:
        where, name = f"part {number + 1} of {where}", f"{name}&part={number + 1}"
    row = Row(where, name, _bad(f"{where} {part.problem}"))
    if part.columns is not None:
        row = _checked_row(row._replace(columns=dict(part.columns), extra=part.extra), allow_prefixes)
    found = read_row(row, message.uri, **chosen)
    if isinstance(found, DeadLetter):
        return _with_message(found, part, message)
    if found.questions and not set(ID_COLUMNS).intersection(part.columns or ()):
        return _with_questions_in_id(found)
    return found


def _checked_row(row: Row, allow_prefixes: tuple[str, ...]) -> Row:
    """Returns the row with its audio URI from the columns, or with the reason why it may not be read."""
    named = next((row.columns.pop(name) for name in URI_COLUMNS if name in row.columns), None)
    if not isinstance(named, str) or not named:
        problem = f"names no audio; it needs a URI, or JSON with one of {', '.join(URI_COLUMNS)}"
        return row._replace(columns=_bad(f"{row.where} {problem}"))
    if not is_text(named):
        return row._replace(columns=_bad(f"{row.where} names what is not UTF-8"))
    if "://" not in named and not named.startswith("/"):
        return row._replace(columns=_bad(f"{row.where} names {named}, which is no URL and no absolute path"))
    try:
        check_allowed(named, where=row.where, allow_prefixes=allow_prefixes)
    except Rejected as rejected:
        return row._replace(columns=rejected)
    return row._replace(audio=storage.ObjectInfo(named, None, None, None))


def _with_questions_in_id(recording: Recording) -> Recording:
    """Includes a recording's questions in its id, since later messages may ask others about the same audio."""
    asked = json.dumps(plain(recording.questions), ensure_ascii=False)
    own_id = source_key(
        f"{recording.uri} {asked}",
        recording.offset_s,
        recording.duration_s,
        channel=recording.channel,
        stream=recording.stream,
    )
    return recording._replace(recording_id=own_id)


def _with_message(letter: DeadLetter, part: _Part, message: Message) -> DeadLetter:
    """Adds its part of the message to a dead letter's `input`, so that it can be published again."""
    kept = {"data": storage.redact(part.text), "attributes": storage.redact_values(dict(message.attributes))}
    if message.message_id:
        kept |= {"message_id": message.message_id, "published_at": message.published_at}
    input_json = json.dumps(json.loads(letter.input) | {"message": kept}, ensure_ascii=False)
    input_json = input_json.encode(errors="backslashreplace").decode()
    key = dead_letter_key(letter.recording_id, letter.stage, letter.reason, input_json)
    return letter._replace(input=input_json, dead_letter_key=key)


def _parts(message: Message) -> Iterator[_Part]:
    attributes = dict(message.attributes)
    try:
        text, problem = message.data.decode("utf-8-sig"), ""
    except UnicodeDecodeError as error:
        text, problem = (
            base64.b64encode(message.data).decode(),
            f"is not UTF-8 (its input contains it as base64): {error}",
        )
    if attributes.keys() >= _GCS_EVENT:
        yield _event_part(text, _gcs_event, attributes, {})
    elif problem:
        yield _Part(text, None, attributes, problem)
    elif message.data or attributes:
        yield from _body_parts(text, attributes)


def _body_parts(text: str, extra: Mapping[str, str]) -> Iterator[_Part]:
    """Parses a body without Google's attributes: JSON, or URIs and JSON objects, one per line."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    whole = _json(text)
    if not lines:
        yield _Part(text, None, extra, "is empty, and has not the attributes of a storage notification")
    elif not isinstance(whole, _NotJson):
        for entry in whole if isinstance(whole, list) else [whole]:
            yield from _entry_parts(entry, extra)
    elif lines[0].startswith(("{", "[")) and isinstance(_json(lines[0]), _NotJson):
        yield _Part(text, None, extra, f"is not JSON: {whole}")
    else:
        for line in lines:
            entry = _json(line) if line.startswith("{") else line
            if isinstance(entry, _NotJson):
                yield _Part(line, None, extra, f"is not JSON: {entry}")
            else:
                yield from _entry_parts(entry, extra)


class _NotJson(str):
    """Says why a text is not JSON."""


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        return _NotJson(error)


def _entry_parts(entry: Any, extra: Mapping[str, str]) -> Iterator[_Part]:
    text = entry if isinstance(entry, str) else json.dumps(entry, ensure_ascii=False)
    if isinstance(entry, str):
        yield _Part(text, {"uri": entry}, extra)
    elif not isinstance(entry, dict):
        yield _Part(text, None, extra, "is neither a URI nor an object")
    elif entry.get("Type") == "Notification" and isinstance(entry.get("Message"), str):  # Amazon SNS around a message
        yield from _body_parts(entry["Message"], {**extra, **_sns_attributes(entry)})
    elif isinstance(entry.get("Records"), list):
        for record in entry["Records"]:
            yield _event_part(json.dumps(record, ensure_ascii=False), _s3_record, record, extra)
    elif entry.get("Event") == "s3:TestEvent":
        yield _Part(text, None, extra)
    elif entry.get("source") == "aws.s3" and "detail" in entry:
        yield _event_part(text, _event_bridge, entry, extra)
    elif entry.get("kind") == "storage#object":  # Google's payload where the attributes were lost on the way
        yield _event_part(text, _gcs_payload, entry, extra)
    else:
        yield _Part(text, entry, extra)


_Event = tuple[str, Any, Any, dict[str, Any]] | None


def _event_part(text: str, read: Callable[[Any], _Event], event: Any, extra: Mapping[str, str]) -> _Part:
    """Parses a store's event: `read` returns scheme, bucket, key and metadata, or None if there is no new object."""
    try:
        found = read(event)
        if found is None:
            return _Part(text, None, extra)
        scheme, bucket, key, values = found
        if not isinstance(bucket, str) or not isinstance(key, str) or not bucket or not key:
            raise TypeError(f"bucket is {bucket!r} and object is {key!r}")
    except (AttributeError, KeyError, TypeError) as error:
        problem = f"has no {error}" if isinstance(error, KeyError) else f"is malformed: {error}"
        return _Part(text, None, extra, f"looks like a storage notification, and {problem}")
    # As in a folder, audio is recognized by its extension.
    is_audio = PurePosixPath(key).suffix[1:].lower() in storage.AUDIO_EXTENSIONS and not key.endswith("/")
    metadata = {name: str(value) for name, value in values.items() if value}
    return _Part(text, {"uri": f"{scheme}://{bucket}/{key}"} if is_audio else None, {**extra, **metadata})


def _gcs_event(attributes: dict[str, str]) -> _Event:
    if attributes["eventType"] != "OBJECT_FINALIZE":
        return None
    metadata = {name: value for name, value in attributes.items() if name not in _GCS_OWN}
    return "gs", attributes["bucketId"], attributes["objectId"], metadata


def _gcs_payload(payload: dict[str, Any]) -> _Event:
    return "gs", payload["bucket"], payload["name"], {"objectGeneration": payload.get("generation")}


def _s3_record(record: Any) -> _Event:
    """Parses a record of Amazon S3, MinIO or another compatible server."""
    version = str(record.get("eventVersion", "2"))
    if version.partition(".")[0] != "2":
        raise TypeError(f"eventVersion is {version}, and only 2 is known")
    found = record["s3"]["object"]
    if not record["eventName"].removeprefix("s3:").startswith("ObjectCreated:"):
        return None
    # URL-encoded like forms: a space is a plus sign.
    key = unquote_plus(found["key"], errors="surrogateescape")
    metadata = {"eventTime": record.get("eventTime"), "versionId": found.get("versionId")}
    return "s3", record["s3"]["bucket"]["name"], key, metadata


def _event_bridge(event: dict[str, Any]) -> _Event:
    found = event["detail"]["object"]
    if event["detail-type"] != "Object Created":
        return None
    metadata = {"eventTime": event.get("time"), "versionId": found.get("version-id")}
    return "s3", event["detail"]["bucket"]["name"], found["key"], metadata


def _sns_attributes(envelope: dict[str, Any]) -> dict[str, str]:
    found = envelope.get("MessageAttributes")
    values = found.items() if isinstance(found, dict) else ()
    return {name: str(value["Value"]) for name, value in values if isinstance(value, dict) and "Value" in value}


def _bad(detail: str) -> Rejected:
    return Rejected(Stage.LIST, Reason.UNSUPPORTED_FORMAT, detail)
