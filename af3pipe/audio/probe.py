"""Reads duration, sampling rate, channels and codec from the header, and chooses between the two decoders.

libsndfile reads what states its length in samples (WAV, FLAC, AIFF, AU, CAF, W64, ...). FFmpeg, through PyAV,
reads the rest, and MP3 and Ogg too: libsndfile gives the same samples there, but trusts a length that it
estimates. Of a variable-rate MP3 without a Xing header it returned 28%, and of MP3 or Ogg files joined end to end
only the first, both without an error (tests/audio/test_decode.py: test_nothing_is_lost_...). MP3 in WAV it decodes
wrongly when it is read block by block (tests/audio/test_formats.py: `wav mp3`), and of 568 telephone prompts stored
as bare samples it took 47 for MPEG audio. Of GSM in WAV it decodes the byte that pads the file as 40 ms of noise.
docs/formats.md says of each format which of the two reads it, and whether its length is known from the header.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import BinaryIO, NamedTuple, TypeVar

import av
import av.container
import soundfile

from af3pipe.audio.headers import (
    HEADERLESS,
    Headerless,
    audio_start,
    caf_frames,
    has_header,
    is_no_audio,
    xing_states_length,
)
from af3pipe.audio.reader import Reader
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
# Beyond these a header is broken: at 1 Hz a second of sound would pass for hours.
_LOWEST_RATE, _HIGHEST_RATE = 1000, 2_000_000
# The demuxers whose duration is stated or read off the last page. Of the others (raw AAC, AMR, MPEG streams, WMA)
# FFmpeg derives one from the bit rate, which is no ground to reject anything on.
_STATES_LENGTH = frozenset({"mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm", "ogg", "ape", "tta", "wv"})


_T = TypeVar("_T")


class Source(NamedTuple):
    """An open recording, before the first sample is read. Use it in one thread at a time.

    Attributes:
        info: What the header says.
        stated_frames: Length by the header, in frames at `info.sample_rate`; None if it states none, and for headers
            written before the length was known. Not limited to what the file contains.
        handle: The decoder.
        reader: The file below it.
        stream: The stream to decode; None if the decoder supports only one.
    """

    info: AudioInfo
    stated_frames: int | None
    handle: "soundfile.SoundFile | av.container.InputContainer"
    reader: Reader
    stream: av.AudioStream | None = None


def probe(file: BinaryIO, *, extension: str = "", stream: int | None = None) -> AudioInfo:
    """Reads what the header states, without decoding.

    Args:
        file: Seekable, read from its start; stays open, at any position.
        extension: Extension of the file's name, with or without the dot. Used only for content without a header
            (`.g722`, `.gsm`, `.ulaw`, `.alaw`, `.sln16`, ...): a WAV named `call.gsm` is a WAV.
        stream: Index among the audio streams; None for FFmpeg's best stream, as a player would choose.

    Raises:
        Rejected: empty_file, unsupported_format, or no_audio_stream; and the errors of `file`.
    """
    with open_source(file, extension=extension, stream=stream) as source:
        return source.info


@contextmanager
def open_source(file: BinaryIO, *, extension: str = "", stream: int | None = None) -> Iterator[Source]:
    """Opens `file` with the decoder that can read all of it; closing it leaves `file` open. Raises as `probe`."""
    reader = Reader(file)
    if reader.size_bytes == 0:
        raise Rejected(Stage.PROBE, Reason.EMPTY_FILE, "The object has 0 bytes.")
    source = _open(reader, extension.lower().removeprefix("."), stream)
    try:
        _check_rate(source.info)
        yield source
    finally:
        source.handle.close()


def _open(reader: Reader, extension: str, stream: int | None) -> Source:
    head = reader.read(512)
    reader.raise_error()
    stored = HEADERLESS.get(extension)
    if stored is not None and not has_header(head):
        return _open_headerless(reader, head, stored, extension, stream)
    begins = list(dict.fromkeys([audio_start(reader), (b"", 0)]))  # as it is, where nothing is known without its tag
    causes = []
    for begin in begins:
        reader.raise_error()
        reader.begin_at(*begin)
        for opener in _openers(reader):
            reader.seek(0)
            try:
                source = opener(reader, stream)
            except (soundfile.LibsndfileError, av.FFmpegError) as error:
                reader.raise_error()
                raise_out_of_memory(error)
                causes.append(_cause(error))
                continue
            reader.raise_error()
            if source is not None:
                return source
    detail = f"No decoder knows the format ({reader.size_bytes} bytes): {'; '.join(dict.fromkeys(causes))}."
    raise Rejected(Stage.PROBE, Reason.UNSUPPORTED_FORMAT, detail)


def raise_out_of_memory(error: Exception) -> None:
    """Raises MemoryError if a decoder's error means that, since it says nothing about the file."""
    if isinstance(error, MemoryError) or getattr(error, "code", None) == _LIBSNDFILE_MALLOC_FAILED:
        raise MemoryError(str(error)) from error


