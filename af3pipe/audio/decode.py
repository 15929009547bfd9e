"""Decodes any number of parts of a file, in one pass, to mono float32 blocks at the model's sampling rate.

The decoder gives blocks of the requested channels at the stored rate. Each part takes its range out of them, checks
that it is finite, and resamples it from its own first frame on. So the samples of a part equal
`librosa.load(path, sr=sample_rate, mono=True, offset=..., duration=...)` within 1e-5, whatever else is decoded in the
same pass (tests/audio/test_decode.py, tests/audio/test_parts.py).
"""

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import BinaryIO

import av
import av.container
import numpy as np
import soundfile
import soxr

from af3pipe.audio.blocks import CODEC_FRAMES, Channels, StreamChanged, channel_blocks
from af3pipe.audio.decoding import Asked, Decoding, Part, Piece, Samples, channel_index, resampled_length
from af3pipe.audio.headers import ogg_breaks_off
from af3pipe.audio.probe import Source, open_source, raise_out_of_memory
from af3pipe.schemas import MIX, Reason, Rejected

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
# Between two parts. Less is decoded in some 50 ms, about what a store takes to answer one request; a seek in FLAC is
# several.
_WORTH_A_SEEK_S = 30.0
_NOTHING = np.zeros(0, np.float32)


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
    """Decodes a recording, or one part of it, from front to back, in bounded memory.

    Args:
        file: Seekable; stays open. An exception of its `read` is raised here, unchanged.
        sample_rate: Sampling rate of the output, in Hz.
        offset_s: See `decoding.Part`, as for `duration_s` and `channel`.
        duration_s: Length in seconds; None for all.
        extension: Extension of the file's name; see `probe`.
        channel: `mix`, `left`, `right`, or an index from 0.
        stream: See `probe`.

    Yields:
        float32 mono blocks of about 10 s, shape (n,); together ceil(frames * sample_rate / stored rate) samples.

    Raises:
        Rejected: As `probe`; no_audio_stream for a channel the audio does not have; decode_error (with the
            position), decode_short for a file that ends before the length its header states, too_short for an
            offset beyond the end.
    """
    with open_decoding(file, Asked(sample_rate, extension, stream)) as decoding:
        yield from decoding.blocks(Part(offset_s, duration_s, channel))


@contextmanager
def open_decoding(file: BinaryIO, asked: Asked) -> Iterator[Decoding]:
    """Opens a file for decoding in this process; `guard.DecoderPool.open` does the same in another one."""
    with open_source(file, extension=asked.extension, stream=asked.stream) as source:
        yield _SourceDecoding(source, asked.sample_rate)


