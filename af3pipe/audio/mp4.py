"""Reads the duration that an MP4 states, without the rest of its index.

FFmpeg reads the whole index to open a file: 0.65 MB for an hour of AAC, and the cover art in it. To find that a
recording is too long, the boxes with the duration suffice, and their positions follow from the boxes' sizes.
"""

import struct
from collections.abc import Iterator
from typing import NamedTuple, Protocol

_SMALL_INDEX = 512 << 10
_MOST_BOXES = 256
_MOST_TIMES_BYTES = 16 << 10


class _File(Protocol):
    def read(self, size: int = -1) -> bytes: ...

    def seek(self, offset: int, whence: int = 0) -> int: ...


class _Box(NamedTuple):
    kind: bytes
    start: int
    end: int


def stated_by_large_index(file: _File, size_bytes: int, stream: int | None) -> float | None:
    """Returns the duration of an MP4 with a large index, in seconds; None if FFmpeg may as well read it.

    Of several audio tracks it takes the shortest, unless `stream` is given, so that none is rejected wrongly.
    """
    file.seek(0)
    if file.read(8)[4:] != b"ftyp":
        return None
    index = _first(_boxes(file, 0, size_bytes), b"moov")
    if index is None or index.end - index.start < _SMALL_INDEX:
        return None
    parts = list(_boxes(file, index.start, index.end))
    movie = _first(iter(parts), b"mvhd")
    if movie is None or _first(iter(parts), b"mvex") is not None:  # fragments follow, which the index does not count
        return None
    movie_rate = _clock(file, movie)[0]
    tracks = [_track_s(file, part, movie_rate) for part in parts if part.kind == b"trak"]
    audio = [seconds for seconds in tracks if seconds is not None]
    if stream is not None:
        audio = audio[stream : stream + 1]
    shortest = min(audio, default=0.0)
    return shortest or None


def _boxes(file: _File, start: int, end: int) -> Iterator[_Box]:
    for _ in range(_MOST_BOXES):
        file.seek(start)
        head = file.read(16)
        size, kind, behind_head = int.from_bytes(head[:4], "big"), head[4:8], start + 8
        if size == 1:
            size, behind_head = int.from_bytes(head[8:], "big"), start + 16
        if size == 0:
            size = end - start
        if len(head) < 8 or start + size > end or start + size < behind_head:
            return
        yield _Box(kind, behind_head, start + size)
        start += size


def _first(boxes: Iterator[_Box], kind: bytes) -> _Box | None:
    return next((box for box in boxes if box.kind == kind), None)


def _track_s(file: _File, track: _Box, movie_rate: int) -> float | None:
    """Returns a track's duration; None for a track that is not audio, 0.0 for audio without a stated duration."""
    parts = list(_boxes(file, track.start, track.end))
    media = _first(iter(parts), b"mdia")
    if media is None:
        return None
    inside = list(_boxes(file, media.start, media.end))
    handler, header = _first(iter(inside), b"hdlr"), _first(iter(inside), b"mdhd")
    if handler is None or header is None:
        return None
    file.seek(handler.start)
    if file.read(12)[8:] != b"soun":
        return None
    rate, duration = _clock(file, header)
    # A header may lie; how long each frame lasts is what the decoder goes by.
    whole_s = min(duration, _listed_ticks(file, inside)) / rate if rate else 0.0
    edits = _first(iter(parts), b"edts")
    listed = _first(_boxes(file, edits.start, edits.end), b"elst") if edits else None
    return min(whole_s, _edited_s(file, listed, movie_rate)) if listed and movie_rate else whole_s


def _listed_ticks(file: _File, media: list[_Box]) -> int:
    """Returns the sum of all frames' durations in a track; 0 if finding it takes more than a few bytes."""
    information = _first(iter(media), b"minf")
    table = _first(_boxes(file, information.start, information.end), b"stbl") if information else None
    times = _first(_boxes(file, table.start, table.end), b"stts") if table else None
    if times is None or times.end - times.start > _MOST_TIMES_BYTES:
        return 0
    file.seek(times.start)
    data = file.read(times.end - times.start)[8:]
    numbers = struct.unpack(f">{len(data) // 8 * 2}I", data[: len(data) // 8 * 8])
    return sum(count * ticks for count, ticks in zip(numbers[::2], numbers[1::2], strict=True))


def _clock(file: _File, box: _Box) -> tuple[int, int]:
    """Returns ticks per second, and the duration in ticks, from `mvhd` and `mdhd`; 0 if it is not stated."""
    file.seek(box.start)
    data = file.read(32)
    at, width = (20, 8) if data[:1] == b"\x01" else (12, 4)
    duration = int.from_bytes(data[at + 4 : at + 4 + width], "big")
    return int.from_bytes(data[at : at + 4], "big"), 0 if duration == (1 << 8 * width) - 1 else duration


def _edited_s(file: _File, box: _Box, movie_rate: int) -> float:
    """Returns how much of a track is played (its edit list), in seconds."""
    file.seek(box.start)
    data = file.read(min(box.end - box.start, 4096))
    width = 8 if data[:1] == b"\x01" else 4
    entry = 2 * width + 4
    starts = range(8, len(data) - entry + 1, entry)
    return sum(int.from_bytes(data[at : at + width], "big") for at in starts) / movie_rate
