import base64
import json
from types import SimpleNamespace
from urllib.parse import quote, quote_plus

import pytest
from apache_beam.io.gcp.pubsub import PubsubMessage
from hypothesis import example, given
from hypothesis import strategies as st

from af3pipe.schemas import DeadLetter, Question, Reason, Stage
from af3pipe.transforms.inputs.messages import Message, parse_notification
from af3pipe.transforms.outcome import recording_of

ALL = ("s3://", "gs://", "/inbox")

# As Google's documentation of Pub/Sub notifications names them.
GCS_ATTRIBUTES = {
    "notificationConfig": "projects/_/buckets/archive/notificationConfigs/3",
    "eventType": "OBJECT_FINALIZE",
    "payloadFormat": "JSON_API_V1",
    "bucketId": "archive",
    "objectId": "field/red flower #1.flac",
    "objectGeneration": "1764068422613456",
    "eventTime": "2026-11-21T10:20:22.615123Z",
}
GCS_PAYLOAD = {
    "kind": "storage#object",
    "id": "archive/field/red flower #1.flac/1764068422613456",
    "selfLink": "https://www.googleapis.com/storage/v1/b/archive/o/field%2Fred%20flower%20%231.flac",
    "name": "field/red flower #1.flac",
    "bucket": "archive",
    "generation": "1764068422613456",
    "metageneration": "1",
    "contentType": "audio/flac",
    "timeCreated": "2026-11-21T10:20:22.615Z",
    "size": "73",
    "md5Hash": "2AEBpV8qYqg9ioElUD6Lvw==",
    "etag": "CNDq5Z7x25ADEAE=",
}
# Amazon's own example of a PUT, with a key that it has to encode.
S3_RECORD = {
    "eventVersion": "2.1",
    "eventSource": "aws:s3",
    "awsRegion": "us-west-2",
    "eventTime": "1970-01-01T00:00:00.000Z",
    "eventName": "ObjectCreated:Put",
    "userIdentity": {"principalId": "AIDAJDPLRKLG7UEXAMPLE"},
    "requestParameters": {"sourceIPAddress": "127.0.0.1"},
    "responseElements": {
        "x-amz-request-id": "C3D13FE58DE4C810",
        "x-amz-id-2": "FMyUVURIY8/IgAtTv8xRjskZQpcIZ9KG4V5Wp6S7S/JRWeUWerMUE5JgHvANOjpD",
    },
    "s3": {
        "s3SchemaVersion": "1.0",
        "configurationId": "testConfigRule",
        "bucket": {
            "name": "mybucket",
            "ownerIdentity": {"principalId": "A3NL1KOZZKExample"},
            "arn": "arn:aws:s3:::mybucket",
        },
        "object": {
            "key": "field/red+flower+%231.flac",
            "size": 1024,
            "eTag": "d41d8cd98f00b204e9800998ecf8427e",
            "versionId": "096fKKXTRTtl3on89fVO.nfljtsv6qko",
            "sequencer": "0055AED6DCD90281E5",
        },
    },
}
S3_TEST = {
    "Service": "Amazon S3",
    "Event": "s3:TestEvent",
    "Time": "2014-10-13T15:57:02.089Z",
    "Bucket": "bucketname",
    "RequestId": "5582815E1AEA5ADF",
    "HostId": "8cLeGAmw098X5cv4Zkwcmo8vvZa3eH3eKxsPzbB9wrR+YstdA6Knx4Ip8EXAMPLE",
}
# As MinIO's guide shows what it sends to Kafka; the key is encoded as Amazon's is.
MINIO = {
    "EventName": "s3:ObjectCreated:Put",
    "Key": "archive/field/red flower #1.flac",
    "Records": [
        {
            "eventVersion": "2.0",
            "eventSource": "aws:s3",
            "awsRegion": "",
            "eventTime": "2016-10-12T21:18:20Z",
            "eventName": "s3:ObjectCreated:Put",
            "userIdentity": {"principalId": "minio"},
            "requestParameters": {"sourceIPAddress": "[::1]:39706"},
            "responseElements": {},
            "s3": {
                "s3SchemaVersion": "1.0",
                "configurationId": "Config",
                "bucket": {
                    "name": "archive",
                    "ownerIdentity": {"principalId": "minio"},
                    "arn": "arn:aws:s3:::archive",
                },
                "object": {
                    "key": "field%2Fred+flower+%231.flac",
                    "size": 56060,
                    "eTag": "1d97bf45ecb37f7a7b699418070df08f",
                    "contentType": "audio/flac",
                    "userMetadata": {"content-type": "audio/flac"},
                    "sequencer": "147CE57C70B31931",
                },
            },
        }
    ],
}
# Amazon's own example.
EVENT_BRIDGE = {
    "version": "0",
    "id": "17793124-05d4-b198-2fde-7ededc63b103",
    "detail-type": "Object Created",
    "source": "aws.s3",
    "account": "111122223333",
    "time": "2021-11-12T00:00:00Z",
    "region": "ca-central-1",
    "resources": ["arn:aws:s3:::amzn-s3-demo-bucket1"],
    "detail": {
        "version": "0",
        "bucket": {"name": "amzn-s3-demo-bucket1"},
        "object": {
            "key": "field/red flower+1.flac",
            "size": 5,
            "etag": "b1946ac92492d2347c6235b4d2611184",
            "version-id": "IYV3p45BT0ac8hjHg1houSdS1a.Mro8e",
            "sequencer": "617f08299329d189",
        },
        "request-id": "N4N7GDK58NMKJ12R",
        "requester": "123456789012",
        "source-ip-address": "1.2.3.4",
        "reason": "PutObject",
    },
}


