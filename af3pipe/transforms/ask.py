"""Runs the model on segments: submits requests to the process's engine and makes rows of its replies."""

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

_PENDING_PER_SLOT = 3  # one in progress and two queued
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
    """Describes an answered request without its audio, so that it can be repeated.

    Attributes:
        checksum: Checksum of the audio, see `audio_checksum`.
        tasks: The requested tasks, in order.
        replies: One reply per task.
    """

    recording: Recording
    segment_index: int
    checksum: int
    tasks: tuple[Task, ...]
    replies: tuple[Reply, ...]


registry.register_coder(AskedRequest, RowTupleCoder)


def audio_checksum(request: Request) -> int:
    """Returns the CRC-32 of the samples of a request."""
    checksum = 0
    for audio in request.audios:
        checksum = zlib.crc32(np.ascontiguousarray(audio).data, checksum)
    return checksum


def check_tasks(tasks: Sequence[Task]) -> None:
    """Checks that tasks can be requested together.

    Raises:
        ValueError: There is no task, two have the same name and question, or a follow-up lacks its question.
    """
    if not tasks:
        raise ValueError("tasks is empty; give at least one, for example tasks=[caption()]")
    names = [(task.name, task.question_id) for task in tasks]
    for task in tasks:
        if names.count((task.name, task.question_id)) > 1:
            raise ValueError(f"{_shown(task)} is asked twice; remove one, or give it another name or id")
    requested: set[tuple[Turn, ...]] = set()
    for task in tasks:
        if task.history and task.history not in requested:
            before = task.history[-1].prompt
            raise ValueError(f"{_shown(task)} follows up {before!r}, which is not asked before it; add that, too")
        requested.add(thinking(task).turns)


def _shown(task: Task) -> str:
    return f"question {task.question!r}" if task.question else f"task {task.name!r}"


def request_seed(segment: Segment) -> int:
    """Returns a seed below 2**32 for a segment's request: the same in every run, different for other audio."""
    place = json.dumps([segment.recording.source_key, segment.start_s])
    return int.from_bytes(hashlib.sha256(place.encode()).digest()[:4], "big")


