"""Which channel, which stream; and what a file's name decides where its content does not say what it is."""

import functools
import io
from pathlib import Path

import numpy as np
import pytest
import soundfile

from af3pipe.audio.decode import decode
from af3pipe.audio.headers import HEADERLESS
from af3pipe.audio.probe import probe
from af3pipe.audio.recording import read_segments
from af3pipe.audio.segments import AudioLimits
from af3pipe.schemas import Reason, Recording, Rejected, Stage
from af3pipe.storage import AUDIO_EXTENSIONS
from tests import fixtures_audio as make

RATE = 16000
LIMITS = AudioLimits(sample_rate=RATE, max_samples=4 * RATE, min_samples=480, window_samples=RATE)
PROMPTS = Path("/usr/share/asterisk/sounds/en_US_f_Allison")


def decoded(data, **asked):
    return np.concatenate(list(decode(io.BytesIO(data), sample_rate=RATE, **asked)))


def rejection(data, **asked):
    with pytest.raises(Rejected) as caught:
        decoded(data, **asked)
    assert (caught.value.stage, caught.value.reason) == (Stage.PROBE, Reason.NO_AUDIO_STREAM)
    return caught.value.detail


ENCODERS = {"wav": lambda samples, rate: make.wav(samples, rate, "FLOAT"), "flac": make.flac, "alac": make.alac}


def sound():
    return make.sound(2, RATE, 2)


def stereo(name):
    """`sound()` in a file."""
    return make.encoded(ENCODERS[name], 2, RATE, 2)


@pytest.mark.parametrize("name", ENCODERS)
@pytest.mark.parametrize(("channel", "index"), [("left", 0), ("right", 1), (0, 0), ("1", 1)])
def test_one_channel_is_that_channel_alone(name, channel, index):
    np.testing.assert_allclose(decoded(stereo(name), channel=channel), sound()[:, index], rtol=0, atol=1e-4)


def test_the_mix_is_the_mean():
    np.testing.assert_array_equal(decoded(stereo("wav"), channel="mix"), sound().mean(axis=1, dtype=np.float32))


@pytest.mark.parametrize("name", ENCODERS)
def test_a_channel_that_is_not_there_is_rejected_with_those_that_are(name):
    detail = rejection(stereo(name), channel=2)
    assert (
        detail
        == "Channel 2 was requested, but the audio has 2 channels, 0 to 1; choose --channel mix or one of these."
    )


@pytest.mark.parametrize("channel", ["left", "right", 1])
def test_one_channel_is_neither_left_nor_right(channel):
    data = make.wav(make.sound(1, RATE), RATE)
    assert f"Channel {channel} was requested, but the audio has 1 channel, number 0" in rejection(
        data, channel=channel
    )
    assert len(decoded(data, channel=0)) == RATE


def test_what_is_no_channel_is_a_mistake_of_the_caller():
    with pytest.raises(ValueError, match="channel is 'middle'; it must be mix, left, right"):
        decoded(stereo("wav"), channel="middle")


@functools.cache
def two_streams():
    return make.two_streams(make.sound(2, RATE), make.sound(3, RATE, 2, seed=1), RATE)


def test_a_stream_is_counted_among_the_audio_streams():
    assert [probe(io.BytesIO(two_streams()), stream=number).channels for number in (0, 1)] == [1, 2]
    np.testing.assert_allclose(decoded(two_streams(), stream=0), make.sound(2, RATE)[:, 0], rtol=0, atol=1e-4)
    right = make.sound(3, RATE, 2, seed=1)[:, 1]
    np.testing.assert_allclose(decoded(two_streams(), stream=1, channel="right"), right, rtol=0, atol=1e-4)


def test_a_stream_that_is_not_there_is_rejected_with_those_that_are():
    assert "stream 2 was requested, but the file has 2, 0 to 1" in rejection(two_streams(), stream=2)
    assert "stream 1 was requested, but WAV has one, number 0" in rejection(stereo("wav"), stream=1)
    assert "stream 1 was requested, but the file has one, number 0" in rejection(stereo("alac"), stream=1)
    assert len(decoded(stereo("wav"), stream=0)) == 2 * RATE


def test_a_recording_carries_its_choice():
    recording = Recording("id", "call.wav", channel="right")
    (segment,) = read_segments(io.BytesIO(stereo("wav")), recording, limits=LIMITS, over_length="dead-letter")
    np.testing.assert_array_equal(segment.samples, sound()[:, 1])
    assert segment.info.channels == 2


def test_audio_whose_channels_change_has_not_the_channel_all_along():
    joined = make.adts(make.sound(2, 44100, 2), 44100) + make.adts(make.sound(2, 44100, 1), 44100)
    assert len(decoded(joined)) > 3.9 * RATE
    with pytest.raises(Rejected) as caught:
        decoded(joined, channel=1)
    assert caught.value.reason is Reason.DECODE_ERROR
    assert "number of channels changes from 2 to 1" in caught.value.detail


@pytest.mark.parametrize("extension", sorted(HEADERLESS))
def test_a_file_with_a_header_is_what_it_says_whatever_its_name(extension):
    for data, codec in ((stereo("wav"), "float"), (stereo("flac"), "flac"), (stereo("alac"), "alac")):
        assert probe(io.BytesIO(data), extension=f".{extension.upper()}").codec == codec


@pytest.mark.parametrize("extension", ["ulaw", ".g722", "gsm", "sln16"])
@pytest.mark.parametrize(
    "data",
    [
        "<!DOCTYPE html><html><body>Diese Datei gibt es nicht, für niemanden.</body></html>".encode() * 9,
        b'{"error": "not found"}',
        b"\x1f\x8b\x08\x00" + bytes(100),
    ],
    ids=["html", "json", "gzip"],
)
def test_an_error_page_named_like_samples_is_not_decoded_to_noise(extension, data):
    with pytest.raises(Rejected) as caught:
        probe(io.BytesIO(data), extension=extension)
    assert caught.value.reason is Reason.UNSUPPORTED_FORMAT
    assert "nothing but samples" in caught.value.detail


def test_quiet_a_law_reads_like_letters_and_is_audio():
    quiet = io.BytesIO()
    soundfile.write(quiet, np.linspace(-0.003, -0.0001, 8000), 8000, format="RAW", subtype="ALAW")
    assert quiet.getvalue()[:512].decode("ascii").isprintable()
    assert probe(quiet, extension="alaw").duration_s == 1.0


def test_half_a_sample_is_none():
    with pytest.raises(Rejected, match="not one whole sample"):
        probe(io.BytesIO(b"\x01"), extension="sln")


@pytest.mark.parametrize("extension", ["g722", "gsm"])
def test_telephone_prompts_are_as_long_as_their_wav(extension):
    found = sorted(PROMPTS.glob(f"digits/*.{extension}"))
    if not found:
        pytest.skip(f"needs Debian's asterisk-core-sounds-en-{extension}")
    for path in found:
        info = probe(io.BytesIO(path.read_bytes()), extension=extension)
        assert info.duration_s == pytest.approx(soundfile.info(path.with_suffix(".wav")).duration, abs=0.021)


def test_folders_list_every_extension_without_a_header():
    assert set(HEADERLESS) <= AUDIO_EXTENSIONS
