import io
import itertools
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from af3pipe.audio.decode import decode
from af3pipe.schemas import Reason, Rejected, Stage
from tests import fixtures_audio as make
from tests.audio import as_librosa

RATE = 16000


def decoded(data, sample_rate=RATE, **asked):
    blocks = list(decode(io.BytesIO(data), sample_rate=sample_rate, **asked))
    return np.concatenate(blocks) if blocks else np.zeros(0, np.float32)


def rejection(data, **asked):
    with pytest.raises(Rejected) as caught:
        decoded(data, **asked)
    return caught.value


def slow(*parameters):
    return [pytest.param(parameter, marks=pytest.mark.slow) for parameter in parameters]


LIBROSA_READS = {
    "wav 8": lambda samples, rate: make.wav(samples, rate, "PCM_U8"),
    "wav 16": make.wav,
    "wav 24": lambda samples, rate: make.wav(samples, rate, "PCM_24"),
    "wav float": lambda samples, rate: make.wav(samples, rate, "FLOAT"),
    "flac": make.flac,
    "mp3": make.mp3,
    "ogg": make.ogg,
    "aiff": make.aiff,
}
RATES_AND_CHANNELS = [(8000, 1), (16000, 2), (22050, 1), (44100, 2), (48000, 6), (44100, 1)]


def made(name, rate, channels):
    # 12.3 s is more than one block; the odd frame makes the length round up.
    return LIBROSA_READS[name](make.sound(12.3, rate, channels)[:-7], rate)


def assert_equal_samples(found, expected):
    assert found.dtype == np.float32
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


@pytest.mark.representative  # the only one that calls librosa: its import takes seconds
def test_equals_librosa_load():
    import librosa

    for name, (rate, channels) in zip(LIBROSA_READS, itertools.cycle(RATES_AND_CHANNELS), strict=False):
        data = made(name, rate, channels)
        expected, _ = librosa.load(io.BytesIO(data), sr=RATE, mono=True)
        assert_equal_samples(decoded(data), expected)
        np.testing.assert_array_equal(as_librosa.load(data, RATE), expected)
        part, _ = librosa.load(io.BytesIO(data), sr=RATE, mono=True, offset=3.5, duration=5.25)
        np.testing.assert_array_equal(as_librosa.load(data, RATE, offset_s=3.5, duration_s=5.25), part)


@pytest.mark.parametrize(
    ("name", "rate", "channels"),  # test_formats.py compares the formats without loss
    [
        pytest.param(
            name,
            rate,
            min(channels, 2) if name == "mp3" else channels,
            marks=() if (rate, channels) in ((8000, 1), (44100, 2)) else pytest.mark.slow,
        )
        for name in ["mp3", "ogg"]
        for rate, channels in RATES_AND_CHANNELS
    ],
)
def test_equals_librosa(name, rate, channels):
    data = made(name, rate, channels)
    assert_equal_samples(decoded(data), as_librosa.load(data, RATE))


@pytest.mark.parametrize("encode", [make.m4a, make.adts, make.webm, make.mp4_video, make.mkv_video])
def test_what_only_ffmpeg_reads_sounds_like_the_original(encode):
    samples = make.sound(11, 48000, 2)
    original = as_librosa.load(make.wav(samples, 48000), RATE)
    found = decoded(encode(samples, 48000))
    assert abs(len(found) - len(original)) <= 2 * 1024 / 48000 * RATE + 1
    length = 10 * RATE
    # Bare frames do not tell the encoder's delay.
    lags = range(700) if encode is make.adts else range(1)
    assert any(np.corrcoef(found[lag : lag + length], original[:length])[0, 1] > 0.95 for lag in lags)


def test_an_m4a_is_as_long_as_what_went_in():
    assert len(decoded(make.m4a(make.sound(10, 44100), 44100))) == 10 * RATE


NOTHING_IS_LOST = {
    "of an mp3 without a length": lambda: make.encoded(make.mp3_without_length, 20, 44100),
    "of two mp3 joined": lambda: make.encoded(make.mp3, 11, 44100) + make.encoded(make.mp3, 9, 44100),
    "of two ogg joined": lambda: make.encoded(make.ogg, 11, 44100) + make.encoded(make.ogg, 9, 44100),
}


@pytest.mark.parametrize("name", NOTHING_IS_LOST)
def test_nothing_is_lost(name):
    assert len(decoded(NOTHING_IS_LOST[name]())) / RATE == pytest.approx(20, abs=0.1)


def test_nothing_is_lost_of_streams_whose_header_was_never_completed():
    samples = make.sound(11.3, RATE)
    wav = bytearray(make.wav(samples, RATE))
    expected = decoded(wav)
    for size in (0, 0x7FFFF000, 0xFFFFFFFF):
        wav[40:44] = size.to_bytes(4, "little")
        np.testing.assert_array_equal(decoded(wav), expected)
    flac = bytearray(make.flac(samples, RATE))
    expected = decoded(flac)
    assert flac[:4] == b"fLaC"
    flac[21] &= 0xF0  # STREAMINFO: 36 bits of total samples
    flac[22:26] = bytes(4)
    np.testing.assert_array_equal(decoded(flac), expected)


