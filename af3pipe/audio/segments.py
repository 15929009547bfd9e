"""Splits blocks of PCM into segments, in whole samples."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from af3pipe.audio.levels import quietest_point


class AudioLimits(NamedTuple):
    """Limits of one audio given to the model, read from the checkpoint by `models.family`; no constants here.

    Attributes:
        sample_rate: Sampling rate of the feature extractor, in Hz.
        max_samples: Longest segment (the cap): the processor's `max_audio_len` in whole windows.
        min_samples: Shortest segment; fewer samples give no audio token.
        window_samples: Length of one window of the audio encoder.
    """

    sample_rate: int
    max_samples: int
    min_samples: int
    window_samples: int

    @property
    def max_s(self) -> float:
        """The longest segment, in seconds."""
        return self.max_samples / self.sample_rate


class Cut(NamedTuple):
    """The samples of one segment, before it is assigned to a recording.

    Attributes:
        start: Index of the first sample, counted from the first sample decoded.
        samples: float32 mono PCM, shape (n,), n between `min_samples` and `max_samples`.
        is_last: Whether no further segment follows.
    """

    start: int
    samples: npt.NDArray[np.float32]
    is_last: bool


def decided_samples(limits: AudioLimits) -> int:
    """Returns how many samples suffice to know that a second segment follows the first."""
    return limits.max_samples + limits.min_samples


def is_over_length(total: int, limits: AudioLimits) -> bool:
    """Returns whether `total` samples need more than one segment."""
    return total >= decided_samples(limits)


class Cutter:
    """Regroups blocks of PCM into consecutive segments without gaps, in linear time.

    A segment ends at the cap, or at the quietest point (`levels.quietest_point`) of the tolerance before it, so
    that no word is cut if there is a pause. Only the samples before the cap decide, not the sizes of the blocks.

    A remainder shorter than `min_samples` (under 0.03 s) gives no audio token. It is not a segment, and cannot extend
    the last one past the cap: it is dropped, and the recording counts as covered without it. There is no segment at
    all if all blocks together are that short.

    A segment is delayed until it is known whether another follows, so that `is_last` is right. It is filled in place,
    so at most one segment and one block are in memory here, besides the segments that a caller keeps.

    Args:
        limits: The longest and the shortest segment.
        tolerance_samples: How many samples before the cap a segment may end; at most half the cap.
        expected: Number of samples to come, if known; saves memory, and may be wrong.
    """

    def __init__(self, limits: AudioLimits, *, tolerance_samples: int = 0, expected: int | None = None) -> None:
        self._limits = limits
        self._tolerance = tolerance_samples
        self._decided = decided_samples(limits)
        self._expected = expected
        self._gathered = np.empty(0, np.float32)
        self._count = 0
        self._start = 0

    def push(self, block: npt.NDArray[np.float32]) -> Iterator[Cut]:
        """Adds the next samples, float32 mono, shape (n,); yields the segments that others follow."""
        while len(block):
            taken = min(len(block), self._decided - self._count)
            self._make_room(self._count + taken)
            self._gathered[self._count : self._count + taken] = block[:taken]
            self._count, block = self._count + taken, block[taken:]
            if self._count < self._decided:
                continue
            end = _end(self._gathered, self._limits, self._tolerance)
            piece, rest = Cut(self._start, self._gathered[:end], is_last=False), self._gathered[end:].copy()
            # Lets go of the segment, which the caller may do, too, before a buffer for the next one is made.
            self._gathered, self._count, self._start = rest, len(rest), self._start + end
            yield piece
            del piece

    def end(self) -> Cut | None:
        """Returns the last segment, once all samples were pushed."""
        gathered, count, self._gathered = self._gathered, self._count, np.empty(0, np.float32)
        if count < self._limits.min_samples:
            return None
        samples = gathered[: min(count, self._limits.max_samples)]
        # A short one does not keep all of the buffer alive; a copy of a long one would take more than it saves.
        return Cut(self._start, samples.copy() if 8 * count < len(gathered) else samples, is_last=True)

    def _make_room(self, count: int) -> None:
        if count <= len(self._gathered):
            return
        expected = self._decided if self._expected is None else self._expected - self._start
        larger = np.empty(min(max(count, expected, 2 * len(self._gathered)), self._decided), np.float32)
        larger[: self._count] = self._gathered[: self._count]
        self._gathered = larger


def _end(gathered: npt.NDArray[np.float32], limits: AudioLimits, tolerance_samples: int) -> int:
    """Returns where a segment ends if there are more samples than the cap."""
    cap = limits.max_samples
    tolerance = min(tolerance_samples, cap // 2, cap - limits.min_samples)
    if tolerance <= 0:
        return cap
    return cap - tolerance + quietest_point(gathered[cap - tolerance : cap], limits.sample_rate)
