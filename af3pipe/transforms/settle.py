"""All that became of a recording, as one element, without a shuffle: how a stream reconciles.

A bounded pipeline lets answers meet by recording when all are there. A stream never knows that all are there; but
decoding and asking are one fused stage, which ends its bundle when every segment is answered. So what belongs
together is in one bundle, and meets at its end.
"""

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator
from datetime import datetime
from typing import Any, NamedTuple

import apache_beam as beam
from apache_beam.coders import registry
from apache_beam.pvalue import TaggedOutput
from apache_beam.transforms.window import GlobalWindow, TimestampedValue
from apache_beam.utils.timestamp import Timestamp
from apache_beam.utils.windowed_value import WindowedValue

from af3pipe.schemas import Answer, Covered, DeadLetter, Recording, RecordingResult, Task, task_key
from af3pipe.transforms.ask import KEPT, KNOWN, PARTS, AskAudioFlamingo, stitch_group, stitch_key
from af3pipe.transforms.coders import RowTupleCoder
from af3pipe.transforms.decode import DecodeAudio
from af3pipe.transforms.outcome import DEAD_LETTERS, recording_of
from af3pipe.transforms.overlap import OverlapDoFn
from af3pipe.transforms.reconcile import asked_of, covered_by, failed_by, settle, settle_rejected

_RECORDING = "recording"
_SEGMENT = "segment"
_ANSWER = "answer"


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


registry.register_coder(SettledRecording, RowTupleCoder)


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


class _TaggingDoFn(beam.DoFn):
    """A DoFn of several outputs as one of a single output, of (tag, item), which passes on what is not for it.

    Some runners put a break between a stage and the Flatten of its outputs.
    """

    def __init__(self, dofn: OverlapDoFn[Any, Any], takes: str, gives: str, *, keeps_input: bool = False) -> None:
        self._dofn = dofn
        self._takes = takes
        self._gives = gives
        self._keeps_input = keeps_input

    def setup(self) -> None:
        self._dofn.setup()

    def start_bundle(self) -> None:
        self._dofn.start_bundle()

    def process(
        self,
        tagged: tuple[str, Any],
        timestamp: Any = beam.DoFn.TimestampParam,
        window: Any = beam.DoFn.WindowParam,
    ) -> Iterator[Any]:
        tag, item = tagged
        if tag != self._takes or self._keeps_input:
            yield tagged
        if tag == self._takes:
            yield from map(self._tagged, self._dofn.process(item, timestamp, window))

    def finish_bundle(self) -> Iterator[WindowedValue]:
        yield from map(self._tagged, self._dofn.finish_bundle())

    def teardown(self) -> None:
        self._dofn.teardown()

    def _tagged(self, output: Any) -> WindowedValue:
        tag, windowed = (output.tag, output.value) if isinstance(output, TaggedOutput) else (self._gives, output)
        return windowed.with_value((tag, windowed.value))


class _Gathered:
    """What became of one recording so far."""

    def __init__(self) -> None:
        self.recording: Recording | None = None
        self.answers: list[Answer] = []
        self.parts: dict[str, list[Answer]] = defaultdict(list)
        self.known: dict[str, list[Covered]] = defaultdict(list)
        self.kept: list[Covered] = []
        self.dead_letters: list[DeadLetter] = []

    def add(self, tag: str, item: Any) -> None:
        if tag == PARTS:
            self.parts[stitch_key(item.recording_id, item.task, item.question_id)].append(item)
        elif tag == KNOWN:
            self.known[item[0]].append(item[1])
        elif tag == KEPT:
            self.kept.append(item[1])
        elif tag == DEAD_LETTERS:
            self.dead_letters.append(item)
        elif tag == _RECORDING:
            self.recording = item
        else:
            self.answers.append(item)

    def settle(self, tasks: frozenset[str]) -> SettledRecording:
        """Raises NotTogether."""
        for key, parts in self.parts.items():
            once = {part.answer_key: part for part in parts}.values()
            for stitched in stitch_group(key, {"parts": once, "known": self.known[key]}):
                if isinstance(stitched, TaggedOutput):
                    self.kept.append(stitched.value[1])
                else:
                    self.answers.append(stitched)
        if self.recording is None:
            raise NotTogether("answers of a recording that is not in their bundle")
        result = settle(
            self.recording,
            map(covered_by, self.answers),
            map(failed_by, self.dead_letters),
            asked_of(self.recording, tasks),
            kept=self.kept,
        )
        if result is None:
            raise NotTogether(f"{self.recording.uri} came to an end without an answer to each task")
        new = tuple(letter for letter in self.dead_letters if not letter.run_id)
        return SettledRecording(result, tuple(self.answers), new)


class _GatherDoFn(beam.DoFn):
    """(tag, item) to `SettledRecording` at the end of the bundle."""

    def __init__(self, tasks: frozenset[str]) -> None:
        self._tasks = tasks

    def start_bundle(self) -> None:
        # By recording and version: a bundle may have two versions of a file that is written again and again.
        self._versions: dict[tuple[str, str], _Gathered] = defaultdict(_Gathered)

    def process(self, tagged: tuple[str, Any]) -> None:
        self._versions[_version(*tagged)].add(*tagged)

    def finish_bundle(self) -> Iterator[WindowedValue]:
        for gathered in self._versions.values():
            yield _windowed(gathered.settle(self._tasks))


def _version(tag: str, item: Any) -> tuple[str, str]:
    if tag in (KEPT, KNOWN):
        name, covered = item
        return name if tag == KEPT else json.loads(name)[0], covered.content_identity
    if tag == DEAD_LETTERS:
        return item.recording_id, recording_of(item.input).content_identity
    return item.recording_id, item.content_identity


def _windowed(settled: SettledRecording) -> WindowedValue:
    return WindowedValue(settled, event_time(settled), (GlobalWindow(),))


class AnswerAndSettle(beam.PTransform):
    """What `AnswerRecordings` and `ReconcileRecordings` do, for a stream: nothing of it waits for a shuffle.

    Takes `Recording`, in the global window, with the size that a listing or a message gave it; gives
    `SettledRecording`, each with its object's modification time.

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
        return (
            recordings
            | "Tag" >> beam.Map(lambda recording: (_RECORDING, recording)).with_output_types(tuple[str, Any])
            | "Decode" >> beam.ParDo(_TaggingDoFn(self._decode.dofn, _RECORDING, _SEGMENT, keeps_input=True))
            | "Ask" >> beam.ParDo(_TaggingDoFn(self._ask.dofn, _SEGMENT, _ANSWER))
            | "Settle" >> beam.ParDo(_GatherDoFn(self._tasks)).with_output_types(SettledRecording)
        )


def settle_letter(letter: DeadLetter) -> SettledRecording:
    """What there is of a recording that was rejected before there was anything to ask."""
    return SettledRecording(settle_rejected(letter.recording_id, [failed_by(letter)]), (), (letter,))


class SettleRejected(beam.PTransform):
    """`DeadLetter` of what was rejected before there was anything to ask, to `SettledRecording`, in a stream."""

    def expand(self, letters: Any) -> Any:
        return letters | "SettleRejected" >> beam.Map(lambda letter: _timed(settle_letter(letter))).with_output_types(
            SettledRecording
        )


def _timed(settled: SettledRecording) -> TimestampedValue:
    return TimestampedValue(settled, event_time(settled))
