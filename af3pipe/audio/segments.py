"""Where a recording is cut: blocks of PCM to segments, in whole samples."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from af3pipe.audio.levels import quietest_point


class AudioLimits(NamedTuple):
    """What one sample given to the model may be. Read from the checkpoint by `models.family`; no constants here.

    Attributes:
        sample_rate: In Hz, of the feature extractor.
        max_samples: The cap of one segment: the processor's `max_audio_len` in whole windows.
        min_samples: Fewer give not a single audio token.
        window_samples: One window of the audio encoder.
    """

    sample_rate: int
    max_samples: int
    min_samples: int
    window_samples: int

    @property
    def max_s(self) -> float:
        """The cap in seconds."""
        return self.max_samples / self.sample_rate


class Cut(NamedTuple):
    """One segment's samples, before it knows which recording it is of.

    Attributes:
        start: Index of the first sample, counted from the first sample decoded.
        samples: float32 mono PCM, shape (n,), n between `min_samples` and `max_samples`.
        is_last: Whether nothing that could be answered follows.
    """

    start: int
    samples: npt.NDArray[np.float32]
    is_last: bool


def is_over_length(total: int, limits: AudioLimits) -> bool:
    """Whether `total` samples need more than one segment."""
    return total >= limits.max_samples + limits.min_samples


def cut(
    blocks: Iterator[npt.NDArray[np.float32]], limits: AudioLimits, *, tolerance_samples: int = 0
) -> Iterator[Cut]:
    """Regroups blocks of PCM into consecutive segments that join without a gap, in linear time.

    A segment ends at the cap, or at the quietest point (`levels.quietest_point`) of the tolerance before it, so
    that no word is cut where there is a pause. Only what lies before the cap decides, not how it came in blocks.

    A remainder shorter than `min_samples` (under 0.03 s) gives not a single audio token. It is no segment of its
    own, and it cannot lengthen the last one past the cap: it belongs to none, and the recording counts as covered
    without it. Yields nothing where all blocks together are that short.

    A segment is held back until it is known whether another follows, so that `is_last` is right. It is gathered in
    place, so at most one segment and one block are in memory here; a caller who keeps segments adds those.

    Args:
        blocks: float32 mono, each of shape (n,), any lengths.
        limits: The cap, and the shortest that can be answered.
        tolerance_samples: How much earlier than at the cap a segment may end; half the cap at most counts.
    """
    decided = limits.max_samples + limits.min_samples  # so many, and another segment follows
    gathered = np.empty(decided, np.float32)
    count = start = 0
    for block in blocks:
        while len(block):
            taken = min(len(block), decided - count)
            gathered[count : count + taken] = block[:taken]
            count, block = count + taken, block[taken:]
            if count < decided:
                continue
            end = _end(gathered, limits, tolerance_samples)
            piece, rest = Cut(start, gathered[:end], is_last=False), gathered[end:].copy()
            gathered = rest  # lets go of the segment, as does the next line but one
            yield piece
            del piece
            gathered = np.empty(decided, np.float32)
            start, count = start + end, len(rest)
            gathered[:count] = rest
    if count >= limits.min_samples:
        samples = gathered[: min(count, limits.max_samples)]
        # A short one does not keep all of the buffer alive; a copy of a long one would take more than it saves.
        yield Cut(start, samples.copy() if 8 * count < decided else samples, is_last=True)


def _end(gathered: npt.NDArray[np.float32], limits: AudioLimits, tolerance_samples: int) -> int:
    """Where a segment ends of which more is there than the cap."""
    cap = limits.max_samples
    tolerance = min(tolerance_samples, cap // 2, cap - limits.min_samples)
    if tolerance <= 0:
        return cap
    return cap - tolerance + quietest_point(gathered[cap - tolerance : cap], limits.sample_rate)
