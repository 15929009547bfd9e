"""Segments to answers, on the process's one engine."""

import hashlib
import json
import operator
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
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
    keep_engine,
    release_engine,
)
from af3pipe.models.family import DEFAULT_MODEL, model_revision, open_checkpoint
from af3pipe.models.tasks import ANSWER, answer, parse, resolve, stitch, thinking
from af3pipe.schemas import (
    ROUNDING_S,
    Answer,
    Covered,
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
    stitched_key,
    task_key,
)
from af3pipe.transforms import metrics
from af3pipe.transforms.coders import RowTupleCoder
from af3pipe.transforms.decode import DecodeAudio
from af3pipe.transforms.outcome import (
    DEAD_LETTERS,
    join_dead_letters,
    now_us,
    outcomes,
    public_uri,
    split_input,
    to_dead_letter,
)
from af3pipe.transforms.overlap import OverlapDoFn

ASKED = "asked"
KEPT = "kept"
KNOWN = "known"
PARTS = "parts"
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


class AnswerOutcome(NamedTuple):
    """An `Outcome` of answers, and what of earlier runs' answers stands, as `ReconcileRecordings` takes it."""

    good: Any
    dead_letters: Any
    kept: Any


class VerifiableOutcome(NamedTuple):
    """An `AnswerOutcome`, and the `AskedRequest`s that `VerifyAnswers` takes a sample of."""

    good: Any
    dead_letters: Any
    kept: Any
    asked: Any


def audio_checksum(request: Request) -> int:
    """CRC-32 over the samples of a request."""
    checksum = 0
    for audio in request.audios:
        checksum = zlib.crc32(np.ascontiguousarray(audio).data, checksum)
    return checksum


def segment_key(segment: Segment, task: Task, model_id: str, model_revision: str) -> str:
    """The `answer_key` of a task asked of a segment."""
    cut_at = segment.cut_at if _is_part(segment, task) else None
    return answer_key(
        segment.recording, segment.start_s, segment.end_s, task, model_id, model_revision, cut_at=cut_at
    )


