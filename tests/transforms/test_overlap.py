import threading
from concurrent.futures import Future, ThreadPoolExecutor

import apache_beam as beam
import pytest
from apache_beam.testing.util import assert_that, equal_to
from apache_beam.transforms.window import FixedWindows, TimestampedValue
from apache_beam.utils.timestamp import Timestamp

from af3pipe.transforms.overlap import OverlapDoFn


class Doubling(OverlapDoFn):
    """Doubles on a pool; tells how many were under way at most. Odd numbers go to a tag."""

    most_pending = 0
    lock = threading.Lock()

    def setup(self):
        self.pool = ThreadPoolExecutor(4)

    def weigh(self, element):
        return float(element)

    def submit(self, element):
        with self.lock:
            Doubling.most_pending = max(Doubling.most_pending, len(self._pending) + 1)
        return self.pool.submit(lambda: element * 2)

    def emit(self, element, future):
        yield future.result()
        if element % 2:
            yield beam.pvalue.TaggedOutput("odd", element)


class Stamp(beam.DoFn):
    def process(self, element, timestamp=beam.DoFn.TimestampParam, window=beam.DoFn.WindowParam):
        yield element, int(timestamp), int(window.start)


def run(elements, dofn):
    with beam.Pipeline(runner="FnApiRunner") as pipeline:
        doubled = (
            pipeline
            | beam.Create([TimestampedValue(n, Timestamp(n)) for n in elements])
            | beam.WindowInto(FixedWindows(10))
            | beam.ParDo(dofn).with_outputs("odd", main="all")
        )
        assert_that(
            doubled.all | "StampAll" >> beam.ParDo(Stamp()),
            equal_to([(n * 2, n, n // 10 * 10) for n in elements]),
            label="all",
        )
        assert_that(
            doubled.odd | "StampOdd" >> beam.ParDo(Stamp()),
            equal_to([(n, n, n // 10 * 10) for n in elements if n % 2]),
            label="odd",
        )


def test_every_element_keeps_its_timestamp_and_window():
    run(list(range(50)), Doubling(max_pending=7))


def test_pending_is_bounded_by_count():
    Doubling.most_pending = 0
    run(list(range(40)), Doubling(max_pending=3))
    assert Doubling.most_pending == 3


def test_pending_is_bounded_by_weight_but_one_heavy_element_passes():
    Doubling.most_pending = 0
    run([100, 101, 102, 103], Doubling(max_pending=50, max_pending_weight=60))
    assert Doubling.most_pending == 1


def test_a_failed_bundle_leaves_nothing_for_the_next_one():
    dofn = Doubling(max_pending=5)
    stuck: Future = Future()
    dofn.submit = lambda element: stuck
    dofn.start_bundle()
    list(dofn.process(1, Timestamp(0), None))
    dofn.start_bundle()
    assert stuck.cancelled()
    assert list(dofn.finish_bundle()) == []


def test_at_least_one_element_must_be_allowed():
    with pytest.raises(ValueError, match="max_pending is 0"):
        Doubling(max_pending=0)
