"""The length of a long recording is known before its body is read: at most 1 MiB of it, wherever the header is."""

import functools
import io
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from af3pipe.audio.decode import decode
from af3pipe.audio.mp4 import stated_by_large_index
from af3pipe.audio.probe import probe
from af3pipe.audio.recording import read_segments
from af3pipe.audio.segments import AudioLimits
from af3pipe.schemas import Reason, Recording, Rejected, Stage
from tests import fixtures_audio as make
from tests.audio.formats import FORMATS

RATE = 16000
LIMITS = AudioLimits(sample_rate=RATE, max_samples=600 * RATE, min_samples=480, window_samples=30 * RATE)


class CountingFile(io.BytesIO):
    bytes_read = 0

    def read(self, size=-1):
        data = super().read(size)
        self.bytes_read += len(data)
        return data


def long(name, minutes, *options):
    """A minute by a real encoder, again and again."""
    found = FORMATS[name]
    if not make.program_encodes(found.encoder or "flac"):
        pytest.skip(f"needs an ffmpeg program that encodes {found.encoder}")
    return make.repeated(make.encoded(found.encode, 60, 44100), found.extension, minutes, *options)


def silence(encode):
    """11 minutes."""
    return encode(np.zeros((11 * 60 * 8000, 1), np.float32), 8000)


def written(container):
    return lambda: silence(lambda samples, rate: make.by_libsndfile(samples, rate, container, "PCM_16"))


def with_cover(minutes):
    return make.id3(make.picture(8 << 20)) + minutes


