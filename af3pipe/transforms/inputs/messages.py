"""Messages about new recordings to recordings: object-change notifications of stores, plain URIs, rows of a manifest.

A message is never dropped in silence: it names recordings, or it is ignored knowingly and counted (a deletion, a
store's test event, an object that is no audio), or it is a dead letter that holds it.
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
# They say what the URI says, or nothing of the recording; all others ride along.
_GCS_OWN = _GCS_EVENT | {"payloadFormat", "notificationConfig"}


class Message(NamedTuple):
    """A message as it was delivered.

    Attributes:
        data: Its body.
        attributes: Names and values beside the body.
        message_id: The same however often it is delivered; empty where the messaging system has none.
        published_at: ISO 8601 in UTC; empty where it is not known.
        subscription: Where it was pulled from; empty for messages that nobody here acknowledges.
        ack_id: Names this delivery; changes when it is delivered again.
    """

    data: bytes
    attributes: tuple[tuple[str, str], ...] = ()
    message_id: str = ""
    published_at: str = ""
    subscription: str = ""
    ack_id: str = ""

    @property
    def uri(self) -> str:
        """Names it where it names no recording: the same message has the same name."""
        if self.message_id:
            return f"pubsub://{self.subscription}#message={self.message_id}"
        digest = hashlib.sha256(repr((self.data, self.attributes)).encode()).hexdigest()
        return f"message://{digest[:20]}"


class _Part(NamedTuple):
    """One thing that a message says.

    Attributes:
        text: The part of the body that says it.
        columns: As of a row of a manifest; None where there is nothing to do.
        extra: What rides along.
        problem: What is wrong with it, to be read behind a name of the part.
    """

    text: str
    columns: dict[str, Any] | None
    extra: Mapping[str, str]
    problem: str = ""


def as_message(found: Any) -> Message:
    """A message of any kind: `Message`, Beam's `PubsubMessage`, a (key, value) pair of Kafka's, bytes or text.

    Raises:
        TypeError: Something else.
    """
    if isinstance(found, Message):
        return found
    if isinstance(found, tuple) and len(found) == 2:
        found = found[1]
    if found is None:  # of a pair: what was under the key is deleted
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
    """What a message names, in its order: what ParseNotification does for one, without Beam and without the store.

    Args:
        message: As `as_message` takes it.
        allow_prefixes: As of `ParseNotification`.
        channel: Of recordings for which the message names none.
        stream: Of recordings for which the message names none.

    Returns:
        Nothing, where the message tells of nothing to do.
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
        return _holding(found, part, message)
    if found.questions and not set(ID_COLUMNS).intersection(part.columns or ()):
        return _asked_apart(found)
    return found


def _checked_row(row: Row, allow_prefixes: tuple[str, ...]) -> Row:
    """The row with its audio found in the columns, or with the reason why it may not be read."""
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
    return row._replace(held=storage.ObjectInfo(named, None, None, None))


def _asked_apart(recording: Recording) -> Recording:
    """Named by its questions, too: another message may ask the same recording something else, at any later time."""
    asked = json.dumps(plain(recording.questions), ensure_ascii=False)
    own_id = source_key(
        f"{recording.uri} {asked}",
        recording.offset_s,
        recording.duration_s,
        channel=recording.channel,
        stream=recording.stream,
    )
    return recording._replace(recording_id=own_id)


def _holding(letter: DeadLetter, part: _Part, message: Message) -> DeadLetter:
    """The dead letter with its part of the message in `input`, so that it can be published again."""
    held = {"data": storage.redact(part.text), "attributes": storage.redact_values(dict(message.attributes))}
    if message.message_id:
        held |= {"message_id": message.message_id, "published_at": message.published_at}
    told = json.dumps(json.loads(letter.input) | {"message": held}, ensure_ascii=False)
    told = told.encode(errors="backslashreplace").decode()
    key = dead_letter_key(letter.recording_id, letter.stage, letter.reason, told)
    return letter._replace(input=told, dead_letter_key=key)


def _parts(message: Message) -> Iterator[_Part]:
    attributes = dict(message.attributes)
    try:
        text, problem = message.data.decode("utf-8-sig"), ""
    except UnicodeDecodeError as error:
        text, problem = (
            base64.b64encode(message.data).decode(),
            f"is not UTF-8 (its input holds it as base64): {error}",
        )
    if attributes.keys() >= _GCS_EVENT:
        yield _event_part(text, _gcs_event, attributes, {})
    elif problem:
        yield _Part(text, None, attributes, problem)
    elif message.data or attributes:
        yield from _body_parts(text, attributes)


def _body_parts(text: str, extra: Mapping[str, str]) -> Iterator[_Part]:
    """Of a body without Google's attributes: JSON, or URIs and JSON objects, one a line."""
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
    """Why a text is not JSON."""


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
    """Of a store's event: `read` gives scheme, bucket, key and what rides along, or None for no new object."""
    try:
        found = read(event)
        if found is None:
            return _Part(text, None, extra)
        scheme, bucket, key, told = found
        if not isinstance(bucket, str) or not isinstance(key, str) or not bucket or not key:
            raise TypeError(f"bucket is {bucket!r} and object is {key!r}")
    except (AttributeError, KeyError, TypeError) as error:
        problem = f"has no {error}" if isinstance(error, KeyError) else f"is malformed: {error}"
        return _Part(text, None, extra, f"looks like a storage notification, and {problem}")
    # As in a folder, audio is told by its extension.
    is_audio = PurePosixPath(key).suffix[1:].lower() in storage.AUDIO_EXTENSIONS and not key.endswith("/")
    told = {name: str(value) for name, value in told.items() if value}
    return _Part(text, {"uri": f"{scheme}://{bucket}/{key}"} if is_audio else None, {**extra, **told})


def _gcs_event(attributes: dict[str, str]) -> _Event:
    if attributes["eventType"] != "OBJECT_FINALIZE":
        return None
    told = {name: value for name, value in attributes.items() if name not in _GCS_OWN}
    return "gs", attributes["bucketId"], attributes["objectId"], told


def _gcs_payload(payload: dict[str, Any]) -> _Event:
    return "gs", payload["bucket"], payload["name"], {"objectGeneration": payload.get("generation")}


def _s3_record(record: Any) -> _Event:
    """Of Amazon S3, MinIO or another server that follows it."""
    version = str(record.get("eventVersion", "2"))
    if version.partition(".")[0] != "2":
        raise TypeError(f"eventVersion is {version}, and only 2 is known")
    found = record["s3"]["object"]
    if not record["eventName"].removeprefix("s3:").startswith("ObjectCreated:"):
        return None
    # As forms encode it: a space is a plus sign.
    key = unquote_plus(found["key"], errors="surrogateescape")
    told = {"eventTime": record.get("eventTime"), "versionId": found.get("versionId")}
    return "s3", record["s3"]["bucket"]["name"], key, told


def _event_bridge(event: dict[str, Any]) -> _Event:
    found = event["detail"]["object"]
    if event["detail-type"] != "Object Created":
        return None
    told = {"eventTime": event.get("time"), "versionId": found.get("version-id")}
    return "s3", event["detail"]["bucket"]["name"], found["key"], told


def _sns_attributes(envelope: dict[str, Any]) -> dict[str, str]:
    found = envelope.get("MessageAttributes")
    values = found.items() if isinstance(found, dict) else ()
    return {name: str(value["Value"]) for name, value in values if isinstance(value, dict) and "Value" in value}


def _bad(detail: str) -> Rejected:
    return Rejected(Stage.LIST, Reason.UNSUPPORTED_FORMAT, detail)