def sns(message, **attributes):
    """As Amazon documents it, where raw delivery is off."""
    return {
        "Type": "Notification",
        "MessageId": "719a6bbf-f51b-5320-920f-3385b5e9aa56",
        "TopicArn": "arn:aws:sns:us-east-1:333333333333:my-kinesis-test-topic",
        "Subject": "Amazon S3 Notification",
        "Message": json.dumps(message),
        "Timestamp": "2020-11-26T23:48:02.032Z",
        "UnsubscribeURL": "https://sns.us-east-1.amazonaws.com/?Action=Unsubscribe",
        "MessageAttributes": {name: {"Type": "String", "Value": value} for name, value in attributes.items()},
    }


def s3_event(key, name="ObjectCreated:Put"):
    found = {"bucket": {"name": "mybucket"}, "object": {"key": key}}
    return {"Records": [{"eventVersion": "2.1", "eventName": name, "s3": found}]}


def gcs(payload=b"", **changes):
    return PubsubMessage(payload, GCS_ATTRIBUTES | changes, message_id="7")


def parse(message, allow_prefixes=ALL, **chosen):
    message = json.dumps(message).encode() if isinstance(message, dict | list) else message
    return parse_notification(message, allow_prefixes=allow_prefixes, **chosen)


def uris(message, **chosen):
    found = parse(message, **chosen)
    assert not [each for each in found if isinstance(each, DeadLetter)], found
    return [each.uri for each in found]