def _openers(reader: Reader) -> "tuple[Callable[[Reader, int | None], Source | None], ...]":
    reader.seek(0)
    head = reader.read(4)
    # MP3 and Ogg; why not libsndfile is in the module's docstring.
    ffmpeg_first = head[:3] == b"ID3" or head == b"OggS" or (head[:1] == b"\xff" and head[1:2] >= b"\xe0")
    return (_open_pyav, _open_soundfile) if ffmpeg_first else (_open_soundfile, _open_pyav)


def _open_headerless(reader: Reader, head: bytes, stored: Headerless, extension: str, stream: int | None) -> Source:
    frames = stored.count(reader.size_bytes)
    if is_no_audio(head) or not frames:
        what = "the content is text or another kind of file" if frames else "there is not one whole sample"
        detail = f"A .{extension} file is nothing but samples, but {what} ({reader.size_bytes} bytes)."
        raise Rejected(Stage.PROBE, Reason.UNSUPPORTED_FORMAT, detail)
    rate = stored.sample_rate
    reader.seek(0)
    if stored.decoder == "pyav":
        source = _open_pyav(reader, stream, format=stored.encoding)
        info = source.info._replace(duration_s=frames / rate)
        return source._replace(info=info, stated_frames=frames)
    _only_stream(stream, "RAW", "soundfile")
    raw = {"format": "RAW", "subtype": stored.encoding, "endian": "LITTLE"}
    handle = soundfile.SoundFile(reader, samplerate=rate, channels=1, **raw)
    info = AudioInfo(frames / rate, rate, 1, stored.encoding.lower(), "soundfile")
    return Source(info, frames, handle, reader)


def _only_stream(stream: int | None, container: str, decoder: str) -> None:
    if stream:
        detail = f"Audio stream {stream} was requested, but {container} has one, number 0; leave --stream out."
        raise Rejected(Stage.PROBE, Reason.NO_AUDIO_STREAM, detail, decoder=decoder)


def _check_rate(info: AudioInfo) -> None:
    if not _LOWEST_RATE <= info.sample_rate <= _HIGHEST_RATE:
        detail = (
            f"The header states {info.sample_rate:,} samples a second; "
            f"recordings have {_LOWEST_RATE:,} to {_HIGHEST_RATE:,}."
        )
        raise Rejected(Stage.PROBE, Reason.UNSUPPORTED_FORMAT, detail, decoder=info.decoder)


def _cause(error: Exception) -> str:
    if isinstance(error, soundfile.LibsndfileError):
        return f"libsndfile says {error.error_string.rstrip('.')!r}"
    return f"FFmpeg says {getattr(error, 'strerror', None) or str(error)!r}"


def _open_soundfile(reader: Reader, stream: int | None) -> Source | None:
    """Opens a file with libsndfile; None for files that it misreads, or whose end only FFmpeg finds."""
    handle = soundfile.SoundFile(reader)
    misread = handle.subtype.startswith("MPEG") or (handle.subtype == "GSM610" and handle.format in ("WAV", "W64"))
    if not 0 < handle.frames < _UNKNOWN_FRAMES or misread:
        handle.close()
        return None
    _only_stream(stream, handle.format, "soundfile")
    stated = _stated_by_libsndfile(handle)
    rate = handle.samplerate
    codec = "flac" if handle.format == "FLAC" else handle.subtype.lower()
    duration_s = None if stated is None else stated / rate
    return Source(AudioInfo(duration_s, rate, handle.channels, codec, "soundfile"), stated, handle, reader)


