"""Deduplicates recordings that arrive via several messages or inputs."""

import apache_beam as beam
import pytest

from af3pipe.schemas import DeadLetter, Reason, Recording, Rejected, Stage
from af3pipe.transforms import Outcome
from af3pipe.transforms.inputs.dedup import Deduplicate
from af3pipe.transforms.outcome import to_dead_letter
from tests.collected import Collected


def stored(name, etag, uri=None):
    return Recording(name, uri or f"s3://archive/{name}", 10, etag, "2026-01-01T00:00:00+00:00")


def letter(name, etag=None, uri=None):
    error = Rejected(Stage.LIST, Reason.NOT_FOUND, "gone")
    return to_dead_letter(error, stored(name, etag, uri), stage=Stage.LIST)


def passed(arrived, **how):
    """Recordings and dead letters in this order: what passes, by id; recordings in their order, then the others."""
    found = Collected()
    with beam.Pipeline(runner="FnApiRunner") as pipeline:
        # One collection, which keeps its order; what is of the other type is empty.
        rows = pipeline | "Arrived" >> beam.Create(arrived, reshuffle=False)
        none = pipeline | "None" >> beam.Create([], reshuffle=False)
        distinct = Outcome(rows, none) | Deduplicate(**how)
        _ = distinct.good | found.into("good")
        _ = distinct.dead_letters | found.into("letters")
    assert all(isinstance(one, Recording) for one in found["good"])
    by_id = {}
    for one in [*found["good"], *found["letters"]]:
        by_id.setdefault(one.recording_id, []).append(one)
    return by_id


def test_a_version_passes_unless_it_was_the_last_to_pass():
    first, second, other = stored("a", "1"), stored("a", "2"), stored("b", "1")
    assert passed([first, other, first, second, second, other, first]) == {"a": [first, second, first], "b": [other]}


def test_a_dead_letter_passes_once_and_what_comes_back_after_it_passes_again():
    here, gone = stored("a", "1"), letter("a")
    assert passed([here, gone, gone, here, here]) == {"a": [here, here, gone]}


def test_what_shares_an_id_is_not_passed_over():
    first, second = letter("a", uri="s3://archive/1"), letter("a", uri="s3://archive/2")
    assert passed([first, second]) == {"a": [first, second]}
    cut = stored("a", "1")
    assert passed([cut, cut._replace(offset_s=5.0), cut._replace(offset_s=5.0, channel="left")]).keys() == {"a"}
    assert len(passed([cut, cut._replace(offset_s=5.0), cut._replace(offset_s=5.0, channel="left")])["a"]) == 3


@pytest.mark.parametrize(("remember_s", "times"), [(0.0, 3), (3600.0, 1)])
def test_what_is_told_much_later_passes_again(remember_s, times):
    assert len(passed([stored("a", "1")] * 3, remember_s=remember_s)["a"]) == times


def test_both_kinds_come_out_where_they_belong():
    found = Collected()
    with beam.Pipeline(runner="FnApiRunner") as pipeline:
        good = pipeline | "Good" >> beam.Create([stored("a", "1")]).with_output_types(Recording)
        letters = pipeline | "Letters" >> beam.Create([letter("b")]).with_output_types(DeadLetter)
        distinct = Outcome(good, letters) | Deduplicate()
        _ = distinct.good | found.into("good")
        _ = distinct.dead_letters | found.into("letters")
    assert found["good"] == [stored("a", "1")]
    assert [one.recording_id for one in found["letters"]] == ["b"]
