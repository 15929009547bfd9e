"""Every promised format: sample for sample what librosa or the `ffmpeg` program make of it."""

import functools
import io

import librosa
import numpy as np
import pytest

from af3pipe.audio.decode import decode
from af3pipe.audio.probe import probe
from af3pipe.audio.recording import read_segments
from af3pipe.audio.segments import AudioLimits
from af3pipe.schemas import Recording
from tests import fixtures_audio as make
from tests.audio.formats import FORMATS

RATE = 16000
LIMITS = AudioLimits(sample_rate=RATE, max_samples=4 * RATE, min_samples=480, window_samples=RATE)
CASES = [
    pytest.param(name, rate, channels, id=f"{name}-{rate}x{channels}")
    for name, found in FORMATS.items()
    for rate, channels in found.stored
]


@functools.lru_cache(maxsize=4)  # the tests of one case follow each other
def made(name, rate, channels):
    # 11.3 s are more than one block; the odd frames make the length round up.
    return encoded(name, make.sound(11.3, rate, channels)[:-7], rate)


def encoded(name, samples, rate):
    found = FORMATS[name]
    if found.encoder and not make.program_encodes(found.encoder):
        pytest.skip(f"needs an ffmpeg program that encodes {found.encoder}")
    return found.encode(samples, rate)


def decoded(data, sample_rate=RATE, **asked):
    blocks = list(decode(io.BytesIO(data), sample_rate=sample_rate, **asked))
    return np.concatenate(blocks) if blocks else np.zeros(0, np.float32)


@pytest.mark.parametrize(("name", "rate", "channels"), CASES)
def test_samples(name, rate, channels):
    data = made(name, rate, channels)
    found = FORMATS[name]
    by_libsndfile = probe(io.BytesIO(data), extension=found.extension).decoder == "soundfile"
    if by_libsndfile and not found.raw:
        expected, _ = librosa.load(io.BytesIO(data), sr=RATE, mono=True)
        heard, tolerance = decoded(data), 1e-5
    else:
        if not make.program_encodes("pcm_f32le"):
            pytest.skip("needs the ffmpeg program")
        native = make.heard_by_program(data, found.extension, *found.raw).mean(axis=1, dtype=np.float32)
        stored_rate = probe(io.BytesIO(data), extension=found.extension).sample_rate
        if found.padded:
            kept = len(decoded(data, stored_rate, extension=found.extension))
            assert 0 <= len(native) - kept < 1024  # an AAC frame
            native = native[:kept]
        expected = librosa.resample(native, orig_sr=stored_rate, target_sr=RATE, res_type="soxr_hq")
        heard, tolerance = decoded(data, extension=found.extension), 1e-3
    assert heard.dtype == np.float32
    assert abs(len(heard) - len(expected)) <= (0 if tolerance == 1e-5 else 1)
    length = min(len(heard), len(expected))
    np.testing.assert_allclose(heard[:length], expected[:length], rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", FORMATS)
def test_segments_together_are_the_whole(name):
    data, extension = made(name, *FORMATS[name].stored[0]), FORMATS[name].extension
    recording = Recording("id", f"file.{extension}")
    found = list(read_segments(io.BytesIO(data), recording, limits=LIMITS, over_length="split"))
    assert [piece.end_s for piece in found[:-1]] == [piece.start_s for piece in found[1:]]
    whole = decoded(data, extension=extension)
    np.testing.assert_array_equal(np.concatenate([piece.samples for piece in found]), whole)


@pytest.mark.parametrize("name", ["m4a", "mp4", "alac"])
@pytest.mark.parametrize("missing", [0, 7, 600])
def test_mp4_gives_as_many_samples_as_went_in(name, missing):
    samples = make.sound(3, 44100, 2)[: 3 * 44100 - missing]
    assert len(decoded(encoded(name, samples, 44100), 44100)) == len(samples)


@pytest.mark.parametrize("channels", range(1, 9))
@pytest.mark.parametrize("name", ["wav 16 bit", "wav extensible", "flac", "ogg opus", "mka", "wavpack"])
def test_one_to_eight_channels(name, channels):
    samples = make.sound(1, 48000, channels)
    data = encoded(name, samples, 48000)
    assert probe(io.BytesIO(data)).channels == channels
    assert len(decoded(data, 48000)) == 48000
    assert np.corrcoef(decoded(data, 48000), samples.mean(axis=1))[0, 1] > 0.95
    if name != "ogg opus":  # lossy
        for channel in range(channels):
            np.testing.assert_allclose(decoded(data, 48000, channel=channel), samples[:, channel], rtol=0, atol=1e-4)


@pytest.mark.parametrize("rate", [8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000, 88200, 96000, 192000])
@pytest.mark.parametrize("name", ["wav 24 bit", "flac", "aiff", "mka"])
def test_rates(name, rate):
    samples = make.sound(1, rate, 2)
    data = encoded(name, samples, rate)
    expected, _ = librosa.load(io.BytesIO(make.wav(samples, rate, "FLOAT")), sr=RATE, mono=True)
    heard = decoded(data)
    assert probe(io.BytesIO(data)).sample_rate == rate
    assert heard.shape == expected.shape
    np.testing.assert_allclose(heard, expected, rtol=0, atol=1e-4)
