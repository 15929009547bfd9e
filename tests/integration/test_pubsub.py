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
from af3pipe.transforms.outcome import recording_of
from af3pipe.transforms.pubsub import pull
from tests.integration.pubsub import prism, pubsub_emulator
from tests.integration.servers import free_port, python_module, wait_for_port

pytestmark = [
    pytest.mark.integration,
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
        self.log = folder / "asked.jsonl"
        self.log.touch()
        for file in "abcd":
            (folder / f"{file}.flac").write_bytes(file.encode())

    def uri(self, name):
        return str(self.folder / f"{name}.flac")

    def tell(self, *names):
        return self.told.publish("\n".join(self.uri(name) for name in names).encode())

    def asked(self):
        return [json.loads(line) for line in self.log.read_text().splitlines()]

    def make_durable(self, uri):
        """As a sink does once the rows of a recording, or its dead letter, are written."""
        (work,) = {tuple(each["work"]) for each in self.asked() if each["uri"] == uri}
        self.durable.publish(json.dumps(work).encode())

    def start(self, flags, *, first_lease_s=LEASE_S, lease_s=LEASE_S):
        pipeline = beam.Pipeline(options=PipelineOptions([*flags, "--streaming"]))
        notified = pipeline | ReadNotifications(
            self.told.subscription, allow_prefixes=[str(self.folder)], ack_deadline_s=first_lease_s
        )
        _ = (notified.good, notified.dead_letters) | beam.Flatten() | "Ask" >> beam.Map(ask, log=str(self.log))
        durable = (
            pipeline
            | "PullDurable" >> PullMessages(self.durable.subscription)
            | "Durable"
            >> beam.Map(lambda message: tuple(json.loads(message.data))).with_output_types(tuple[str, str])
        )
        _ = {"waiting": notified.waiting, "durable": durable} | AcknowledgeMessages(ack_deadline_s=lease_s)
        return pipeline.run()


def ask(found, log):
    recording = recording_of(found.input) if isinstance(found, DeadLetter) else found
    row = {"uri": found.uri, "work": [found.recording_id, recording.content_identity]}
    with Path(log).open("a") as file:
        file.write(json.dumps(row) + "\n")


def counted(job):
    job._metrics = None  # Beam's client asks once and keeps the answer
    counters = job.metrics().query()["counters"]
    return {each.key.metric.name: each.committed for each in counters}


def wait_until(is_so, job=None, seconds=60):
    deadline = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < deadline, f"it never came to be; counted: {job and counted(job)}"
        time.sleep(0.3)


def wait_for(job, **wanted):
    """Until the job has counted this much; more at once would be wrong, too."""
    wait_until(lambda: all(counted(job).get(name, 0) >= count for name, count in wanted.items()), job)
    assert {name: counted(job).get(name, 0) for name in wanted} == wanted


def test_a_message_is_acknowledged_when_all_it_asked_for_is_durable(emulator, tmp_path):
    archive = Archive(tmp_path, "durable")
    with prism(tmp_path) as flags:
        job = archive.start(flags)
        letter = f"pubsub://{archive.told.subscription}#message={archive.told.publish(b'{broken')}"
        archive.tell("a")
        archive.tell("a")
        archive.tell("b", "c")
        archive.told.publish(b"", eventType="OBJECT_DELETE", bucketId="b", objectId="a.flac")
        never = archive.tell("d")
        wait_for(job, notifications=6, messages_acknowledged=1)  # the deletion
        wait_until(lambda: len(archive.asked()) == 5)
        archive.make_durable(archive.uri("a"))
        wait_for(job, messages_acknowledged=3)
        archive.make_durable(archive.uri("b"))
        archive.make_durable(letter)
        wait_for(job, messages_acknowledged=4)
        archive.make_durable(archive.uri("c"))
        wait_for(job, messages_acknowledged=5)
        archive.tell("a")  # of what was done long ago
        wait_for(job, messages_acknowledged=6)
        wait_until(lambda: counted(job).get("leases_extended", 0) >= 3)
        # Each was asked once, and all of that took longer than a lease.
        assert counted(job)["notifications"] == 7
        assert sorted(each["uri"] for each in archive.asked()) == sorted([*map(archive.uri, "abcd"), letter])
        job.cancel()
    # Any other would have come first: this one was leased last.
    assert archive.told.pull(60) == [never]


def test_a_message_that_was_delivered_again_is_acknowledged_by_its_last_delivery(emulator, tmp_path):
    archive = Archive(tmp_path, "again")
    with prism(tmp_path) as flags:
        job = archive.start(flags, lease_s=600)  # too late for a first lease of 10 s
        archive.tell("a")
        wait_until(lambda: counted(job).get("notifications", 0) >= 2)
        assert len(archive.asked()) == 1
        archive.make_durable(archive.uri("a"))
        wait_until(lambda: counted(job).get("messages_acknowledged", 0) >= 1)
        job.cancel()
    assert archive.told.pull(LEASE_S + 5) == []


def test_what_a_killed_worker_had_is_delivered_to_the_next_job(emulator, tmp_path):
    archive = Archive(tmp_path, "killed")
    archive.tell("a")
    with prism(tmp_path) as flags:
        port = free_port()
        pool = subprocess.Popen(
            python_module("apache_beam.runners.worker.worker_pool_main", f"--service_port={port}"),
            start_new_session=True,
        )
        try:
            wait_for_port(port, pool)
            archive.start([*flags[:-1], "--environment_type=EXTERNAL", f"--environment_config=localhost:{port}"])
            wait_until(lambda: archive.asked())
        finally:
            os.killpg(pool.pid, signal.SIGKILL)
            pool.wait()
    (tmp_path / "next").mkdir()
    with prism(tmp_path / "next") as flags:
        job = archive.start(flags)
        wait_until(lambda: len(archive.asked()) == 2)
        archive.make_durable(archive.uri("a"))
        wait_for(job, messages_acknowledged=1)
        job.cancel()
    assert archive.told.pull(LEASE_S + 5) == []
