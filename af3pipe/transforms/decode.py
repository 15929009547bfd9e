"""Decodes recordings into segments of PCM, prefetching a few in a small thread pool."""

import itertools
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import apache_beam as beam

from af3pipe import storage
from af3pipe.audio.decoding import OpenDecoding, open_in_process
from af3pipe.audio.guard import DEFAULT_LIMITS, IS_SUPPORTED, acquire_decoders, check_limits, release_decoders
from af3pipe.audio.guarded import DecoderLimits
from af3pipe.audio.levels import FLOOR_DBFS, SILENT_BELOW_DBFS
from af3pipe.audio.recording import OverLength, read_parts, read_segments
from af3pipe.audio.segments import AudioLimits
from af3pipe.models.family import DEFAULT_MODEL, open_checkpoint
from af3pipe.schemas import AudioObject, DeadLetter, Reason, Recording, Rejected, Segment, Stage
from af3pipe.transforms import metrics
from af3pipe.transforms.launcher import SentByLauncher
from af3pipe.transforms.outcome import (
    DEAD_LETTERS,
    FATAL,
    Outcome,
    join_dead_letters,
    split_input,
    to_dead_letter,
)
from af3pipe.transforms.overlap import OverlapDoFn
from af3pipe.transforms.stores import count_retries, set_storage

SplitAt: TypeAlias = Literal["cap", "silence"]
OnSilent: TypeAlias = Literal["flag", "dead-letter"]

_SPLIT_TOLERANCE_S = 15.0  # nearly any speech has a pause in 15 s, and it makes only 1% more segments


def open_segments(
    recording: Recording,
    *,
    limits: AudioLimits,
    over_length: OverLength = "dead-letter",
    split_tolerance_s: float = 0.0,
    silent_below_dbfs: float = SILENT_BELOW_DBFS,
    open_decoding: OpenDecoding = open_in_process,
) -> Iterator[Segment]:
    """Opens a recording and decodes it into segments, from beginning to end: DecodeAudio without Beam.

    Silent segments are yielded, too, with `levels.silent` set.

    Args:
        recording: The recording.
        limits: Limits of the model, from `models.open_checkpoint(...).limits`.
        over_length: See `DecodeAudio`.
        split_tolerance_s: With `split`, the cut is at the quietest point in this time before the maximum duration; 0
            cuts at the maximum duration.
        silent_below_dbfs: A segment whose peak is at or below this is silent.
        open_decoding: Decodes in this process, or in another one with `guard.DecoderPool.open`.

    Raises:
        Rejected: The recording cannot be read or decoded, or is too short or too long.
    """
    if recording.size_bytes is None:
        info = storage.stat(recording.uri)
        recording = recording._replace(size_bytes=info.size_bytes, etag=info.etag, mtime=info.mtime)
    with storage.open_input(recording.uri, size_bytes=recording.size_bytes) as file:
        yield from read_segments(
            file,
            recording,
            limits=limits,
            over_length=over_length,
            split_tolerance_s=split_tolerance_s,
            silent_below_dbfs=silent_below_dbfs,
            open_decoding=open_decoding,
        )


def check_split(over_length: OverLength, split_at: SplitAt, split_tolerance_s: float | None) -> None:
    """Raises ValueError if settings for splitting are invalid or would have no effect."""
    if split_at == "silence" and over_length != "split":
        raise ValueError(
            f"split_at is 'silence', but over_length is {over_length!r}, so that nothing is split; "
            "set over_length to 'split'"
        )
    if split_tolerance_s is None:
        return
    if split_at != "silence":
        raise ValueError(
            f"split_tolerance_s is {split_tolerance_s:g}, but split_at is {split_at!r}, so that no silence is "
            "searched for; set split_at to 'silence'"
        )
    if not split_tolerance_s > 0:
        raise ValueError(f"split_tolerance_s is {split_tolerance_s:g}; it must be more than 0 s, for example 15")


