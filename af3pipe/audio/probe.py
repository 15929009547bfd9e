"""Header to duration, rate, channels and codec; and the door to the two decoders.

libsndfile reads what states its length in samples (WAV, FLAC, AIFF, AU, CAF, W64, ...). FFmpeg, through PyAV,
reads the rest, and MP3 and Ogg too: libsndfile gives the same samples there, but trusts a length that it
estimates. Of a variable-rate MP3 without a Xing header it returned 28%, and of MP3 or Ogg files joined end to end
only the first, both without an error (tests/audio/test_decode.py: test_nothing_is_lost_...).
"""

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO, NamedTuple

import av
import av.container
import soundfile

from af3pipe.schemas import AudioInfo, Reason, Rejected, Stage

# Content may be a playlist or a concat script, which FFmpeg would follow to other files and to the network.
# No protocol has this name, so nothing but the file object itself is ever opened.
_NO_OTHER_FILES = {"protocol_whitelist": "none"}

# Sizes that writers put where they cannot seek back to state one: sox and arecord close to 2^31, FFmpeg 2^32 - 1.
_STREAMED_SIZES = (range(0x7FFF0000, 0x80000001), range(0xFFFF0000, 1 << 32))

_LIBSNDFILE_SIZE = re.compile(
    r"^\s*(?:data|SSND|Data Size|riff|Riff size) *: (\d+) \(should be (\d+)\)", re.MULTILINE
)
_LIBSNDFILE_MALLOC_FAILED = 17  # SFE_MALLOC_FAILED
_UNKNOWN_FRAMES = 1 << 62
# The demuxers whose duration is stated or read off the last page. Of the others (raw AAC, AMR, MPEG streams, WMA)
# FFmpeg derives one from the bit rate, which is no ground to reject anything on.
_STATES_LENGTH = frozenset({"mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm", "ogg", "ape", "tta", "wv"})


class Reader:
    """The file as the decoders see it: it remembers the first exception instead of raising it.

    libsndfile calls `read` through cffi, which prints an exception and takes it for the end of the file: a store
    that fails would look like a short recording. So the error is kept, and raised again by `raise_error`.

    Attributes:
        size_bytes: Of the whole file.
        at_end: Whether a decoder has asked for bytes beyond the end.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._position = 0
        self._error: BaseException | None = None
        self.at_end = False
        self.size_bytes = file.seek(0, io.SEEK_END)

    def read(self, size: int = -1) -> bytes:
        """Returns `size` bytes, fewer only at the end of the file or once it has failed."""
        if self._error is not None:
            return b""
        missing = size if size >= 0 else max(self.size_bytes - self._position, 0)
        parts: list[bytes] = []
        try:
            if missing and self._file.tell() != self._position:
                self._file.seek(self._position)
            while missing and (part := self._file.read(missing)):
                parts.append(part)
                missing -= len(part)
        except BaseException as error:  # noqa: BLE001  (raised again by raise_error, on this side of the decoder)
            self._error = error
            return b""
        self.at_end = self.at_end or missing > 0
        data = b"".join(parts)
        self._position += len(data)
        return data

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Moves to a position in bytes, as `io.IOBase.seek` does; the file itself moves with the next read."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self.size_bytes}[whence]
        self._position = max(base + offset, 0)
        return self._position

    def tell(self) -> int:
        """The position in bytes."""
        return self._position

    def raise_error(self) -> None:
        """Raises what the file raised, if it did."""
        if self._error is not None:
            raise self._error


class Source(NamedTuple):
    """An open recording, before the first sample is read. Belongs to one thread at a time.

    Attributes:
        info: What the header says.
        stated_frames: Length in frames at `info.sample_rate` that the header states; None where it does not, and
            for headers written before the length was known. Not clamped to what is there.
        handle: The decoder.
        reader: The file below it.
    """

    info: AudioInfo
    stated_frames: int | None
    handle: "soundfile.SoundFile | av.container.InputContainer"
    reader: Reader


def probe(file: BinaryIO) -> AudioInfo:
    """Reads what the header states; decodes nothing.

    Args:
        file: Seekable, from its start; left open, at any position.

    Raises:
        Rejected: empty_file, unsupported_format, or no_audio_stream; and what `file` itself raises.
    """
    with open_source(file) as source:
        return source.info


@contextmanager
def open_source(file: BinaryIO) -> Iterator[Source]:
    """Opens `file` with the decoder that reads it whole; closes the decoder, not the file. Raises as `probe` does."""
    reader = Reader(file)
    if reader.size_bytes == 0:
        raise Rejected(Stage.PROBE, Reason.EMPTY_FILE, "The object has 0 bytes.")
    source = _open(reader)
    try:
        yield source
    finally:
        source.handle.close()


def _open(reader: Reader) -> Source:
    head = reader.read(4)
    reader.raise_error()
    # MP3 and Ogg; why not libsndfile is in the module's docstring.
    ffmpeg_first = head[:3] == b"ID3" or head == b"OggS" or (head[0] == 0xFF and head[1:2] >= b"\xe0")
    causes = []
    for opener in (_open_pyav, _open_soundfile) if ffmpeg_first else (_open_soundfile, _open_pyav):
        reader.seek(0)
        try:
            source = opener(reader)
        except (soundfile.LibsndfileError, av.FFmpegError) as error:
            reader.raise_error()
            raise_out_of_memory(error)
            causes.append(_cause(error))
            continue
        reader.raise_error()
        if source is not None:
            return source
    detail = f"No decoder knows the format ({reader.size_bytes} bytes): {'; '.join(causes)}."
    raise Rejected(Stage.PROBE, Reason.UNSUPPORTED_FORMAT, detail)


def raise_out_of_memory(error: Exception) -> None:
    """Raises MemoryError where that is what a decoder's error means: it says nothing about the file."""
    if isinstance(error, MemoryError) or getattr(error, "code", None) == _LIBSNDFILE_MALLOC_FAILED:
        raise MemoryError(str(error)) from error


