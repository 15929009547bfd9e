"""Segments to answers, on the process's one engine."""

import json
import operator
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from typing import Any

import apache_beam as beam

from af3pipe.models.engine import (
    EngineFailed,
    EngineInfo,
    EngineOptions,
    acquire_engine,
    release_engine,
)
from af3pipe.models.family import DEFAULT_MODEL
from af3pipe.models.tasks import answer, parse, resolve, stitch
from af3pipe.schemas import (
    Answer,
    DeadLetter,
    Recording,
    Reply,
    Request,
    Segment,
    Stage,
    Task,
    TimedText,
    answer_key,
)
from af3pipe.transforms import metrics
from af3pipe.transforms.decode import DecodeAudio
from af3pipe.transforms.outcome import (
    DEAD_LETTERS,
    Outcome,
    join_dead_letters,
    now_us,
    outcomes,
    split_input,
    to_dead_letter,
)
from af3pipe.transforms.overlap import OverlapDoFn

_PARTS = "parts"
_ENGINE_COUNTERS = (
    "windows",
    "audio_tokens",
    "prompt_tokens",
    "reused_tokens",
    "new_tokens",
    "steps",
    "slot_steps",
    "slot_capacity",
)


def make_answer(segment: Segment, task: Task, reply: Reply, info: EngineInfo) -> Answer:
    """The row for one reply.

    Raises:
        Rejected: The reply is not what the task allows.
    """
    text, choice = parse(task, reply.text)
    recording = segment.recording
    prompt = task.prompt or ""
    return Answer(
        recording_id=recording.recording_id,
        uri=recording.uri,
        size_bytes=recording.size_bytes,
        etag=recording.etag,
        mtime=recording.mtime,
        segment_index=segment.segment_index,
        start_s=segment.start_s,
        end_s=segment.end_s,
        duration_s=segment.info.duration_s,
        sample_rate=segment.info.sample_rate,
        channels=segment.info.channels,
        codec=segment.info.codec,
        **segment.levels._asdict(),
        channel=recording.channel,
        stream=recording.stream,
        task=task.name,
        prompt=prompt,
        question_id=task.question_id,
        question=task.question,
        choices=task.choices,
        text=text,
        choice=choice,
        segments=(TimedText(segment.start_s, segment.end_s, text),) if task.stitch else (),
        finish_reason=reply.finish_reason,
        audio_tokens=reply.audio_tokens,
        prompt_tokens=reply.prompt_tokens,
        new_tokens=reply.new_tokens,
        model_id=info.model_id,
        model_revision=info.model_revision,
        family=info.family,
        engine=info.engine,
        dtype=info.dtype,
        decoding=task.decoding.to_json(),
        answer_key=answer_key(recording, segment.start_s, segment.end_s, task, info.model_id, info.model_revision),
        metadata=recording.metadata,
        run_id="",
        created_at=now_us(),
    )


def check_tasks(tasks: Sequence[Task]) -> None:
    """Raises ValueError for no task, and for two that nobody could tell apart in the output."""
    if not tasks:
        raise ValueError("tasks is empty; ask at least one, for example tasks=[caption()]")
    names = [(task.name, task.question_id) for task in tasks]
    for task in tasks:
        if names.count((task.name, task.question_id)) > 1:
            asked = f"question {task.question!r}" if task.question else f"task {task.name!r}"
            raise ValueError(f"{asked} is asked twice; leave one out, or give it a name or id of its own")


