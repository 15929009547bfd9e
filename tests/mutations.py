"""Broken audio files, each known by a seed and a number: whole files by real encoders, and what may happen to them.

A file is the same on every run and machine that has the same encoders. Who adds a format to `tests/fixtures_audio.py`
adds its line to `FORMATS` here.
"""

import re
from collections.abc import Callable, Iterator
from functools import cache
from typing import NamedTuple

import numpy as np

from tests import fixtures_audio as make

Random = np.random.Generator
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


class Case(NamedTuple):
    """One file to be fuzzed with."""

    number: int
    format: str
    kind: str
    extension: str
    content: bytes
    original_s: float

    @property
    def name(self) -> str:
        """Its file name; some have no extension."""
        return f"{self.number:06}.{self.extension}".rstrip(".")


def _stored(container: str, subtype: str) -> Maker:
    return lambda samples, rate: make._by_libsndfile(samples, rate, container, subtype)


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


def case(number: int, seed: int = 0) -> Case:
    """File `number` of the run with this seed. Formats change fastest, so that any slice has them all."""
    formats, kinds = list(FORMATS), list(KINDS)
    name = formats[number % len(formats)]
    kind = kinds[number // len(formats) % len(kinds)]
    rng = np.random.default_rng((seed, number))
    original = _any_of(rng, name)
    content, extension = KINDS[kind](rng, original)
    return Case(number, name, kind, extension, content, original.seconds)


def _any_of(rng: Random, name: str | None = None) -> Original:
    found = originals(name or str(rng.choice(list(FORMATS))))
    return found[int(rng.choice(len(found), p=(0.3, 0.32, 0.3, 0.08)))]


# What may happen to a file. Each takes the bytes and gives others.


def _unchanged(rng: Random, data: bytes) -> bytes:
    return data


def _flip_bits(rng: Random, data: bytes) -> bytes:
    changed = bytearray(data)
    reach = min(len(data), 512) if rng.random() < 0.5 else len(data)  # half of them hit the header
    for at in rng.integers(0, reach, rng.integers(1, 33)):
        changed[at] ^= 1 << int(rng.integers(8))
    return bytes(changed)


def _noise(rng: Random, data: bytes) -> bytes:
    start, end = _span(rng, data)
    return data[:start] + rng.bytes(end - start) + data[end:]


def _zeros(rng: Random, data: bytes) -> bytes:
    start, end = _span(rng, data)
    return data[:start] + bytes(end - start) + data[end:]


def _cut_tail(rng: Random, data: bytes) -> bytes:
    return data[: int(rng.integers(1, len(data)))]


def _cut_head(rng: Random, data: bytes) -> bytes:
    return data[int(rng.integers(1, len(data))) :]


def _remove(rng: Random, data: bytes) -> bytes:
    start, end = _span(rng, data)
    return data[:start] + data[end:]


def _repeat(rng: Random, data: bytes) -> bytes:
    start, end = _span(rng, data)
    return data[:end] + data[start:end] * int(rng.integers(1, 5)) + data[end:]


def _insert(rng: Random, data: bytes) -> bytes:
    at = int(rng.integers(len(data)))
    return data[:at] + rng.bytes(int(rng.integers(1, 2000))) + data[at:]


def _splice(rng: Random, data: bytes) -> bytes:
    """The front of one file and the back of another, of any format."""
    other = _any_of(rng).content
    return _cut_tail(rng, data) + _cut_head(rng, other)


def _join(rng: Random, data: bytes) -> bytes:
    """Two whole files."""
    return data + _any_of(rng).content


def _foreign_head(rng: Random, data: bytes) -> bytes:
    """What the first bytes promise is not what follows."""
    length = int(rng.integers(4, 65))
    return _any_of(rng).content[:length] + data[length:]


_LANDMARKS = re.compile(
    rb"RIFF|RF64|riff|fmt |fact|data|ds64|FORM|COMM|SSND|\.snd|caff|desc|pakt|kuki|fLaC|OggS|OpusHead|OpusTags|vorbis|"
    rb"ID3|Xing|Info|LAME|mvhd|tkhd|mdhd|hdlr|stsd|stts|stsc|stsz|stco|mp4a|alac|esds|elst|moov|mdat|"
    rb"\x1a\x45\xdf\xa3|\x18\x53\x80\x67|\x16\x54\xae\x6b|\x1f\x43\xb6\x75|\xb5|\x9f|\xae|"  # Matroska's elements
    rb"strh|strf|movi|idx1|FLV|TTA1|wvpk|#!AMR"
)
_HEADER_BYTES = 48


def _edit_header(rng: Random, data: bytes) -> bytes:
    """Sizes, rates, channels and block sizes of 0, -1, 1, or beyond all measure, behind what marks a header."""
    changed = bytearray(data)
    marks = [0, *(found.end() for found in _LANDMARKS.finditer(data[:8192]))]
    for _ in range(int(rng.integers(1, 4))):
        at = int(rng.choice(marks)) + int(rng.integers(_HEADER_BYTES))
        width = int(rng.choice((1, 2, 4, 8)))
        if at + width <= len(changed):
            changed[at : at + width] = _extreme(rng, width, int.from_bytes(data[at : at + width], "little"))
    return bytes(changed)


def _extreme(rng: Random, width: int, now: int) -> bytes:
    most = (1 << 8 * width) - 1
    values = (0, 1, most, most >> 1, (most >> 1) + 1, most - 1, now * 2, now // 2, now + 1, now - 1)
    value = values[int(rng.integers(len(values)))] & most
    return value.to_bytes(width, "little" if rng.random() < 0.5 else "big")


def _several(rng: Random, data: bytes) -> bytes:
    for _ in range(int(rng.integers(2, 5))):
        data = _CHANGES[int(rng.integers(len(_CHANGES)))](rng, data or b"\0")
    return data


def _empty(rng: Random, data: bytes) -> bytes:
    return b""


def _random(rng: Random, data: bytes) -> bytes:
    """Noise, half of it behind a true beginning."""
    head = data[: int(rng.integers(4, 200))] if rng.random() < 0.5 else b""
    return head + rng.bytes(int(rng.integers(1, 60_000)))


_TEXTS = (
    "Dear diary, today I am a recording.\n",
    '{"uri": "a.wav", "duration": 3}\n',
    "#EXTM3U\n#EXTINF:10,\nhttp://127.0.0.1:9/a.ts\n#EXT-X-ENDLIST\n",
    "ffconcat version 1.0\nfile /etc/hostname\n",
    "[playlist]\nFile1=a.wav\n",
    "<?xml version='1.0'?><MPD xmlns='urn:mpeg:dash:schema:mpd:2011'><Period/></MPD>\n",
    "1\n00:00:00,000 --> 00:00:02,000\nSpoken words.\n",
    "<!DOCTYPE html><html><body>403 Forbidden</body></html>\n",
    "\ufeffGrüße aus Köln\n",
)


def _text(rng: Random, data: bytes) -> bytes:
    return str(rng.choice(_TEXTS)).encode() * int(rng.integers(1, 50))


def _span(rng: Random, data: bytes) -> tuple[int, int]:
    """Part of a file: a few bytes as often as most of it."""
    start = int(rng.integers(len(data)))
    length = int(2 ** rng.uniform(0, np.log2(len(data) + 1)))
    return start, min(start + length, len(data))


_CHANGES = (_flip_bits, _noise, _zeros, _cut_tail, _cut_head, _remove, _repeat, _insert, _splice, _edit_header)


def _keeps_name(change: Callable[[Random, bytes], bytes]) -> Callable[[Random, Original], tuple[bytes, str]]:
    return lambda rng, original: (change(rng, original.content), original.extension)


def _renamed(rng: Random, original: Original) -> tuple[bytes, str]:
    extensions = sorted({form.extension for form in FORMATS.values()} - {original.extension})
    return original.content, str(rng.choice([*extensions, "txt", "WAV", "bin", ""]))


KINDS: dict[str, Callable[[Random, Original], tuple[bytes, str]]] = {
    "unchanged": _keeps_name(_unchanged),
    "header edited": _keeps_name(_edit_header),
    "bits flipped": _keeps_name(_flip_bits),
    "noise": _keeps_name(_noise),
    "tail cut": _keeps_name(_cut_tail),
    "head cut": _keeps_name(_cut_head),
    "spliced": _keeps_name(_splice),
    "joined": _keeps_name(_join),
    "foreign head": _keeps_name(_foreign_head),
    "zeroed": _keeps_name(_zeros),
    "repeated": _keeps_name(_repeat),
    "removed": _keeps_name(_remove),
    "inserted": _keeps_name(_insert),
    "several": _keeps_name(_several),
    "renamed": _renamed,
    "random": _keeps_name(_random),
    "text": _keeps_name(_text),
    "empty": _keeps_name(_empty),
}


# Ogg, WebM and Matroska give every file a number by chance; without it, the same file is the same bytes.


def without_chance(data: bytes) -> bytes:
    """The file with fixed serial numbers."""
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
