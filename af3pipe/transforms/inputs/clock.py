"""The clock of a stream that looks for something again and again."""

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
    """Splits off what is left, and never a half: the half that lies centuries ahead would take the watermark there.

    Prism halves whatever takes a moment, keeps the watermark of the half it asked last, and drops rows as late.
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
        """Drained: there is no further tick."""


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
        # What fell due while the runner was busy or down is one tick: nothing is looked for twice at a time.
        tick = max(restriction.start, math.floor((time.time() - start_s) / every_s))
        at = Timestamp.of(start_s + tick * every_s)
        if at > Timestamp.now():
            watermark.set_watermark(at)
            tracker.defer_remainder(at)
        elif self._is_stopped():
            tracker.try_claim(restriction.stop)  # so that nothing is left to claim
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
                _log.warning("whether to stop cannot be told now: %s", rejected.detail)
            return False
        except storage.StorageError as error:  # a store may be down for a while: the stream goes on
            _log.warning("whether to stop cannot be told now: %s", error)
            return False
        return True


class Ticks(beam.PTransform):
    """Starts a stream with the time, in seconds since 1970-01-01 UTC, now and every so often from now on.

    Beam's `PeriodicImpulse`, but what fell due meanwhile is one tick and not all of them at once, and it can be
    stopped: then the stream ends, and with it, when all is done, the job.

    Args:
        every_s: Seconds from one to the next.
        stop_uri: The stream ends once there is a file of this name.
        stop_after_s: It ends after so many seconds; None for never.
        storage_options: As of `ReadRecordings`.
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