@pytest.mark.parametrize(
    ("message", "uri"),
    [
        (gcs(json.dumps(GCS_PAYLOAD).encode()), "gs://archive/field/red flower #1.flac"),
        (gcs(payloadFormat="NONE"), "gs://archive/field/red flower #1.flac"),
        (gcs(overwroteGeneration="1764068422613455"), "gs://archive/field/red flower #1.flac"),
        (GCS_PAYLOAD, "gs://archive/field/red flower #1.flac"),
        ({"Records": [S3_RECORD]}, "s3://mybucket/field/red flower #1.flac"),
        (sns({"Records": [S3_RECORD]}), "s3://mybucket/field/red flower #1.flac"),
        (MINIO, "s3://archive/field/red flower #1.flac"),
        (EVENT_BRIDGE, "s3://amzn-s3-demo-bucket1/field/red flower+1.flac"),
        (s3_event("a%2Bb+c.WAV", "s3:ObjectCreated:CompleteMultipartUpload"), "s3://mybucket/a+b c.WAV"),
        (b"gs://archive/a.flac", "gs://archive/a.flac"),
        (b"\xef\xbb\xbfgs://archive/a.flac\r\n", "gs://archive/a.flac"),
        ('"gs://archive/a.flac"', "gs://archive/a.flac"),
        (b"/inbox/a.flac", "/inbox/a.flac"),
        ({"audio_filepath": "gs://archive/any name"}, "gs://archive/any name"),
    ],
)
def test_all_kinds_of_messages_name_a_recording(message, uri):
    assert uris(message) == [uri]
    body = message if not isinstance(message, dict) else json.dumps(message).encode()
    if isinstance(body, bytes):
        assert uris((b"key", body)) == uris(Message(body)) == uris(PubsubMessage(body, None)) == [uri]


@pytest.mark.parametrize(
    "message",
    [
        gcs(eventType="OBJECT_DELETE"),
        gcs(eventType="OBJECT_ARCHIVE"),
        gcs(eventType="OBJECT_METADATA_UPDATE"),
        gcs(objectId="thumbnails/a.jpg"),
        gcs(objectId="a.flac/"),
        gcs(objectId="flac"),
        S3_TEST,
        sns(S3_TEST),
        {"Records": []},
        s3_event("a.flac", "ObjectRemoved:Delete"),
        s3_event("a.flac", "s3:ObjectRemoved:DeleteMarkerCreated"),
        s3_event("HappyFace.jpg"),
        EVENT_BRIDGE | {"detail-type": "Object Deleted"},
        (b"key", None),
        (b"key", b""),
        [],
    ],
)
def test_what_is_no_news_of_audio_is_ignored(message):
    assert parse(message) == []


def test_several_recordings_in_a_message_and_a_bad_one_costs_no_other():
    records = [S3_RECORD, s3_event("a.jpg")["Records"][0], {"eventName": "ObjectCreated:Put"}, *MINIO["Records"]]
    first, bad, last = parse({"Records": records})
    assert (first.uri, last.uri) == (
        "s3://mybucket/field/red flower #1.flac",
        "s3://archive/field/red flower #1.flac",
    )
    assert json.loads(json.loads(bad.input)["message"]["data"]) == {"eventName": "ObjectCreated:Put"}
    lines = ["gs://b/a.flac", "", '{"uri": "gs://b/b.flac", "speaker": 7}', "{broken", "gs://b/c.flac"]
    a, b, bad, c = parse("\n".join(lines).encode())
    assert [a.uri, b.uri, c.uri] == ["gs://b/a.flac", "gs://b/b.flac", "gs://b/c.flac"]
    assert b.metadata == '{"speaker": 7}'
    assert json.loads(bad.input)["message"]["data"] == "{broken"
    assert "part 3 of message" in bad.detail
    assert uris([{"uri": "gs://b/a"}, "gs://b/b"]) == ["gs://b/a", "gs://b/b"]


def test_rows_ask_what_a_manifests_rows_ask():
    row = {"uri": "gs://b/a.flac", "question": "Who?", "offset": 1.5, "channel": "left", "speaker": "Ada"}
    (found,) = parse(row)
    assert (found.offset_s, found.channel, found.metadata) == (1.5, "left", '{"speaker": "Ada"}')
    assert [question.text for question in found.questions] == ["Who?"]
    assert all(isinstance(question, Question) for question in found.questions)
    (other,) = parse(b"gs://b/a.flac", channel="right", stream=1)
    assert (other.channel, other.stream) == ("right", 1)


