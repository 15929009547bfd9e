"""`af3pipe watch` of a Pub/Sub subscription, on Prism, against Google's own emulator: from the message to its end."""

import json
import time

import pytest
from google.cloud import pubsub_v1

from af3pipe.pipelines import batch, graph, redrive, streaming
from af3pipe.pipelines.audit import audit
from af3pipe.pipelines.job import JobError
from af3pipe.transforms import metrics
from af3pipe.transforms.inputs.pubsub import pull
from tests.integration.pubsub import prism, pubsub_emulator
from tests.integration.runners import rows
from tests.integration.test_watch import job, recordings, stopped, tone, wait_for_rows, watching

pytestmark = [
    pytest.mark.integration,
    pytest.mark.slow,
    # Threads of Beam's worker in this process, when the runner is ended.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning"),
]


@pytest.fixture(scope="module")
def runner(tmp_path_factory):
    with pubsub_emulator(tmp_path_factory.mktemp("pubsub")), prism(tmp_path_factory.mktemp("prism")) as flags:
        yield flags


@pytest.fixture
def wait_until_acknowledged():
    """Waits until so many messages of this test are acknowledged; workers of a watch count in this process."""
    before = metrics.tally()

    def wait(number, watch, seconds=120):
        deadline = time.monotonic() + seconds
        while (counted := (metrics.tally() - before)["messages_acknowledged"]) < number:
            assert time.monotonic() < deadline, f"{counted} messages are acknowledged, {number} expected"
            assert not watch.wait(0.2), "it ended by itself"

    return wait


@pytest.fixture
def subscription(runner, request):
    """Publishes to a topic of its own; leases are as short as they may be."""
    name = request.node.name.replace("[", "-").replace("]", "")
    publisher, subscriber = pubsub_v1.PublisherClient(), pubsub_v1.SubscriberClient()
    topic = publisher.topic_path("project", name)
    path = subscriber.subscription_path("project", name)
    publisher.create_topic(name=topic)
    subscriber.create_subscription(name=path, topic=topic, ack_deadline_seconds=10)
    return path, lambda data, **attributes: publisher.publish(topic, data, **attributes).result()


def test_what_messages_name_is_answered_and_they_are_acknowledged(
    model, runner, subscription, wait_until_acknowledged, tmp_path
):
    path, publish = subscription
    folder, output = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    first, second = tone(folder / "first.flac"), tone(folder / "second.flac", 65.0)
    watched = job([f"pubsub://{path}"], output, model, allow_prefixes=[str(folder)])
    publish(str(first).encode(), speaker="7")
    with watching(watched, runner) as watch:
        wait_for_rows(output, 1, watch)  # and nothing but that one message to hurry it along
        publish(json.dumps({"uri": str(second)}).encode())
        publish(str(first).encode())  # told of again
        publish(b'{"uri": 3}')
        publish(str(folder / "gone.flac").encode())
        wait_for_rows(output, 4, watch)
        wait_until_acknowledged(5, watch)
        report = stopped(watch)
    assert report.counts.reconciled, report.counts.problems
    assert report.counts.states == {"ok": 2, "dead_letter": 2}
    assert report.counts.answers == {"captions": 3, "transcripts": 2}
    assert sorted(report.counts.dead_letters) == ["not_found", "unsupported_format"]
    assert report.metrics["messages_acknowledged"] == 5
    (caption,) = [row for row in rows(output, "captions") if row["uri"] == str(first)]
    assert json.loads(caption["metadata"])["speaker"] == "7"
    (transcript,) = [row for row in rows(output, "transcripts") if row["uri"] == str(second)]
    assert len(transcript["segments"]) == 2
    assert pull(path, 100, 10) == []
    # A message that could not be read cannot be opened again: the others can.
    (again,) = redrive.redrive(str(output), redrive.Chosen((), (), None), {})
    assert again[1].counts.found == 1


def test_what_an_earlier_run_has_answered_is_acknowledged_and_not_asked(
    model, runner, subscription, wait_until_acknowledged, tmp_path
):
    """As a message is that was under way when its watch was killed."""
    path, publish = subscription
    folder, output = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    first, second = tone(folder / "first.flac"), tone(folder / "second.flac", 2.0)
    batch.run(job([str(first)], output, model))
    publish(str(first).encode())
    publish(str(second).encode())
    both = job([f"pubsub://{path}", str(folder)], output, model, allow_prefixes=[str(folder)])
    with watching(both, runner) as watch:  # the folder tells of the same
        wait_for_rows(output, 2, watch)
        wait_until_acknowledged(2, watch)
        report = stopped(watch)
    assert report.counts.states == {"ok": 1, "skipped_done": 1}
    assert report.metrics["answers"] == 2
    assert report.metrics["messages_acknowledged"] == 2
    assert sorted(recordings(output)) == [(str(first), "ok"), (str(second), "ok")]
    assert pull(path, 100, 10) == []
    assert not audit(str(output)).problems


def test_a_subscription_that_is_not_there_is_told_before_anything_starts(model, runner, tmp_path):
    nothing = job(["pubsub://projects/project/subscriptions/none"], tmp_path / "out", model, allow_prefixes=["/in"])
    with pytest.raises(JobError, match=r"input pubsub://.*/none: there is no such subscription"):
        streaming.Watch(nothing, runner)
    with pytest.raises(JobError, match=r"is a subscription, whose messages never end: `af3pipe watch` reads it"):
        batch.run(nothing)
    assert not (tmp_path / "out" / "_runs").exists()


def test_what_was_not_written_comes_again_to_the_next_watch(
    model, runner, subscription, wait_until_acknowledged, tmp_path, monkeypatch
):
    monkeypatch.setattr(graph, "_LEASE_S", 10)  # the shortest there is
    path, publish = subscription
    folder, output = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    first = tone(folder / "first.flac")
    watched = job([f"pubsub://{path}"], output, model, allow_prefixes=[str(folder)])
    never = watched.model_copy(update={"watch": watched.watch.model_copy(update={"pane_every": 3600.0})})
    with watching(never, runner) as watch:
        publish(str(first).encode())
        deadline = time.monotonic() + 60
        while not watch.progress().done:
            assert time.monotonic() < deadline, "it was never answered"
            time.sleep(0.5)
        watch.cancel()
    assert recordings(output) == []
    with watching(watched, runner) as watch:  # once the lease is over
        wait_for_rows(output, 1, watch)
        wait_until_acknowledged(1, watch)
        report = stopped(watch)
    assert report.counts.states == {"ok": 1}
    assert report.metrics["messages_acknowledged"] == 1
    assert pull(path, 100, 10) == []
