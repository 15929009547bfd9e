"""Decodes a file as `librosa.load` does, without importing librosa: that takes seconds, and compiles code at first.

The calls are librosa's own. `test_decode.py::test_equals_librosa_load` shows that both give the same samples, bit for
bit.
"""

import io
import math

import numpy as np
import soundfile
import soxr

from tests.fixtures_audio import Samples


def load(data: bytes, sample_rate: int, *, offset_s: float = 0.0, duration_s: float | None = None) -> Samples:
    """The mean of all channels, as `librosa.load(mono=True)`."""
    with soundfile.SoundFile(io.BytesIO(data)) as file:
        file.seek(int(offset_s * file.samplerate))
        frames = -1 if duration_s is None else int(duration_s * file.samplerate)
        samples = file.read(frames, dtype="float32").T
        mono = samples if samples.ndim == 1 else samples.mean(axis=0)
        return resample(mono, file.samplerate, sample_rate)


def resample(samples: Samples, rate: int, sample_rate: int) -> Samples:
    """As `librosa.resample`: the length is rounded up, and a sample that soxr lacks is silence."""
    if rate == sample_rate:
        return samples
    resampled = soxr.resample(samples, rate, sample_rate, quality="soxr_hq")
    length = math.ceil(len(samples) * (sample_rate / rate))
    return np.pad(resampled[:length], (0, max(0, length - len(resampled)))).astype(np.float32)
