"""Creates audio files in every supported format, short ones and a long one, with the same bytes every time."""

import re
from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

import numpy as np

from tests import fixtures_audio as make
from tests.audio import formats
from tests.audio.formats import Format

# Those of docs/formats.md, and what has crashed a decoder.
FORMATS: dict[str, Format] = {
    **formats.FORMATS,
    "ogg vorbis 7.1": Format(
        "Ogg Vorbis", "ogg", lambda samples, rate: make.ogg(np.repeat(samples[:, :1], 8, axis=1), rate)
    ),
    "flv": Format(
        "", "flv", lambda samples, rate: make.by_program(samples, rate, "flv"), ((44100, 2), (22050, 1)), "libmp3lame"
    ),
}
LENGTHS_S = (0.3, 1.1, 2.9, 31.0)
"""The last is longer than one window of 30 s: the harness sets the cap there."""


def missing_encoders() -> list[str]:
    """What the `ffmpeg` program here cannot encode; all that is needed, where there is none."""
    needed = {form.encoder for form in FORMATS.values()} - {""}
    return sorted(encoder for encoder in needed if not make.program_encodes(encoder))


class Original(NamedTuple):
    """A whole file."""

    format: str
    extension: str
    content: bytes
    seconds: float


@cache
def original(name: str, index: int) -> Original:
    """A whole file of a format, `LENGTHS_S[index]` long; short ones of several rates and channels."""
    form, seconds = FORMATS[name], LENGTHS_S[index]
    rate, channels = form.stored[index % len(form.stored) if index < len(LENGTHS_S) - 1 else 0]
    content = form.encode(make.sound(seconds, rate, channels, seed=index), rate)
    return Original(name, form.extension, without_chance(content), seconds)


# Ogg, WebM and Matroska give every file a number by chance, and floating-point WAV the time of day.


def without_chance(data: bytes) -> bytes:
    """The same file with the same bytes every time."""
    if data[:4] in (b"RIFF", b"FORM"):
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
