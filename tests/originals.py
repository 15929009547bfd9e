"""Whole audio files in every format, short ones and a long one, the same bytes every time.

Who adds a format to `tests/fixtures_audio.py` adds its line to `FORMATS` here.
"""

import io
import re
from collections.abc import Callable, Iterator
from functools import cache
from typing import NamedTuple

import numpy as np
import soundfile

from tests import fixtures_audio as make

Maker = Callable[[make.Samples, int], bytes]


class Format(NamedTuple):
    """How files of one format are made.

    Attributes:
        extension: Without the dot.
        make: Samples and their rate to a file's bytes.
        rates: That the encoder takes; the first is used for the long recording.
        stereo: Whether it takes two channels.
    """

    extension: str
    make: Maker
    rates: tuple[int, ...] = (8000, 22050, 44100)
    stereo: bool = True


class Original(NamedTuple):
    """A whole file."""

    format: str
    extension: str
    content: bytes
    seconds: float


def _stored(container: str, subtype: str) -> Maker:
    def write(samples: make.Samples, rate: int) -> bytes:
        file = io.BytesIO()
        soundfile.write(file, samples, rate, format=container, subtype=subtype)
        return file.getvalue()

    return write


def _encoded(container: str, codec: str) -> Maker:
    return lambda samples, rate: make._by_ffmpeg(samples, rate, container, codec)


_MPEG = (16000, 22050, 44100)
_OPUS = (8000, 16000, 48000)
_AC3 = (32000, 44100, 48000)

FORMATS: dict[str, Format] = {
    "wav": Format("wav", make.wav),
    "wav float": Format("wav", _stored("WAVEX", "FLOAT")),
    "wav 24 bit": Format("wav", _stored("WAV", "PCM_24")),
    "wav u-law": Format("wav", _stored("WAV", "ULAW")),
    "wav ima adpcm": Format("wav", _stored("WAV", "IMA_ADPCM")),
    "wav ms adpcm": Format("wav", _encoded("wav", "adpcm_ms")),
    "wav gsm": Format("wav", _stored("WAV", "GSM610"), (8000, 16000), stereo=False),
    "w64": Format("w64", _stored("W64", "PCM_16")),
    "rf64": Format("rf64", _stored("RF64", "PCM_16")),
    "aiff": Format("aiff", make.aiff),
    "au": Format("au", _stored("AU", "PCM_16")),
    "caf": Format("caf", _stored("CAF", "PCM_16")),
    "caf alac": Format("caf", _stored("CAF", "ALAC_16")),
    "flac": Format("flac", make.flac),
    "ogg vorbis": Format("ogg", make.ogg),
    "ogg vorbis 7.1": Format("ogg", lambda samples, rate: make.ogg(np.repeat(samples[:, :1], 8, axis=1), rate)),
    "ogg opus": Format("opus", lambda samples, rate: make.ogg(samples, rate, "OPUS"), _OPUS),
    "ogg flac": Format("oga", _encoded("ogg", "flac")),
    "mp3": Format("mp3", make.mp3, _MPEG),
    "mp3 no length": Format("mp3", make.mp3_without_length, _MPEG),
    "mp2": Format("mp2", _encoded("mp2", "mp2"), _MPEG),
    "m4a": Format("m4a", make.m4a),
    "m4a alac": Format("m4a", _encoded("ipod", "alac")),
    "adts": Format("aac", make.adts),
    "webm": Format("webm", make.webm, _OPUS),
    "mp4 video": Format("mp4", make.mp4_video, _MPEG),
    "mkv video": Format("mkv", make.mkv_video, _MPEG),
    "mpegts": Format("ts", _encoded("mpegts", "aac"), _MPEG),
    "avi": Format("avi", _encoded("avi", "pcm_s16le")),
    "flv": Format("flv", _encoded("flv", "libmp3lame"), (22050, 44100)),
    "ac3": Format("ac3", _encoded("ac3", "ac3"), _AC3),
    "tta": Format("tta", _encoded("tta", "tta")),
    "wavpack": Format("wv", _encoded("wv", "wavpack")),
    "amr": Format("amr", _encoded("amr", "libopencore_amrnb"), (8000,), stereo=False),
}

LENGTHS_S = (0.3, 1.1, 2.9)
LONG_S = 31.0
"""Longer than one window of 30 s: the harness sets the cap there."""


@cache
def originals(name: str) -> tuple[Original, ...]:
    """Whole files of a format: short ones of several rates and channels, and a long one."""
    form = FORMATS[name]
    made = []
    for index, seconds in enumerate((*LENGTHS_S, LONG_S)):
        rate = form.rates[0 if seconds == LONG_S else index % len(form.rates)]
        channels = 2 if form.stereo and index % 2 else 1
        content = form.make(make.sound(seconds, rate, channels if seconds < LONG_S else 1, seed=index), rate)
        made.append(Original(name, form.extension, without_chance(content), seconds))
    return tuple(made)


# Ogg, WebM and Matroska give every file a number by chance, and floating-point WAV the time of day.


def without_chance(data: bytes) -> bytes:
    """The same file with the same bytes every time."""
    if data[:4] == b"RIFF":
        return re.sub(rb"(?<=PEAK.{8}).{4}", bytes(4), data, count=1, flags=re.DOTALL)
    if data[:4] == b"OggS":
        return b"".join(_renumbered(page) for page in _ogg_pages(data))
    if data[:4] == b"\x1a\x45\xdf\xa3":
        head, cluster, audio = data.partition(b"\x1f\x43\xb6\x75")
        head = re.sub(rb"(?<=\x73\xa4\x90).{16}", bytes(15) + b"\1", head, count=1, flags=re.DOTALL)
        head = re.sub(rb"(?<=[\x63\x73]\xc5\x88).{8}", bytes(7) + b"\1", head, flags=re.DOTALL)
        head = re.sub(rb"(?<=\xbf\x84).{4}", bytes(4), head, flags=re.DOTALL)  # checksums; nobody checks them
        return head + cluster + audio
    return data


def _ogg_pages(data: bytes) -> Iterator[bytes]:
    start = 0
    while start < len(data):
        body = start + 27 + data[start + 26]
        end = body + sum(data[start + 27 : body])
        yield data[start:end]
        start = end


def _renumbered(page: bytes) -> bytes:
    page = page[:14] + b"\1\0\0\0" + page[18:22] + bytes(4) + page[26:]
    checksum = 0
    for byte in page:
        checksum = checksum << 8 & 0xFFFFFFFF ^ _OGG_CRC[checksum >> 24 ^ byte]
    return page[:22] + checksum.to_bytes(4, "little") + page[26:]


def _crc_of(byte: int) -> int:
    value = byte << 24
    for _ in range(8):
        value = value << 1 & 0xFFFFFFFF ^ (0x04C11DB7 if value >> 31 else 0)
    return value


_OGG_CRC = [_crc_of(byte) for byte in range(256)]