class AskDoFn(OverlapDoFn[Segment, list[Reply]]):
    """Emits `Answer`; pieces of answers to be stitched to the tag `parts`; `DeadLetter` to `dead_letters`.

    The engine is held once per process, whatever the number of instances, threads and bundles. What is pending is
    bounded by count and by seconds of audio: one runner gives a whole stage as one bundle.
    """

    def __init__(self, options: EngineOptions, tasks: Sequence[Task], question_tokens: int = 256) -> None:
        # Two batches: one that the engine works on, one that it finds when it is done. More where it has more slots.
        super().__init__(2 * (options.slots or 16), 2 * options.queue_audio_s)
        self._options = options
        self._asked = tuple(tasks)
        self._question_tokens = question_tokens

    def setup(self) -> None:
        self._engine = acquire_engine(self._options)
        self._info = self._engine.info
        engines = len(self._info.device.split(","))
        self._max_pending = max(2 * self._info.slots, 2 * (self._options.slots or 16))
        self._max_weight = 2 * engines * self._options.queue_audio_s
        self._tasks = tuple(resolve(task, self._info.family) for task in self._asked)

    def teardown(self) -> None:
        super().teardown()
        release_engine(self._options)

    def weigh(self, segment: Segment) -> float:
        return segment.audio_s

    def tasks_of(self, recording: Recording) -> tuple[Task, ...]:
        """The job's tasks and the recording's own questions, each once."""
        limit = self._question_tokens
        own = (answer(q.text, q.choices, q.question_id, max_new_tokens=limit) for q in recording.questions)
        tasks = (*self._tasks, *(resolve(task, self._info.family) for task in own))
        return tuple({(task.name, task.question_id): task for task in reversed(tasks)}.values())[::-1]

    def submit(self, segment: Segment) -> "Future[list[Reply]]":
        return self._engine.submit(Request(segment.samples, self.tasks_of(segment.recording)))

    def emit(self, segment: Segment, future: "Future[list[Reply]]") -> Iterator[Any]:
        metrics.count("segments_asked")
        metrics.count_seconds("audio", segment.audio_s)
        if segment.is_last:
            metrics.count("recordings_done")
        for outcome in self._answers(segment, self.tasks_of(segment.recording), future):
            if isinstance(outcome, DeadLetter):
                metrics.count(f"dead_letters_{outcome.reason.value}")
                yield beam.pvalue.TaggedOutput(DEAD_LETTERS, outcome)
                continue
            metrics.count("answers")
            is_part = outcome.segments and not (segment.segment_index == 0 and segment.is_last)
            yield beam.pvalue.TaggedOutput(_PARTS, outcome) if is_part else outcome
        self._count_engine()

    def _answers(
        self, segment: Segment, tasks: tuple[Task, ...], future: "Future[list[Reply]]"
    ) -> Iterator[Answer | DeadLetter]:
        """One outcome per task; one dead letter for all of them where the request as a whole failed."""

        def lost(error: Exception) -> DeadLetter:
            return to_dead_letter(error, segment.recording, stage=Stage.GENERATE, segment=segment, tasks=tasks)

        for replies in outcomes(iter_result(future), lost):
            if isinstance(replies, DeadLetter):
                yield replies
                continue
            if len(replies) != len(tasks):
                raise EngineFailed(f"the engine gave {len(replies)} replies to {len(tasks)} tasks")
            for task, reply in zip(tasks, replies, strict=True):
                yield from self._answer(segment, task, reply)

    def _answer(self, segment: Segment, task: Task, reply: Reply) -> Iterator[Answer | DeadLetter]:
        def invalid(error: Exception) -> DeadLetter:
            return to_dead_letter(error, segment.recording, stage=Stage.PARSE, segment=segment, tasks=(task,))

        return outcomes((make_answer(segment, task, reply, self._info) for _ in range(1)), invalid)

    def _count_engine(self) -> None:
        """Beam drops what is counted on the engine's thread, so a bundle's thread collects it."""
        stats = self._engine.take_stats()
        for name in _ENGINE_COUNTERS:
            metrics.count(name, getattr(stats, name))
        for name in ("encode", "prefill", "decode", "idle"):
            metrics.count_seconds(name, getattr(stats, f"{name}_s"))
        if stats.slot_capacity:
            metrics.observe("slots_taken_percent", round(100 * stats.slot_steps / stats.slot_capacity))


def iter_result(future: "Future[list[Reply]]") -> Iterator[list[Reply]]:
    """The future's result, raised inside the iteration, where `outcomes` catches it."""
    yield future.result()