def _cause(error: Exception) -> str:
    if isinstance(error, soundfile.LibsndfileError):
        return f"libsndfile says {error.error_string.rstrip('.')!r}"
    return f"FFmpeg says {getattr(error, 'strerror', None) or str(error)!r}"


def _open_soundfile(reader: Reader) -> Source | None:
    """None for a file whose end libsndfile cannot tell: FFmpeg reads on while there is something."""
    handle = soundfile.SoundFile(reader)
    if not 0 < handle.frames < _UNKNOWN_FRAMES:
        handle.close()
        return None
    stated = _stated_by_libsndfile(handle)
    rate = handle.samplerate
    codec = "flac" if handle.format == "FLAC" else handle.subtype.lower()
    duration_s = None if stated is None else stated / rate
    return Source(AudioInfo(duration_s, rate, handle.channels, codec, "soundfile"), stated, handle, reader)


def _stated_by_libsndfile(handle: soundfile.SoundFile) -> int | None:
    """What the header says, where `frames` is already clamped to the file's size.

    libsndfile's log has both numbers: `data : 3528000 (should be 1763978)`.
    """
    found = _LIBSNDFILE_SIZE.search(handle.extra_info)
    if found is None:
        return int(handle.frames)
    stated, present = int(found[1]), int(found[2])
    if present <= 0 or any(stated in sizes for sizes in _STREAMED_SIZES):
        return None
    frames = int(handle.frames)
    return max(frames * stated // present, frames)


def _open_pyav(reader: Reader) -> Source:
    handle = av.open(reader, mode="r", options=_NO_OTHER_FILES, metadata_errors="replace")
    stream = handle.streams.best("audio")
    if not isinstance(stream, av.AudioStream):
        kinds = ", ".join(sorted({other.type for other in handle.streams})) or "no"
        handle.close()
        detail = f"The {handle.format.name} container holds {kinds} streams, and no audio."
        raise Rejected(Stage.PROBE, Reason.NO_AUDIO_STREAM, detail, decoder="pyav")
    duration_s = _stated_by_ffmpeg(handle, stream, reader)
    codec = stream.codec_context
    info = AudioInfo(duration_s, codec.sample_rate, codec.channels, codec.codec.canonical_name, "pyav")
    stated = None if duration_s is None else round(duration_s * codec.sample_rate)
    return Source(info, stated, handle, reader)


def _stated_by_ffmpeg(handle: av.container.InputContainer, stream: av.AudioStream, reader: Reader) -> float | None:
    name = handle.format.name
    if name not in _STATES_LENGTH and not (name == "mp3" and _xing_covers_file(reader)):
        return None
    if stream.duration is not None and stream.time_base is not None:
        return float(stream.duration * stream.time_base)
    if "DURATION" in stream.metadata:  # Matroska and WebM: the track's own
        return _clock_s(stream.metadata["DURATION"])
    if handle.duration is None or len(handle.streams) > 1:  # a container's duration is its longest stream's
        return None
    return float(handle.duration / av.time_base)


def _clock_s(text: str) -> float | None:
    """Seconds of `00:00:05.008000000`."""
    match = re.fullmatch(r"(\d+):(\d+):(\d+(?:\.\d+)?)", text.strip("\0 "))
    return None if match is None else int(match[1]) * 3600 + int(match[2]) * 60 + float(match[3])


def _xing_covers_file(reader: Reader) -> bool:
    """Whether an MP3 states its own length, and states it for all of the file.

    Without the Xing, Info or VBRI header the length is guessed from the first frame's bit rate. With it, the length
    is wrong for files joined end to end, which are longer than the header's count of bytes.
    """
    position = reader.tell()
    reader.seek(0)
    tag = reader.read(10)
    start = 0
    if tag[:3] == b"ID3":
        start = 10 + (tag[6] << 21 | tag[7] << 14 | tag[8] << 7 | tag[9])
    reader.seek(start)
    head = reader.read(4096)
    reader.seek(position)
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
    return reader.size_bytes - start <= stated + (stated >> 4) + 1024
