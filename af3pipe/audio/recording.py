"""Decodes recordings, or any number of parts of one object in one pass, into segments for the model."""

import math
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from heapq import heappop, heappush
from pathlib import Path
from typing import BinaryIO, Literal, NamedTuple, TypeAlias

from af3pipe.audio import lengths
from af3pipe.audio.decoding import Asked, Decoding, OpenDecoding, Part, Piece, channel_index, open_in_process
from af3pipe.audio.levels import SILENT_BELOW_DBFS, measure
from af3pipe.audio.segments import AudioLimits, Cut, Cutter, decided_samples
from af3pipe.schemas import MIX, Recording, Rejected, Segment, channel_text

OverLength: TypeAlias = Literal["dead-letter", "truncate", "split"]

BUFFERED_S = 1200.0
"""Most audio of all parts of one pass in memory at once, in seconds: 77 MB at 16 kHz."""
# Each has a resampler that takes 0.5 MB, in a decoder process that may have 64 MiB.
_MOST_AT_ONCE = 64
_MOST_PARTS = 20_000  # of one pass: a decoder process keeps them in mind, some 15 MB


def read_segments(
    file: BinaryIO,
    recording: Recording,
    *,
    limits: AudioLimits,
    over_length: OverLength,
    split_tolerance_s: float = 0.0,
    silent_below_dbfs: float = SILENT_BELOW_DBFS,
    open_decoding: OpenDecoding = open_in_process,
) -> Iterator[Segment]:
    """Decodes a recording (or its requested range) into segments: `read_parts` for a single part.

    Raises:
        Rejected: The rejection that `read_parts` yields.
    """
    with closing(
        read_parts(
            file,
            [recording],
            limits=limits,
            over_length=over_length,
            split_tolerance_s=split_tolerance_s,
            silent_below_dbfs=silent_below_dbfs,
            open_decoding=open_decoding,
        )
    ) as outcomes:
        for _, outcome in outcomes:
            if isinstance(outcome, Rejected):
                raise outcome
            yield outcome
            del outcome  # or it stays in memory while the next one is filled


def read_parts(
    file: BinaryIO,
    parts: Sequence[Recording],
    *,
    limits: AudioLimits,
    over_length: OverLength,
    split_tolerance_s: float = 0.0,
    silent_below_dbfs: float = SILENT_BELOW_DBFS,
    open_decoding: OpenDecoding = open_in_process,
) -> Generator[tuple[int, Segment | Rejected], None, None]:
    """Decodes all parts of one object into the segments that the policy allows, in one pass over the file.

    Parts may overlap, be equal, and come in any order. Each gives the same segments and rejection as if it were
    decoded alone. Only parts that a crashed decoder process leaves unfinished are rejected together.

    Over-long parts are detected from the header before the body is read, or while decoding if the header is wrong or
    states no length. The cap is the longest segment (`limits.max_samples`). `dead-letter` rejects over-long parts,
    `truncate` gives one segment of exactly the cap, `split` gives consecutive segments, each of which ends at the
    quietest point of the last `split_tolerance_s` before the cap (0: at the cap). A part of the cap plus less than
    `limits.min_samples` is not over-long.

    The last segment's `info.duration_s` is the object's duration as decoded. If decoding stopped before the object's
    end, it is what the header states, but at least what was decoded, so that a truncated segment visibly ends before
    it; for a requested range it may be None.

    The file is read from front to back. Gaps between parts are skipped if the format allows exact seeks (PCM, FLAC).
    Several passes are needed

    - if several audio streams are requested (`Recording.stream`);
    - if parts of the mix and of single channels of one stream are requested in formats that FFmpeg reads, where the
      number of channels may change in the middle;
    - if overlapping parts would need more than `BUFFERED_S` of audio in memory at once, or are more than 64: the rest
      is decoded in another pass. A single part always fits;
    - if there are more than 20,000 parts;
    - if the decoder fails, and parts after the failure can be reached by an exact seek.

    Args:
        file: Seekable; stays open. Exceptions of its `read`, other than Rejected, are raised here, unchanged.
        parts: Recordings of the same object.
        limits: The model's limits.
        over_length: Policy for parts longer than the cap.
        split_tolerance_s: How long before the cap `split` may cut, in seconds.
        silent_below_dbfs: A segment whose peak is at or below this is silent.
        open_decoding: Opens the decoder: in this process, or in another one with `guard.DecoderPool.open`.

    Yields:
        The index of a part, and its next segment or its end. Segments of one part come in order of time, as soon as
        they are complete. Each part ends exactly once: by a segment with `is_last`, or by a Rejected.

    Raises:
        ValueError: An offset or a duration is not finite, an offset is negative, or a channel has no such name.
        Exception: Errors of opening and reading other than Rejected: GuardError, DecoderError, errors of the file.
            They concern all parts that have not ended.
    """
    policy = _Policy(limits, over_length, split_tolerance_s, silent_below_dbfs)
    streams: dict[int | None, dict[Part, _Reading]] = {}
    for index, recording in enumerate(parts):
        part = _part(recording, policy)
        same = streams.setdefault(recording.stream, {})
        same.setdefault(part, _Reading(part, policy)).takers.append((index, recording))
    for stream, found in streams.items():
        # Plain numbers: they go to another process, and NumPy's do not.
        number = None if stream is None else int(stream)
        asked = Asked(limits.sample_rate, Path(parts[0].uri).suffix, number)
        readings = sorted(found.values(), key=lambda reading: reading.part.offset_s)
        yield from _read_stream(file, asked, readings, policy, open_decoding)