class _Track:
    """A part during a pass: takes its range out of the blocks, and resamples it.

    Attributes:
        first: Its first frame, in frames as stored; `end` is the one after its last, or None.
        taken: Number of frames given to the resampler.
        is_done: Whether all of it was yielded.
    """

    def __init__(self, index: int, part: Part, decoding: Decoding) -> None:
        if part.offset_s < 0:
            raise ValueError(f"offset_s is {part.offset_s}; it counts from the start of the object, so 0 or more")
        self.index = index
        self.first, self.end = part.frames(decoding.rate)
        self.channel = channel_index(part.channel, decoding.info)
        self.offset_s = part.offset_s
        self.taken = 0
        self.is_done = False
        self._most = part.most_samples
        self._given = 0
        self._decoding = decoding
        self._resampler: soxr.ResampleStream | None = None

    def take(self, block: Samples, start: int, *, is_finite: bool) -> Iterator[Piece]:
        """Returns this part's samples from a block of its channel.

        Args:
            block: Shape (n,), at the stored rate.
            start: Index of its first sample, in frames from the start of the object.
            is_finite: Whether the whole block is known to be finite.
        """
        behind = start + len(block)
        wanted = block[max(self.first - start, 0) : None if self.end is None else self.end - start]
        if not is_finite and not (finite := np.isfinite(wanted)).all():
            good = int(finite.argmin())
            first_s = (max(self.first, start) + good) / self._decoding.rate
            yield Piece(self.index, self._resampled(wanted[:good]))
            detail = f"The sample at {first_s:.3f} s is NaN or infinite."
            yield self.rejected(self._decoding.rejected(Reason.DECODE_ERROR, detail, first_s))
            return
        is_last = self.end is not None and behind >= self.end
        samples = self._resampled(wanted, is_last=is_last)
        self.is_done = is_last or (self._most is not None and self._given >= self._most)
        if self.is_done:
            self._resampler = None  # others of the same block may need the memory
        yield Piece(self.index, samples, self.is_done)

    def finish(self) -> Piece:
        """Returns the remaining samples at the end of the object."""
        self.is_done = True
        return Piece(self.index, self._resampled(_NOTHING, is_last=True), is_end=True)

    def rejected(self, rejected: Rejected) -> Piece:
        """Ends this part with a failure that may concern other parts, too."""
        self.is_done = True
        self._resampler = None
        again = Rejected(
            rejected.stage,
            rejected.reason,
            rejected.detail,
            decoder=rejected.decoder,
            position_s=rejected.position_s,
        )
        again.__cause__ = rejected.__cause__
        return Piece(self.index, _NOTHING, is_end=True, rejected=again)

    def _resampled(self, block: Samples, *, is_last: bool = False) -> Samples:
        in_rate, out_rate = self._decoding.rate, self._decoding.sample_rate
        self.taken += len(block)
        if in_rate == out_rate or not self.taken:
            samples = block
        else:
            if self._resampler is None:  # now, and not for each of a thousand parts that wait
                self._resampler = soxr.ResampleStream(in_rate, out_rate, 1, dtype="float32", quality="HQ")
            # A second at a time: it keeps buffers for the longest block it ever got, 2 MB for 10 s.
            starts = range(0, max(len(block), 1), in_rate)
            samples = np.concatenate(
                [
                    self._resampler.resample_chunk(
                        block[start : start + in_rate], last=is_last and start == starts[-1]
                    )
                    for start in starts
                ]
            )
            if is_last:
                # soxr rounds the length to the nearest sample, librosa up: it pads the one that may be missing with
                # silence.
                missing = max(resampled_length(self.taken, in_rate, out_rate) - self._given, 0)
                samples = np.pad(samples[:missing], (0, max(missing - len(samples), 0)))
        self._given += len(samples)
        return samples


