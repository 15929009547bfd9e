"""What is asked and what comes back: tasks, requests, replies, and the answer row."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from af3pipe.schemas.recording import Levels, Recording, content_identity, taken_from

_ALWAYS = ("max_new_tokens", "do_sample", "temperature", "top_p", "top_k", "repetition_penalty")


class Decoding(NamedTuple):
    """How the reply is chosen, token by token. The defaults are greedy, whatever the checkpoint's own are.

    The released checkpoints default to sampling (temperature 0.7, top_p 0.8, repetition_penalty 1.05).
    The names are those of Hugging Face's `GenerationConfig`, as far as it has them.

    Attributes:
        min_new_tokens: The reply does not end before.
        seed: For sampling: with the request's own seed it decides every draw, whatever else is decoded beside it.
        stop: Strings that end the reply; what begins with one is not part of its text.
        one_of: Whole replies, of which the model must give one; empty for free text.
        json_schema: JSON text of a schema that the reply must follow; None for free text.
    """

    max_new_tokens: int = 256
    do_sample: bool = False
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 50
    repetition_penalty: float = 1.0
    min_new_tokens: int = 0
    seed: int = 0
    stop: tuple[str, ...] = ()
    one_of: tuple[str, ...] = ()
    json_schema: str | None = None

    def to_json(self) -> str:
        """The `decoding` column: sorted keys, so that equal parameters give equal text.

        What came after the first six is told only where it is used: answers keep the keys they have.
        """
        defaults = Decoding()._asdict()
        told = {key: value for key, value in self._asdict().items() if key in _ALWAYS or value != defaults[key]}
        return json.dumps(told, sort_keys=True)


class Turn(NamedTuple):
    """What the user said at one point of a conversation.

    Attributes:
        prompt: The turn's text; may be empty where there is audio.
        audios: Which of the request's audios are heard in this turn, by index. None is all of them in the first
            turn and none in later ones; an empty tuple in the first turn asks without audio.
    """

    prompt: str
    audios: tuple[int, ...] | None = None


class Task(NamedTuple):
    """What is asked of a segment. Built by `af3pipe.models.tasks`, or by hand for a task of your own.

    Attributes:
        name: The `task` column; `caption` and `transcript` have tables of their own.
        prompt: The user turn's text; None takes the family's own prompt for this name.
        question_id: Names the question across runs, where there is one.
        question: As the user wrote it, without the choices.
        choices: The answers allowed; empty for free text.
        decoding: How the reply is chosen.
        parser: How the reply is read: a name from `models.tasks.PARSERS`, or `module:function`.
        strip_prefix: Whether the checkpoint's framing sentence is removed by its processor.
        stitch: Whether the replies of a long recording's segments make one answer.
        history: The turns before this one. The model sees them with the replies it gave to them, so each must be
            a task of the same request, placed before this one.
        audios: Of this turn; see `Turn`.
        think: Whether the model is asked to reason before it answers; needs the adapter that was trained to.
    """

    name: str
    prompt: str | None = None
    question_id: str | None = None
    question: str | None = None
    choices: tuple[str, ...] = ()
    decoding: Decoding = Decoding()
    parser: str = "text"
    strip_prefix: bool = False
    stitch: bool = False
    history: tuple[Turn, ...] = ()
    audios: tuple[int, ...] | None = None
    think: bool = False

    @property
    def turns(self) -> tuple[Turn, ...]:
        """The conversation's user turns, this one last."""
        return (*self.history, Turn(self.prompt or "", self.audios))


class Request(NamedTuple):
    """One segment and the tasks asked of it, as an engine takes it.

    Attributes:
        samples: float32 mono PCM at the model's sampling rate, shape (n,); a tuple of them for a conversation
            about several, empty for one about none.
        tasks: At least one; every prompt filled in.
        seed: Joined with a sampling task's own, so that not every recording gets the same draws.
    """

    samples: npt.NDArray[np.float32] | tuple[npt.NDArray[np.float32], ...]
    tasks: tuple[Task, ...]
    seed: int = 0

    @property
    def audios(self) -> tuple[npt.NDArray[np.float32], ...]:
        """What may be heard, in order."""
        return self.samples if isinstance(self.samples, tuple) else (self.samples,)

    def __repr__(self) -> str:
        shapes = [audio.shape for audio in self.audios]
        return f"Request(audios={shapes}, tasks={[task.name for task in self.tasks]})"


