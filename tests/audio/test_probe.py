import io

import pytest

from af3pipe.audio.probe import probe
from af3pipe.schemas import AudioInfo, Reason, Rejected, Stage
from tests import fixtures_audio as make


class CountingFile(io.BytesIO):
    """Knows how many bytes were read from it."""

    bytes_read = 0

    def read(self, size=-1):
        data = super().read(size)
        self.bytes_read += len(data)
        return data


def wav_u8(samples, rate):
    return make.wav(samples, rate, "PCM_U8")


def opus(samples, rate):
    return make.ogg(samples, rate, "OPUS")


def long_video(samples, rate):
    return make.mkv_video(samples, rate, video_s=4)


# How it is made: encoder, seconds, rate, channels.
MADE = {
    "wav": ((make.wav, 2, 8000, 2), AudioInfo(2.0, 8000, 2, "pcm_16", "soundfile")),
    "wav_u8": ((wav_u8, 2, 8000), AudioInfo(2.0, 8000, 1, "pcm_u8", "soundfile")),
    "flac": ((make.flac, 2, 44100, 6), AudioInfo(2.0, 44100, 6, "flac", "soundfile")),
    "mp3": ((make.mp3, 2, 22050), AudioInfo(2.0, 22050, 1, "mp3", "pyav")),
    "mp3_without_length": ((make.mp3_without_length, 2, 44100, 2), AudioInfo(None, 44100, 2, "mp3", "pyav")),
    "ogg": ((make.ogg, 2, 48000, 2), AudioInfo(2.0, 48000, 2, "vorbis", "pyav")),
    "opus": ((opus, 2, 48000), AudioInfo(2.0065, 48000, 1, "opus", "pyav")),
    "m4a": ((make.m4a, 2, 44100, 2), AudioInfo(2.0, 44100, 2, "aac", "pyav")),
    "adts": ((make.adts, 2, 44100), AudioInfo(None, 44100, 1, "aac", "pyav")),
    "webm": ((make.webm, 2, 48000), AudioInfo(2.008, 48000, 1, "opus", "pyav")),
    "mp4": ((make.mp4_video, 1.5, 44100), AudioInfo(1.5, 44100, 1, "aac", "pyav")),
    "mkv": ((long_video, 1.5, 44100), AudioInfo(1.5, 44100, 1, "aac", "pyav")),
}


@pytest.mark.parametrize("name", MADE)
def test_the_header_tells_rate_channels_codec_and_the_length_of_the_sound(name):
    how, expected = MADE[name]
    info = probe(io.BytesIO(make.encoded(*how)))
    assert info._replace(duration_s=None) == expected._replace(duration_s=None)
    if expected.duration_s is None:
        assert info.duration_s is None
    else:
        assert info.duration_s == pytest.approx(expected.duration_s, abs=0.03)


@pytest.mark.parametrize("encode", [make.wav, make.flac, make.mp3, make.ogg, make.m4a])
def test_probing_reads_the_header_and_not_the_body(encode):
    file = CountingFile(make.encoded(encode, 120, 16000))
    probe(file)
    assert file.bytes_read < 0.35 * len(file.getvalue())


@pytest.mark.parametrize("size", [0, 0x7FFFF000, 0x7FFFFFFF, 0xFFFFFFFF])
def test_the_size_that_a_streaming_writer_puts_into_a_wav_is_no_statement(size):
    data = bytearray(make.wav(make.sound(1, 16000), 16000))
    data[40:44] = size.to_bytes(4, "little")
    assert probe(io.BytesIO(data)).duration_s is None


@pytest.mark.parametrize(
    ("made", "reason", "words"),
    [
        (lambda: b"", Reason.EMPTY_FILE, "0 bytes"),
        (lambda: b"This is not audio, whatever its name says.\n" * 50, Reason.UNSUPPORTED_FORMAT, "2150 bytes"),
        (lambda: b"<!DOCTYPE html><html><body>404</body></html>", Reason.UNSUPPORTED_FORMAT, "44 bytes"),
        (lambda: b"\xff", Reason.UNSUPPORTED_FORMAT, "(1 bytes)"),
        (lambda: bytes(30_000), Reason.UNSUPPORTED_FORMAT, "30000 bytes"),
        (lambda: make.mp4_video(None), Reason.NO_AUDIO_STREAM, "video"),
    ],
    ids=["empty", "text", "html", "one byte", "zeros", "video without sound"],
)
def test_what_is_no_audio_is_rejected_with_the_reason(made, reason, words):
    with pytest.raises(Rejected) as caught:
        probe(io.BytesIO(made()))
    assert (caught.value.stage, caught.value.reason) == (Stage.PROBE, reason)
    assert words in caught.value.detail


def test_an_mp3_joined_from_two_states_no_length():
    one = make.mp3(make.sound(2, 44100), 44100)
    assert probe(io.BytesIO(one + bytes(100))).duration_s == 2.0
    assert probe(io.BytesIO(one + one)).duration_s is None


def test_a_caf_that_counts_its_padding_apart_is_as_long_as_its_sound():
    if not make.program_encodes("alac"):
        pytest.skip("needs the ffmpeg program")
    data = bytearray(make.by_program(make.sound(2, 44100), 44100, "caf", "-c:a", "alac"))
    frames = data.index(b"pakt") + 20
    data[frames : frames + 8] = (88_200).to_bytes(8, "big")  # as Apple's tools do; FFmpeg counts whole packets
    assert probe(io.BytesIO(data)).duration_s == 2.0


@pytest.mark.parametrize(
    "data",
    [
        make.id3(b"") * 20_000,
        make.id3(bytes(5000))[:3000],
        b"fLaC\x00\x00\x00\x22" + bytes(34) + bytes(4) * 50_000,
        b"caff\x00\x01\x00\x00" + (b"free" + bytes(8)) * 20_000,
    ],
    ids=["tags and nothing else", "half a tag", "blocks and nothing else", "chunks and nothing else"],
)
def test_headers_without_end_are_given_up(data):
    file = CountingFile(data)
    with pytest.raises(Rejected) as caught:
        probe(file)
    assert caught.value.reason is Reason.UNSUPPORTED_FORMAT


def test_a_playlist_does_not_make_ffmpeg_open_other_files(tmp_path, monkeypatch):
    (tmp_path / "secret.wav").write_bytes(make.wav(make.sound(1, 16000), 16000))
    monkeypatch.chdir(tmp_path)
    for text in ("ffconcat version 1.0\nfile 'secret.wav'\n", f"#EXTM3U\n#EXTINF:1,\nfile://{tmp_path}/secret.wav\n"):
        with pytest.raises(Rejected) as caught:
            probe(io.BytesIO(text.encode()))
        assert caught.value.reason is Reason.UNSUPPORTED_FORMAT


def test_the_file_stays_open():
    file = io.BytesIO(make.encoded(make.wav, 2, 8000))
    probe(file)
    assert not file.closed
