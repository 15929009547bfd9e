"""Reads an open file as blocks of the requested channels at the stored rate, with either decoder."""

from collections.abc import Iterator
from fractions import Fraction
from typing import Any, TypeAlias

import av
import av.container
import numpy as np
import soundfile
from av.audio.frame import format_dtypes

from af3pipe.audio.decoding import Samples
from af3pipe.audio.probe import Source

Channels: TypeAlias = tuple[int | None, ...]
"""Indices of channels; None stands for the mean over all."""

CODEC_FRAMES = 4096
"""Two HE-AAC frames: as much may be a codec's own delay and padding."""
_BLOCK_S = 10
_BLOCK_SAMPLES = 1 << 24  # over all channels: 10 s of 8 at 192 kHz fit, and what a lying header states is bounded


class StreamChanged(Exception):
    """The stream's sampling rate or channels, or the streams themselves, changed in the middle of the file."""


def channel_blocks(source: Source, channels: Channels) -> Iterator[Samples]:
    """Yields blocks of about 10 s, shape (channels, n), at the stored rate, from the decoder's position on."""
    handle = source.handle
    length = _BLOCK_S * source.info.sample_rate
    if not isinstance(handle, av.container.InputContainer):
        for block in _soundfile_frames(handle, max(min(length, _BLOCK_SAMPLES // handle.channels), 1)):
            yield _selected(np.ascontiguousarray(block.T), channels)
        return
    frames = _pyav_frames(handle, source, channels)
    if source.info.codec == "aac" and source.stated_frames is not None:
        samples = _without_padding(frames, source, channels)
    else:
        samples = (_selected(_floats(frame), channels) for frame in frames)
    yield from _gathered(samples, length)


def _soundfile_frames(handle: soundfile.SoundFile, length: int) -> Iterator[Samples]:
    """Yields blocks of shape (n, channels); the last one before an error contains the good frames before it."""
    while True:
        block = np.empty((length, handle.channels), np.float32)
        start = _place(handle)
        try:
            frames: Samples = handle.read(out=block)
        except soundfile.LibsndfileError:
            if 0 < (good := _place(handle) - start) <= length:
                yield block[:good]
            raise
        if not len(frames):
            return
        yield frames


def _place(handle: soundfile.SoundFile) -> int:
    return int(handle.tell()) if handle.seekable() else 0


def _pyav_frames(
    container: av.container.InputContainer, source: Source, channels: Channels
) -> Iterator[av.AudioFrame]:
    rate = source.info.sample_rate
    channel = next((index for index in channels if index is not None), None)
    for frame in _frames_of_known_streams(container, source):
        if not isinstance(frame, av.AudioFrame):
            continue
        if frame.sample_rate != rate:
            raise StreamChanged(f"the sampling rate changes from {rate} Hz to {frame.sample_rate} Hz")
        if channel is not None and frame.layout.nb_channels != source.info.channels:
            change = f"from {source.info.channels} to {frame.layout.nb_channels}"
            raise StreamChanged(f"the number of channels changes {change}, and channel {channel} was requested")
        yield frame


def _frames_of_known_streams(container: av.container.InputContainer, source: Source) -> Iterator[Any]:
    try:
        yield from container.decode(source.stream)
    except IndexError as error:  # PyAV counted the streams when it opened the file
        raise StreamChanged("a stream begins in the middle of the file") from error


def _without_padding(frames: Iterator[av.AudioFrame], source: Source, channels: Channels) -> Iterator[Samples]:
    """Drops the samples that an AAC encoder added to fill its last frame, so that 600.0 s of M4A stay 600.0 s.

    If there are more, they are not padding but the header is wrong, and all are kept.
    """
    stated = source.stated_frames or 0
    count = 0
    beyond: list[Samples] = []
    for frame in frames:
        samples = _selected(_floats(frame), channels)
        kept = min(max(_sounding(frame, stated - count), 0), samples.shape[1])
        count += samples.shape[1]
        if kept:
            yield samples[:, :kept]
        if kept < samples.shape[1]:
            beyond.append(samples[:, kept:])
        if count > stated + CODEC_FRAMES:
            yield from beyond
            beyond = []


def _sounding(frame: av.AudioFrame, stated: int) -> int:
    """Returns how many samples of the last frame are audio: by the container's duration of that frame if it is exact.

    The stated total is often rounded to a millisecond: up to 22 samples at 44.1 kHz.
    """
    if frame.duration and frame.time_base == Fraction(1, frame.sample_rate) and frame.duration < frame.samples:
        rounding = frame.sample_rate // 1000 + 1
        return frame.duration if abs(frame.duration - stated) <= rounding else stated
    return stated


def _gathered(frames: Iterator[Samples], length: int) -> Iterator[Samples]:
    """Joins a codec's frames, of about 20 ms each, to blocks of at least `length` samples."""
    frames_so_far: list[Samples] = []
    count = 0
    failure: Exception | None = None
    try:
        for frame in frames:
            frames_so_far.append(frame)
            count += frame.shape[1]
            if count >= length:
                yield np.concatenate(frames_so_far, axis=1)
                frames_so_far, count = [], 0
    except (av.FFmpegError, StreamChanged) as error:
        failure = error  # the frames before it are good, and show where it happened
    if frames_so_far:
        yield np.concatenate(frames_so_far, axis=1)
    if failure is not None:
        raise failure


def _floats(frame: av.AudioFrame) -> Samples:
    """Converts a frame to float32 in [-1, 1], shape (channels, n), scaled as in libsndfile."""
    # Not frame.to_ndarray(): PyAV counts planes up to a null pointer, which is not there behind eight of them, and
    # reads what is no memory (tests/audio/test_formats.py: test_one_to_eight_channels).
    dtype, channels = format_dtypes[frame.format.name], frame.layout.nb_channels
    planes: tuple[Any, ...] = frame.planes  # buffers, which its types do not say
    if frame.format.is_planar:
        stored = np.stack([np.frombuffer(plane, dtype, frame.samples) for plane in planes[:channels]])
    else:
        stored = np.frombuffer(planes[0], dtype, frame.samples * channels).reshape(-1, channels).T
    floats: Samples = stored.astype(np.float32, copy=False)
    if stored.dtype == np.uint8:
        floats = (floats - np.float32(128)) / np.float32(128)
    elif stored.dtype.kind == "i":
        floats = floats / np.float32(2 ** (8 * stored.dtype.itemsize - 1))
    return floats


def _selected(frames: Samples, channels: Channels) -> Samples:
    """Selects the requested channels of (channels, n); the mean is in float32, as in librosa.to_mono."""
    if len(channels) == 1:
        return _mono(frames, channels[0])[np.newaxis]
    return np.stack([_mono(frames, channel) for channel in channels])


def _mono(frames: Samples, channel: int | None) -> Samples:
    if channel is not None:
        return np.ascontiguousarray(frames[channel])
    mixed: Samples = frames[0] if len(frames) == 1 else frames.mean(axis=0, dtype=np.float32)
    return mixed
