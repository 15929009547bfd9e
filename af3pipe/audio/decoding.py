"""Defines what a decoder is given and what it gives, without loading a decoder.

`decode.open_decoding` decodes in this process, `guard.DecoderPool.open` in another one. This module imports neither
PyAV nor soundfile nor soxr, so that what only plans work does not load them.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import BinaryIO, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from af3pipe.schemas import MIX, AudioInfo, Reason, Rejected, Stage, channel_text

Samples: TypeAlias = npt.NDArray[np.float32]


class Asked(NamedTuple):
    """How a file is to be opened.

    Attributes:
        sample_rate: Of the samples wanted, in Hz.
        extension: Of the file's name; see `probe.probe`.
        stream: Index among the audio streams; None takes the file's main one.
    """

    sample_rate: int
    extension: str = ""
    stream: int | None = None


class Part(NamedTuple):
    """A range of one channel that is to be decoded.

    Attributes:
        offset_s: Where it begins, in seconds from the start of the object; rounded to the nearest frame as stored.
        duration_s: How much to take, in seconds; None takes all. What the file does not have is not missed.
        channel: `mix`, the mean over all; `left`, `right` (of two or more); or an index from 0.
        most_samples: It ends early once that many samples or more have been given; None for no such limit.
    """

    offset_s: float = 0.0
    duration_s: float | None = None
    channel: str | int = MIX
    most_samples: int | None = None

    def frames(self, rate: int) -> tuple[int, int | None]:
        """The first frame and the one behind the last, of frames as stored; None where it goes to the end."""
        first = round(self.offset_s * rate)
        return first, None if self.duration_s is None else first + max(round(self.duration_s * rate), 0)


WHOLE = Part()
"""All of a file, every channel mixed."""


class Piece(NamedTuple):
    """The next samples of one part.

    Attributes:
        part: Index of the part.
        samples: float32 mono, shape (n,), n may be 0. Valid until the next piece is taken: they may lie in memory
            that is shared with another process.
        is_end: Whether nothing follows of this part.
        rejected: Why it ends before all of it was decoded; only with `is_end`.
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
        sample_rate: Of the samples given, in Hz.
        rate: Of the frames as stored, in Hz.
        frames_read: How far the pass has come, in frames as stored, counted from the start of the object.
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
        """Decodes all parts in one pass, front to back. Call it once.

        Parts may overlap, and come in any order. The samples of each are those that decoding it alone gives.

        Yields:
            The pieces of each part in order of time, in turns with those of the others; None behind each block of
            about 10 s, whether it held anything of a part or not. Each part has one piece with `is_end`, but those
            which a pass of their own may still decode: a failure stopped this one before their first sample, and
            the decoder can seek past it. At least one part ends in every pass.

        Raises:
            Rejected: A decoder process died, or the store rejected a read: no part that has not ended can go on.
        """
        raise NotImplementedError

    def blocks(self, part: Part = WHOLE) -> Iterator[Samples]:
        """The samples of one part. Raises Rejected where it ends before all of it was decoded."""
        for piece in self.pieces([part]):
            if piece is None:
                continue
            if len(piece.samples):
                yield piece.samples
            if piece.rejected is not None:
                raise piece.rejected

    @property
    def position_s(self) -> float:
        """End of what was decoded, in seconds from the start of the object."""
        return self.frames_read / self.rate

    def stated_samples(self, part: Part) -> int | None:
        """Samples in a part, by the header; None where it states no length."""
        if self.stated_frames is None:
            return None
        first, end = part.frames(self.rate)
        last = self.stated_frames if end is None else min(end, self.stated_frames)
        return resampled_length(max(last - first, 0), self.rate, self.sample_rate)

    def rejected(self, reason: Reason, detail: str, position_s: float | None = None) -> Rejected:
        """The error of this pass, with its decoder and position."""
        position_s = self.position_s if position_s is None else position_s
        return Rejected(Stage.DECODE, reason, detail, decoder=self.info.decoder, position_s=position_s)


OpenDecoding: TypeAlias = Callable[[BinaryIO, Asked], AbstractContextManager[Decoding]]
"""Opens a file for decoding: `open_in_process`, or `guard.DecoderPool.open`."""


def open_in_process(file: BinaryIO, asked: Asked) -> AbstractContextManager[Decoding]:
    """Opens a file for decoding in this process, as `decode.open_decoding`; loads the decoders at the first call."""
    from af3pipe.audio.decode import open_decoding

    return open_decoding(file, asked)


def resampled_length(frames: int, in_rate: int, out_rate: int) -> int:
    """Rounded up, as librosa does; in integers, so that the cap is never missed by a rounding error."""
    return -(-frames * out_rate // in_rate)


def channel_index(channel: str | int, info: AudioInfo) -> int | None:
    """The index of a channel by any of its names; None for the mean over all.

    Raises:
        Rejected: no_audio_stream, where the audio has no such channel.
    """
    wanted = channel_text(channel)
    if wanted == MIX:
        return None
    index = {"left": 0, "right": 1}.get(wanted)
    if (info.channels < 2) if index is not None else (int(wanted) >= info.channels):
        has = "1 channel, number 0" if info.channels == 1 else f"{info.channels} channels, 0 to {info.channels - 1}"
        detail = f"Channel {wanted} was asked for, but the audio has {has}; choose --channel mix or one of these."
        raise Rejected(Stage.PROBE, Reason.NO_AUDIO_STREAM, detail, decoder=info.decoder)
    return int(wanted) if index is None else index