class Reply(NamedTuple):
    """What the model said to one task.

    Attributes:
        text: Decoded, without special tokens, stripped as the task asks.
        tokens: The new token ids, the end-of-sequence token included where it was produced.
        finish_reason: `stop` when the model or a stop string ended the reply, `length` when `max_new_tokens` did.
        audio_tokens: Placeholders the audio took in the prompt.
        prompt_tokens: Length of the whole prompt, `audio_tokens` included.
    """

    text: str
    tokens: tuple[int, ...]
    finish_reason: str
    audio_tokens: int
    prompt_tokens: int

    @property
    def new_tokens(self) -> int:
        """How many tokens were produced."""
        return len(self.tokens)


class TimedText(NamedTuple):
    """A piece of a transcript and where in the recording it was heard, in seconds."""

    start_s: float
    end_s: float
    text: str


class Answer(NamedTuple):
    """One reply, parsed: one row of `captions/`, `transcripts/` or `answers/`.

    Attributes:
        segment_index: Of the segment asked about; 0 for an answer stitched over all of them.
        start_s: Of what was heard, in seconds from the start of the object.
        end_s: End of what was heard, exclusive.
        duration_s: Of the whole object, in seconds; None when it was never learnt.
        peak_dbfs: This and the next three as `Levels`, of what was heard.
        channels: How many the object has, as stored.
        channel: The one that was heard: `mix`, `left`, `right`, or its index as text.
        stream: Index of the audio stream that was heard; None for the object's main one.
        history: The prompts that were asked before, in a conversation; empty for a first question.
        choice: The choice that the reply names; None for free text.
        segments: The pieces of a transcript with their times; empty for other tasks.
        decoding: JSON of `Decoding`.
        answer_key: See `answer_key`.
        created_at: Microseconds since 1970-01-01 UTC.
    """

    recording_id: str
    uri: str
    source_key: str
    size_bytes: int | None
    etag: str | None
    mtime: str | None
    segment_index: int
    start_s: float
    end_s: float
    duration_s: float | None
    sample_rate: int
    channels: int
    codec: str
    peak_dbfs: float
    rms_dbfs: float
    clipped_share: float
    silent: bool
    channel: str
    stream: int | None
    task: str
    prompt: str
    history: tuple[str, ...]
    question_id: str | None
    question: str | None
    choices: tuple[str, ...]
    text: str
    choice: str | None
    segments: tuple[TimedText, ...]
    finish_reason: str
    audio_tokens: int
    prompt_tokens: int
    new_tokens: int
    model_id: str
    model_revision: str
    family: str
    engine: str
    dtype: str
    decoding: str
    answer_key: str
    metadata: str
    run_id: str
    created_at: int

    @property
    def levels(self) -> Levels:
        """Its four columns as one."""
        return Levels(self.peak_dbfs, self.rms_dbfs, self.clipped_share, self.silent)

    @property
    def content_identity(self) -> str:
        """As of `Recording`."""
        return content_identity(self.etag, self.size_bytes, self.mtime)