class _Policy(NamedTuple):
    limits: AudioLimits
    over_length: OverLength
    split_tolerance_s: float
    silent_below_dbfs: float

    @property
    def rejects_long(self) -> bool:
        return self.over_length == "dead-letter"


def _part(recording: Recording, policy: _Policy) -> Part:
    offset_s, duration_s = float(recording.offset_s), recording.duration_s
    if not 0 <= offset_s < math.inf or not (duration_s is None or math.isfinite(duration_s)):
        raise ValueError(
            f"offset_s is {offset_s} and duration_s {duration_s}; both must be finite, the offset 0 or more, since "
            "it counts from the start of the object"
        )
    most = None if policy.over_length == "split" else decided_samples(policy.limits)
    channel = channel_text(recording.channel)
    return Part(offset_s, None if duration_s is None else float(duration_s), channel, most)


class _Reading:
    """A part that is being decoded, for all recordings that request the same part.

    Attributes:
        takers: Index among the parts, and the recording, for each of them.
        has_ended: Whether its last segment or its rejection was yielded.
    """

    def __init__(self, part: Part, policy: _Policy) -> None:
        self.part = part
        self.takers: list[tuple[int, Recording]] = []
        self.has_ended = False
        self._policy = policy
        self._cutter: Cutter | None = None
        self._segments = 0
        self._samples = 0

    def gathers_s(self, decoding: Decoding) -> float:
        """Returns how much audio it needs in memory at most, in seconds."""
        limits = self._policy.limits
        stated = decoding.stated_samples(self.part)
        wanted_s = self.part.duration_s if stated is None else stated / limits.sample_rate
        return limits.max_s if wanted_s is None else min(max(wanted_s, 0.0), limits.max_s)

    def ends_s(self) -> float:
        """Returns where in the object it ends, in seconds; infinite for the object's end."""
        most, duration_s = self.part.most_samples, self.part.duration_s
        until_s = math.inf if duration_s is None else self.part.offset_s + duration_s
        return until_s if most is None else min(until_s, self._end_s(most))

    def take(self, piece: Piece, decoding: Decoding) -> Iterator[tuple[int, Segment | Rejected]]:
        """Yields the segments that its next samples complete; none after it has ended, even if more was decoded."""
        if self.has_ended:
            return
        if self._cutter is None:
            tolerance_s = min(self._policy.split_tolerance_s, self._policy.limits.max_s)
            tolerance = round(tolerance_s * self._policy.limits.sample_rate)
            is_split = self._policy.over_length == "split"
            expected = decoding.stated_samples(self.part)
            self._cutter = Cutter(
                self._policy.limits, tolerance_samples=tolerance if is_split else 0, expected=expected
            )
        self._samples += len(piece.samples)
        for cut in self._cutter.push(piece.samples):
            yield from self._give(cut, decoding)
            del cut  # or it stays in memory while the next one is filled
            if self.has_ended:
                return
        if not piece.is_end:
            return
        if piece.rejected is not None:
            yield from self.reject(piece.rejected)
        elif (last := self._cutter.end()) is not None:
            yield from self._give(last, decoding)
        else:
            limits = self._policy.limits
            yield from self.reject(lengths.too_short(decoding, limits, self._samples, self._end_s(self._samples)))

    def reject(self, rejected: Rejected) -> Iterator[tuple[int, Rejected]]:
        """Ends this part, with a rejection for all of its recordings."""
        self._end()
        for index, _ in self.takers:
            yield index, rejected

    def _give(self, cut: Cut, decoding: Decoding) -> Iterator[tuple[int, Segment | Rejected]]:
        policy = self._policy
        decided_s = self._end_s(decided_samples(policy.limits))  # the shortest possible length if more follows
        if policy.rejects_long and not cut.is_last:
            yield from self.reject(lengths.too_long(decoding, policy.limits, decided_s))
            return
        is_truncated = policy.over_length == "truncate"
        info = decoding.info
        if decoding.ended and cut.is_last:
            info = info._replace(duration_s=decoding.position_s)
        elif is_truncated and not cut.is_last:
            info = info._replace(duration_s=max(info.duration_s or 0.0, decided_s))
        if cut.is_last or is_truncated:
            self._end()
        index, self._segments = self._segments, self._segments + 1
        levels = measure(cut.samples, silent_below_dbfs=policy.silent_below_dbfs)
        tolerance_s = policy.split_tolerance_s
        for taker, recording in self.takers:
            yield (
                taker,
                Segment(
                    recording=recording,
                    info=info,
                    segment_index=index,
                    start_s=self._end_s(cut.start),
                    end_s=self._end_s(cut.start + len(cut.samples)),
                    is_last=self.has_ended,
                    sample_rate=decoding.sample_rate,
                    samples=cut.samples,
                    levels=levels,
                    cut_at=f"silence:{tolerance_s}" if tolerance_s else "cap",
                ),
            )

    def _end(self) -> None:
        self.has_ended = True
        self._cutter = None  # with what it gathered beyond

    def _end_s(self, samples: int) -> float:
        """Returns the end of its first `samples` samples, in seconds from the start of the object."""
        return self.part.offset_s + samples / self._policy.limits.sample_rate


