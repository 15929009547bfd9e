import json

import apache_beam as beam
import pytest
from apache_beam.io.gcp.pubsub import PubsubMessage
from apache_beam.testing.util import assert_that, equal_to

from af3pipe.schemas import Reason
from af3pipe.transforms import ParseNotification, PullMessages, ReadNotifications
from af3pipe.transforms.inputs.acknowledge import AcknowledgeMessages
from af3pipe.transforms.inputs.messages import Message
from af3pipe.transforms.outcome import Outcome

RUNNER = "apache_beam.runners.portability.fn_api_runner.FnApiRunner"


def test_pairs_of_kafka_give_recordings_as_the_store_has_them_now(tmp_path):
    (tmp_path / "a.flac").write_bytes(b"0123456789")
    messages = [
        (b"inbox/a.flac", str(tmp_path / "a.flac").encode()),
        (None, json.dumps({"uri": str(tmp_path / "gone.flac"), "speaker": "Ada"}).encode()),
        (b"inbox/old.flac", None),
        (b"", b"{broken"),
    ]
    with beam.Pipeline(runner=RUNNER) as pipeline:
        found = pipeline | beam.Create(messages, reshuffle=False) | ParseNotification(allow_prefixes=[str(tmp_path)])
        assert isinstance(found, Outcome)
        told = found.good | beam.Map(lambda each: (each.uri, each.size_bytes, each.mtime is not None))
        assert_that(told, equal_to([(str(tmp_path / "a.flac"), 10, True)]), label="Good")
        letters = found.dead_letters | "Reason" >> beam.Map(lambda letter: letter.reason)
        assert_that(letters, equal_to([Reason.NOT_FOUND, Reason.UNSUPPORTED_FORMAT]), label="DeadLetters")
    counters = {each.key.metric.name: each.committed for each in pipeline.result.metrics().query()["counters"]}
    assert (counters["notifications"], counters["notifications_ignored"]) == (4, 1)
    assert "recordings_found" not in counters, "they are counted where they are planned"


def test_messages_that_were_not_pulled_wait_for_nothing(tmp_path):
    (tmp_path / "a.flac").write_bytes(b"0123456789")
    uri = str(tmp_path / "a.flac").encode()
    parse = ParseNotification(allow_prefixes=[str(tmp_path)])
    pulled = Message(uri, (), "7", "", "projects/p/subscriptions/s", "ack")
    with beam.Pipeline(runner=RUNNER) as pipeline:
        messages = pipeline | beam.Create([PubsubMessage(uri, None), pulled], reshuffle=False)
        told = parse.notified(messages).waiting | beam.Map(lambda each: (each.message_id, each.item, each.items))
        assert_that(told, equal_to([("7", 0, 1)]))


@pytest.mark.parametrize(
    ("make", "problem"),
    [
        (lambda: ParseNotification(allow_prefixes=[]), "list what messages may name"),
        (lambda: ParseNotification(allow_prefixes="gs://archive"), "list what messages may name"),
        (lambda: ParseNotification(allow_prefixes=["gs://b"], channel="middle"), "channel"),
        (
            lambda: ReadNotifications("my-subscription", allow_prefixes=["gs://b"]),
            "projects/PROJECT/subscriptions/NAME",
        ),
        (lambda: PullMessages("projects/p/subscriptions/s", max_messages=5000), "max_messages is 5000"),
        (lambda: PullMessages("projects/p/subscriptions/s", ack_deadline_s=3600), "10 to 600 seconds"),
        (lambda: AcknowledgeMessages(ack_deadline_s=1), "10 to 600 seconds"),
    ],
)
def test_what_cannot_work_is_said_while_the_graph_is_built(make, problem):
    with pytest.raises(ValueError, match=problem):
        make()