def _stated_by_libsndfile(handle: soundfile.SoundFile) -> int | None:
    """Returns the frames that the header states; the handle's `frames` is limited to the file's size.

    libsndfile's log contains both numbers: `data : 3528000 (should be 1763978)`.
    """
    found = _LIBSNDFILE_SIZE.search(handle.extra_info)
    if found is None:
        return int(handle.frames)
    stated, present = int(found[1]), int(found[2])
    if present <= 0 or any(stated in sizes for sizes in _STREAMED_SIZES):
        return None
    frames = int(handle.frames)
    return max(frames * stated // present, frames)


def _open_pyav(reader: Reader, stream: int | None, format: str | None = None) -> Source:
    handle = av.open(reader, mode="r", format=format, options=_NO_OTHER_FILES, metadata_errors="replace")
    try:
        chosen = _chosen_stream(handle, stream)
    except Rejected:
        handle.close()
        raise
    codec = chosen.codec_context
    if codec is None:
        detail = f"The {handle.format.name} container has audio of a codec that FFmpeg does not know."
        handle.close()
        raise Rejected(Stage.PROBE, Reason.UNSUPPORTED_FORMAT, detail, decoder="pyav")
    stated = _stated_by_ffmpeg(handle, chosen, reader)
    duration_s = None if stated is None else stated / codec.sample_rate
    info = AudioInfo(duration_s, codec.sample_rate, codec.channels, codec.codec.canonical_name, "pyav")
    return Source(info, stated, handle, reader, chosen)


def _chosen_stream(handle: av.container.InputContainer, stream: int | None) -> av.AudioStream:
    found = handle.streams.audio
    best = handle.streams.best("audio")
    if isinstance(best, av.AudioStream) and (stream is None or stream < len(found)):
        return best if stream is None else found[stream]
    kinds = ", ".join(sorted({other.type for other in handle.streams})) or "no"
    detail = f"The {handle.format.name} container has {kinds} streams, and no audio."
    if found:
        has = "one, number 0" if len(found) == 1 else f"{len(found)}, 0 to {len(found) - 1}"
        detail = f"Audio stream {stream} was requested, but the file has {has}; choose --stream among these."
    raise Rejected(Stage.PROBE, Reason.NO_AUDIO_STREAM, detail, decoder="pyav")


def _stated_by_ffmpeg(handle: av.container.InputContainer, stream: av.AudioStream, reader: Reader) -> int | None:
    """Returns the stated length in frames at the stream's rate."""
    name = handle.format.name
    if name == "caf":
        return _aside(reader, caf_frames)
    states = (
        name in _STATES_LENGTH
        or (name == "mp3" and _aside(reader, xing_states_length))
        # Coded, so its `fact` chunk counts the samples. PCM is here only where no size is stated, and was not to be.
        or (name == "wav" and not stream.codec_context.codec.canonical_name.startswith("pcm_"))
    )
    if not states:
        return None
    seconds = _stated_seconds(handle, stream)
    return None if seconds is None else round(seconds * stream.codec_context.sample_rate)


def _aside(reader: Reader, look: "Callable[[Reader, int], _T]") -> "_T":
    """Reads the file without changing the position that the decoder sees."""
    position = reader.tell()
    found = look(reader, reader.size_bytes)
    reader.seek(position)
    return found


def _stated_seconds(handle: av.container.InputContainer, stream: av.AudioStream) -> float | None:
    if stream.duration is not None and stream.time_base is not None:
        return float(stream.duration * stream.time_base)
    if "DURATION" in stream.metadata:  # Matroska and WebM: the track's own
        return _clock_s(stream.metadata["DURATION"])
    if handle.duration is None or len(handle.streams) > 1:  # a container's duration is its longest stream's
        return None
    return float(handle.duration / av.time_base)


def _clock_s(text: str) -> float | None:
    """Parses `00:00:05.008000000` to seconds."""
    match = re.fullmatch(r"(\d+):(\d+):(\d+(?:\.\d+)?)", text.strip("\0 "))
    return None if match is None else int(match[1]) * 3600 + int(match[2]) * 60 + float(match[3])
