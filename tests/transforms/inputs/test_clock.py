"""When a stream ticks: by hand, with Beam's own trackers, and on its in-process runner."""

import itertools
import time

import apache_beam as beam
import pytest
from apache_beam.io.watermark_estimators import ManualWatermarkEstimator
from apache_beam.runners.sdf_utils import (
    RestrictionTrackerView,
    ThreadsafeRestrictionTracker,
    ThreadsafeWatermarkEstimator,
)
from apache_beam.testing.util import assert_that, equal_to
from apache_beam.utils.timestamp import MAX_TIMESTAMP, Timestamp

from af3pipe import storage
from af3pipe.schemas import Reason, Rejected, Stage
from af3pipe.transforms.inputs.clock import Ticks, _TickDoFn, _TickRanges

HOUR_S = 3600.0
RANGES = _TickRanges()


def hours_ago(hours, end_in=100):
    """A clock that ticks once an hour, and began so many ago: between two of its ticks, by half an hour."""
    now_s = time.time()
    return now_s - hours * HOUR_S, now_s + end_in * HOUR_S, HOUR_S


class Ran:
    """What one call of a clock's `process` did, as a runner sees it."""

    def __init__(self, clock, restriction=None, stop_uri=None):
        tracker = ThreadsafeRestrictionTracker(
            RANGES.create_tracker(restriction or RANGES.initial_restriction(clock))
        )
        watermark = ThreadsafeWatermarkEstimator(ManualWatermarkEstimator(None))
        dofn = _TickDoFn(stop_uri, {})
        self.ticks = [
            (tick.value, tick.timestamp) for tick in dofn.process(clock, RestrictionTrackerView(tracker), watermark)
        ]
        tracker.check_done()  # raises where something was left to claim
        self.left, delay = tracker.deferred_status() or (None, None)
        self.delay_s = delay and delay.micros / 1e6
        self.watermark = watermark.current_watermark()


def test_the_first_tick_is_now():
    clock = hours_ago(0)
    ran = Ran(clock)
    assert ran.ticks == [(pytest.approx(clock[0]), ran.watermark)]
    assert ran.watermark == Timestamp.of(clock[0])
    assert (ran.left.start, ran.left.stop) == (1, 100)
    assert ran.delay_s == pytest.approx(HOUR_S, abs=60)


def test_what_fell_due_meanwhile_is_one_tick():
    clock = hours_ago(10.5)
    ran = Ran(clock)
    assert ran.ticks == [(pytest.approx(clock[0] + 10 * HOUR_S), ran.watermark)]
    assert (ran.left.start, ran.left.stop) == (11, 111)
    assert ran.delay_s == pytest.approx(HOUR_S / 2, abs=60)


def test_a_clock_that_is_resumed_too_early_waits_for_its_tick():
    clock = hours_ago(10.5)
    ran = Ran(clock, Ran(clock).left)
    assert ran.ticks == []
    assert (ran.left.start, ran.left.stop) == (11, 111)
    assert ran.delay_s == pytest.approx(HOUR_S / 2, abs=60)
    assert ran.watermark == Timestamp.of(clock[0] + 11 * HOUR_S)


def test_a_worker_whose_clock_is_behind_waits():
    ran = Ran(hours_ago(-2))
    assert ran.ticks == []
    assert (ran.left.start, ran.left.stop) == (0, 98)


def test_it_ends_when_its_time_is_over():
    ran = Ran(hours_ago(10.5, end_in=-1))
    assert (ran.ticks, ran.left) == ([], None)


def test_its_last_tick_leaves_nothing_to_wait_for():
    clock = hours_ago(10.5, end_in=0.5)
    ran = Ran(clock)
    assert [value for value, _ in ran.ticks] == [pytest.approx(clock[0] + 10 * HOUR_S)]
    assert ran.left is None


def test_it_ends_when_it_is_told(tmp_path):
    clock = hours_ago(10.5)
    stop_uri = str(tmp_path / "stop")
    assert Ran(clock, stop_uri=stop_uri).ticks
    storage.write_atomic(stop_uri, b"")
    ran = Ran(clock, stop_uri=stop_uri)
    assert (ran.ticks, ran.left) == ([], None)


@pytest.mark.parametrize(
    "error", [Rejected(Stage.READ, Reason.PERMISSION_DENIED, "not yours"), storage.StorageError("it is down")]
)
def test_a_store_that_is_down_does_not_end_it(error, monkeypatch, caplog):
    def refused(uri):
        raise error

    monkeypatch.setattr(storage, "stat", refused)  # the owner of all files is refused nothing here
    assert Ran(hours_ago(10.5), stop_uri="memory://stop").ticks
    assert "cannot check whether to stop: " in caplog.text


def test_a_clock_that_never_ends_has_ticks_to_the_end_of_time():
    now_s = time.time()
    ticks = RANGES.initial_restriction((now_s, MAX_TIMESTAMP.micros / 1e6 - 1, 0.5))
    assert Timestamp.of(now_s + 0.5 * ticks.stop) <= MAX_TIMESTAMP
    assert ticks.stop * 0.5 > 1000 * 365 * 24 * 3600


def test_no_half_of_a_clock_ticks_by_itself():
    """A runner that halves it would have one that is due in centuries, and a watermark that is there already."""
    tracker = RANGES.create_tracker(RANGES.initial_restriction(hours_ago(10.5)))
    for fraction in (0.01, 0.5, 0.99):
        assert tracker.try_split(fraction) is None
    assert tracker.try_claim(10)
    assert tracker.try_split(0.5) is None
    primary, rest = tracker.try_split(0)  # as a checkpoint has it
    assert ((primary.start, primary.stop), (rest.start, rest.stop)) == ((0, 11), (11, 111))


def test_a_drained_clock_has_no_further_tick():
    clock = hours_ago(10.5)
    assert RANGES.truncate(clock, RANGES.initial_restriction(clock)) is None


def test_in_a_pipeline_each_tick_is_at_its_time_and_it_ends():
    began_s = time.time()
    with beam.Pipeline(runner="FnApiRunner") as pipeline:
        ticks = (
            pipeline
            | Ticks(0.25, stop_after_s=1.2)
            | beam.Map(lambda tick, at=beam.DoFn.TimestampParam: (tick, at.micros / 1e6))
        )
        assert not ticks.is_bounded
        assert_that(ticks, right_ticks(began_s))


def right_ticks(began_s):
    def check(found):
        values = [tick for tick, _ in sorted(found)]
        assert [at for _, at in sorted(found)] == values
        assert len(values) <= 5, values  # 0, 0.25, 0.5, 0.75 and 1 s; a machine that is slow to start merges some
        assert all(tick >= began_s for tick in values)
        gaps = [(later - earlier) / 0.25 for earlier, later in itertools.pairwise(values)]
        assert gaps == [pytest.approx(max(1, round(gap))) for gap in gaps], values

    return check


def test_in_a_pipeline_it_ends_when_there_is_a_file(tmp_path):
    storage.write_atomic(str(tmp_path / "stop"), b"")
    with beam.Pipeline(runner="FnApiRunner") as pipeline:
        ticks = pipeline | Ticks(HOUR_S, stop_uri=str(tmp_path / "stop"))
        assert_that(ticks, equal_to([]))