class Decoder(SentByLauncher):
    """Opens recordings and decodes them into segments, in decoder processes that may crash or hang.

    Its arguments are those of `DecodeAudio`, without defaults.
    """

    def __init__(
        self,
        *,
        model: str,
        revision: str | None,
        over_length: OverLength,
        split_tolerance_s: float,
        on_silent: OnSilent,
        silent_below_dbfs: float,
        threads: int,
        guard: DecoderLimits | None,
        storage_options: storage.StorageOptions,
    ) -> None:
        self._model = model
        self._revision = revision
        self._over_length = over_length
        self._split_tolerance_s = split_tolerance_s
        self._on_silent = on_silent
        self._silent_below_dbfs = silent_below_dbfs
        self.threads = threads
        self.guard = guard
        self._storage_options = storage_options

    def setup(self) -> None:
        """Reads the model's limits and acquires the pool of decoder processes. Raises ModelError."""
        set_storage(self._storage_options)
        with self.naming_worker():
            self._limits = open_checkpoint(self._model, self._revision).limits
        self._open_decoding: OpenDecoding = open_in_process
        if self.guard is not None:
            self._open_decoding = acquire_decoders(self.guard).open

    def close(self) -> None:
        """Releases the pool of decoder processes."""
        if self.guard is not None:
            release_decoders(self.guard)

    @property
    def policy(self) -> tuple[str | float, ...]:
        """The settings that decide how a recording ends, beside its content and requests; part of the `work_key`."""
        return self._over_length, self._split_tolerance_s, self._on_silent, self._silent_below_dbfs

    def segments_of(self, recording: Recording) -> Iterator[Segment]:
        """Decodes a recording lazily and yields its segments. Raises Rejected like `open_segments`."""
        return open_segments(
            recording,
            limits=self._limits,
            over_length=self._over_length,
            split_tolerance_s=self._split_tolerance_s,
            silent_below_dbfs=self._silent_below_dbfs,
            open_decoding=self._open_decoding,
        )

    def parts_of(self, recordings: Sequence[Recording]) -> Iterator[tuple[int, Segment | Exception]]:
        """Decodes all recordings of one object in the listed version, opening it once.

        Yields:
            Index of a recording and its next segment, or the error that ends this recording. The segments of each
            recording are in order.

        Raises:
            Rejected: changed; the object has changed since it was listed, so segments yielded before may be wrong.
            StorageError, GuardError: The worker failed, not a recording.
        """
        ended: set[int] = set()
        try:
            first, *_ = recordings = stated(recordings)
            listed = storage.ObjectInfo(first.uri, first.size_bytes, first.etag, first.mtime)
            with storage.open_version(listed) as file:
                for index, part in read_parts(
                    file,
                    recordings,
                    limits=self._limits,
                    over_length=self._over_length,
                    split_tolerance_s=self._split_tolerance_s,
                    silent_below_dbfs=self._silent_below_dbfs,
                    open_decoding=self._open_decoding,
                ):
                    if isinstance(part, Rejected) and part.reason is Reason.CHANGED:
                        raise part
                    if not isinstance(part, Segment) or part.is_last:
                        ended.add(index)
                    yield index, part
        except FATAL:
            raise
        except Exception as error:
            if isinstance(error, Rejected) and error.reason is Reason.CHANGED:
                raise
            for index in range(len(recordings)):
                if index not in ended:
                    yield index, error

    def silent(self, segment: Segment) -> DeadLetter | None:
        """Returns the dead letter of a silent segment if `on_silent` asks for one; else None."""
        if not segment.levels.silent or self._on_silent != "dead-letter":
            return None
        peak, rms, *_ = segment.levels
        detail = (
            f"{segment.start_s:.1f} to {segment.end_s:.1f} s is silent: its peak is {peak:.1f} dBFS (RMS {rms:.1f}), "
            f"and up to {self._silent_below_dbfs:g} counts as silence."
        )
        error = Rejected(Stage.DECODE, Reason.SILENT, detail)
        return to_dead_letter(error, segment.recording, stage=Stage.DECODE, segment=segment)


class _Ahead(NamedTuple):
    """Has the first decoded segment of an object, and an iterator that decodes the rest on demand."""

    first: tuple[int, Segment | Exception] | None
    rest: Iterator[tuple[int, Segment | Exception]]


def _decode_ahead(parts: Iterator[tuple[int, Segment | Exception]]) -> _Ahead:
    return _Ahead(next(parts, None), parts)


class _DecodeDoFn(OverlapDoFn[AudioObject | Recording, _Ahead]):
    """Decodes audio objects: emits `Segment`, and `DeadLetter` to the tag `dead_letters`."""

    def __init__(self, decoder: Decoder) -> None:
        # Each pending object has at most one segment of PCM in memory: 38 MB for 600 s.
        super().__init__(max_pending=2 * decoder.threads)
        self._decoder = decoder

    def setup(self) -> None:
        self._decoder.setup()
        self._pool = ThreadPoolExecutor(self._decoder.threads, thread_name_prefix="af3pipe-decode")

    def teardown(self) -> None:
        super().teardown()
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._decoder.close()

    def finish_bundle(self) -> Iterator[Any]:
        yield from super().finish_bundle()
        count_retries()

    def submit(self, found: AudioObject | Recording) -> "Future[_Ahead]":
        return self._pool.submit(_decode_ahead, self._decoder.parts_of(recordings_of(found)))

    def emit(self, found: AudioObject | Recording, future: "Future[_Ahead]") -> Iterator[Any]:
        recordings = recordings_of(found)
        ahead = future.result()
        for index, part in itertools.chain([] if ahead.first is None else [ahead.first], ahead.rest):
            letter = (
                to_dead_letter(part, recordings[index], stage=Stage.DECODE)
                if isinstance(part, Exception)
                else self._decoder.silent(part)
            )
            if letter is None:
                metrics.count("segments")
                yield part
            else:
                metrics.count(f"dead_letters_{letter.reason.value}")
                yield beam.pvalue.TaggedOutput(DEAD_LETTERS, letter)
        for letter in found.dead_letters if isinstance(found, AudioObject) else ():
            yield beam.pvalue.TaggedOutput(DEAD_LETTERS, letter)


