"""Messages of Google's Pub/Sub emulator, pulled and acknowledged on Prism; a test says when rows are durable."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import apache_beam as beam
import pytest
from apache_beam.options.pipeline_options import PipelineOptions
from google.cloud import pubsub_v1

from af3pipe.schemas import DeadLetter
from af3pipe.transforms import AcknowledgeMessages, PullMessages, ReadNotifications
from af3pipe.transforms.inputs.pubsub import modify_deadline, pull
from af3pipe.transforms.outcome import recording_of
from tests.integration.pubsub import prism, pubsub_emulator
from tests.integration.servers import free_port, python_module, wait_for_port
from tests.waiting import wait_until

pytestmark = [
    pytest.mark.integration,
    pytest.mark.slow,
    # Threads of Beam's worker in this process, when the runner is ended.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning"),
]
LEASE_S = 10  # the shortest there is


@pytest.fixture(scope="module")
def emulator(tmp_path_factory):
    with pubsub_emulator(tmp_path_factory.mktemp("pubsub")) as address:
        yield address


class Topic:
    """A topic with one subscription."""

    def __init__(self, name):
        self._publisher, subscriber = pubsub_v1.PublisherClient(), pubsub_v1.SubscriberClient()
        self._topic = self._publisher.topic_path("project", name)
        self.subscription = subscriber.subscription_path("project", name)
        self._publisher.create_topic(name=self._topic)
        subscriber.create_subscription(name=self.subscription, topic=self._topic, ack_deadline_seconds=LEASE_S)

    def publish(self, data, **attributes):
        """Gives the message's id."""
        return self._publisher.publish(self._topic, data, **attributes).result()

    def pull(self, seconds):
        """Ids of the first messages that come in this time."""
        deadline = time.monotonic() + seconds
        found = []
        while not found and time.monotonic() < deadline:
            found = [message.message_id for message in pull(self.subscription, 100, 600)]
        return found


class Archive:
    """Recordings, the topic that tells of them, and what a pipeline made of it."""

    def __init__(self, folder, name):
        self.folder = folder
        self.told = Topic(f"{name}-told")
        self.durable = Topic(f"{name}-durable")
        self.logs = {kind: folder / f"{kind}.jsonl" for kind in ("asked", "delivered", "acknowledged")}
        for log in self.logs.values():
            log.touch()
        for file in "abcd":
            (folder / f"{file}.flac").write_bytes(file.encode())

    def uri(self, name):
        return str(self.folder / f"{name}.flac")

    def tell(self, *names):
        return self.told.publish("\n".join(self.uri(name) for name in names).encode())

    def logged(self, kind):
        """What the pipeline has asked, what was delivered to it, or what it acknowledged."""
        return [json.loads(line) for line in self.logs[kind].read_text().splitlines()]

    def asked(self):
        return [uri for uri, _ in self.logged("asked")]

    def delivered(self):
        return {(message_id, ack_id) for _, _, message_id, ack_id, *_ in self.logged("delivered")}

    def acknowledged(self):
        return {message_id for _, message_id in self.logged("acknowledged")}

    def wait_until_acknowledged(self, *message_ids):
        """And no more than these."""
        wait_until(lambda: self.acknowledged() >= set(message_ids))
        assert self.acknowledged() == set(message_ids)

    def make_durable(self, uri):
        """As a sink does once the rows of a recording, or its dead letter, are written."""
        (work,) = {tuple(work) for asked, work in self.logged("asked") if asked == uri}
        self.durable.publish(json.dumps(work).encode())

    def start(self, flags, *, lease_s=LEASE_S):
        pipeline = beam.Pipeline(options=PipelineOptions([*flags, "--streaming"]))
        notified = pipeline | ReadNotifications(
            self.told.subscription, allow_prefixes=[str(self.folder)], ack_deadline_s=LEASE_S
        )
        found = (notified.good, notified.dead_letters) | "Found" >> beam.Flatten()
        _ = found | "Ask" >> beam.Map(ask) | "Asked" >> beam.Map(log_to, str(self.logs["asked"]))
        _ = notified.waiting | "DeliveredTo" >> beam.Map(log_to, str(self.logs["delivered"]))
        durable = (
            pipeline
            | "PullDurable" >> PullMessages(self.durable.subscription)
            | "Durable"
            >> beam.Map(lambda message: tuple(json.loads(message.data))).with_output_types(tuple[str, str])
        )
        acknowledged = {"waiting": notified.waiting, "durable": durable} | AcknowledgeMessages(ack_deadline_s=lease_s)
        _ = acknowledged | "AcknowledgedNow" >> beam.Map(log_to, str(self.logs["acknowledged"]))
        return pipeline.run()


