"""What is told of several times, by messages or by several inputs."""

import apache_beam as beam
import pytest

from af3pipe.schemas import DeadLetter, Reason, Recording, Rejected, Stage
from af3pipe.transforms.once import Once
from af3pipe.transforms.outcome import to_dead_letter
from tests.collected import Collected


def stored(name, etag):
    return Recording(name, f"s3://archive/{name}", 10, etag, "2026-01-01T00:00:00+00:00")


def letter(name, etag):
    return to_dead_letter(Rejected(Stage.LIST, Reason.NOT_FOUND, "gone"), stored(name, etag), stage=Stage.LIST)


def passed(row_class, told, **how):
    found = Collected()
    with beam.Pipeline(runner="FnApiRunner") as pipeline:
        rows = pipeline | beam.Create(told, reshuffle=False).with_output_types(row_class)
        _ = rows | Once(row_class, **how) | found.into("passed")
    return found["passed"]


def test_a_version_passes_unless_it_was_the_last_to_pass():
    first, second, other = stored("a", "1"), stored("a", "2"), stored("b", "1")
    told = [first, other, first, second, second, other, first]
    by_name = passed(Recording, told)
    assert [one for one in by_name if one.uri == first.uri] == [first, second, first]
    assert [one for one in by_name if one.uri == other.uri] == [other]


def test_a_dead_letter_passes_once_a_version():
    letters = [letter("a", None), letter("a", None), letter("a", "2")]
    found = passed(DeadLetter, letters)
    assert found == [letters[0], letters[2]]


@pytest.mark.parametrize(("remember_s", "times"), [(0.0, 3), (3600.0, 1)])
def test_what_is_told_much_later_passes_again(remember_s, times):
    assert len(passed(Recording, [stored("a", "1")] * 3, remember_s=remember_s)) == times