def test_other_questions_are_other_work_unless_the_row_is_named():
    ids = [
        parse({"uri": "gs://b/a.flac"} | more)[0].recording_id
        for more in ({}, {"question": "Who?"}, {"question": "?"})
    ]
    assert len(set(ids)) == 3
    assert parse({"uri": "gs://b/a.flac", "question": "Who?"})[0].recording_id == ids[1]
    assert parse(b"gs://b/a.flac")[0].recording_id == ids[0]
    assert parse({"uri": "gs://b/a.flac", "question": "Who?", "id": "mine"})[0].recording_id == "mine"


def test_attributes_ride_along():
    (found,) = parse(gcs(station="K Q", overwroteGeneration="5"))
    assert json.loads(found.metadata) == {
        "eventTime": "2026-11-21T10:20:22.615123Z",
        "objectGeneration": "1764068422613456",
        "overwroteGeneration": "5",
        "station": "K Q",
    }
    (found,) = parse(PubsubMessage(b'{"uri": "gs://b/a.flac", "take": 2}', {"question": "no question", "take": "1"}))
    assert (json.loads(found.metadata), found.questions) == ({"question": "no question", "take": 2}, ())
    (found,) = parse(sns({"Records": [S3_RECORD]}, station="K"))
    assert json.loads(found.metadata) == {
        "eventTime": "1970-01-01T00:00:00.000Z",
        "station": "K",
        "versionId": "096fKKXTRTtl3on89fVO.nfljtsv6qko",
    }


