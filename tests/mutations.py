"""Creates corrupt audio files, each identified by a seed and a number: valid files, and mutations of them.

A file is the same on every run, and on every machine that has the same encoders.
"""

import re
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from af3pipe.audio.headers import has_header
from tests.originals import FORMATS, Original, original

Random = np.random.Generator


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


def case(number: int, seed: int = 0) -> Case:
    """File `number` of the run with this seed. Formats change fastest, so that any slice has them all."""
    formats, kinds = list(FORMATS), list(KINDS)
    name = formats[number % len(formats)]
    kind = kinds[number // len(formats) % len(kinds)]
    rng = np.random.default_rng((seed, number))
    whole = _any_of(rng, name)
    content, extension = KINDS[kind](rng, whole)
    return Case(number, name, kind, extension, content, whole.seconds)


def _any_of(rng: Random, name: str | None = None) -> Original:
    return original(name or str(rng.choice(list(FORMATS))), int(rng.choice(4, p=(0.3, 0.32, 0.3, 0.08))))


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
    rb"RIFF|RF64|riff|fmt |fact|data|ds64|FORM|COMM|SSND|\.snd|caff|desc|pakt|kuki|fLaC|OggS|OpusHead|OpusTags|"
    rb"vorbis|ID3|Xing|Info|LAME|mvhd|tkhd|mdhd|hdlr|stsd|stts|stsc|stsz|stco|mp4a|alac|esds|elst|moov|mdat|"
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
    return lambda rng, whole: (change(rng, whole.content), whole.extension)


def _renamed(rng: Random, whole: Original) -> tuple[bytes, str]:
    # A bare format's name is believed of all that does not say what it is.
    forms = [form for form in FORMATS.values() if not form.raw or has_header(whole.content[:512])]
    extensions = sorted({form.extension for form in forms} - {whole.extension})
    return whole.content, str(rng.choice([*extensions, "txt", "WAV", "bin", ""]))


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