def ask(found):
    recording = recording_of(found.input) if isinstance(found, DeadLetter) else found
    return found.uri, [found.recording_id, recording.content_identity]


def log_to(row, log):
    with Path(log).open("a") as file:
        file.write(json.dumps(row) + "\n")


def test_a_message_is_acknowledged_when_all_it_asked_for_is_durable(emulator, tmp_path):
    archive = Archive(tmp_path, "durable")
    with prism(tmp_path) as flags:
        job = archive.start(flags)
        malformed = archive.told.publish(b"{broken")
        letter = f"pubsub://{archive.told.subscription}#message={malformed}"
        of_a, of_a_again, of_b_and_c, never = (archive.tell(*names) for names in ("a", "a", "bc", "d"))
        deletion = archive.told.publish(b"", eventType="OBJECT_DELETE", bucketId="b", objectId="a.flac")
        wait_until(lambda: len(archive.asked()) == 5 and len(archive.delivered()) == 6)
        archive.wait_until_acknowledged(deletion)
        archive.make_durable(archive.uri("a"))
        archive.wait_until_acknowledged(deletion, of_a, of_a_again)
        archive.make_durable(archive.uri("b"))
        archive.make_durable(letter)
        archive.wait_until_acknowledged(deletion, of_a, of_a_again, malformed)
        archive.make_durable(archive.uri("c"))
        archive.wait_until_acknowledged(deletion, of_a, of_a_again, malformed, of_b_and_c)
        late = archive.tell("a")  # it was done long ago
        archive.wait_until_acknowledged(deletion, of_a, of_a_again, malformed, of_b_and_c, late)
        time.sleep(2 * LEASE_S)
        assert len(archive.delivered()) == 7  # no lease ran out
        assert sorted(archive.asked()) == sorted([*map(archive.uri, "abcd"), letter])
        job.cancel()
    # Any other that was not acknowledged would have come with it or before it.
    assert archive.told.pull(60) == [never]


def test_a_message_that_was_delivered_again_is_acknowledged_by_its_last_delivery(emulator, tmp_path):
    archive = Archive(tmp_path, "again")
    with prism(tmp_path) as flags:
        job = archive.start(flags, lease_s=600)
        message = archive.tell("a")
        wait_until(archive.delivered)
        ((_, delivery),) = archive.delivered()
        modify_deadline(archive.told.subscription, [delivery], 0)  # as if its lease had run out
        wait_until(lambda: len(archive.delivered()) >= 2)
        archive.make_durable(archive.uri("a"))
        archive.wait_until_acknowledged(message)
        assert archive.asked() == [archive.uri("a")]
        job.cancel()
    assert archive.told.pull(LEASE_S + 5) == []


def test_what_a_killed_worker_had_is_delivered_to_the_next_job(emulator, tmp_path):
    archive = Archive(tmp_path, "killed")
    message = archive.tell("a")
    with prism(tmp_path) as flags:
        port = free_port()
        pool = subprocess.Popen(
            python_module("apache_beam.runners.worker.worker_pool_main", f"--service_port={port}"),
            start_new_session=True,
        )
        try:
            wait_for_port(port, pool)
            archive.start([*flags[:-1], "--environment_type=EXTERNAL", f"--environment_config=localhost:{port}"])
            wait_until(archive.asked)
        finally:
            os.killpg(pool.pid, signal.SIGKILL)
            pool.wait()
    (tmp_path / "next").mkdir()
    with prism(tmp_path / "next") as flags:
        job = archive.start(flags)
        wait_until(lambda: len(archive.asked()) == 2)
        archive.make_durable(archive.uri("a"))
        archive.wait_until_acknowledged(message)
        job.cancel()
    assert archive.told.pull(LEASE_S + 5) == []