class Asker(SentByLauncher):
    """Submits requests about segments to the process's engine, and makes rows of the replies.

    All users and threads of a process share one engine, which is opened for the first request.

    Args:
        options: Model and settings of the engine.
        tasks: Tasks for every recording.
        question_tokens: Maximum length of replies to a recording's own questions, in tokens.
        question_think: Whether the model is prompted to reason first for these questions.
        keep_engine: Whether to keep the engine open until the process ends: a runner tears down a DoFn that is idle
            for a while, and loading a model takes a minute.
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
        """Reads the checkpoint's configuration, without its weights. Raises ModelError."""
        options = self.options
        with self.naming_worker():
            checkpoint = open_checkpoint(options.model, options.revision)
            self._model = checkpoint.model_id, model_revision(checkpoint, options.adapter, options.quantize)
        self._family = checkpoint.family
        self._tasks = tuple(resolve(task, self._family) for task in self.requested)

    def close(self) -> None:
        """Releases the engine, if it was opened."""
        if self._engine is not None:
            self._engine = None
            release_engine(self.options)

    def engine(self) -> Engine:
        """Returns the process's engine, opening it on the first call."""
        if self._engine is None:
            with self.naming_worker():
                self._engine = acquire_engine(self.options)
            if self._keep_engine:
                keep_engine(self.options)
        return self._engine

    @property
    def info(self) -> EngineInfo:
        """Describes the engine; opens it if necessary."""
        return self.engine().info

    @property
    def model(self) -> tuple[str, str]:
        """Id and revision of the model; available after `setup`."""
        return self._model

    @property
    def most_pending(self) -> tuple[int, float]:
        """Limits on pending requests and their seconds of audio, since some runners make a whole stage one bundle."""
        if self._engine is None:  # how many slots it has is known once it is open
            return _PENDING_PER_SLOT, 2 * self.options.queue_audio_s
        info = self._engine.info
        return _PENDING_PER_SLOT * info.slots, 2 * len(info.device.split(",")) * self.options.queue_audio_s

    def tasks_of(self, recording: Recording) -> tuple[Task, ...]:
        """Returns the distinct tasks of the job and the recording's own questions, each before its follow-ups."""
        tasks = {(task.name, task.question_id): task for task in self._tasks}
        for question in recording.questions:
            task = answer(
                question.text,
                question.choices,
                question.question_id,
                prompt=question.prompt,
                max_new_tokens=self._question_tokens,
                think=self._question_think,
                # As it is requested here: a job's question of the same id takes precedence.
                after=None if question.after is None else tasks[ANSWER, question.after],
            )
            tasks.setdefault((task.name, task.question_id), resolve(task, self._family))
        return tuple(tasks.values())

    def request(self, segment: Segment, tasks: Sequence[Task]) -> Request:
        """Makes a request from a segment's audio and the tasks."""
        return Request(segment.samples, tuple(tasks), request_seed(segment))

    def submit(self, segment: Segment, tasks: Sequence[Task]) -> "Future[list[Reply]]":
        """Submits a request to the engine; without tasks, returns a future of an empty list."""
        if tasks:
            return self.engine().submit(self.request(segment, tasks))
        nothing: Future[list[Reply]] = Future()
        nothing.set_result([])
        return nothing

    def replies(self, segment: Segment, tasks: Sequence[Task], future: "Future[list[Reply]]") -> list[Reply]:
        """Returns the replies to a request, one per task. Raises what the request raised."""
        replies = future.result()
        if len(replies) != len(tasks):
            raise EngineFailed(f"the engine returned {len(replies)} replies to {len(tasks)} tasks")
        if tasks:
            metrics.count("segments_asked")
            metrics.count_seconds("audio", segment.audio_s)
        return replies

    def answer(self, segment: Segment, task: Task, reply: Reply) -> Answer | DeadLetter:
        """Makes the answer row of a reply, or a dead letter if the reply is invalid for the task."""

        def invalid(error: Exception) -> DeadLetter:
            return to_dead_letter(error, segment.recording, stage=Stage.PARSE, segment=segment, tasks=(task,))

        (row,) = outcomes((make_answer(segment, task, reply, self.info) for _ in range(1)), invalid)
        return row

    def count(self) -> None:
        """Counts the engine's work. Call it on a bundle's thread, since Beam drops counts of the engine's thread."""
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
    """Runs the model on segments: emits `Answer` for each task and segment, and `DeadLetter` to its tag."""

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
    """Runs Audio Flamingo 3 or Music Flamingo on segments of audio.

    The input is `Segment` (a PCollection, or the Outcome of `DecodeAudio`); the output is an `Outcome` of `Answer`,
    one for each task and segment. `AnswerRecordings` also merges the transcripts of a recording's segments. A request
    that fails becomes a dead letter and does not affect others; a model that cannot be loaded fails the job.

    Args:
        model: Hub id, local directory, or `demo`. The released weights are for non-commercial use, and so are
            adapters made from them.
        tasks: Tasks for every segment; a recording's own questions are added.
        revision: Branch, tag or commit of the model on the hub.
        engine: Name of the engine implementation: `transformers`.
        dtype: `auto` is bfloat16 on CUDA and float32 on CPU.
        device: A torch device name. `auto` claims a GPU that no other process has, and is the CPU if there is none;
            `all` claims every such GPU, and starts an engine process for each. `cuda:0,cuda:1` names them instead.
        slots: Maximum number of prompts decoded together; None chooses it for the device.
        queue_audio_s: Maximum seconds of audio that wait for the engine.
        question_tokens: Maximum length of replies to a recording's own questions, in tokens.
        question_think: Whether the model is prompted to reason first for these questions.
        attention: Attention implementation of the audio encoder, by its Hugging Face name.
        cuda_graphs: Whether decoding steps are captured as CUDA graphs; no effect on a CPU.
        adapter: Directory of a PEFT LoRA that is merged into the weights; the workers must have it.
        quantize: `none`, or `int8` or `fp8` for the language model's weights.
        keep_engine: Whether a worker process keeps an opened engine until it ends. Otherwise the engine is closed
            when the runner tears down its last user, on Flink and Dataflow after a minute without work, and opened
            again for the next recording.

    Raises:
        ValueError: There is no task, two have the same name and question, or a follow-up lacks its question.
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
