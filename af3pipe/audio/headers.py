"""Reads headers before a decoder does: finds tags to skip, stated lengths, and files without a header."""

import codecs
import re
from typing import NamedTuple, Protocol

_CHUNK = 64 << 10
# Of tags, blocks or chunks one after another: more than anybody writes, and an end to a file made of nothing else.
_MOST = 256
_OGG_PAGE_BYTES = 65_307  # the most that one takes, by RFC 3533
# Content that says what it is, whatever the file's name says.
_MAGIC = (
    *(b"RIFF", b"RIFX", b"RF64", b"BW64", b"riff", b"FORM", b"fLaC", b"OggS", b"ID3", b"caff", b".snd", b"#!AMR"),
    *(b"\x1aE\xdf\xa3", b"MAC ", b"wvpk", b"FLV", b"Crea", b"TTA1", b"NIST", b"\x30\x26\xb2\x75"),
)
_NO_AUDIO_MAGIC = (b"PK\x03\x04", b"\x1f\x8b\x08", b"%PDF", b"\x89PNG", b"\xff\xd8\xff\xe0")


class _File(Protocol):
    def read(self, size: int = -1) -> bytes: ...

    def seek(self, offset: int, whence: int = 0) -> int: ...


class Headerless(NamedTuple):
    """The format of files without a header: one channel, at a constant number of bytes per sample.

    Attributes:
        decoder: `soundfile` or `pyav`.
        encoding: The decoder's name of the encoding.
        sample_rate: Sampling rate in Hz.
        frames: Samples in a unit of `unit_bytes`.
        unit_bytes: Size of the smallest unit that can be decoded.
    """

    decoder: str
    encoding: str
    sample_rate: int
    frames: int = 1
    unit_bytes: int = 1

    def count(self, size_bytes: int) -> int:
        """Returns the samples in a file of this size."""
        return size_bytes // self.unit_bytes * self.frames


def _linear(sample_rate: int) -> Headerless:
    return Headerless("soundfile", "PCM_16", sample_rate, 1, 2)


HEADERLESS = {
    "g722": Headerless("pyav", "g722", 16_000, 2, 1),
    "gsm": Headerless("pyav", "gsm", 8_000, 160, 33),
    **dict.fromkeys(("ulaw", "ul", "ulw", "mulaw"), Headerless("soundfile", "ULAW", 8_000)),
    **dict.fromkeys(("alaw", "al", "alw"), Headerless("soundfile", "ALAW", 8_000)),
    **dict.fromkeys(("sln", "sln8"), _linear(8_000)),
    **{f"sln{khz}": _linear(khz * 1000) for khz in (12, 16, 24, 32, 48, 96, 192)},
    "sln44": _linear(44_100),
}
"""Formats of telephone exchanges by extension, which is the only way to recognise them."""


def has_header(head: bytes) -> bool:
    """Returns whether the first bytes are those of a container that identifies its format."""
    return head.startswith(_MAGIC) or head[4:8] == b"ftyp"


def is_no_audio(head: bytes) -> bool:
    """Returns whether the start of a supposedly headerless file is actually text, an archive or a picture.

    Any bytes decode to noise as mu-law or G.722, and a model would describe it: an error page saved as `call.ulaw`
    must be recognised here.
    """
    if head.startswith(_NO_AUDIO_MAGIC):
        return True
    try:
        text = codecs.getincrementaldecoder("utf-8")().decode(head)  # the last character may be cut
    except UnicodeDecodeError:
        return False
    # Quiet A-law is letters, too, from 0x40 to 0x5F; a space is a loud sample there.
    return bool(re.search(r"[ \n<]", text)) and all(char.isprintable() or char.isspace() for char in text)


def audio_start(file: _File) -> tuple[bytes, int]:
    """Returns a replacement for a file's beginning without its cover art, so that a probe does not download that.

    FFmpeg reads the pictures of an ID3 tag, and libFLAC those of a FLAC file, instead of seeking past them.

    Returns:
        Bytes to begin with, and the offset in the file of what follows them.
    """
    start = _behind_id3(file)
    file.seek(start)
    head = file.read(42)
    if head[:4] != b"fLaC" or head[4] & 0x7F or len(head) < 42:
        return b"", start
    frames = _behind_flac_blocks(file, start + 4)
    if frames is None or frames - start < _CHUNK:
        return b"", start
    return head[:4] + bytes([0x80]) + head[5:], frames  # STREAMINFO alone, marked as the last block


def _behind_id3(file: _File) -> int:
    start = 0
    for _ in range(_MOST):
        file.seek(start)
        tag = file.read(10)
        if len(tag) < 10 or tag[:3] != b"ID3" or tag[3] > 4 or max(tag[6:]) > 0x7F:
            return start
        size = tag[6] << 21 | tag[7] << 14 | tag[8] << 7 | tag[9]
        start += 10 + size + (10 if tag[5] & 0x10 else 0)  # a footer repeats the header
    return start


def _behind_flac_blocks(file: _File, position: int) -> int | None:
    for _ in range(_MOST):
        file.seek(position)
        block = file.read(4)
        if len(block) < 4:
            return None
        position += 4 + int.from_bytes(block[1:], "big")
        if block[0] & 0x80:
            return position
    return None


def xing_states_length(file: _File, size_bytes: int) -> bool:
    """Returns whether an MP3 states its length, for all of the file.

    Without a Xing, Info or VBRI header decoders guess the length from the first frame's bit rate. With one, the
    length is wrong for concatenated files, which are longer than the header's count of bytes.

    Args:
        file: File at the first frame; tags before it are not skipped.
        size_bytes: Size from there on.
    """
    file.seek(0)
    head = file.read(4096)
    found = re.search(rb"(?:Xing|Info)(.{4})(.{4})(.{4})|VBRI.{6}(.{4})", head, re.DOTALL)
    if found is None:
        return False
    if found[4] is not None:
        stated = int.from_bytes(found[4], "big")
    elif found[1][3] & 3 == 3:  # the count of frames is there, and the count of bytes behind it
        stated = int.from_bytes(found[3], "big")
    else:
        return bool(found[1][3] & 1)
    # Tags behind the music are no second recording: FFmpeg's own margin is a sixteenth, too.
    return size_bytes <= stated + (stated >> 4) + 1024


def caf_frames(file: _File, size_bytes: int) -> int | None:
    """Returns the frames of a CAF file of packets (ALAC, AAC), without the final padding that FFmpeg includes."""
    position = 8
    for _ in range(_MOST):
        if position + 12 > size_bytes:
            break
        file.seek(position)
        header = file.read(20 + 8)
        length = int.from_bytes(header[4:12], "big", signed=True)
        if header[:4] == b"pakt":
            frames = int.from_bytes(header[20:28], "big", signed=True)
            return frames if frames > 0 else None
        if length < 0:  # data up to the end of the file
            return None
        position += 12 + length
    return None


def ogg_breaks_off(file: _File, size_bytes: int) -> bool:
    """Returns whether the last page of an Ogg file is incomplete."""
    start = max(size_bytes - _OGG_PAGE_BYTES, 0)
    file.seek(start)
    tail = file.read(size_bytes - start)
    page = tail.rfind(b"OggS\0")
    if page < 0:
        return False
    header = tail[page : page + 27]
    lacing = tail[page + 27 : page + 27 + header[26]] if len(header) == 27 else b""
    return len(header) < 27 or len(lacing) < header[26] or page + 27 + len(lacing) + sum(lacing) > len(tail)
