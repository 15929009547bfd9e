"""Segments to answers, on the process's one engine."""

import hashlib
import json
import operator
import zlib
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple

import apache_beam as beam
import numpy as np
from apache_beam.coders import registry

from af3pipe.models.engine import (
    Engine,
    EngineFailed,
    EngineInfo,
    EngineOptions,
    acquire_engine,
    release_engine,
)
from af3pipe.models.family import DEFAULT_MODEL
from af3pipe.models.tasks import ANSWER, answer, parse, resolve, stitch, thinking
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
    Turn,
    answer_key,
)
from af3pipe.transforms import metrics
from af3pipe.transforms.coders import RowTupleCoder
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

_ASKED = "asked"
_PARTS = "parts"
_PENDING_PER_SLOT = 3  # one that the engine works on, two that it finds when that is done
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


class AskedRequest(NamedTuple):
    """A request that was answered, without its audio: all it takes to ask it again.

    Attributes:
        checksum: Of the audio that was heard; see `audio_checksum`.
        replies: One per task, in order.
    """

    recording: Recording
    segment_index: int
    checksum: int
    replies: tuple[Reply, ...]


registry.register_coder(AskedRequest, RowTupleCoder)


class VerifiableOutcome(NamedTuple):
    """An `Outcome` of answers, and the `AskedRequest`s that `VerifyAnswers` takes a sample of."""

    good: Any
    dead_letters: Any
    asked: Any


def audio_checksum(request: Request) -> int:
    """CRC-32 over the samples of a request."""
    checksum = 0
    for audio in request.audios:
        checksum = zlib.crc32(np.ascontiguousarray(audio).data, checksum)
    return checksum


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
        history=tuple(turn.prompt for turn in task.history),
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
    """Whether tasks can be asked together.

    Raises:
        ValueError: No task, two that nobody could tell apart in the output, or a follow-up to what was not asked.
    """
    if not tasks:
        raise ValueError("tasks is empty; ask at least one, for example tasks=[caption()]")
    names = [(task.name, task.question_id) for task in tasks]
    for task in tasks:
        if names.count((task.name, task.question_id)) > 1:
            raise ValueError(f"{_told(task)} is asked twice; leave one out, or give it a name or id of its own")
    asked: set[tuple[Turn, ...]] = set()
    for task in tasks:
        if task.history and task.history not in asked:
            before = task.history[-1].prompt
            raise ValueError(f"{_told(task)} follows up {before!r}, which is not asked before it; ask that, too")
        asked.add(thinking(task).turns)


def _told(task: Task) -> str:
    return f"question {task.question!r}" if task.question else f"task {task.name!r}"


def request_seed(segment: Segment) -> int:
    """Of a segment's request, below 2**32: another one for every recording, the same one on every run."""
    place = json.dumps([segment.recording.recording_id, segment.start_s])
    return int.from_bytes(hashlib.sha256(place.encode()).digest()[:4], "big")