@pytest.mark.parametrize(
    ("message", "problem"),
    [
        (b"{broken", "is not JSON"),
        (b'{"uri":\n "gs://b/a.flac",\n', "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        (b"17", "is neither a URI nor an object"),
        (b"null", "is neither a URI nor an object"),
        (b"\n", "is empty"),
        (PubsubMessage(b"", {"a": "b"}), "is empty"),
        (b"\xff\xfe", "is not UTF-8"),
        (b"{}", "names no audio"),
        ({"uri": 7}, "names no audio"),
        ({"type": "something else"}, "names no audio"),
        (b"clips/a.flac", "no URL and no absolute path"),
        (b'{"uri": "gs://b/\\ud800.flac"}', "not UTF-8"),
        (b'{"uri": "gs://b/a.flac", "speaker": "\\ud800"}', "not valid Unicode"),
        ({"uri": "gs://b/a.flac", "offset": "soon"}, "offset is 'soon'"),
        (gcs(objectId=""), "looks like a storage notification"),
        (s3_event(7), "looks like a storage notification"),
        (s3_event("a%FF.flac"), "not UTF-8"),
        ({"Records": [{"eventName": "ObjectCreated:Put"}]}, "has no 's3'"),
        ({"Records": ["gs://b/a.flac"]}, "looks like a storage notification"),
        ({"Records": [S3_RECORD | {"eventVersion": "3.0"}]}, "only 2 is known"),
        ({"source": "aws.s3", "detail-type": "Object Created", "detail": {}}, "has no 'object'"),
    ],
)
def test_malformed_messages_are_dead_letters_that_hold_them(message, problem):
    (letter,) = parse(message)
    assert isinstance(letter, DeadLetter)
    assert (letter.stage, letter.reason) == (Stage.LIST, Reason.UNSUPPORTED_FORMAT)
    assert problem in letter.detail
    held = json.loads(letter.input)["message"]["data"]
    data = message.data if isinstance(message, PubsubMessage) else message
    if isinstance(data, bytes):
        whole = base64.b64encode(data).decode() if data == b"\xff\xfe" else data.decode()
        assert held == whole or json.loads(held) == json.loads(whole)
    assert recording_of(letter.input).recording_id == letter.recording_id
    letter.input.encode()


def test_a_message_has_one_name_however_often_it_comes():
    first, second = (Message(b"{broken", (), "7", "", "projects/p/subscriptions/s", ack) for ack in ("one", "two"))
    assert parse(first)[0].dead_letter_key == parse(second)[0].dead_letter_key
    assert parse(first)[0].uri == "pubsub://projects/p/subscriptions/s#message=7"
    assert parse(b"{broken")[0].dead_letter_key == parse(b"{broken")[0].dead_letter_key
    assert parse(b"{broken")[0].recording_id != parse(b"{broken2")[0].recording_id


@pytest.mark.parametrize(
    ("message", "allow_prefixes"),
    [
        (b"/etc/passwd", ("gs://b", "s3://")),
        (b"file:///etc/passwd", ("gs://b",)),
        (b"/inbox/../etc/passwd", ("/inbox",)),
        (b"/inbox-evil/a.flac", ("/inbox",)),
        (b"simplecache::/etc/passwd", ("/etc", "simplecache::/etc")),
        (b"simplecache::file:///etc/passwd", ("/etc", "file:///")),
        (b"gs://other/a.flac", ("gs://b",)),
        (b"gs://b-evil/a.flac", ("gs://b",)),
        (b"https://169.254.169.254/latest/meta-data", ("gs://b",)),
        (s3_event("x/../../secret.wav"), ("s3://mybucket/x",)),
        (gcs(bucketId="other"), ("gs://archive",)),
    ],
)
def test_messages_have_nothing_read_but_what_is_allowed(message, allow_prefixes):
    (letter,) = parse(message, allow_prefixes)
    assert isinstance(letter, DeadLetter)
    assert letter.reason in (Reason.NOT_ALLOWED, Reason.UNSUPPORTED_FORMAT)


def test_a_refusal_says_what_to_do():
    (letter,) = parse(b"gs://other/a.flac", ["gs://archive"])
    assert "names gs://other/a.flac" in letter.detail
    assert "--allow-prefix gs://other" in letter.detail


def test_secrets_of_a_malformed_message_are_not_told():
    (letter,) = parse(b'{"url": "https://me:hunter2secret@host/a.flac"}')
    assert "hunter2secret" not in letter.input


KEYS = st.text(st.characters(blacklist_categories=("Cs", "Cc"))).filter(lambda key: key.isprintable())


@given(KEYS, st.booleans())
def test_keys_come_back_as_they_were(key, with_slashes):
    name = f"x{key}.flac"
    encoded = quote_plus(name, safe="/" if with_slashes else "")
    found = parse(s3_event(encoded))
    if ".." in name.replace("\\", "/").split("/"):
        assert isinstance(found[0], DeadLetter)
        return
    same = parse({**EVENT_BRIDGE, "detail": {"bucket": {"name": "mybucket"}, "object": {"key": name}}})
    google = parse(gcs(bucketId="mybucket", objectId=name))
    if name.endswith("/.flac"):  # a hidden file without an extension
        assert (found, same, google) == ([], [], [])
        return
    told = [(each.uri if not isinstance(each, DeadLetter) else each.reason) for each in (*found, *same, *google)]
    # A key that reads like an encoded way up is not read either.
    if told[0] != Reason.NOT_ALLOWED:
        assert told == [f"s3://mybucket/{name}", f"s3://mybucket/{name}", f"gs://mybucket/{name}"]


def recordings_or_reasons(found):
    """A dead letter names its message, which is another one."""
    return [each.reason if isinstance(each, DeadLetter) else each for each in found]


@given(KEYS)
@example("::")  # may not be read
def test_a_space_is_never_taken_for_a_plus(key):
    # Encoded by the rules for paths instead, only a plus that was not encoded differs.
    by_path, by_query = (s3_event(encode(f"{key}.flac")) for encode in (quote, quote_plus))
    assert recordings_or_reasons(parse(by_path)) == recordings_or_reasons(parse(by_query))


@given(st.binary() | st.text().map(str.encode), st.dictionaries(st.text(), st.text()))
def test_whatever_it_is_it_is_a_recording_or_a_dead_letter_or_nothing(data, attributes):
    for found in parse(SimpleNamespace(data=data, attributes=attributes)):
        assert found.recording_id
        if isinstance(found, DeadLetter):
            assert json.loads(found.input.encode())["message"]["attributes"].keys() == attributes.keys()


def test_what_is_no_message_is_said():
    with pytest.raises(TypeError, match="int is no message"):
        parse(17)