def wav_float(samples, rate):
    return make.wav(samples, rate, "FLOAT")


def ogg_opus(samples, rate):
    return make.ogg(samples, rate, "OPUS")


SHORT = {
    "wav": lambda: make.encoded(make.wav, 20, 16000),
    "wav float": lambda: make.encoded(wav_float, 20, 16000, 2),
    "aiff": lambda: make.encoded(make.aiff, 20, 16000),
    "flac": lambda: make.encoded(make.flac, 20, 16000),
    "mp3": lambda: make.encoded(make.mp3, 20, 44100),
    "m4a": lambda: make.encoded(make.m4a, 20, 44100),
    "webm": lambda: make.encoded(make.webm, 20, 48000),
}


@pytest.mark.parametrize("name", SHORT)
@pytest.mark.parametrize("share", [0.6, *slow(0.25, 0.97)])
def test_a_file_that_ends_before_its_stated_length_is_rejected_with_both(name, share):
    data = SHORT[name]()
    rejected = rejection(data[: int(len(data) * share)])
    assert (rejected.stage, rejected.reason) == (Stage.DECODE, Reason.DECODE_SHORT)
    assert "states 20.0 s" in rejected.detail
    assert rejected.position_s == pytest.approx(20 * share, abs=3)
    assert f"{rejected.position_s:.1f} s" in rejected.detail


@pytest.mark.parametrize("name", SHORT)
def test_the_part_before_the_break_can_be_asked_for(name):
    data = SHORT[name]()
    assert len(decoded(data[: int(len(data) * 0.6)], offset_s=1, duration_s=4)) == 4 * RATE


@pytest.mark.parametrize("encode", [make.ogg, ogg_opus])
@pytest.mark.parametrize("share", [0.7, *slow(0.3, 0.99)])
def test_an_ogg_file_that_breaks_off_is_rejected(encode, share):
    data = make.encoded(encode, 20, 48000)
    rejected = rejection(data[: int(len(data) * share)])
    assert rejected.reason is Reason.DECODE_SHORT
    assert rejected.position_s == pytest.approx(20 * share, abs=3)
    assert rejected.detail.endswith("in the middle of a page.")
    assert len(decoded(data + b"junk")) == len(decoded(data))