def _is_part(segment: Segment, task: Task) -> bool:
    """Whether the answer is one of several that make one."""
    return task.stitch and not (segment.segment_index == 0 and segment.is_last)


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
        uri=public_uri(recording),
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
        answer_key=segment_key(segment, task, info.model_id, info.model_revision),
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

    What `earlier` of a recording answers already is not asked: (recording_id, `Covered`) goes to the tag `kept`. The
    tag `known` has earlier answers that stitching may arrive at again, by what the parts are grouped by. When
    `verifiable`, emits an `AskedRequest` to the tag `asked` for each request that was answered.

    The engine is held once per process, whatever the number of instances, threads and bundles; it is opened when
    there is something to ask. What is pending is bounded by count and by seconds of audio: one runner gives a whole
    stage as one bundle.

    With `keep_engine` the process keeps it until it ends: a runner tears an instance down that had nothing to do for
    a while, and a model takes a minute to load.
    """

    def __init__(
        self,
        options: EngineOptions,
        tasks: Sequence[Task],
        question_tokens: int = 256,
        question_think: bool = False,
        *,
        verifiable: bool = False,
        keep_engine: bool = False,
    ) -> None:
        super().__init__(_PENDING_PER_SLOT, 2 * options.queue_audio_s)  # how many slots is known once it is open
        self._options = options
        self._asked = tuple(tasks)
        self._question_tokens = question_tokens
        self._question_think = question_think
        self._engine: Engine | None = None
        self.verifiable = verifiable
        self._keep_engine = keep_engine

    def setup(self) -> None:
        options = self._options
        with self.telling_where():
            checkpoint = open_checkpoint(options.model, options.revision)
            self._model = checkpoint.model_id, model_revision(checkpoint, options.adapter, options.quantize)
        self._family = checkpoint.family
        self._tasks = tuple(resolve(task, self._family) for task in self._asked)

    def teardown(self) -> None:
        super().teardown()
        if self._engine is not None:
            self._engine = None
            release_engine(self._options)

    # A method, because Beam looks at every property of a DoFn where the graph is built.
    def engine(self) -> Engine:
        """The process's; opened the first time that it is wanted between setup and teardown."""
        if self._engine is None:
            with self.telling_where():
                self._engine = acquire_engine(self._options)
            if self._keep_engine:
                keep_engine(self._options)
            self._info = self._engine.info
            self._max_pending = _PENDING_PER_SLOT * self._info.slots
            self._max_weight = 2 * len(self._info.device.split(",")) * self._options.queue_audio_s
        return self._engine

    @property
    def options(self) -> EngineOptions:
        """What the engine is opened with."""
        return self._options

    @property
    def model(self) -> tuple[str, str]:
        """Id and revision of what answers; known after setup."""
        return self._model

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
            tasks.setdefault((task.name, task.question_id), resolve(task, self._family))
        return tuple(tasks.values())

    def request_of(self, segment: Segment) -> Request:
        """What is asked of a segment, however often it is asked; without tasks where there is nothing left to ask."""
        return self._request(segment, self._left(segment).asked)

    def _request(self, segment: Segment, tasks: tuple[Task, ...]) -> Request:
        return Request(segment.samples, tasks, request_seed(segment))

    def _left(self, segment: Segment) -> "_Left":
        """What there is to ask of a segment, held against what earlier runs have answered."""
        tasks = self.tasks_of(segment.recording)
        if not segment.recording.earlier.answers:
            return _Left(tasks, {})
        kept = {task: found for task in tasks if (found := self._answered(segment, task)) is not None}
        # A follow-up needs what the model said before, so that is asked again; its answer is not written again.
        before = {task.history[: n + 1] for task in tasks if task not in kept for n in range(len(task.history))}
        asked = tuple(task for task in tasks if task not in kept or thinking(task).turns in before)
        return _Left(asked, kept)

    def _answered(self, segment: Segment, task: Task) -> Covered | None:
        """The earlier answer to this task, of this very content, model, prompt and decoding."""
        earlier = segment.recording.earlier.answers
        if not _is_part(segment, task):
            key = segment_key(segment, task, *self._model)
            return next((found for found in earlier if found.answer_key == key), None)
        return next((found for found in self._may_be_stitched(segment, task) if _is_whole(segment, found)), None)

    def _may_be_stitched(self, segment: Segment, task: Task) -> Iterator[Covered]:
        """Earlier answers that are stitched of parts such as this one."""
        for found in segment.recording.earlier.answers:
            if found.task == task_key(task.name, task.question_id):
                parts = [
                    answer_key(segment.recording, *piece, task, *self._model, cut_at=segment.cut_at)
                    for piece in found.pieces
                ]
                if stitched_key(parts) == found.answer_key:
                    yield found

    def submit(self, segment: Segment) -> "Future[list[Reply]]":
        tasks = self._left(segment).asked
        if tasks:
            return self.engine().submit(self._request(segment, tasks))
        nothing: Future[list[Reply]] = Future()
        nothing.set_result([])
        return nothing

    def emit(self, segment: Segment, future: "Future[list[Reply]]") -> Iterator[Any]:
        left = self._left(segment)
        if left.asked:
            metrics.count("segments_asked")
            metrics.count_seconds("audio", segment.audio_s)
        if segment.is_last:
            metrics.count("recordings_done")
        for found in left.kept.values():
            metrics.count("answers_kept")
            yield beam.pvalue.TaggedOutput(KEPT, (segment.recording.recording_id, found))
        for outcome in self._answers(segment, left, future):
            if isinstance(outcome, DeadLetter):
                metrics.count(f"dead_letters_{outcome.reason.value}")
                yield beam.pvalue.TaggedOutput(DEAD_LETTERS, outcome)
                continue
            if isinstance(outcome, AskedRequest):
                yield beam.pvalue.TaggedOutput(ASKED, outcome)
                continue
            metrics.count("answers")
            is_part = outcome.segments and not (segment.segment_index == 0 and segment.is_last)
            yield beam.pvalue.TaggedOutput(PARTS, outcome) if is_part else outcome
        for task in left.asked:
            if task not in left.kept and _is_part(segment, task):
                for found in self._may_be_stitched(segment, task):
                    key = stitch_key(segment.recording.recording_id, task.name, task.question_id)
                    yield beam.pvalue.TaggedOutput(KNOWN, (key, found))
        if self._engine is not None:
            self._count_engine(self._engine)

    def _answers(
        self, segment: Segment, left: "_Left", future: "Future[list[Reply]]"
    ) -> Iterator[Answer | DeadLetter | AskedRequest]:
        """One outcome per task; one dead letter for all of them where the request as a whole failed."""

        def lost(error: Exception) -> DeadLetter:
            tasks = tuple(task for task in left.asked if task not in left.kept)
            return to_dead_letter(error, segment.recording, stage=Stage.GENERATE, segment=segment, tasks=tasks)

        for replies in outcomes(iter_result(future), lost):
            if isinstance(replies, DeadLetter):
                yield replies
                continue
            if len(replies) != len(left.asked):
                raise EngineFailed(f"the engine gave {len(replies)} replies to {len(left.asked)} tasks")
            if self.verifiable and left.asked:
                checksum = audio_checksum(self._request(segment, left.asked))
                yield AskedRequest(segment.recording, segment.segment_index, checksum, tuple(replies))
            for task, reply in zip(left.asked, replies, strict=True):
                if task not in left.kept:
                    yield from self._answer(segment, task, reply)

    def _answer(self, segment: Segment, task: Task, reply: Reply) -> Iterator[Answer | DeadLetter]:
        def invalid(error: Exception) -> DeadLetter:
            return to_dead_letter(error, segment.recording, stage=Stage.PARSE, segment=segment, tasks=(task,))

        return outcomes((make_answer(segment, task, reply, self._info) for _ in range(1)), invalid)

    def _count_engine(self, engine: Engine) -> None:
        """Beam drops what is counted on the engine's thread, so a bundle's thread collects it."""
        stats = engine.take_stats()
        for name in _ENGINE_COUNTERS:
            metrics.count(name, getattr(stats, name))
        for name in ("encode", "prefill", "decode", "idle"):
            metrics.count_seconds(name, getattr(stats, f"{name}_s"))
        if stats.slot_capacity:
            metrics.observe("slots_taken_percent", round(100 * stats.slot_steps / stats.slot_capacity))