ANSWER_SCHEMA = pa.schema(
    [
        pa.field("recording_id", pa.string(), nullable=False),
        pa.field("uri", pa.string(), nullable=False),
        ("source_key", pa.string()),
        ("size_bytes", pa.int64()),
        ("etag", pa.string()),
        ("mtime", pa.timestamp("us", tz="UTC")),
        pa.field("segment_index", pa.int32(), nullable=False),
        pa.field("start_s", pa.float64(), nullable=False),
        pa.field("end_s", pa.float64(), nullable=False),
        ("duration_s", pa.float64()),
        pa.field("sample_rate", pa.int32(), nullable=False),
        pa.field("channels", pa.int32(), nullable=False),
        pa.field("codec", pa.string(), nullable=False),
        pa.field("peak_dbfs", pa.float64(), nullable=False),
        pa.field("rms_dbfs", pa.float64(), nullable=False),
        pa.field("clipped_share", pa.float64(), nullable=False),
        pa.field("silent", pa.bool_(), nullable=False),
        pa.field("channel", pa.string(), nullable=False),
        ("stream", pa.int32()),
        pa.field("task", pa.string(), nullable=False),
        pa.field("prompt", pa.string(), nullable=False),
        ("history", pa.list_(pa.string())),
        ("question_id", pa.string()),
        ("question", pa.string()),
        ("choices", pa.list_(pa.string())),
        pa.field("text", pa.string(), nullable=False),
        ("choice", pa.string()),
        (
            "segments",
            pa.list_(pa.struct([("start_s", pa.float64()), ("end_s", pa.float64()), ("text", pa.string())])),
        ),
        pa.field("finish_reason", pa.string(), nullable=False),
        pa.field("audio_tokens", pa.int32(), nullable=False),
        pa.field("prompt_tokens", pa.int32(), nullable=False),
        pa.field("new_tokens", pa.int32(), nullable=False),
        pa.field("model_id", pa.string(), nullable=False),
        pa.field("model_revision", pa.string(), nullable=False),
        pa.field("family", pa.string(), nullable=False),
        pa.field("engine", pa.string(), nullable=False),
        pa.field("dtype", pa.string(), nullable=False),
        pa.field("decoding", pa.string(), nullable=False),
        pa.field("answer_key", pa.string(), nullable=False),
        ("metadata", pa.string()),
        pa.field("run_id", pa.string(), nullable=False),
        pa.field("created_at", pa.timestamp("us", tz="UTC"), nullable=False),
    ]
)


def task_key(name: str, question_id: str | None) -> str:
    """Tells apart what is asked of one recording."""
    return f"{name}/{question_id or ''}"


def answer_key(
    recording: Recording,
    start_s: float,
    end_s: float,
    task: Task,
    model_id: str,
    model_revision: str,
    cut_at: str | None = None,
) -> str:
    """Names a piece of work: the same work has the same key on every run, so a rerun can skip it.

    sha256 over the content's identity, the segment's bounds, the task, its prompt, the model and the decoding; and
    the channel and stream, where one was chosen.

    Args:
        recording: With its size, and etag or modification time.
        start_s: Of what is heard. So is `end_s`.
        end_s: Its end.
        task: Resolved.
        model_id: What answers.
        model_revision: Of it.
        cut_at: For a part of what will be stitched, as of `Segment`: the parts belong to one way of cutting.
    """
    name, question_id, prompt, parser, decoding, *turns = _asked(task)
    parts = [
        recording.uri,
        recording.content_identity,
        f"{start_s:.6f}-{end_s:.6f}",
        name,
        question_id,
        prompt,
        parser,
        model_id,
        model_revision,
        decoding,
        *turns,
        *taken_from(recording.channel, recording.stream),
        *([] if cut_at is None else [f"cut_at={cut_at}"]),
    ]
    return _digest(parts)


def stitched_key(answer_keys: Sequence[str]) -> str:
    """The `answer_key` of what is stitched of several answers, in order; one keeps its own: it is the same work."""
    return answer_keys[0] if len(answer_keys) == 1 else hashlib.sha256("".join(answer_keys).encode()).hexdigest()


def work_key(
    recording: Recording, tasks: Iterable[Task], model_id: str, model_revision: str, policy: Sequence[object]
) -> str:
    """Names all that is asked of a recording: with the same key, the same run of it would end the same.

    Unlike `answer_key` it is known before the recording is opened.

    Args:
        recording: With its size, and etag or modification time.
        tasks: All that is asked of it, resolved.
        model_id: As in its answers. So is `model_revision`.
        model_revision: Of the model.
        policy: What else decides how a recording ends: what becomes of long and silent ones, and what of its
            mentions was rejected.
    """
    parts = [
        recording.uri,
        recording.content_identity,
        [recording.offset_s, recording.duration_s, recording.channel, recording.stream],
        sorted(json.dumps(_asked(task)) for task in tasks),
        model_id,
        model_revision,
        list(policy),
    ]
    return _digest(parts)


def _asked(task: Task) -> list[object]:
    """What of a task decides its reply and how it is read."""
    turns = [list(turn) for turn in task.turns] if task.history or task.audios is not None else []
    # A prompt of one's own need not tell the choices that its reply is held against.
    choices = [["choices", *task.choices]] if task.choices else []
    return [task.name, task.question_id, task.prompt, task.parser, task.decoding.to_json(), *choices, *turns]


def _digest(parts: Sequence[object]) -> str:
    return hashlib.sha256(json.dumps(list(parts)).encode()).hexdigest()
