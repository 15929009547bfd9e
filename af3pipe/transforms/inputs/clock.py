"""Emits a tick at regular intervals, for streams that poll folders or subscriptions."""

import logging
import math
import time
from collections.abc import Iterator
from types import MappingProxyType
from typing import Any

import apache_beam as beam
from apache_beam.io.restriction_trackers import OffsetRange, OffsetRestrictionTracker
from apache_beam.io.watermark_estimators import ManualWatermarkEstimator
from apache_beam.transforms.core import RestrictionProvider
from apache_beam.transforms.window import TimestampedValue
from apache_beam.utils.timestamp import MAX_TIMESTAMP, Timestamp

from af3pipe import storage
from af3pipe.schemas import Reason, Rejected
from af3pipe.transforms.stores import set_storage

_log = logging.getLogger(__name__)


class _TickTracker(OffsetRestrictionTracker):
    """Refuses to split a range of ticks in halves: a half centuries ahead would move the watermark there.

    Prism halves any range that takes a moment, uses the watermark of the last half, and drops rows as late. Only
    splitting off the whole remainder is allowed.
    """

    def try_split(self, fraction_of_remainder: float) -> Any:
        return super().try_split(0) if fraction_of_remainder == 0 else None


class _TickRanges(RestrictionProvider):
    def initial_restriction(self, element: tuple[float, float, float]) -> OffsetRange:
        start_s, end_s, every_s = element
        return OffsetRange(0, math.ceil((end_s - start_s) / every_s))

    def create_tracker(self, restriction: OffsetRange) -> _TickTracker:
        return _TickTracker(restriction)

    def restriction_size(self, element: Any, restriction: OffsetRange) -> int:
        return 1

    def truncate(self, element: Any, restriction: OffsetRange) -> None:
        """Returns no remainder: a drained stream has no further ticks."""


class _TickDoFn(beam.DoFn):
    def __init__(self, stop_uri: str | None, storage_options: storage.StorageOptions) -> None:
        self._stop_uri = stop_uri
        self._storage_options = storage_options

    def setup(self) -> None:
        set_storage(self._storage_options)

    @beam.DoFn.unbounded_per_element()
    def process(
        self,
        element: tuple[float, float, float],
        tracker: Any = beam.DoFn.RestrictionParam(_TickRanges()),
        watermark: Any = beam.DoFn.WatermarkEstimatorParam(ManualWatermarkEstimator.default_provider()),
    ) -> Iterator[TimestampedValue]:
        start_s, _, every_s = element
        restriction = tracker.current_restriction()
        # Ticks that were missed while the runner was busy or down become one tick.
        tick = max(restriction.start, math.floor((time.time() - start_s) / every_s))
        at = Timestamp.of(start_s + tick * every_s)
        if at > Timestamp.now():
            watermark.set_watermark(at)
            tracker.defer_remainder(at)
        elif self._is_stopped():
            tracker.try_claim(restriction.stop)  # so that the range is finished
        elif tracker.try_claim(tick):
            watermark.set_watermark(at)
            yield TimestampedValue(at.micros / 1e6, at)
            tracker.defer_remainder(at + every_s)

    def _is_stopped(self) -> bool:
        if self._stop_uri is None:
            return False
        try:
            storage.stat(self._stop_uri)
        except Rejected as rejected:
            if rejected.reason is not Reason.NOT_FOUND:
                _log.warning("cannot check whether to stop: %s", rejected.detail)
            return False
        except storage.StorageError as error:  # a store may be down for a while: the stream goes on
            _log.warning("cannot check whether to stop: %s", error)
            return False
        return True


class Ticks(beam.PTransform):
    """Emits the current time, in seconds since 1970-01-01 UTC, now and then at regular intervals.

    Unlike Beam's `PeriodicImpulse`, missed ticks become one tick instead of a burst, and the stream can be stopped,
    which ends the job when all elements are processed.

    Args:
        every_s: Seconds between two ticks.
        stop_uri: The stream ends when this file exists.
        stop_after_s: The stream ends after this many seconds; None for never.
        storage_options: See `ReadRecordings`.
    """

    def __init__(
        self,
        every_s: float,
        *,
        stop_uri: str | None = None,
        stop_after_s: float | None = None,
        storage_options: storage.StorageOptions = MappingProxyType({}),
    ) -> None:
        super().__init__()
        self._every_s = every_s
        self._stop_after_s = stop_after_s
        self._dofn = _TickDoFn(stop_uri, dict(storage_options))

    def expand(self, pipeline: Any) -> Any:
        start_s = time.time()
        end_s = MAX_TIMESTAMP.micros / 1e6 - 1 if self._stop_after_s is None else start_s + self._stop_after_s
        return (
            pipeline
            | "Start" >> beam.Create([(start_s, end_s, self._every_s)], reshuffle=False)
            | "Tick" >> beam.ParDo(self._dofn).with_output_types(float)
        )