class _Left(NamedTuple):
    """What is left to ask of a segment, and what need not be, by task."""

    asked: tuple[Task, ...]
    kept: dict[Task, Covered]


def _is_whole(segment: Segment, found: Covered) -> bool:
    """Whether a stitched answer covers all that was wanted of the recording, without a gap.

    Its end must have been reached: where the last part failed, the duration is not known, or the header's statement,
    which may be less than the parts before it cover already.
    """
    end_s = segment.recording.offset_s
    for start_s, piece_end_s in found.pieces:
        if start_s > end_s + ROUNDING_S:
            return False
        end_s = piece_end_s
    return abs(end_s - segment.recording.wanted_until_s(found.duration_s)) <= ROUNDING_S


def iter_result(future: "Future[list[Reply]]") -> Iterator[list[Reply]]:
    """The future's result, raised inside the iteration, where `outcomes` catches it."""
    yield future.result()


class _Stitch(beam.PTransform):
    """Segments of one recording meet again, as text: their transcripts become one answer.

    Takes a dict of `parts` and `known`; gives answers, and to the tag `kept` those that are there already.
    """

    def expand(self, inputs: Any) -> Any:
        parts = inputs["parts"] | "ByRecordingAndTask" >> beam.Map(_keyed_part).with_output_types(tuple[str, Answer])
        return (
            {"parts": parts, "known": inputs["known"]}
            | "GroupParts" >> beam.CoGroupByKey()
            | "Join"
            >> beam.FlatMapTuple(stitch_group)
            .with_output_types(Answer, **{KEPT: tuple[str, Covered]})
            .with_outputs(KEPT, main="stitched")
        )


def stitch_key(recording_id: str, task: str, question_id: str | None) -> str:
    """What parts of one answer have in common."""
    return json.dumps([recording_id, task, question_id])  # ids may hold any separator