def stated(recordings: Sequence[Recording]) -> Sequence[Recording]:
    """Returns recordings of one object with its size, etag and modification time, requesting them if unknown.

    Raises:
        Rejected: The object cannot be found or read.
    """
    first = recordings[0]
    if first.size_bytes is not None or first.etag or first.mtime:
        return recordings
    info = storage.stat(first.uri)
    return [as_stored(recording, info) for recording in recordings]


def as_stored(recording: Recording, info: storage.ObjectInfo) -> Recording:
    """Sets a recording's size, etag and modification time to those of its object."""
    return recording._replace(size_bytes=info.size_bytes, etag=info.etag, mtime=info.mtime)


def recordings_of(found: AudioObject | Recording) -> tuple[Recording, ...]:
    """Returns the recordings of an object, or a recording as the only one."""
    return found.recordings if isinstance(found, AudioObject) else (found,)


class DecodeAudio(beam.PTransform):
    """Decodes recordings into segments for the model: 16 kHz mono PCM, at most the model's maximum duration.

    The input is `AudioObject` (from `ReadRecordings`) or `Recording`, as a PCollection or an `Outcome`; the output is
    an `Outcome` of `Segment`. Segments are large: run the model in the same stage, without a shuffle in between.

    Args:
        model: Model whose limits apply; only its configuration is read. Use the same as in `AskAudioFlamingo`.
        revision: Branch, tag or commit of the model on the hub.
        over_length: How recordings over the maximum duration are treated: `dead-letter`; `truncate` keeps the first
            part; `split` makes consecutive segments.
        split_at: Where `split` cuts: at the maximum duration (`cap`), or at the quietest point before it
            (`silence`), to avoid cutting words.
        split_tolerance_s: With `silence`, how long before the maximum duration that point may be; 15 by default,
            and limited to half the maximum duration.
        on_silent: How silent segments are treated: `flag` processes them and sets the column `silent`;
            `dead-letter` does not process them.
        silent_below_dbfs: A segment whose peak is at or below this is silent; -120 to below 0 dBFS.
        threads: Number of objects opened and decoded concurrently; by default the number of cores plus 4, since
            threads often wait for the store, and at most 8, since each keeps a segment in memory.
        guard: Time and memory limits of the decoder processes, in which a crash or a hang costs only one
            recording; None decodes in the worker's own process, which is always so on Windows.
        storage_options: See `ReadRecordings`.

    Raises:
        ValueError: An argument has an invalid value, or two arguments conflict.
    """

    def __init__(
        self,
        *,
        model: str = DEFAULT_MODEL,
        revision: str | None = None,
        over_length: OverLength = "dead-letter",
        split_at: SplitAt = "cap",
        split_tolerance_s: float | None = None,
        on_silent: OnSilent = "flag",
        silent_below_dbfs: float = SILENT_BELOW_DBFS,
        threads: int | None = None,
        guard: DecoderLimits | None = DEFAULT_LIMITS,
        storage_options: storage.StorageOptions = MappingProxyType({}),
    ) -> None:
        super().__init__()
        _check_choice("over_length", over_length, OverLength)
        _check_choice("split_at", split_at, SplitAt)
        _check_choice("on_silent", on_silent, OnSilent)
        check_split(over_length, split_at, split_tolerance_s)
        if guard is not None:
            check_limits(guard)
        if not FLOOR_DBFS <= silent_below_dbfs < 0:
            raise ValueError(f"silent_below_dbfs is {silent_below_dbfs:g}; it must be from {FLOOR_DBFS:g} to below 0")
        self.decoder = Decoder(
            model=model,
            revision=revision,
            over_length=over_length,
            split_tolerance_s=(split_tolerance_s or _SPLIT_TOLERANCE_S) if split_at == "silence" else 0.0,
            on_silent=on_silent,
            silent_below_dbfs=silent_below_dbfs,
            threads=threads or min((os.cpu_count() or 1) + 4, 8),
            guard=guard if IS_SUPPORTED else None,
            storage_options=dict(storage_options),
        )

    def expand(self, inputs: Any) -> Any:
        objects, before = split_input(inputs)
        decode = beam.ParDo(_DecodeDoFn(self.decoder)).with_output_types(Segment, **{DEAD_LETTERS: DeadLetter})
        decoded = objects | "Decode" >> decode.with_outputs(DEAD_LETTERS, main="segments")
        return Outcome(decoded.segments, join_dead_letters(decoded[DEAD_LETTERS], before))


def _check_choice(name: str, value: str, allowed: Any) -> None:
    if value not in get_args(allowed):
        raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(get_args(allowed))}")
