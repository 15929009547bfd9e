"""Every promised format: sample for sample what librosa or the `ffmpeg` program make of it, and as its row says.

README's command takes the first format of each row of docs/formats.md, and CI all of them.
"""

import io
import re
from pathlib import Path

import numpy as np
import pytest

from af3pipe.audio.decode import decode
from af3pipe.audio.headers import HEADERLESS
from af3pipe.audio.probe import probe
from af3pipe.audio.recording import read_segments
from af3pipe.audio.segments import AudioLimits
from af3pipe.schemas import Recording
from af3pipe.storage import AUDIO_EXTENSIONS
from tests import fixtures_audio as make
from tests.audio import as_librosa
from tests.audio.formats import FORMATS

RATE = 16000
LIMITS = AudioLimits(sample_rate=RATE, max_samples=4 * RATE, min_samples=480, window_samples=RATE)
DOCUMENT = (Path(__file__).parents[2] / "docs" / "formats.md").read_text(encoding="utf-8")
ROWS = {
    name: (extensions.split(), decoder, length)
    for name, extensions, decoder, length in re.findall(
        r"^\| ([^|]+) \| ([a-z0-9 ]+) \| (libsndfile|FFmpeg) \| (yes|no) \|", DOCUMENT, re.MULTILINE
    )
}
FIRST_OF_ROW = set({found.row: name for name, found in reversed(FORMATS.items())}.values())


def encoded(name, samples, rate):
    found = FORMATS[name]
    if found.encoder and not make.program_encodes(found.encoder):
        pytest.skip(f"needs an ffmpeg program that encodes {found.encoder}")
    return found.encode(samples, rate)


def made(name, rate, channels):
    # 11.3 s are more than one block; the odd frames make the length round up.
    return encoded(name, make.sound(11.3, rate, channels)[:-7], rate)


def decoded(data, sample_rate=RATE, **asked):
    blocks = list(decode(io.BytesIO(data), sample_rate=sample_rate, **asked))
    return np.concatenate(blocks) if blocks else np.zeros(0, np.float32)


def slow_unless(is_quick, *parameters):
    return pytest.param(*parameters, marks=() if is_quick else pytest.mark.slow)


@pytest.fixture(scope="module", params=[slow_unless(name in FIRST_OF_ROW, name) for name in FORMATS])
def file(request):
    """A format and a file of it: one for all tests of that format, which pytest runs one after the other."""
    found = FORMATS[request.param]
    return found, made(request.param, *found.stored[0])


def check_samples(found, data):
    info = probe(io.BytesIO(data), extension=found.extension)
    if info.decoder == "soundfile" and not found.raw:
        expected = as_librosa.load(data, RATE)
        heard, tolerance = decoded(data), 1e-5
    else:
        if not make.program_encodes("pcm_f32le"):
            pytest.skip("needs the ffmpeg program")
        native = make.heard_by_program(data, found.extension, *found.raw).mean(axis=1, dtype=np.float32)
        if found.padded:
            kept = len(decoded(data, info.sample_rate, extension=found.extension))
            assert 0 <= len(native) - kept < 1024  # an AAC frame
            native = native[:kept]
        expected = as_librosa.resample(native, info.sample_rate, RATE)
        heard, tolerance = decoded(data, extension=found.extension), 1e-3
    assert heard.dtype == np.float32
    assert abs(len(heard) - len(expected)) <= (0 if tolerance == 1e-5 else 1)
    length = min(len(heard), len(expected))
    np.testing.assert_allclose(heard[:length], expected[:length], rtol=0, atol=tolerance)


def test_samples(file):
    check_samples(*file)


def test_segments_together_are_the_whole(file):
    found, data = file
    recording = Recording("id", f"file.{found.extension}")
    pieces = list(read_segments(io.BytesIO(data), recording, limits=LIMITS, over_length="split"))
    assert [piece.end_s for piece in pieces[:-1]] == [piece.start_s for piece in pieces[1:]]
    whole = decoded(data, extension=found.extension)
    np.testing.assert_array_equal(np.concatenate([piece.samples for piece in pieces]), whole)


def test_probing_says_what_the_row_says(file):
    found, data = file
    extensions, decoder, length = ROWS[found.row]
    assert found.extension in extensions
    for extension in extensions if found.extension not in HEADERLESS else [found.extension]:
        info = probe(io.BytesIO(data), extension=extension)
        assert info.decoder == {"libsndfile": "soundfile", "FFmpeg": "pyav"}[decoder]
        assert (info.duration_s is not None) == (length == "yes")


def test_every_row_has_a_fixture_and_every_fixture_a_row():
    assert len(ROWS) == DOCUMENT.count("\n| ") - 2  # the heading, and the line below it
    assert {found.row for found in FORMATS.values()} == set(ROWS)


def test_folders_are_searched_for_all_of_them_and_for_nothing_else_that_is_not_named():
    in_rows = {extension for extensions, _, _ in ROWS.values() for extension in extensions}
    (untested,) = re.findall(r"no test here covers: ([a-z0-9\s]+)\.", DOCUMENT)
    assert in_rows | set(untested.split()) == AUDIO_EXTENSIONS
    assert not in_rows & set(untested.split())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "rate", "channels"),
    [
        pytest.param(name, rate, channels, id=f"{name}-{rate}x{channels}")
        for name, found in FORMATS.items()
        for rate, channels in found.stored[1:]
    ],
)
def test_samples_of_other_rates_and_channels(name, rate, channels):
    check_samples(FORMATS[name], made(name, rate, channels))


@pytest.mark.parametrize(
    ("name", "missing"),
    [
        slow_unless(name == "m4a" or missing == 7, name, missing)
        for name in ["m4a", "mp4", "alac"]
        for missing in [0, 7, 600]
    ],
)
def test_mp4_gives_as_many_samples_as_went_in(name, missing):
    samples = make.sound(3, 44100, 2)[: 3 * 44100 - missing]
    assert len(decoded(encoded(name, samples, 44100), 44100)) == len(samples)


@pytest.mark.parametrize(
    ("name", "channels"),
    [
        slow_unless(name in ("wav 16 bit", "mka") and channels in (2, 6), name, channels)
        for name in ["wav 16 bit", "wav extensible", "flac", "ogg opus", "mka", "wavpack"]
        for channels in range(1, 9)
    ],
)
def test_one_to_eight_channels(name, channels):
    samples = make.sound(1, 48000, channels)
    data = encoded(name, samples, 48000)
    assert probe(io.BytesIO(data)).channels == channels
    assert len(decoded(data, 48000)) == 48000
    assert np.corrcoef(decoded(data, 48000), samples.mean(axis=1))[0, 1] > 0.95
    if name != "ogg opus":  # lossy
        for channel in range(channels):
            np.testing.assert_allclose(decoded(data, 48000, channel=channel), samples[:, channel], rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "rate"),
    [
        slow_unless(name == "flac" or (name == "mka" and rate in (8000, 44100)), name, rate)
        for name in ["wav 24 bit", "flac", "aiff", "mka"]
        for rate in [8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000, 88200, 96000, 192000]
    ],
)
def test_rates(name, rate):
    samples = make.sound(1, rate, 2)
    data = encoded(name, samples, rate)
    expected = as_librosa.load(make.wav(samples, rate, "FLOAT"), RATE)
    heard = decoded(data)
    assert probe(io.BytesIO(data)).sample_rate == rate
    assert heard.shape == expected.shape
    np.testing.assert_allclose(heard, expected, rtol=0, atol=1e-4)
