"""Runs the model on segments: the process's one engine, what is requested of it, and what its replies become."""

import hashlib
import json
import zlib
from collections.abc import Iterator, Sequence
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
from af3pipe.models.tasks import ANSWER, answer, resolve, thinking
from af3pipe.schemas import Answer, DeadLetter, Recording, Reply, Request, Segment, Stage, Task, Turn
from af3pipe.transforms import metrics
from af3pipe.transforms.answer_rows import make_answer
from af3pipe.transforms.coders import RowTupleCoder
from af3pipe.transforms.launcher import SentByLauncher
from af3pipe.transforms.outcome import (
    DEAD_LETTERS,
    Outcome,
    join_dead_letters,
    outcomes,
    split_input,
    to_dead_letter,
)
from af3pipe.transforms.overlap import OverlapDoFn

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
    """A request that was answered, without its audio: all it takes to repeat it.

    Attributes:
        checksum: Of the audio; see `audio_checksum`.
        tasks: That were requested, in order.
        replies: One per task.
    """

    recording: Recording
    segment_index: int
    checksum: int
    tasks: tuple[Task, ...]
    replies: tuple[Reply, ...]


registry.register_coder(AskedRequest, RowTupleCoder)


def audio_checksum(request: Request) -> int:
    """CRC-32 over the samples of a request."""
    checksum = 0
    for audio in request.audios:
        checksum = zlib.crc32(np.ascontiguousarray(audio).data, checksum)
    return checksum


def check_tasks(tasks: Sequence[Task]) -> None:
    """Checks that tasks can be requested together.

    Raises:
        ValueError: No task, two that the output could not tell apart, or a follow-up to what is not requested.
    """
    if not tasks:
        raise ValueError("tasks is empty; ask at least one, for example tasks=[caption()]")
    names = [(task.name, task.question_id) for task in tasks]
    for task in tasks:
        if names.count((task.name, task.question_id)) > 1:
            raise ValueError(f"{_shown(task)} is asked twice; leave one out, or give it a name or id of its own")
    requested: set[tuple[Turn, ...]] = set()
    for task in tasks:
        if task.history and task.history not in requested:
            before = task.history[-1].prompt
            raise ValueError(f"{_shown(task)} follows up {before!r}, which is not asked before it; ask that, too")
        requested.add(thinking(task).turns)


def _shown(task: Task) -> str:
    return f"question {task.question!r}" if task.question else f"task {task.name!r}"


def request_seed(segment: Segment) -> int:
    """Of a segment's request, below 2**32: another one for all other audio, the same one on every run."""
    place = json.dumps([segment.recording.source_key, segment.start_s])
    return int.from_bytes(hashlib.sha256(place.encode()).digest()[:4], "big")


