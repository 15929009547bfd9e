"""Which deliveries are acknowledged, and when; Pub/Sub itself is in tests/integration/test_pubsub.py."""

import itertools
from typing import Any

import apache_beam as beam
import pytest

from af3pipe.transforms import AcknowledgeMessages
from af3pipe.transforms.inputs import acknowledge, pubsub
from af3pipe.transforms.inputs.acknowledge import _AcknowledgeDoFn, _arrived, _AwaitDoFn, _waits_for
from af3pipe.transforms.inputs.notifications import Waiting, work_name
from tests.collected import Collected

RUNNER = "FnApiRunner"
SUBSCRIPTION = "projects/p/subscriptions/s"


def waiting(ack_id, *works):
    """What a delivery of one message, which names so many recordings, waits for."""
    named = [Waiting(work, SUBSCRIPTION, "7", ack_id, item, len(works)) for item, work in enumerate(works)]
    return named or [Waiting("", SUBSCRIPTION, "7", ack_id, 0, 0)]


@pytest.fixture
def acknowledged(monkeypatch):
    """ack_ids, in the order in which Pub/Sub would have been told."""
    told = []
    monkeypatch.setattr(
        acknowledge, "acknowledge", lambda subscription, ack_ids: told.extend(ack_ids) or len(ack_ids)
    )
    monkeypatch.setattr(acknowledge, "modify_deadline", lambda _, ack_ids, ack_deadline_s: len(ack_ids))
    return told


def run(events):
    with beam.Pipeline(runner=RUNNER) as pipeline:
        typed = pipeline | beam.Create(events, reshuffle=False).with_output_types(tuple[str, Any])
        _ = typed | beam.ParDo(_AcknowledgeDoFn(60))


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))), ids=str)
def test_whatever_comes_first_a_delivery_is_acknowledged_once_and_not_leased_after_it(acknowledged, order):
    """One that is leased after that would be leased for ever, and a watch that is stopped would wait for it."""
    both = waiting("ack", "a", "b")
    (came,) = [event for each in both for event in _arrived(each)]
    events = [came, *((key, (item, items)) for each in both for _, (key, item, items) in _waits_for(each))]
    run([events[number] for number in order])
    assert acknowledged == ["ack"]


def test_what_asks_for_nothing_is_acknowledged_at_once(acknowledged):
    run([event for each in waiting("ack") for event in _arrived(each)])
    assert acknowledged == ["ack"]


def awaited(*events):
    """Deliveries that were told, of (work, what waits for it or nothing where it is durable) in this order."""
    found = Collected()
    with beam.Pipeline(runner=RUNNER) as pipeline:
        typed = pipeline | beam.Create(events, reshuffle=False).with_output_types(tuple[str, Any])
        _ = typed | beam.ParDo(_AwaitDoFn()) | found.into("told")
    return sorted(key.split(" ")[-1] for key, _ in found["told"])


def test_a_delivery_waits_for_the_version_that_it_was_found_with():
    """The object has changed when its message is delivered again: with the first version only the first is done."""
    first, again = waiting("first", "a 1"), waiting("again", "a 2")
    told = [event for each in (*first, *again) for event in _waits_for(each)]
    assert awaited(*told, ("a 1", ())) == ["first"]
    assert awaited(("a 1", ()), *told) == ["first"]
    assert awaited(*told, ("a 1", ()), ("a 2", ())) == ["again", "first"]


def test_each_delivery_of_the_same_is_told():
    told = [event for ack_id in ("first", "again") for each in waiting(ack_id, "a") for event in _waits_for(each)]
    assert awaited(*told, ("a", ()), ("a", ())) == ["again", "first"]
    assert awaited(("a", ()), *told) == ["again", "first"]


def test_all_of_it_together(acknowledged):
    found = Collected()
    works = [work_name("a", "1"), work_name("b", "1")]
    with beam.Pipeline(runner=RUNNER) as pipeline:
        rows = pipeline | "Rows" >> beam.Create(
            [*waiting("first", *works), *waiting("again", works[1])]
        ).with_output_types(Waiting)
        durable = pipeline | "Durable" >> beam.Create([("a", "1"), ("b", "1")]).with_output_types(tuple[str, str])
        told = {"waiting": rows, "durable": durable}
        _ = told | AcknowledgeMessages(ack_deadline_s=10) | found.into("told")
    assert sorted(acknowledged) == ["again", "first"]
    assert found["told"] == [(SUBSCRIPTION, "7")] * 2


def test_where_pubsub_is_down_nothing_fails(caplog, no_pubsub):
    """The bundle would, and on some runners the job; what was not acknowledged comes again."""
    assert pubsub.acknowledge(SUBSCRIPTION, ["a", "b"]) == 0
    assert pubsub.modify_deadline(SUBSCRIPTION, ["a"], 60) == 0
    assert pubsub.pull(SUBSCRIPTION, 10, 60) == []
    assert caplog.text.count("cannot be") == 3
