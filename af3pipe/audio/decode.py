"""File to mono float32 blocks at the model's rate, streamed.

A chain of small generators: decoder -> length check -> requested range -> finite check -> resampler. The samples
equal `librosa.load(path, sr=sample_rate, mono=True)` within 1e-5 (tests/audio/test_decode.py).
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import BinaryIO, NamedTuple, TypeAlias

import av
import av.container
import numpy as np
import soundfile
import soxr

from af3pipe.audio.blocks import CODEC_FRAMES, Samples, StreamChanged, mono_blocks
from af3pipe.audio.headers import ogg_breaks_off
from af3pipe.audio.probe import Source, open_source, raise_out_of_memory
from af3pipe.schemas import MIX, AudioInfo, Reason, Rejected, Stage

# How much less than its header states a recording may hold. Encoders count their own delay and the padding of the
# last frame in or out: up to two AAC frames, or three of MP3 at 44.1 kHz, which is what 0.1 s covers; at low rates
# two HE-AAC frames take longer (CODEC_FRAMES; PCM and FLAC have neither). No share of the length: 1% of an hour would
# be 36 s of lost audio.
_SHORT_S = 0.1
# PCM and FLAC: a seek is sample-exact there (test_offset_is_exact). Everything else is read from the front.
_SEEKABLE = frozenset({"WAV", "WAVEX", "RF64", "W64", "AIFF", "AU", "CAF", "FLAC", "RAW"})
_SEEKABLE_CODECS = frozenset(
    {"flac", "pcm_s8", "pcm_u8", "pcm_16", "pcm_24", "pcm_32", "float", "double", "ulaw", "alaw"}
)


class Asked(NamedTuple):
    """What is to be decoded of a file; see `decode` for each."""

    sample_rate: int
    offset_s: float = 0.0
    duration_s: float | None = None
    extension: str = ""
    channel: str | int = MIX
    stream: int | None = None


OpenDecoding: TypeAlias = "Callable[[BinaryIO, Asked], AbstractContextManager[Decoding]]"
"""What opens a file for decoding: `open_decoding`, or `guard.DecoderPool.open`."""


def decode(
    file: BinaryIO,
    *,
    sample_rate: int,
    offset_s: float = 0.0,
    duration_s: float | None = None,
    extension: str = "",
    channel: str | int = MIX,
    stream: int | None = None,
) -> Iterator[Samples]:
    """Decodes a recording front to back, in bounded memory.

    Args:
        file: Seekable; left open. An exception of its own `read` is raised here, unchanged.
        sample_rate: Of the samples wanted, in Hz.
        offset_s: Where to begin, in seconds; rounded to the nearest frame as stored.
        duration_s: How much to take, in seconds; None takes all. What the file does not have is not missed.
        extension: Of the file's name; see `probe`.
        channel: `mix`, the mean over all; `left`, `right` (of two or more); or an index from 0.
        stream: See `probe`.

    Yields:
        float32 mono blocks of about 10 s, shape (n,); together ceil(frames * sample_rate / stored rate) samples.

    Raises:
        Rejected: As `probe`; no_audio_stream for a channel the audio does not have; decode_error (with the
            position), decode_short for a file that ends before the length its header states, too_short for an
            offset beyond the end.
    """
    asked = Asked(sample_rate, offset_s, duration_s, extension, channel, stream)
    with open_decoding(file, asked) as decoding:
        yield from decoding.blocks()


@contextmanager
def open_decoding(file: BinaryIO, asked: Asked) -> "Iterator[Decoding]":
    """Opens what `decode` decodes, in this process; `guard.DecoderPool.open` does the same in another one."""
    with open_source(file, extension=asked.extension, channel=asked.channel, stream=asked.stream) as source:
        yield _SourceDecoding(source, asked)


class Decoding:
    """One pass over one open recording, and how far it has come.

    Attributes:
        info: What the header says.
        stated_frames: See `probe.Source`.
        sample_rate: Of the samples given, in Hz.
        frames_read: Decoded so far, in frames as stored, counted from the start of the object.
        samples: Given so far, at `sample_rate`.
        ended: Whether the object's end was reached.
    """

    def __init__(self, info: AudioInfo, stated_frames: int | None, asked: Asked) -> None:
        if asked.offset_s < 0:
            raise ValueError(f"offset_s is {asked.offset_s}; it counts from the start of the object, so 0 or more")
        self.info = info
        self.stated_frames = stated_frames
        self.sample_rate = asked.sample_rate
        self.rate = info.sample_rate
        self.offset_s = asked.offset_s
        self.first_frame = round(asked.offset_s * self.rate)
        self.frames_wanted = None if asked.duration_s is None else max(round(asked.duration_s * self.rate), 0)
        self.frames_read = 0
        self.samples = 0
        self.ended = False

    def blocks(self) -> Iterator[Samples]:
        """The samples asked for, at the rate asked for; see `decode`.

        A block holds only until the next one is asked for: it may lie in memory shared with another process.
        """
        raise NotImplementedError

    @property
    def position_s(self) -> float:
        """End of what was decoded, in seconds from the start of the object."""
        return self.frames_read / self.rate

    @property
    def stated_samples(self) -> int | None:
        """Samples in the range asked for, by the header."""
        if self.stated_frames is None:
            return None
        frames = max(self.stated_frames - self.first_frame, 0)
        frames = frames if self.frames_wanted is None else min(frames, self.frames_wanted)
        return _resampled_length(frames, self.rate, self.sample_rate)

    def rejected(self, reason: Reason, detail: str) -> Rejected:
        """The error of this pass, with its decoder and position."""
        return Rejected(Stage.DECODE, reason, detail, decoder=self.info.decoder, position_s=self.position_s)


class _SourceDecoding(Decoding):
    """Decodes in this process."""

    def __init__(self, source: Source, asked: Asked) -> None:
        super().__init__(source.info, source.stated_frames, asked)
        self.source = source

    def blocks(self) -> Iterator[Samples]:
        for block in _resampled(self._finite(self._range()), self.rate, self.sample_rate):
            self.samples += len(block)
            yield block

    def _native(self) -> Iterator[Samples]:
        """Mono blocks at the stored rate, from `frames_read` on."""
        try:
            for block in mono_blocks(self.source):
                # First: what came back from a store that failed may look like the end, or like broken data.
                self.source.reader.raise_error()
                self.frames_read += len(block)
                yield block
        except (soundfile.LibsndfileError, av.FFmpegError, StreamChanged) as error:
            self.source.reader.raise_error()
            raise_out_of_memory(error)
            self._explain(error)
        self.source.reader.raise_error()
        self.ended = True
        if self._is_short():
            raise self._short()
        if self._is_cut_off():
            raise self._cut_off()

    def _explain(self, error: Exception) -> None:
        """Returns where an error is nothing but junk behind a complete recording."""
        if isinstance(self.source.handle, soundfile.SoundFile):
            # The block that failed holds good frames, too; libsndfile knows how many.
            self.frames_read = max(self.frames_read, int(self.source.handle.tell()))
        if self.stated_frames is not None and not self._is_short():
            return
        if self._nothing_follows():
            raise (self._cut_off() if self.stated_frames is None else self._short()) from error
        cause = getattr(error, "strerror", None) or str(error).removeprefix("Error : ").strip(" .") or repr(error)
        detail = f"The {self.source.info.codec} decoder failed after {self.position_s:.1f} s: {cause}."
        raise self.rejected(Reason.DECODE_ERROR, detail) from error

    def _nothing_follows(self) -> bool:
        """Whether a decoder that failed had come to the end of the file: what it missed is not there."""
        handle = self.source.handle
        if not isinstance(handle, av.container.InputContainer):
            return self.source.reader.at_end
        try:
            return not any(packet.size for packet in handle.demux(self.source.stream))
        except av.FFmpegError:
            return True

    def _is_short(self) -> bool:
        if self.stated_frames is None:
            return False
        padding = 0 if self.info.codec in _SEEKABLE_CODECS else CODEC_FRAMES
        return self.stated_frames - self.frames_read > max(_SHORT_S * self.rate, padding)

    def _short(self) -> Rejected:
        stated_s = (self.stated_frames or 0) / self.rate
        detail = f"The header states {stated_s:.1f} s, but the file ends after {self.position_s:.1f} s."
        return self.rejected(Reason.DECODE_SHORT, detail)

    def _is_cut_off(self) -> bool:
        """Ogg states no length: a file that is not whole ends like one that is, but for its last page."""
        handle = self.source.handle
        is_ogg = isinstance(handle, av.container.InputContainer) and handle.format.name == "ogg"
        return is_ogg and ogg_breaks_off(self.source.reader, self.source.reader.size_bytes)

    def _cut_off(self) -> Rejected:
        what = "page" if self._is_cut_off() else "frame"
        return self.rejected(
            Reason.DECODE_SHORT, f"The file breaks off after {self.position_s:.1f} s, in the middle of a {what}."
        )

    def _range(self) -> Iterator[Samples]:
        """Cuts the frames asked for out of what is decoded, and stops decoding behind them."""
        self._seek()
        end = None if self.frames_wanted is None else self.first_frame + self.frames_wanted
        if end is not None and end <= self.first_frame:
            return
        start = self.frames_read
        for block in self._native():
            wanted = block[max(self.first_frame - start, 0) : None if end is None else end - start]
            start += len(block)
            if len(wanted):
                yield wanted
            if end is not None and start >= end:
                return
        if self.first_frame and self.frames_read <= self.first_frame:
            detail = f"It was to begin at {self.offset_s:.3f} s, but the object lasts {self.position_s:.3f} s."
            raise self.rejected(Reason.TOO_SHORT, detail)

    def _seek(self) -> None:
        handle = self.source.handle
        if self.first_frame and isinstance(handle, soundfile.SoundFile) and _seeks_exactly(self.source):
            try:
                self.frames_read = int(handle.seek(min(self.first_frame, handle.frames)))
            except soundfile.LibsndfileError as error:
                self.source.reader.raise_error()
                raise_out_of_memory(error)
                detail = f"The {self.info.codec} decoder cannot go to {self.offset_s:.3f} s: {error.error_string}"
                raise self.rejected(Reason.DECODE_ERROR, detail) from error

    def _finite(self, blocks: Iterator[Samples]) -> Iterator[Samples]:
        position = self.first_frame
        for block in blocks:
            finite = np.isfinite(block)
            if not finite.all():
                broken = ~finite
                count = int(broken.sum())
                first_s = (position + int(broken.argmax())) / self.rate
                detail = (
                    f"{count} of {len(block)} samples decoded together are NaN or infinite, "
                    f"the first at {first_s:.3f} s."
                )
                raise self.rejected(Reason.DECODE_ERROR, detail)
            position += len(block)
            yield block


def _seeks_exactly(source: Source) -> bool:
    stored_as = getattr(source.handle, "format", None)
    return stored_as in _SEEKABLE and source.info.codec in _SEEKABLE_CODECS


def _resampled_length(frames: int, in_rate: int, out_rate: int) -> int:
    """Rounded up, as librosa does; in integers, so that the cap is never missed by a rounding error."""
    return -(-frames * out_rate // in_rate)


def _resampled(blocks: Iterator[Samples], in_rate: int, out_rate: int) -> Iterator[Samples]:
    if in_rate == out_rate:
        yield from blocks
        return
    stream = soxr.ResampleStream(in_rate, out_rate, 1, dtype="float32", quality="HQ")
    taken = given = 0
    for block in blocks:
        out = stream.resample_chunk(block)
        taken += len(block)
        given += len(out)
        if len(out):
            yield out
    tail = stream.resample_chunk(np.zeros(0, np.float32), last=True)
    # soxr rounds the length to the nearest sample, librosa up: it pads the one that may be missing with silence.
    missing = max(_resampled_length(taken, in_rate, out_rate) - given, 0)
    if missing:
        yield np.pad(tail[:missing], (0, missing - len(tail[:missing])))