class _SourceDecoding(Decoding):
    """A decoding in this process."""

    def __init__(self, source: Source, sample_rate: int) -> None:
        super().__init__(source.info, source.stated_frames, sample_rate)
        self.source = source
        self._failure: Rejected | None = None
        self._broke_off = False  # by an error, though it may be one behind all of the sound

    def pieces(self, parts: Sequence[Part]) -> Iterator[Piece | None]:
        tracks = [_Track(index, part, self) for index, part in enumerate(parts)]
        for track in tracks:
            if track.end is not None and track.end <= track.first:
                yield track.finish()
        waiting = deque(sorted((track for track in tracks if not track.is_done), key=lambda track: track.first))
        active: list[_Track] = []
        if not waiting:
            return
        del tracks  # each is let go of when it is done
        begins = waiting[0].first
        if begins and not self._seek(waiting[0]):
            yield from self._end([], waiting, begins)
            return
        channels = tuple({track.channel: None for track in waiting})
        for block in self._native(channels):
            start = self.frames_read - block.shape[1]
            is_finite = bool(np.isfinite(block).all())
            while waiting and waiting[0].first < self.frames_read:
                active.append(waiting.popleft())
            for track in active:
                yield from track.take(block[channels.index(track.channel)], start, is_finite=is_finite)
            active = [track for track in active if not track.is_done]
            if not active:
                if not waiting:
                    return
                is_far = waiting[0].first - self.frames_read > _WORTH_A_SEEK_S * self.rate
                if is_far and not self._seek(waiting[0]):
                    begins = waiting[0].first
                    break
            yield None
        yield from self._end(active, waiting, begins)

    def _end(self, active: list[_Track], waiting: "deque[_Track]", begins: int) -> Iterator[Piece]:
        """Ends the unfinished parts when the object ends or the decoder fails.

        Args:
            active: Parts that have begun.
            waiting: Parts that have not.
            begins: Where this pass began, in frames: parts that begin later may still be reached by a seek.
        """
        for track in [*active, *waiting]:
            if self._broke_off and not track.taken and track.first > begins and _seeks_exactly(self.source):
                continue
            if self._failure is not None:
                yield track.rejected(self._failure)
            elif track.first and self.frames_read <= track.first:
                lasts = f"the object lasts {self.position_s:.3f} s"
                detail = f"It was to begin at {track.offset_s:.3f} s, but {lasts}."
                yield track.rejected(self.rejected(Reason.TOO_SHORT, detail))
            else:
                yield track.finish()

    def _native(self, channels: Channels) -> Iterator[Samples]:
        """Yields blocks at the stored rate, shape (channels, n), from `frames_read` on; stores a failure."""
        try:
            for block in channel_blocks(self.source, channels):
                # First: what came back from a store that failed may look like the end, or like broken data.
                self.source.reader.raise_error()
                self.frames_read += block.shape[1]
                yield block
        except (soundfile.LibsndfileError, av.FFmpegError, StreamChanged) as error:
            self.source.reader.raise_error()
            raise_out_of_memory(error)
            self._broke_off = True
            self._failure = self._explain(error)
            if self._failure is not None:
                self._failure.__cause__ = error
                return
        self.source.reader.raise_error()
        self.ended = True
        if self._is_short():
            self._failure = self._short()
        elif self._is_cut_off():
            self._failure = self._cut_off()

    def _seek(self, track: _Track) -> bool:
        """Seeks to the start of a part, in formats where that is exact; in others it is decoded up to there."""
        handle = self.source.handle
        if not isinstance(handle, soundfile.SoundFile) or not _seeks_exactly(self.source):
            return True
        try:
            self.frames_read = int(handle.seek(min(track.first, handle.frames)))
        except soundfile.LibsndfileError as error:
            self.source.reader.raise_error()
            raise_out_of_memory(error)
            detail = f"The {self.info.codec} decoder cannot go to {track.offset_s:.3f} s: {error.error_string}"
            self._broke_off = True
            self._failure = self.rejected(Reason.DECODE_ERROR, detail)
            self._failure.__cause__ = error
            return False
        return True

    def _explain(self, error: Exception) -> Rejected | None:
        """Returns the rejection for a decoder's error; None for junk after a complete recording."""
        if isinstance(self.source.handle, soundfile.SoundFile):
            # The block that failed contains good frames, too; libsndfile knows how many.
            self.frames_read = max(self.frames_read, int(self.source.handle.tell()))
        if self.stated_frames is not None and not self._is_short():
            return None
        if self._nothing_follows():
            return self._cut_off() if self.stated_frames is None else self._short()
        cause = getattr(error, "strerror", None) or str(error).removeprefix("Error : ").strip(" .") or repr(error)
        detail = f"The {self.source.info.codec} decoder failed after {self.position_s:.1f} s: {cause}."
        return self.rejected(Reason.DECODE_ERROR, detail)

    def _nothing_follows(self) -> bool:
        """Returns whether a failed decoder had reached the end of the file, so that what is missing is not there."""
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
        """Returns whether an Ogg file is incomplete: it states no length, so only its last page shows that."""
        handle = self.source.handle
        is_ogg = isinstance(handle, av.container.InputContainer) and handle.format.name == "ogg"
        return is_ogg and ogg_breaks_off(self.source.reader, self.source.reader.size_bytes)

    def _cut_off(self) -> Rejected:
        what = "page" if self._is_cut_off() else "frame"
        return self.rejected(
            Reason.DECODE_SHORT, f"The file breaks off after {self.position_s:.1f} s, in the middle of a {what}."
        )


def _seeks_exactly(source: Source) -> bool:
    stored_as = getattr(source.handle, "format", None)
    return stored_as in _SEEKABLE and source.info.codec in _SEEKABLE_CODECS