def _read_stream(
    file: BinaryIO, asked: Asked, readings: list[_Reading], policy: _Policy, open_decoding: OpenDecoding
) -> Iterator[tuple[int, Segment | Rejected]]:
    """Decodes all parts of one audio stream, sorted by offset, in as many passes as they need."""
    try:
        if policy.rejects_long and (whole_s := lengths.read_large_index(file, asked.stream)) is not None:
            for reading in readings:
                try:
                    lengths.check_large_index(whole_s, reading.part, policy.limits)
                except Rejected as rejected:
                    yield from reading.reject(rejected)
        while readings := [reading for reading in readings if not reading.has_ended]:
            with open_decoding(file, asked) as decoding:
                yield from _read_pass(decoding, readings, policy)
            if not any(reading.has_ended for reading in readings):
                raise RuntimeError("a pass over the file ended none of its parts; another one would not either")
    except Rejected as rejected:
        for reading in readings:
            if not reading.has_ended:
                yield from reading.reject(rejected)


def _read_pass(
    decoding: Decoding, readings: list[_Reading], policy: _Policy
) -> Iterator[tuple[int, Segment | Rejected]]:
    possible = []
    for reading in readings:
        try:
            channel_index(reading.part.channel, decoding.info)
            if policy.rejects_long:
                lengths.check_stated(decoding, reading.part, policy.limits)
        except Rejected as rejected:
            yield from reading.reject(rejected)
        else:
            possible.append(reading)
    chosen = _that_fit(_of_one_kind(possible, decoding), decoding)
    if not chosen:
        return
    missing = len(chosen)
    pieces = decoding.pieces([reading.part for reading in chosen])
    for piece in pieces:
        if piece is None:
            continue
        reading = chosen[piece.part]
        yield from reading.take(piece, decoding)
        missing -= piece.is_end
        if not missing:
            return


def _of_one_kind(readings: list[_Reading], decoding: Decoding) -> list[_Reading]:
    """Returns the parts of the mix, or those of single channels: only the latter end if the channels change."""
    if decoding.info.decoder == "soundfile" or not readings:
        return readings
    of_mix = readings[0].part.channel == MIX
    return [reading for reading in readings if (reading.part.channel == MIX) == of_mix]


def _that_fit(readings: list[_Reading], decoding: Decoding) -> list[_Reading]:
    """Chooses from parts sorted by offset those that one pass can decode in bounded memory; at least the first."""
    chosen: list[_Reading] = []
    open_: list[tuple[float, float]] = []  # where a part ends, and what it gathers, in seconds
    buffered_s = 0.0
    for reading in readings:
        while open_ and open_[0][0] <= reading.part.offset_s:
            buffered_s -= heappop(open_)[1]
        gathers_s = reading.gathers_s(decoding)
        if open_ and (buffered_s + gathers_s > BUFFERED_S or len(open_) == _MOST_AT_ONCE):
            continue
        if len(chosen) == _MOST_PARTS:
            break
        heappush(open_, (reading.ends_s(), gathers_s))
        buffered_s += gathers_s
        chosen.append(reading)
    return chosen