class AskDoFn(OverlapDoFn[Segment, list[Reply]]):
    """Emits `Answer`; pieces of answers to be stitched to the tag `parts`; `DeadLetter` to `dead_letters`.

    When `verifiable`, emits an `AskedRequest` to the tag `asked` for each request that was answered.

    The engine is held once per process, whatever the number of instances, threads and bundles. What is pending is
    bounded by count and by seconds of audio: one runner gives a whole stage as one bundle.
    """

    def __init__(
        self,
        options: EngineOptions,
        tasks: Sequence[Task],
        question_tokens: int = 256,
        question_think: bool = False,
        *,
        verifiable: bool = False,
    ) -> None:
        super().__init__(_PENDING_PER_SLOT, 2 * options.queue_audio_s)  # how many slots is known once it is open
        self._options = options
        self._asked = tuple(tasks)
        self._question_tokens = question_tokens
        self._question_think = question_think
        self.verifiable = verifiable

    def setup(self) -> None:
        self._engine = acquire_engine(self._options)
        self._info = self._engine.info
        self._max_pending = _PENDING_PER_SLOT * self._info.slots
        self._max_weight = 2 * len(self._info.device.split(",")) * self._options.queue_audio_s
        self._tasks = tuple(resolve(task, self._info.family) for task in self._asked)

    def teardown(self) -> None:
        super().teardown()
        release_engine(self._options)

    @property
    def engine(self) -> Engine:
        """The process's, between setup and teardown."""
        return self._engine

    @property
    def options(self) -> EngineOptions:
        """What the engine is opened with."""
        return self._options

    def weigh(self, segment: Segment) -> float:
        return segment.audio_s

    def tasks_of(self, recording: Recording) -> tuple[Task, ...]:
        """The job's tasks and the recording's own questions, each once, a follow-up behind what it follows."""
        tasks = {(task.name, task.question_id): task for task in self._tasks}
        for asked in recording.questions:
            task = answer(
                asked.text,
                asked.choices,
                asked.question_id,
                prompt=asked.prompt,
                max_new_tokens=self._question_tokens,
                think=self._question_think,
                # As it is asked here, which may be the job's way.
                after=None if asked.after is None else tasks[ANSWER, asked.after],
            )
            tasks.setdefault((task.name, task.question_id), resolve(task, self._info.family))
        return tuple(tasks.values())

    def request_of(self, segment: Segment) -> Request:
        """All that is asked of a segment, however often it is asked."""
        return Request(segment.samples, self.tasks_of(segment.recording), request_seed(segment))

    def submit(self, segment: Segment) -> "Future[list[Reply]]":
        return self._engine.submit(self.request_of(segment))

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
            if isinstance(outcome, AskedRequest):
                yield beam.pvalue.TaggedOutput(_ASKED, outcome)
                continue
            metrics.count("answers")
            is_part = outcome.segments and not (segment.segment_index == 0 and segment.is_last)
            yield beam.pvalue.TaggedOutput(_PARTS, outcome) if is_part else outcome
        self._count_engine()

    def _answers(
        self, segment: Segment, tasks: tuple[Task, ...], future: "Future[list[Reply]]"
    ) -> Iterator[Answer | DeadLetter | AskedRequest]:
        """One outcome per task; one dead letter for all of them where the request as a whole failed."""

        def lost(error: Exception) -> DeadLetter:
            return to_dead_letter(error, segment.recording, stage=Stage.GENERATE, segment=segment, tasks=tasks)

        for replies in outcomes(iter_result(future), lost):
            if isinstance(replies, DeadLetter):
                yield replies
                continue
            if len(replies) != len(tasks):
                raise EngineFailed(f"the engine gave {len(replies)} replies to {len(tasks)} tasks")
            if self.verifiable:
                checksum = audio_checksum(self.request_of(segment))
                yield AskedRequest(segment.recording, segment.segment_index, checksum, tuple(replies))
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
        model: Hub id, local directory, or `demo`. The released weights are for non-commercial use, and so are
            adapters made from them.
        tasks: What is asked of every segment; a recording's own questions are asked beside them.
        revision: Branch, tag or commit of the model on the hub.
        engine: What turns requests into replies: `transformers`.
        dtype: `auto` is bfloat16 on CUDA and float32 on CPU.
        device: As torch names it. `auto` claims a GPU that no other process has, and is the CPU where there is none;
            `all` claims every such GPU, and starts an engine process for each. `cuda:0,cuda:1` names them instead.
        slots: Most prompts decoded together; None for what the device is good for.
        queue_audio_s: Most seconds of audio that wait for the engine.
        question_tokens: Longest reply to a recording's own questions.
        question_think: Whether the model is asked to reason before it answers those.
        attention: Of the audio encoder, by Hugging Face's name for it.
        cuda_graphs: Whether decoding steps are captured as CUDA graphs; without meaning on a CPU.
        adapter: Directory of a PEFT LoRA that is merged into the weights; the workers must have it.
        quantize: `none`, or `int8` or `fp8` for the language model's weights.
        verifiable: Whether it gives a `VerifiableOutcome`, which `VerifyAnswers` takes.

    Raises:
        ValueError: No task, two of the same name and question, or a follow-up to what is not asked.
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
        question_think: bool = False,
        attention: str = EngineOptions._field_defaults["attention"],
        cuda_graphs: bool = True,
        adapter: str | None = None,
        quantize: str = "none",
        verifiable: bool = False,
    ) -> None:
        super().__init__()
        check_tasks(tasks)
        options = EngineOptions(
            model,
            engine,
            revision,
            dtype,
            device,
            slots,
            queue_audio_s,
            attention=attention,
            cuda_graphs=cuda_graphs,
            adapter=adapter,
            quantize=quantize,
        )
        self.dofn = AskDoFn(options, tasks, question_tokens, question_think, verifiable=verifiable)

    def expand(self, inputs: Any) -> Any:
        segments, before = split_input(inputs)
        tags: dict[str, Any] = {DEAD_LETTERS: DeadLetter, _PARTS: Answer}
        if self.dofn.verifiable:
            tags[_ASKED] = AskedRequest
        asked = segments | "Ask" >> beam.ParDo(self.dofn).with_output_types(Answer, **tags).with_outputs(
            *tags, main="whole"
        )
        stitched = asked[_PARTS] | "Stitch" >> _Stitch()
        good = (asked.whole, stitched) | "AllAnswers" >> beam.Flatten()
        dead_letters = join_dead_letters(asked[DEAD_LETTERS], before)
        if self.dofn.verifiable:
            return VerifiableOutcome(good, dead_letters, asked[_ASKED])
        return Outcome(good, dead_letters)


class AnswerRecordings(beam.PTransform):
    """`DecodeAudio` and `AskAudioFlamingo` as one step, so that a runner keeps both on the same worker.

    Takes `Recording`; gives what `ask` gives. PCM then never crosses a shuffle or the network.

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
        answers: Outcome | VerifiableOutcome = (
            inputs | "DecodeAudio" >> self._decode | "AskAudioFlamingo" >> self._ask
        )
        return answers