class _Stitch(beam.PTransform):
    """Segments of one recording meet again, as text: their transcripts become one answer."""

    def expand(self, parts: Any) -> Any:
        return (
            parts
            | "ByRecordingAndTask" >> beam.WithKeys(_stitch_key).with_output_types(tuple[str, Answer])
            | "GroupParts" >> beam.GroupByKey()
            | "Join" >> beam.MapTuple(_stitch_group).with_output_types(Answer)
        )


def _stitch_key(part: Answer) -> str:
    return json.dumps([part.recording_id, part.task, part.question_id])  # ids may hold any separator


def _stitch_group(_: str, parts: Iterable[Answer]) -> Answer:
    return stitch(sorted(parts, key=operator.attrgetter("segment_index")))


class AskAudioFlamingo(beam.PTransform):
    """Asks Audio Flamingo 3 or Music Flamingo about segments of audio.

    Takes `Segment` (a PCollection, or the Outcome of `DecodeAudio`); gives an `Outcome` of `Answer`. A recording
    of several segments gives one transcript, stitched with its times, and an answer per segment to other tasks.
    A request that fails is a dead letter and costs no other; a model that cannot be loaded ends the job.

    Args:
        model: Hub id, local directory, or `demo`. The released weights are for non-commercial use.
        tasks: What is asked of every segment; a recording's own questions are asked beside them.
        revision: Branch, tag or commit of the model on the hub.
        engine: What turns requests into replies: `transformers`.
        dtype: `auto` is bfloat16 on CUDA and float32 on CPU.
        device: As torch names it. `auto` claims a GPU that no other process has, and is the CPU where there is none;
            `all` claims every such GPU, and starts an engine process for each. `cuda:0,cuda:1` names them instead.
        slots: Most prompts decoded together; None for what the device is good for.
        queue_audio_s: Most seconds of audio that wait for the engine.
        question_tokens: Longest reply to a recording's own questions.

    Raises:
        ValueError: No task, or two of the same name and question.
    """

    def __init__(
        self,
        *,
        model: str = DEFAULT_MODEL,
        tasks: Sequence[Task],
        revision: str | None = None,
        engine: str = "transformers",
        dtype: str = "auto",
        device: str = "auto",
        slots: int | None = None,
        queue_audio_s: float = EngineOptions._field_defaults["queue_audio_s"],
        question_tokens: int = 256,
    ) -> None:
        super().__init__()
        check_tasks(tasks)
        options = EngineOptions(model, engine, revision, dtype, device, slots, queue_audio_s)
        self._dofn = AskDoFn(options, tasks, question_tokens)

    def expand(self, inputs: Any) -> Any:
        segments, before = split_input(inputs)
        asked = segments | "Ask" >> beam.ParDo(self._dofn).with_output_types(
            Answer, **{DEAD_LETTERS: DeadLetter, _PARTS: Answer}
        ).with_outputs(DEAD_LETTERS, _PARTS, main="whole")
        stitched = asked[_PARTS] | "Stitch" >> _Stitch()
        good = (asked.whole, stitched) | "AllAnswers" >> beam.Flatten()
        return Outcome(good, join_dead_letters(asked[DEAD_LETTERS], before))


class AnswerRecordings(beam.PTransform):
    """`DecodeAudio` and `AskAudioFlamingo` as one step, so that a runner keeps both on the same worker.

    Takes `Recording`; gives an `Outcome` of `Answer`. PCM then never crosses a shuffle or the network.

    Args:
        decode: How recordings are decoded.
        ask: What is asked.
        accelerator: Beam's accelerator resource hint, for example
            `type:nvidia-l4;count:1;install-nvidia-driver`. It is set on this step and not on its parts: a hint on
            one of them would put them into different worker environments.
    """

    def __init__(self, decode: DecodeAudio, ask: AskAudioFlamingo, *, accelerator: str | None = None) -> None:
        super().__init__()
        self._decode = decode
        self._ask = ask
        if accelerator:
            self.with_resource_hints(accelerator=accelerator)

    def expand(self, inputs: Any) -> Any:
        answers: Outcome = inputs | "DecodeAudio" >> self._decode | "AskAudioFlamingo" >> self._ask
        return answers