# Name of the format and what is special: how it is made, and its minutes.
STATED = {
    "wav": (written("WAV"), 11),
    "wav of unusual size (rf64)": (written("RF64"), 11),
    "aiff": (written("AIFF"), 11),
    "au": (written("AU"), 11),
    "caf": (written("CAF"), 11),
    "flac behind a tag with a cover": (lambda: with_cover(silence(make.flac)), 11),
    "flac with a cover of its own": (lambda: flac_with_cover(), 11),
    "mp3 with a Xing header": (lambda: long("mp3 vbr", 11), 11),
    "mp3 with a cover in front": (lambda: with_cover(long("mp3 vbr", 11)), 11),
    "m4a, index at the end": (lambda: long("m4a", 60), 60),
    "m4a, index in front": (lambda: long("m4a", 60, "-movflags", "faststart"), 60),
    "mp4 video, index at the end": (lambda: long("mp4", 11), 11),
    "mkv video": (lambda: long("mkv aac", 11), 11),
    "webm": (lambda: long("webm vorbis", 11), 11),
    "ogg vorbis": (lambda: long("ogg vorbis", 11), 11),
    "ogg flac": (lambda: long("ogg flac", 11), 11),
    "alac": (lambda: long("alac", 11), 11),
    "caf alac": (lambda: long("caf alac", 11), 11),
    "g722": (lambda: bytes(range(256)) * (8000 * 660 // 256 + 1), 11),
    "gsm": (lambda: (b"\xd0" + bytes(32)) * (50 * 660), 11),
}


def flac_with_cover():
    """As `metaflac --import-picture-from` leaves it: a block of PICTURE between STREAMINFO and the rest."""
    data = silence(make.flac)
    cover = make.picture(8 << 20)
    block = bytes(4 + 4 + 4 + 16) + len(cover).to_bytes(4, "big") + cover
    return data[:42] + b"\x06" + len(block).to_bytes(3, "big") + block + data[42:]


SLOW = {"mp4 video, index at the end", "mkv video", "webm", "ogg flac", "alac", "caf alac", "video of three hours"}


def marked(names):
    return [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in names]


@pytest.mark.parametrize("name", marked(STATED))
def test_at_most_a_mebibyte_tells_the_length(name):
    make_data, minutes = STATED[name]
    file = CountingFile(make_data())
    extension = name if name in ("g722", "gsm") else ""
    assert probe(file, extension=extension).duration_s == pytest.approx(60 * minutes, rel=0.002)
    assert file.bytes_read <= 1 << 20
    file.bytes_read = 0
    with pytest.raises(Rejected) as caught:
        next(read_segments(file, Recording("id", f"x.{extension}"), limits=LIMITS, over_length="dead-letter"))
    assert (caught.value.stage, caught.value.reason) == (Stage.PROBE, Reason.TOO_LONG)
    assert file.bytes_read <= 1 << 20
    assert len(file.getvalue()) > file.bytes_read


LARGE_INDEX = {
    "three hours": (lambda: long("m4a", 180), 10800),
    "a cover in the index": (lambda: with_cover_inside(), 660),
    "video of three hours": (lambda: long("mp4", 180), 10800),
}


def with_cover_inside():
    """As FFmpeg and iTunes write it: the picture is in the index."""
    if not make.program_encodes("aac"):
        pytest.skip("needs the ffmpeg program")
    with tempfile.TemporaryDirectory() as folder:
        cover = Path(folder) / "cover.png"
        cover.write_bytes(make.picture(6 << 20))
        mapped = ("-i", str(cover), "-map", "0", "-map", "1", "-c:v", "copy", "-disposition:v", "attached_pic")
        return silence(lambda samples, rate: make.by_program(samples, rate, "m4a", *mapped, "-c:a", "aac"))


@pytest.mark.parametrize("name", marked(LARGE_INDEX))
def test_an_mp4_is_too_long_before_its_index_is_read(name):
    make_data, seconds = LARGE_INDEX[name]
    file = CountingFile(make_data())
    with pytest.raises(Rejected) as caught:
        next(read_segments(file, Recording("id", "x.m4a"), limits=LIMITS, over_length="dead-letter"))
    assert (caught.value.stage, caught.value.reason) == (Stage.PROBE, Reason.TOO_LONG)
    assert f"lasts {seconds}." in caught.value.detail
    assert file.bytes_read <= 64 << 10
    assert probe(file).duration_s == pytest.approx(seconds, abs=0.1)
    asked = Recording("id", "x.m4a", offset_s=30.0, duration_s=3.0)
    (segment,) = read_segments(file, asked, limits=LIMITS, over_length="dead-letter")
    assert segment.audio_s == 3.0


def test_an_mp4_s_length_is_the_decoder_s():
    """The boxes say what FFmpeg says, for every kind that it writes."""
    for options in ((), ("-movflags", "faststart"), ("-metadata", "title=x")):
        file = io.BytesIO(long("m4a", 120, *options))
        stated = stated_by_large_index(file, len(file.getvalue()), None)
        assert stated == pytest.approx(probe(file).duration_s, abs=0.002)
    for data in (long("m4a", 2), make.m4a(make.sound(1, 44100), 44100), make.wav(make.sound(1, 8000), 8000), b"x"):
        assert stated_by_large_index(io.BytesIO(data), len(data), None) is None
    fragmented = long("m4a", 60, "-movflags", "frag_keyframe+empty_moov")
    assert stated_by_large_index(io.BytesIO(fragmented), len(fragmented), None) is None


@given(st.lists(st.tuples(st.integers(0, 700_000), st.integers(0, 255)), max_size=20), st.integers(0, 700_000))
@settings(max_examples=200)
def test_a_damaged_index_is_not_trusted_with_more_than_a_number(changes, length):
    data = bytearray(_large_index())
    for position, value in changes:
        data[position % len(data)] = value
    stated = stated_by_large_index(io.BytesIO(data[: len(data) - length % len(data)]), len(data), None)
    assert stated is None or stated > 0


@functools.cache
def _large_index():
    made = make.m4a(make.sound(1, 44100), 44100)
    start = made.index(b"moov") - 4
    size = int.from_bytes(made[start : start + 4], "big")
    padding = (600_000).to_bytes(4, "big") + b"free" + bytes(600_000 - 8)
    return made[:start] + (size + 600_000).to_bytes(4, "big") + made[start + 4 : start + size] + padding


def test_a_cover_changes_no_sample():
    plain = make.flac(make.sound(12, 44100, 2), 44100)
    cover = make.picture(1 << 20)
    block = bytes(4 + 4 + 4 + 16) + len(cover).to_bytes(4, "big") + cover
    inside = plain[:42] + b"\x06" + len(block).to_bytes(3, "big") + block + plain[42:]
    expected = np.concatenate(list(decode(io.BytesIO(plain), sample_rate=RATE)))
    for data in (inside, make.id3(cover) + plain, make.id3(cover) + inside, make.id3(b"x") + make.id3(cover) + plain):
        np.testing.assert_array_equal(np.concatenate(list(decode(io.BytesIO(data), sample_rate=RATE))), expected)
    later = np.concatenate(list(decode(io.BytesIO(inside), sample_rate=44100, offset_s=7.5)))
    whole = np.concatenate(list(decode(io.BytesIO(plain), sample_rate=44100)))
    np.testing.assert_array_equal(later, whole[round(7.5 * 44100) :])


@pytest.mark.parametrize(
    ("name", "options"),
    [
        pytest.param("adts", (), id="adts"),
        pytest.param(
            "mp3 vbr bare",
            ("-write_xing", "0", "-id3v2_version", "0"),
            id="mp3 without Xing",
            marks=pytest.mark.slow,
        ),
        pytest.param("ts", (), id="mpeg-ts", marks=pytest.mark.slow),
    ],
)
def test_where_only_decoding_tells_it_stops_at_the_cap(name, options):
    file = CountingFile(long(name, 60, *options))
    assert probe(file).duration_s is None
    file.bytes_read = 0
    with pytest.raises(Rejected) as caught:
        list(read_segments(file, Recording("id", "x"), limits=LIMITS, over_length="dead-letter"))
    assert (caught.value.stage, caught.value.reason) == (Stage.DECODE, Reason.TOO_LONG)
    assert file.bytes_read < len(file.getvalue()) / 4  # 10 of 60 minutes


def test_an_index_that_states_hours_of_a_few_frames_is_not_believed():
    data = bytearray(make.m4a(make.sound(5, RATE), RATE))
    clock, edit = data.index(b"mdhd") + 20, data.index(b"elst") + 12
    data[clock : clock + 4] = (7200 * RATE).to_bytes(4, "big")
    data[edit : edit + 4] = (7200 * 1000).to_bytes(4, "big")
    # A box of 600 KiB at the end of the index, as a cover is: what follows the index moves.
    moov = data.index(b"moov") - 4
    size = int.from_bytes(data[moov : moov + 4], "big")
    added = (600 << 10).to_bytes(4, "big") + b"free" + bytes((600 << 10) - 8)
    offsets = data.index(b"stco")
    count = int.from_bytes(data[offsets + 8 : offsets + 12], "big")
    for place in range(offsets + 12, offsets + 12 + 4 * count, 4):
        data[place : place + 4] = (int.from_bytes(data[place : place + 4], "big") + len(added)).to_bytes(4, "big")
    data[moov : moov + 4] = (size + len(added)).to_bytes(4, "big")
    data[moov + size : moov + size] = added
    (found,) = read_segments(io.BytesIO(data), Recording("id", "a.m4a"), limits=LIMITS, over_length="dead-letter")
    assert found.end_s == pytest.approx(5, abs=0.1)