class Asker(SentByLauncher):
    """Requests tasks of segments of the process's one engine, and makes rows of the replies.

    The engine is held once per process, whatever the number of users and threads; it is opened when there is
    something to request.

    Args:
        options: What the engine is opened with.
        tasks: Of every recording.
        question_tokens: Longest reply to a recording's own questions.
        question_think: Whether the model is asked to reason before it answers those.
        keep_engine: Whether the process keeps the engine until it ends: a runner tears a DoFn down that had nothing
            to do for a while, and a model takes a minute to load.
    """

    def __init__(
        self,
        options: EngineOptions,
        tasks: Sequence[Task],
        question_tokens: int = 256,
        question_think: bool = False,
        *,
        keep_engine: bool = False,
    ) -> None:
        self.options = options
        self.requested = tuple(tasks)
        self._question_tokens = question_tokens
        self._question_think = question_think
        self._keep_engine = keep_engine
        self._engine: Engine | None = None

    def setup(self) -> None:
        """Reads what there is to know of the checkpoint without its weights. Raises ModelError."""
        options = self.options
        with self.telling_where():
            checkpoint = open_checkpoint(options.model, options.revision)
            self._model = checkpoint.model_id, model_revision(checkpoint, options.adapter, options.quantize)
        self._family = checkpoint.family
        self._tasks = tuple(resolve(task, self._family) for task in self.requested)

    def close(self) -> None:
        """Releases the engine, where it was opened."""
        if self._engine is not None:
            self._engine = None
            release_engine(self.options)

    def engine(self) -> Engine:
        """The process's engine; opened the first time that it is wanted between `setup` and `close`."""
        if self._engine is None:
            with self.telling_where():
                self._engine = acquire_engine(self.options)
            if self._keep_engine:
                keep_engine(self.options)
        return self._engine

    @property
    def info(self) -> EngineInfo:
        """Of the engine."""
        return self.engine().info

    @property
    def model(self) -> tuple[str, str]:
        """Id and revision of the model; known after `setup`."""
        return self._model

    @property
    def most_pending(self) -> tuple[int, float]:
        """Most requests, and most seconds of audio, to have pending: some runners give a stage as one bundle."""
        if self._engine is None:  # how many slots it has is known once it is open
            return _PENDING_PER_SLOT, 2 * self.options.queue_audio_s
        info = self._engine.info
        return _PENDING_PER_SLOT * info.slots, 2 * len(info.device.split(",")) * self.options.queue_audio_s

    def tasks_of(self, recording: Recording) -> tuple[Task, ...]:
        """The job's tasks and the recording's own questions, each once, a follow-up behind what it follows."""
        tasks = {(task.name, task.question_id): task for task in self._tasks}
        for question in recording.questions:
            task = answer(
                question.text,
                question.choices,
                question.question_id,
                prompt=question.prompt,
                max_new_tokens=self._question_tokens,
                think=self._question_think,
                # As it is requested here, which may be the job's way.
                after=None if question.after is None else tasks[ANSWER, question.after],
            )
            tasks.setdefault((task.name, task.question_id), resolve(task, self._family))
        return tuple(tasks.values())

    def request(self, segment: Segment, tasks: Sequence[Task]) -> Request:
        """What the engine takes: the segment's audio and the tasks."""
        return Request(segment.samples, tuple(tasks), request_seed(segment))

    def submit(self, segment: Segment, tasks: Sequence[Task]) -> "Future[list[Reply]]":
        """Starts the request; without tasks there is nothing to start."""
        if tasks:
            return self.engine().submit(self.request(segment, tasks))
        nothing: Future[list[Reply]] = Future()
        nothing.set_result([])
        return nothing

    def replies(self, segment: Segment, tasks: Sequence[Task], future: "Future[list[Reply]]") -> list[Reply]:
        """The replies to a request, one per task. Raises what the request raised."""
        replies = future.result()
        if len(replies) != len(tasks):
            raise EngineFailed(f"the engine gave {len(replies)} replies to {len(tasks)} tasks")
        if tasks:
            metrics.count("segments_asked")
            metrics.count_seconds("audio", segment.audio_s)
        return replies

    def answer(self, segment: Segment, task: Task, reply: Reply) -> Answer | DeadLetter:
        """The row of a reply, or why it is not what the task allows."""

        def invalid(error: Exception) -> DeadLetter:
            return to_dead_letter(error, segment.recording, stage=Stage.PARSE, segment=segment, tasks=(task,))

        (row,) = outcomes((make_answer(segment, task, reply, self.info) for _ in range(1)), invalid)
        return row

    def count(self) -> None:
        """Counts the engine's work: Beam drops what its thread counts, so a bundle's thread does it."""
        if self._engine is None:
            return
        stats = self._engine.take_stats()
        for name in _ENGINE_COUNTERS:
            metrics.count(name, getattr(stats, name))
        for name in ("encode", "prefill", "decode", "idle"):
            metrics.count_seconds(name, getattr(stats, f"{name}_s"))
        if stats.slot_capacity:
            metrics.observe("slots_taken_percent", round(100 * stats.slot_steps / stats.slot_capacity))


class _AskDoFn(OverlapDoFn[Segment, "list[Reply]"]):
    """Emits `Answer`, one for each task and segment, and `DeadLetter` to its tag."""

    def __init__(self, asker: Asker) -> None:
        super().__init__(*asker.most_pending)
        self._asker = asker

    def setup(self) -> None:
        self._asker.setup()

    def teardown(self) -> None:
        super().teardown()
        self._asker.close()

    def weigh(self, segment: Segment) -> float:
        return segment.audio_s

    def submit(self, segment: Segment) -> "Future[list[Reply]]":
        future = self._asker.submit(segment, self._asker.tasks_of(segment.recording))
        self._max_pending, self._max_weight = self._asker.most_pending
        return future

    def emit(self, segment: Segment, future: "Future[list[Reply]]") -> Iterator[Any]:
        tasks = self._asker.tasks_of(segment.recording)

        def lost(error: Exception) -> DeadLetter:
            return to_dead_letter(error, segment.recording, stage=Stage.GENERATE, segment=segment, tasks=tasks)

        def rows() -> Iterator[Answer | DeadLetter]:
            for task, reply in zip(tasks, self._asker.replies(segment, tasks, future), strict=True):
                yield self._asker.answer(segment, task, reply)

        for row in outcomes(rows(), lost):
            if isinstance(row, DeadLetter):
                metrics.count(f"dead_letters_{row.reason.value}")
                yield beam.pvalue.TaggedOutput(DEAD_LETTERS, row)
            else:
                metrics.count("answers")
                yield row
        self._asker.count()


class AskAudioFlamingo(beam.PTransform):
    """Asks Audio Flamingo 3 or Music Flamingo about segments of audio.

    Takes `Segment` (a PCollection, or the Outcome of `DecodeAudio`); gives an `Outcome` of `Answer`, one for each
    task and segment. `AnswerRecordings` does more: it merges the transcripts of a recording's segments. A request
    that fails is a dead letter and costs no other; a model that cannot be loaded ends the job.

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
        self.asker = Asker(options, tasks, question_tokens, question_think, keep_engine=keep_engine)

    def expand(self, inputs: Any) -> Any:
        segments, before = split_input(inputs)
        ask = beam.ParDo(_AskDoFn(self.asker)).with_output_types(Answer, **{DEAD_LETTERS: DeadLetter})
        asked = segments | "Ask" >> ask.with_outputs(DEAD_LETTERS, main="answers")
        return Outcome(asked.answers, join_dead_letters(asked[DEAD_LETTERS], before))
