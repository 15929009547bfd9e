"""Recordings to segments of PCM, decoded ahead in a small pool of threads."""

import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple, get_args

import apache_beam as beam

from af3pipe import storage
from af3pipe.audio.decode import OpenDecoding, OverLength, open_decoding, read_segments
from af3pipe.audio.guard import DEFAULT_LIMITS, IS_SUPPORTED, DecoderPool
from af3pipe.audio.guarded import DecoderLimits
from af3pipe.audio.segments import AudioLimits
from af3pipe.models.family import DEFAULT_MODEL, open_checkpoint
from af3pipe.schemas import DeadLetter, Recording, Segment, Stage
from af3pipe.transforms import metrics
from af3pipe.transforms.outcome import (
    DEAD_LETTERS,
    Outcome,
    join_dead_letters,
    outcomes,
    split_input,
    to_dead_letter,
)
from af3pipe.transforms.overlap import OverlapDoFn


def open_segments(
    recording: Recording,
    *,
    limits: AudioLimits,
    over_length: OverLength = "dead-letter",
    open_decoding: OpenDecoding = open_decoding,
) -> Iterator[Segment]:
    """Opens a recording and decodes it, front to back, into segments: what DecodeAudio does, without Beam.

    Args:
        recording: What is read.
        limits: The model's.
        over_length: See `DecodeAudio`.
        open_decoding: Where it is decoded: in this process, or `guard.DecoderPool.open`.

    Raises:
        Rejected: The recording cannot be read or decoded, or is too short or too long.
    """
    if recording.size_bytes is None:
        info = storage.stat(recording.uri)
        recording = recording._replace(size_bytes=info.size_bytes, etag=info.etag, mtime=info.mtime)
    with storage.open_input(recording.uri, size_bytes=recording.size_bytes) as file:
        yield from read_segments(file, recording, limits=limits, over_length=over_length, open_decoding=open_decoding)


class _Ahead(NamedTuple):
    """A recording decoded as far as its first segment; the rest of a longer one is decoded when it is its turn."""

    first: Segment
    rest: Iterator[Segment]


def _decode_ahead(segments: Iterator[Segment]) -> _Ahead:
    first = next(segments)
    if first.is_last:
        next(
            segments, None
        )  # runs the generator to its end, which closes the file here and not on the bundle's thread
    return _Ahead(first, segments)


class DecodeDoFn(OverlapDoFn[Recording, _Ahead]):
    """Emits `Segment`, and `DeadLetter` to the tag `dead_letters`."""

    def __init__(
        self, *, model: str, revision: str | None, over_length: OverLength, threads: int, guard: DecoderLimits | None
    ) -> None:
        # Each pending recording holds at most one segment of PCM: 38 MB at a cap of 600 s.
        super().__init__(max_pending=2 * threads)
        self._model = model
        self._revision = revision
        self._over_length = over_length
        self._threads = threads
        self._guard = guard

    def setup(self) -> None:
        self._limits = open_checkpoint(self._model, self._revision).limits
        self._open_decoding: OpenDecoding = open_decoding
        if self._guard is not None:
            self._decoders = DecoderPool(self._guard)
            self._open_decoding = self._decoders.open
        self._pool = ThreadPoolExecutor(self._threads, thread_name_prefix="af3pipe-decode")

    def teardown(self) -> None:
        super().teardown()
        self._pool.shutdown(wait=False, cancel_futures=True)
        if self._guard is not None:
            self._decoders.close()

    def submit(self, recording: Recording) -> "Future[_Ahead]":
        segments = open_segments(
            recording, limits=self._limits, over_length=self._over_length, open_decoding=self._open_decoding
        )
        return self._pool.submit(_decode_ahead, segments)

    def emit(self, recording: Recording, future: "Future[_Ahead]") -> Iterator[Any]:
        def segments() -> Iterator[Segment]:
            ahead = future.result()
            yield ahead.first
            yield from ahead.rest

        def rejected(error: Exception) -> DeadLetter:
            return to_dead_letter(error, recording, stage=Stage.DECODE)

        for outcome in outcomes(segments(), rejected):
            if isinstance(outcome, DeadLetter):
                metrics.count("recordings_done")
                metrics.count(f"dead_letters_{outcome.reason.value}")
                yield beam.pvalue.TaggedOutput(DEAD_LETTERS, outcome)
            else:
                metrics.count("segments")
                yield outcome


class DecodeAudio(beam.PTransform):
    """Decodes recordings into segments that the model can take: 16 kHz mono PCM under the family's cap.

    Takes `Recording` (a PCollection, or the Outcome of `ReadRecordings`); gives an `Outcome` of `Segment`.
    Segments are large: ask about them in the same stage, and do not put a shuffle behind this transform.

    Args:
        model: Whose window and cap apply; only its configuration is read. Use the same as in `AskAudioFlamingo`.
        revision: Of the model on the hub.
        over_length: What becomes of a recording longer than the cap: `dead-letter`; `truncate`, which answers for
            the first part; `split`, which makes consecutive segments of it.
        threads: Recordings opened and decoded at once; the default is 4 more than cores, since a thread often
            waits for the store, and 8 at most, since each holds a segment.
        guard: What decoders may take. They run in processes of their own, where a crash or a hang costs one
            recording; None decodes in the worker's own process, and so does Windows.

    Raises:
        ValueError: `over_length` is not one of the three.
    """

    def __init__(
        self,
        *,
        model: str = DEFAULT_MODEL,
        revision: str | None = None,
        over_length: OverLength = "dead-letter",
        threads: int | None = None,
        guard: DecoderLimits | None = DEFAULT_LIMITS,
    ) -> None:
        super().__init__()
        if over_length not in get_args(OverLength):
            raise ValueError(f"over_length is {over_length!r}; it must be one of {', '.join(get_args(OverLength))}")
        self._dofn = DecodeDoFn(
            model=model,
            revision=revision,
            over_length=over_length,
            threads=threads or min((os.cpu_count() or 1) + 4, 8),
            guard=guard if IS_SUPPORTED else None,
        )

    def expand(self, inputs: Any) -> Any:
        recordings, before = split_input(inputs)
        decoded = recordings | "Decode" >> beam.ParDo(self._dofn).with_output_types(
            Segment, **{DEAD_LETTERS: DeadLetter}
        ).with_outputs(DEAD_LETTERS, main="segments")
        return Outcome(decoded.segments, join_dead_letters(decoded[DEAD_LETTERS], before))
