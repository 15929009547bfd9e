"""Measures how loud audio is, and finds its quietest point."""

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from af3pipe.schemas import Levels

FLOOR_DBFS = -120.0
"""Level of digital silence and of everything quieter: 16-bit PCM ends at -90, so no information is lost."""

SILENT_BELOW_DBFS = -60.0
"""A peak of 32 steps of 16-bit PCM: the noise of idle lines and of recorders is below it."""

FULL_SCALE = 32767 / 32768
"""The largest sample of 16-bit PCM: the value of clipped samples."""

_CHUNK = 1 << 16
_FRAME_S = 0.05
_STRETCH_FRAMES = 5  # a quarter of a second: a pause, and not the stop of a "t" or "k" inside a word
_QUIETER = 0.25  # in power, -6 dB: what swings less than that has no pause


def measure(samples: npt.NDArray[np.float32], *, silent_below_dbfs: float = SILENT_BELOW_DBFS) -> Levels:
    """Measures the levels of a segment, without a temporary array of its size.

    Args:
        samples: float32 mono PCM, shape (n,), finite; full scale is 1.0.
        silent_below_dbfs: A segment whose peak is at or below this is silent.
    """
    energy, clipped = 0.0, 0
    peak = max(float(samples.max(initial=0.0)), -float(samples.min(initial=0.0)))
    for start in range(0, len(samples), _CHUNK):
        chunk = samples[start : start + _CHUNK].astype(np.float64)
        if peak >= FULL_SCALE:
            clipped += int(np.count_nonzero(np.abs(chunk) >= FULL_SCALE))
        # Not a dot product: BLAS may sum in another order with other threads, and rows are compared across runs.
        energy += float(np.square(chunk, out=chunk).sum())
    count = max(len(samples), 1)
    peak_dbfs = _dbfs(peak * peak)
    return Levels(peak_dbfs, _dbfs(energy / count), clipped / count, peak_dbfs <= silent_below_dbfs)


def combine(parts: Sequence[tuple[float, Levels]]) -> Levels:
    """Combines the levels of several pieces into one, in any order.

    Args:
        parts: Duration in seconds and levels of each piece; at least one.

    Returns:
        The largest peak, RMS averaged by energy, clipped share averaged by duration; silent if every piece is.
    """
    seconds = math.fsum(length_s for length_s, _ in parts)
    energy = math.fsum(length_s * 10 ** (levels.rms_dbfs / 10) for length_s, levels in parts)
    return Levels(
        peak_dbfs=max(levels.peak_dbfs for _, levels in parts),
        rms_dbfs=_dbfs(energy / seconds),
        clipped_share=math.fsum(length_s * levels.clipped_share for length_s, levels in parts) / seconds,
        silent=all(levels.silent for _, levels in parts),
    )


def quietest_point(samples: npt.NDArray[np.float32], sample_rate: int) -> int:
    """Finds the best place to cut: the centre of the quietest quarter of a second.

    Of several equally quiet ones (digital silence between sentences) it takes the last. If none is 6 dB quieter than
    the whole, as in a steady tone, noise or complete silence, it takes the end.

    Args:
        samples: float32 mono PCM, shape (n,).
        sample_rate: In Hz.

    Returns:
        Index of the first sample after the cut, from 1 to n; also n if there is less than half a second.
    """
    frame = max(round(_FRAME_S * sample_rate), 1)
    count = len(samples) // frame
    if count < 2 * _STRETCH_FRAMES:
        return len(samples)
    offset = len(samples) - count * frame
    frames = samples[offset:].reshape(count, frame)
    energy = np.einsum("ij,ij->i", frames, frames, dtype=np.float64)
    # Not differences of a running sum: their rounding would make one digital silence quieter than another.
    stretches = np.lib.stride_tricks.sliding_window_view(energy, _STRETCH_FRAMES).sum(axis=-1)
    if stretches.min() / _STRETCH_FRAMES >= _QUIETER * energy.mean():
        return len(samples)
    quietest = np.flatnonzero(stretches == stretches.min())
    gaps = np.flatnonzero(np.diff(quietest) > 1)
    first = quietest[gaps[-1] + 1] if len(gaps) else quietest[0]
    return offset + int(first + quietest[-1] + _STRETCH_FRAMES) * frame // 2


def _dbfs(power: float) -> float:
    return max(10 * math.log10(power), FLOOR_DBFS) if power > 0 else FLOOR_DBFS
