"""Defines the arguments and results of decoding, without importing a decoder.

`decode.open_decoding` decodes in this process, `guard.DecoderPool.open` in another one. This module imports neither
PyAV nor soundfile nor soxr, so that code which only plans work does not load them.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import BinaryIO, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from af3pipe.schemas import MIX, AudioInfo, Reason, Rejected, Stage, channel_text

Samples: TypeAlias = npt.NDArray[np.float32]


class Asked(NamedTuple):
    """Options for opening a file.

    Attributes:
        sample_rate: Sampling rate of the output, in Hz.
        extension: Extension of the file's name; see `probe.probe`.
        stream: Index among the audio streams; None for the file's main one.
    """

    sample_rate: int
    extension: str = ""
    stream: int | None = None


class Part(NamedTuple):
    """A time range of one channel to decode.

    Attributes:
        offset_s: Start, in seconds from the start of the object; rounded to the nearest frame as stored.
        duration_s: Length in seconds; None for all. It may reach beyond the end of the file.
        channel: `mix`, the mean over all; `left`, `right` (of two or more); or an index from 0.
        most_samples: Decoding ends early after at least this many samples; None for no limit.
    """

    offset_s: float = 0.0
    duration_s: float | None = None
    channel: str | int = MIX
    most_samples: int | None = None

    def frames(self, rate: int) -> tuple[int, int | None]:
        """Returns the first frame and the one after the last, in frames as stored; None for an open end."""
        first = round(self.offset_s * rate)
        return first, None if self.duration_s is None else first + max(round(self.duration_s * rate), 0)


WHOLE = Part()
"""A whole file, with all channels mixed."""


class Piece(NamedTuple):
    """The next samples of one part.

    Attributes:
        part: Index of the part.
        samples: float32 mono, shape (n,), n may be 0. Valid until the next piece is taken, because they may be in
            memory shared with another process.
        is_end: Whether it is the last piece of its part.
        rejected: Why the part ends before all of it was decoded; only with `is_end`.
    """

    part: int
    samples: Samples
    is_end: bool = False
    rejected: Rejected | None = None


class Decoding:
    """One pass over one open file.

    Attributes:
        info: What the header states.
        stated_frames: See `probe.Source`.
        sample_rate: Sampling rate of the output, in Hz.
        rate: Sampling rate as stored, in Hz.
        frames_read: Position of the pass, in frames as stored, counted from the start of the object.
        ended: Whether the object's end was reached.
    """

    def __init__(self, info: AudioInfo, stated_frames: int | None, sample_rate: int) -> None:
        self.info = info
        self.stated_frames = stated_frames
        self.sample_rate = sample_rate
        self.rate = info.sample_rate
        self.frames_read = 0
        self.ended = False

    def pieces(self, parts: Sequence[Part]) -> Iterator[Piece | None]:
        """Decodes all parts in one pass, from front to back. Call it once.

        Parts may overlap, and come in any order. The samples of each are the same as if it were decoded alone.

        Yields:
            The pieces of each part in order of time, interleaved with those of the others, and None after each block
            of about 10 s, whether or not it contained anything of a part. Each part gets one piece with `is_end`,
            except
            parts that another pass may still decode: this one failed before their first sample, and the decoder can
            seek past the failure. At least one part ends in every pass.

        Raises:
            Rejected: A decoder process died, or the store rejected a read: all parts that have not ended fail.
        """
        raise NotImplementedError

    def blocks(self, part: Part = WHOLE) -> Iterator[Samples]:
        """Yields the samples of one part. Raises Rejected if it ends before all of it was decoded."""
        for piece in self.pieces([part]):
            if piece is None:
                continue
            if len(piece.samples):
                yield piece.samples
            if piece.rejected is not None:
                raise piece.rejected

    @property
    def position_s(self) -> float:
        """End of the decoded audio, in seconds from the start of the object."""
        return self.frames_read / self.rate

    def stated_samples(self, part: Part) -> int | None:
        """Returns the samples of a part by the header; None if the header states no length."""
        if self.stated_frames is None:
            return None
        first, end = part.frames(self.rate)
        last = self.stated_frames if end is None else min(end, self.stated_frames)
        return resampled_length(max(last - first, 0), self.rate, self.sample_rate)

    def rejected(self, reason: Reason, detail: str, position_s: float | None = None) -> Rejected:
        """Returns the error for a failure of this pass, with its decoder and position."""
        position_s = self.position_s if position_s is None else position_s
        return Rejected(Stage.DECODE, reason, detail, decoder=self.info.decoder, position_s=position_s)


OpenDecoding: TypeAlias = Callable[[BinaryIO, Asked], AbstractContextManager[Decoding]]
"""Opens a file for decoding: `open_in_process`, or `guard.DecoderPool.open`."""


def open_in_process(file: BinaryIO, asked: Asked) -> AbstractContextManager[Decoding]:
    """Opens a file for decoding in this process, as `decode.open_decoding`; imports the decoders when called."""
    from af3pipe.audio.decode import open_decoding

    return open_decoding(file, asked)


def resampled_length(frames: int, in_rate: int, out_rate: int) -> int:
    """Returns the length after resampling, rounded up as in librosa; in integers, so exact at the cap."""
    return -(-frames * out_rate // in_rate)


def channel_index(channel: str | int, info: AudioInfo) -> int | None:
    """Returns the index of a channel by any of its names; None for the mean over all.

    Raises:
        Rejected: no_audio_stream, if the audio has no such channel.
    """
    wanted = channel_text(channel)
    if wanted == MIX:
        return None
    index = {"left": 0, "right": 1}.get(wanted)
    if (info.channels < 2) if index is not None else (int(wanted) >= info.channels):
        has = "1 channel, number 0" if info.channels == 1 else f"{info.channels} channels, 0 to {info.channels - 1}"
        detail = f"Channel {wanted} was requested, but the audio has {has}; choose --channel mix or one of these."
        raise Rejected(Stage.PROBE, Reason.NO_AUDIO_STREAM, detail, decoder=info.decoder)
    return int(wanted) if index is None else index
