"""Where a recording is cut: sample counts to segment bounds, in whole samples."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt


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


def segment_bounds(total: int, limits: AudioLimits) -> list[tuple[int, int]]:
    """Cuts `total` samples into half-open segments: all of the cap's length but the last.

    A remainder shorter than `min_samples` (under 0.03 s) gives not a single audio token. It is no segment of
    its own, and it cannot lengthen the last one past the cap: it belongs to no segment, and the recording
    counts as covered without it (see `reaches_end`). So no bounds at all mean that all of it is too short.
    """
    cap = limits.max_samples
    bounds = [(start, min(start + cap, total)) for start in range(0, total, cap)]
    return [(start, end) for start, end in bounds if end - start >= limits.min_samples]


def is_over_length(total: int, limits: AudioLimits) -> bool:
    """Whether `total` samples need more than one segment."""
    return total >= limits.max_samples + limits.min_samples


def reaches_end(end_s: float, whole_s: float, limits: AudioLimits) -> bool:
    """Whether a segment that ends at `end_s` leaves nothing of `whole_s` seconds that could be answered."""
    # Half a sample: both times were divided by a rate, and the comparison is meant in whole samples.
    return (whole_s - end_s) * limits.sample_rate < limits.min_samples - 0.5


def cut(blocks: Iterator[npt.NDArray[np.float32]], limits: AudioLimits) -> Iterator[Cut]:
    """Regroups blocks of PCM into segments, with the same bounds as `segment_bounds`.

    A segment is held back until it is known whether another follows, so that `is_last` is right: at most one
    segment and one block are in memory. Yields nothing where all blocks together are shorter than `min_samples`.

    Args:
        blocks: float32 mono, each of shape (n,), any lengths.
        limits: The cap, and the shortest that can be answered.
    """
    held: list[npt.NDArray[np.float32]] = []
    count = start = 0
    for block in blocks:
        held.append(block)
        count += len(block)
        while is_over_length(count, limits):
            samples, rest = _split(held, limits.max_samples)
            yield Cut(start, samples, is_last=False)
            start += len(samples)
            held, count = [rest], len(rest)
    if count >= limits.min_samples:
        samples, _ = _split(held, limits.max_samples)
        yield Cut(start, samples, is_last=True)


def _split(
    held: list[npt.NDArray[np.float32]], length: int
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    joined = np.concatenate(held)
    # Copies, so that a short remainder does not keep the whole segment alive, nor the reverse.
    return joined[:length].copy() if len(joined) > length else joined, joined[length:].copy()