def test_bare_frames_that_break_off_are_rejected():
    data = make.adts(make.sound(20, 44100), 44100)
    rejected = rejection(data[: len(data) // 2 + 100])
    assert rejected.reason is Reason.DECODE_SHORT
    assert rejected.position_s == pytest.approx(10, abs=1)
    assert rejected.detail.endswith("in the middle of a frame.")


def test_what_was_decoded_before_flac_breaks_counts():
    rejected = rejection(make.flac(make.sound(15, 16000), 16000)[:-20])
    assert rejected.position_s == pytest.approx(14.9, abs=0.15)


@pytest.mark.parametrize("rate", [1, 67_108_864])
def test_a_rate_that_no_recording_has_is_a_broken_header(rate):
    wav = bytearray(make.wav(make.sound(1, RATE), RATE))
    wav[24:28] = rate.to_bytes(4, "little")
    rejected = rejection(wav)
    assert rejected.reason is Reason.UNSUPPORTED_FORMAT
    assert f"{rate:,} samples a second" in rejected.detail


def test_broken_flac_is_rejected_with_the_place():
    data = bytearray(make.flac(make.sound(30, 16000), 16000))
    data[len(data) // 2 : len(data) // 2 + 200] = bytes(200)
    rejected = rejection(data)
    assert (rejected.reason, rejected.decoder) == (Reason.DECODE_ERROR, "soundfile")
    assert 10 <= rejected.position_s <= 20


def test_broken_mp3_is_rejected_with_the_place():
    data = bytearray(make.mp3(make.sound(30, 44100), 44100))
    data[len(data) // 2 : len(data) // 2 + 3000] = bytes(3000)
    rejected = rejection(data)
    assert (rejected.reason, rejected.decoder) == (Reason.DECODE_ERROR, "pyav")
    assert 5 <= rejected.position_s <= 20


def test_tags_and_junk_behind_a_complete_mp3_do_no_harm():
    data = make.mp3(make.sound(12, 44100), 44100)
    assert len(decoded(data + b"TAG" + bytes(125))) == 12 * RATE
    assert len(decoded(data + bytes(3000))) >= 12 * RATE


def test_a_tag_with_a_picture_in_front_of_an_mp3_does_no_harm():
    size = 300_000
    tag = b"ID3\x04\x00\x00" + bytes((size >> shift) & 0x7F for shift in (21, 14, 7, 0)) + bytes(size)
    assert len(decoded(tag + make.mp3(make.sound(12, 44100), 44100))) == 12 * RATE


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_samples_that_are_no_numbers_are_rejected(value):
    samples = make.sound(15, 8000, 2)
    samples[100_000:100_003, 1] = value
    data = make.wav(samples, 8000, "FLOAT")
    rejected = rejection(data)
    assert rejected.reason is Reason.DECODE_ERROR
    assert rejected.detail == "The sample at 12.500 s is NaN or infinite."
    assert rejected.position_s == 12.5
    assert "12.500 s" in rejection(data, offset_s=4).detail
    assert len(decoded(data, offset_s=2, duration_s=10)) == 10 * RATE


class FailingFile(io.BytesIO):
    """A store that breaks off."""

    def __init__(self, data, share, error):
        super().__init__(data)
        self.limit, self.error = share * len(data), error

    def read(self, size=-1):
        if self.tell() + size > self.limit and self.tell() < len(self.getvalue()) * 0.95:
            raise self.error
        return super().read(size)


@pytest.mark.parametrize("encode", [make.wav, make.flac, make.mp3, make.ogg, make.m4a])
@pytest.mark.parametrize("share", [0.0, 0.5])
@pytest.mark.parametrize("kind", [Rejected, ValueError])
def test_an_error_of_the_store_is_raised_as_it_is(encode, share, kind, capfd):
    error = Rejected(Stage.READ, Reason.UNREADABLE, "gone") if kind is Rejected else ValueError("closed")
    file = FailingFile(make.encoded(encode, 40, 44100), share, error)
    with pytest.raises(type(error)) as caught:
        list(decode(file, sample_rate=RATE))
    assert caught.value is error
    assert "From cffi callback" not in capfd.readouterr().err


@pytest.mark.parametrize("failing_at", [320_044, 320_045, 600_000])
def test_nothing_read_around_an_error_of_the_store_passes_for_sound(failing_at):
    data = make.wav(make.sound(40, RATE), RATE)
    error = OSError("gone")
    blocks = decode(FailingFile(data, failing_at / len(data), error), sample_rate=RATE)
    assert len(next(blocks)) == 10 * RATE
    with pytest.raises(OSError, match="gone"):
        next(blocks)


@pytest.mark.parametrize(
    "encode",
    [*LIBROSA_READS.values(), make.m4a, *slow(make.mp3_without_length, make.mkv_video)],
    ids=lambda encode: encode.__name__,
)
def test_offset_is_exact(encode):
    data = make.encoded(encode, 25, 44100, 2)
    whole = decoded(data, sample_rate=44100)
    for offset_s, duration_s in ((0.1, 0.2), (13.37, 2.5), (20.0, None), (24.0, 9.0)):
        start = round(offset_s * 44100)
        end = None if duration_s is None else start + round(duration_s * 44100)
        found = decoded(data, sample_rate=44100, offset_s=offset_s, duration_s=duration_s)
        np.testing.assert_array_equal(found, whole[start:end])


def test_offset_and_duration_equal_librosa():
    data = make.encoded(make.flac, 25, 44100, 2)
    expected = as_librosa.load(data, RATE, offset_s=3.5, duration_s=14.25)
    np.testing.assert_allclose(decoded(data, offset_s=3.5, duration_s=14.25), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("encode", [make.wav, make.mp3])
def test_an_offset_beyond_the_end_names_both(encode):
    rejected = rejection(encode(make.sound(3, 16000), 16000), offset_s=5.0)
    assert rejected.reason is Reason.TOO_SHORT
    assert "5.000 s" in rejected.detail
    assert "lasts 3.000 s" in rejected.detail


def test_a_negative_offset_is_a_mistake_of_the_caller():
    with pytest.raises(ValueError, match="-1"):
        decoded(make.wav(make.sound(1, 16000), 16000), offset_s=-1)


@pytest.mark.parametrize("encode", [make.wav, make.mp3, make.m4a])
def test_blocks_come_before_the_file_is_read_to_its_end(encode):
    file = io.BytesIO(make.encoded(encode, 120, 16000))
    positions = [(len(block), file.tell()) for block in decode(file, sample_rate=RATE)]
    assert max(length for length, _ in positions) < 12 * RATE
    assert len(positions) >= 11
    assert positions[0][1] < len(file.getvalue()) / 2


def test_recordings_are_decoded_in_a_pool():
    made = [
        encode(make.sound(3, 44100, 2, seed), 44100)
        for seed in range(2)
        for encode in (make.flac, make.mp3, make.m4a)
    ]
    alone = [decoded(data) for data in made]
    with ThreadPoolExecutor(6) as pool:
        together = list(pool.map(decoded, made * 2))
    for one, other in zip(alone * 2, together, strict=True):
        np.testing.assert_array_equal(one, other)