def _keyed_part(part: Answer) -> tuple[str, Answer]:
    return stitch_key(part.recording_id, part.task, part.question_id), part


def stitch_group(_: str, found: Mapping[str, Iterable[Any]]) -> Iterator[Any]:
    """One answer of the `parts` of one recording and task, or of `known` ones to the tag `kept` where it is there."""
    parts = sorted(found["parts"], key=operator.attrgetter("segment_index"))
    if not parts:
        return  # each of them is a dead letter
    stitched = stitch(parts)
    known = {earlier.answer_key: earlier for earlier in found["known"]}
    if stitched.answer_key in known:
        yield beam.pvalue.TaggedOutput(KEPT, (stitched.recording_id, known[stitched.answer_key]))
    else:
        yield stitched


class AskAudioFlamingo(beam.PTransform):
    """Asks Audio Flamingo 3 or Music Flamingo about segments of audio.

    Takes `Segment` (a PCollection, or the Outcome of `DecodeAudio`); gives an `AnswerOutcome`. A recording
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
        keep_engine: Whether a worker's process keeps the engine, once it is open, until the process ends. Otherwise
            it is closed when the runner closes the last of its users, which on Flink and Dataflow it does after a
            minute without work, and opened again for the next recording.

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
        keep_engine: bool = False,
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
        self.dofn = AskDoFn(
            options, tasks, question_tokens, question_think, verifiable=verifiable, keep_engine=keep_engine
        )
        self._hints: dict[str, Any] = {}

    def with_resource_hints(self, **hints: Any) -> "AskAudioFlamingo":
        """Beam's resource hints, for the step that asks alone: see `AnswerRecordings`."""
        self._hints.update(hints)
        return self

    def expand(self, inputs: Any) -> Any:
        segments, before = split_input(inputs)
        tags: dict[str, Any] = {
            DEAD_LETTERS: DeadLetter,
            PARTS: Answer,
            KEPT: tuple[str, Covered],
            KNOWN: tuple[str, Covered],
        }
        if self.dofn.verifiable:
            tags[ASKED] = AskedRequest
        ask = beam.ParDo(self.dofn).with_output_types(Answer, **tags)
        asked = segments | "Ask" >> ask.with_outputs(*tags, main="whole").with_resource_hints(**self._hints)
        stitched = {"parts": asked[PARTS], "known": asked[KNOWN]} | "Stitch" >> _Stitch()
        good = (asked.whole, stitched.stitched) | "AllAnswers" >> beam.Flatten()
        kept = (asked[KEPT], stitched[KEPT]) | "AllKept" >> beam.Flatten()
        dead_letters = join_dead_letters(asked[DEAD_LETTERS], before)
        if self.dofn.verifiable:
            return VerifiableOutcome(good, dead_letters, kept, asked[ASKED])
        return AnswerOutcome(good, dead_letters, kept)


class AnswerRecordings(beam.PTransform):
    """`DecodeAudio` and `AskAudioFlamingo` as one step, so that a runner keeps both on the same worker.

    Takes `Recording`; gives what `ask` gives. PCM then never crosses a shuffle or the network.

    Args:
        decode: How recordings are decoded.
        ask: What is asked.
        accelerator: Beam's accelerator resource hint, for example
            `type:nvidia-l4;count:1;install-nvidia-driver`. Decoding and asking have it both, since steps of different
            hints are in different worker environments, with a shuffle between; stitching, which is text, has not.
    """

    def __init__(self, decode: DecodeAudio, ask: AskAudioFlamingo, *, accelerator: str | None = None) -> None:
        super().__init__()
        self._decode = decode
        self._ask = ask
        if accelerator:
            self.with_resource_hints(accelerator=accelerator)

    def with_resource_hints(self, **hints: Any) -> "AnswerRecordings":
        """Beam's resource hints, for decoding and asking."""
        self._decode.with_resource_hints(**hints)
        self._ask.with_resource_hints(**hints)
        return self

    def expand(self, inputs: Any) -> Any:
        answers: AnswerOutcome | VerifiableOutcome = (
            inputs | "DecodeAudio" >> self._decode | "AskAudioFlamingo" >> self._ask
        )
        return answers
