"""All that became of a recording, as one element, without a shuffle: it can be written as soon as it is asked.

Answers that meet by recording in a shuffle do so when all recordings are asked. But decoding and asking are one fused
stage, where all that belongs to a recording is in one bundle: it is counted together there.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime
from typing import Any, NamedTuple, TypeAlias

import apache_beam as beam
from apache_beam.coders import registry
from apache_beam.pvalue import TaggedOutput
from apache_beam.transforms.window import GlobalWindow, TimestampedValue
from apache_beam.utils.timestamp import Timestamp
from apache_beam.utils.windowed_value import WindowedValue

from af3pipe.schemas import Answer, Covered, DeadLetter, Recording, RecordingResult, Segment, Task, task_key
from af3pipe.transforms.ask import ASKED, KEPT, KNOWN, PARTS, AskAudioFlamingo, AskedRequest, stitch_group, stitch_key
from af3pipe.transforms.coders import RowTupleCoder
from af3pipe.transforms.decode import DecodeAudio
from af3pipe.transforms.outcome import DEAD_LETTERS, by_id
from af3pipe.transforms.overlap import DONE, OverlapDoFn
from af3pipe.transforms.reconcile import asked_of, covered_by, failed_by, settle, settle_rejected

_SEGMENT = "segment"
_DECODED = "decoded"
_ANSWERED = "answered"
_REJECTED = "rejected"
_REMEMBERED = 10_000  # more than are ever under way at once: what is left of one that is there twice comes soon
_Version: TypeAlias = tuple[str, str]  # a bundle may have two versions of a file that is written again and again


class PlannedRecording(NamedTuple):
    """A recording that there is something to ask of, and the dead letters that there are of it already.

    Attributes:
        dead_letters: Of other mentions of the same; those that an earlier run wrote say so.
    """

    recording: Recording
    dead_letters: tuple[DeadLetter, ...] = ()


class SettledRecording(NamedTuple):
    """A recording's terminal state, and all rows that this run has of it.

    Attributes:
        result: The row of `recordings/`.
        answers: Those that are new.
        dead_letters: Those that are new.
    """

    result: RecordingResult
    answers: tuple[Answer, ...]
    dead_letters: tuple[DeadLetter, ...]


for _row_class in (PlannedRecording, SettledRecording):
    registry.register_coder(_row_class, RowTupleCoder)


class SettledOutcome(NamedTuple):
    """Settled recordings, and the `AskedRequest`s that `VerifyAnswers` takes a sample of."""

    settled: Any
    asked: Any


def event_time(settled: SettledRecording) -> Timestamp:
    """When the object was modified; where its store does not say, when it was asked.

    What claims to be from before 1970 is from the zero of another clock (1601, 1904): it is of 1970 here, since
    elements that are more than a hundred years late are dropped.
    """
    mtime = settled.result.mtime
    at_s = datetime.fromisoformat(mtime).timestamp() if mtime else settled.result.created_at / 1e6
    return Timestamp.of(max(0.0, at_s))


class NotTogether(Exception):
    """What belongs to one recording came in several bundles: the runner has put a break between asking and this."""


class _Decoded(NamedTuple):
    """A recording of which all segments have gone by.

    Attributes:
        version: As its segments have it: some stores say only when it is opened.
        segments: How many.
    """

    version: _Version
    recording: Recording
    segments: int
    dead_letters: tuple[DeadLetter, ...]


class _Answered(NamedTuple):
    """All that became of a segment: (tag, item) of each output."""

    version: _Version
    segment_index: int
    outputs: tuple[tuple[str, Any], ...]


def _version(recording: Recording) -> _Version:
    return recording.recording_id, recording.content_identity


class _StepDoFn(beam.DoFn):
    """An `OverlapDoFn` as one of a single output, of (tag, item).

    Some runners put a break between a stage and the Flatten of its outputs.
    """

    def __init__(self, dofn: OverlapDoFn[Any, Any]) -> None:
        self._dofn = dofn

    def setup(self) -> None:
        self._dofn.setup()
        self._dofn.tells_done = True

    def start_bundle(self) -> None:
        self._dofn.start_bundle()

    def finish_bundle(self) -> Iterator[WindowedValue]:
        yield from self._tagged(self._dofn.finish_bundle())

    def teardown(self) -> None:
        self._dofn.teardown()

    def take(self, tag: str, item: Any) -> Iterator[tuple[str, Any]]:
        """What goes on of an output of the DoFn."""
        raise NotImplementedError

    def _tagged(self, outputs: Iterable[Any]) -> Iterator[WindowedValue]:
        for output in outputs:
            tag, windowed = (output.tag, output.value) if isinstance(output, TaggedOutput) else ("", output)
            for tagged in self.take(tag, windowed.value):
                yield windowed.with_value(tagged)


class _DecodeStepDoFn(_StepDoFn):
    """`PlannedRecording` or `Recording` to its segments, and `_Decoded` behind them."""

    _opened: Recording | None
    _segments: int
    _letters: list[DeadLetter]

    def start_bundle(self) -> None:
        super().start_bundle()
        self._before: dict[str, tuple[DeadLetter, ...]] = {}
        self._forget()

    def process(
        self,
        planned: PlannedRecording | Recording,
        timestamp: Any = beam.DoFn.TimestampParam,
        window: Any = beam.DoFn.WindowParam,
    ) -> Iterator[Any]:
        recording, letters = planned if isinstance(planned, PlannedRecording) else (planned, ())
        if letters:
            self._before[recording.recording_id] = letters
        yield from self._tagged(self._dofn.process(recording, timestamp, window))

    def take(self, tag: str, item: Any) -> Iterator[tuple[str, Any]]:
        if tag == DONE:
            before = self._before.pop(item.recording_id, ())
            opened = self._opened or item
            yield _DECODED, _Decoded(_version(opened), item, self._segments, (*before, *self._letters))
            self._forget()
        elif tag == DEAD_LETTERS:
            self._letters.append(item)
        else:
            self._opened = item.recording
            self._segments += 1
            yield _SEGMENT, item

    def _forget(self) -> None:
        self._opened, self._segments, self._letters = None, 0, []


class _AskStepDoFn(_StepDoFn):
    """Segments to `_Answered`."""

    def start_bundle(self) -> None:
        super().start_bundle()
        self._outputs: list[tuple[str, Any]] = []

    def process(
        self,
        tagged: tuple[str, Any],
        timestamp: Any = beam.DoFn.TimestampParam,
        window: Any = beam.DoFn.WindowParam,
    ) -> Iterator[Any]:
        tag, item = tagged
        if tag == _SEGMENT:
            yield from self._tagged(self._dofn.process(item, timestamp, window))
        else:
            yield tagged

    def take(self, tag: str, item: Any) -> Iterator[tuple[str, Any]]:
        if tag == DONE:
            segment: Segment = item
            yield _ANSWERED, _Answered(_version(segment.recording), segment.segment_index, tuple(self._outputs))
            self._outputs = []
        else:
            self._outputs.append((tag, item))


class _Gathered:
    """What became of one recording so far."""

    def __init__(self) -> None:
        self.decoded: _Decoded | None = None
        self.answered: set[int] = set()
        self.answers: list[Answer] = []
        self.parts: dict[str, list[Answer]] = defaultdict(list)
        self.known: dict[str, list[Covered]] = defaultdict(list)
        self.kept: list[Covered] = []
        self.dead_letters: list[DeadLetter] = []

    @property
    def is_whole(self) -> bool:
        return self.decoded is not None and len(self.answered) == self.decoded.segments

    def add_decoded(self, decoded: _Decoded) -> None:
        if self.decoded is None:  # else it is in the bundle twice
            self.decoded = decoded
            self.dead_letters.extend(decoded.dead_letters)

    def add_answered(self, answered: _Answered) -> None:
        if answered.segment_index in self.answered:
            return
        self.answered.add(answered.segment_index)
        for tag, item in answered.outputs:
            if tag == PARTS:
                self.parts[stitch_key(item.recording_id, item.task, item.question_id)].append(item)
            elif tag == KNOWN:
                self.known[item[0]].append(item[1])
            elif tag == KEPT:
                self.kept.append(item[1])
            elif tag == DEAD_LETTERS:
                self.dead_letters.append(item)
            elif tag != ASKED:
                self.answers.append(item)

    def settle(self, tasks: frozenset[str]) -> SettledRecording:
        """Raises NotTogether."""
        if self.decoded is None:
            raise NotTogether("answers of a recording that is not in their bundle")
        recording = self.decoded.recording
        if not self.is_whole:
            answered = f"{len(self.answered)} of {self.decoded.segments} segments"
            raise NotTogether(f"{answered} of {recording.uri} were answered in its bundle")
        for key, parts in self.parts.items():
            for stitched in stitch_group(key, {"parts": parts, "known": self.known[key]}):
                if isinstance(stitched, TaggedOutput):
                    self.kept.append(stitched.value[1])
                else:
                    self.answers.append(stitched)
        result = settle(
            recording,
            map(covered_by, self.answers),
            map(failed_by, self.dead_letters),
            asked_of(recording, tasks),
            kept=self.kept,
        )
        if result is None:
            raise NotTogether(f"{recording.uri} came to an end without an answer to each task")
        return SettledRecording(result, tuple(self.answers), new_letters(self.dead_letters))


def new_letters(letters: Iterable[DeadLetter]) -> tuple[DeadLetter, ...]:
    """Those that no earlier run has written."""
    return tuple(letter for letter in letters if not letter.run_id)


class _GatherDoFn(beam.DoFn):
    """(tag, item) to `SettledRecording` as soon as it is whole, and `AskedRequest` to the tag `asked`."""

    def __init__(self, tasks: frozenset[str]) -> None:
        self._tasks = tasks

    def start_bundle(self) -> None:
        self._gathered: dict[_Version, _Gathered] = defaultdict(_Gathered)
        self._settled: dict[_Version, None] = {}

    def process(self, tagged: tuple[str, Any]) -> Iterator[Any]:
        tag, item = tagged
        if tag == _ANSWERED:
            yield from (TaggedOutput(ASKED, asked) for output, asked in item.outputs if output == ASKED)
        if item.version not in self._settled:  # else it is in the bundle twice
            gathered = self._gathered[item.version]
            if tag == _ANSWERED:
                gathered.add_answered(item)
            else:
                gathered.add_decoded(item)
            if gathered.is_whole:
                self._settled[item.version] = None
                if len(self._settled) > _REMEMBERED:
                    del self._settled[next(iter(self._settled))]
                yield _windowed(self._gathered.pop(item.version).settle(self._tasks))

    def finish_bundle(self) -> None:
        for gathered in self._gathered.values():
            gathered.settle(self._tasks)  # raises: it is not whole


def _windowed(settled: SettledRecording) -> WindowedValue:
    return WindowedValue(settled, event_time(settled), (GlobalWindow(),))


class AnswerAndSettle(beam.PTransform):
    """What `AnswerRecordings` and `ReconcileRecordings` do, but nothing of it waits for a shuffle.

    Takes `Recording`, or `PlannedRecording` from `JoinRejected`, in the global window, each version of each once;
    gives `SettledRecording`, each with its object's modification time. In a stream a recording must have the size
    that a listing or a message gave it. With an `ask` that is verifiable, gives a `SettledOutcome`.

    Args:
        decode: How recordings are decoded.
        ask: What is asked.
        tasks: What is asked of every recording.
        accelerator: As of `AnswerRecordings`.
    """

    def __init__(
        self, decode: DecodeAudio, ask: AskAudioFlamingo, tasks: Iterable[Task], *, accelerator: str | None = None
    ) -> None:
        super().__init__()
        self._decode = decode
        self._ask = ask
        self._tasks = frozenset(task_key(task.name, task.question_id) for task in tasks)
        if accelerator:
            self.with_resource_hints(accelerator=accelerator)

    def expand(self, recordings: Any) -> Any:
        answered = (
            recordings
            | "Decode" >> beam.ParDo(_DecodeStepDoFn(self._decode.dofn)).with_output_types(tuple[str, Any])
            | "Ask" >> beam.ParDo(_AskStepDoFn(self._ask.dofn)).with_output_types(tuple[str, Any])
        )
        gather = beam.ParDo(_GatherDoFn(self._tasks))
        if not self._ask.dofn.verifiable:
            return answered | "Settle" >> gather.with_output_types(SettledRecording)
        gather = gather.with_output_types(SettledRecording, **{ASKED: AskedRequest})
        gathered = answered | "Settle" >> gather.with_outputs(ASKED, main="settled")
        return SettledOutcome(gathered.settled, gathered[ASKED])


class JoinedOutcome(NamedTuple):
    """`PlannedRecording`s, and as `SettledRecording` those that were rejected in all their mentions."""

    planned: Any
    settled: Any


class _JoinDoFn(beam.DoFn):
    def process(self, group: tuple[str, dict[str, Iterable[Any]]]) -> Iterator[Any]:
        recordings, letters = list(group[1]["recordings"]), tuple(group[1]["dead_letters"])
        if not recordings:
            yield TaggedOutput(_REJECTED, settle_letters(letters))
        for recording in recordings:
            yield PlannedRecording(recording, letters)


class JoinRejected(beam.PTransform):
    """Has the dead letters of a batch's recordings meet with these, of which other mentions may be good.

    Takes an `Outcome` of `Recording`, before anything is asked; gives a `JoinedOutcome`.
    """

    def expand(self, found: Any) -> Any:
        mentions = {
            "recordings": found.good | "RecordingId" >> beam.Map(by_id).with_output_types(tuple[str, Recording]),
            "dead_letters": found.dead_letters
            | "DeadLetterId" >> beam.Map(by_id).with_output_types(tuple[str, DeadLetter]),
        }
        join = beam.ParDo(_JoinDoFn()).with_output_types(PlannedRecording, **{_REJECTED: SettledRecording})
        joined = mentions | "MeetById" >> beam.CoGroupByKey() | "Join" >> join.with_outputs(_REJECTED, main="planned")
        return JoinedOutcome(joined.planned, joined[_REJECTED])


def settle_letters(letters: Sequence[DeadLetter]) -> SettledRecording:
    """What there is of a recording that was rejected, as often as it was named, before there was anything to ask."""
    return SettledRecording(
        settle_rejected(letters[0].recording_id, map(failed_by, letters)), (), new_letters(letters)
    )


class SettleRejected(beam.PTransform):
    """`DeadLetter` of what was rejected before there was anything to ask, to `SettledRecording`, in a stream."""

    def expand(self, letters: Any) -> Any:
        settle_each = beam.Map(lambda letter: _timed(settle_letters([letter])))
        return letters | "SettleRejected" >> settle_each.with_output_types(SettledRecording)


def _timed(settled: SettledRecording) -> TimestampedValue:
    return TimestampedValue(settled, event_time(settled))
