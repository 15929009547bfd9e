"""Defines tasks, requests to the model, its replies, and the answer row."""

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
    """Decoding parameters of a task. The defaults are greedy decoding, whatever the checkpoint's defaults are.

    The released checkpoints default to sampling (temperature 0.7, top_p 0.8, repetition_penalty 1.05).
    The names are those of Hugging Face's `GenerationConfig`, where it has such a parameter.

    Attributes:
        min_new_tokens: Shortest reply, in tokens.
        seed: For sampling: with the request's own seed it determines every sample, whatever else is in the batch.
        stop: Strings that end the reply; its text is cut before the first of them.
        one_of: Allowed replies, to one of which decoding is constrained; empty for free text.
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
        """Returns the value of the `decoding` column: sorted keys, so that equal parameters give equal text.

        Parameters added after the first six are included only if they are not the default, so that the `answer_key`
        of existing answers does not change.
        """
        defaults = Decoding()._asdict()
        stated = {key: value for key, value in self._asdict().items() if key in _ALWAYS or value != defaults[key]}
        return json.dumps(stated, sort_keys=True)


class Turn(NamedTuple):
    """The user's message at one point of a conversation.

    Attributes:
        prompt: The turn's text; may be empty where there is audio.
        audios: Indices of the request's audios that belong to this turn. None means all of them in the first turn and
            none in later ones; an empty tuple in the first turn sends the prompt without audio.
    """

    prompt: str
    audios: tuple[int, ...] | None = None


class Task(NamedTuple):
    """A prompt for a segment, and how its reply is decoded and parsed.

    Attributes:
        name: The `task` column; `caption` and `transcript` have tables of their own.
        prompt: The user turn's text; None for the model family's own prompt for this name.
        question_id: Identifies the question across runs, if there is one.
        question: The question as the user wrote it, without the choices.
        choices: The answers allowed; empty for free text.
        decoding: Decoding parameters.
        parser: Parser of the reply: a name from `models.tasks.PARSERS`, or `module:function`.
        strip_prefix: Whether the checkpoint's framing sentence is removed by its processor.
        stitch: Whether the replies for the segments of a long recording are merged into one answer.
        history: The turns before this one. The model sees them with its replies to them, so each must be a task of
            the same request, placed before this one.
        audios: Audios of this turn; see `Turn`.
        think: Whether the model is asked to reason before it answers; needs the adapter trained for it.
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
        """The conversation's user turns, ending with this one."""
        return (*self.history, Turn(self.prompt or "", self.audios))


class Request(NamedTuple):
    """One segment and its tasks, as an engine receives them.

    Attributes:
        samples: float32 mono PCM at the model's sampling rate, shape (n,); a tuple of them for a conversation
            about several, empty for one about none.
        tasks: At least one; none with a prompt of None.
        seed: Combined with a sampling task's own seed, so that recordings do not all get the same samples.
    """

    samples: npt.NDArray[np.float32] | tuple[npt.NDArray[np.float32], ...]
    tasks: tuple[Task, ...]
    seed: int = 0

    @property
    def audios(self) -> tuple[npt.NDArray[np.float32], ...]:
        """The audios of the request, in order."""
        return self.samples if isinstance(self.samples, tuple) else (self.samples,)

    def __repr__(self) -> str:
        shapes = [audio.shape for audio in self.audios]
        return f"Request(audios={shapes}, tasks={[task.name for task in self.tasks]})"


class Reply(NamedTuple):
    """The model's reply to one task.

    Attributes:
        text: Decoded text, without special tokens; without the framing sentence if the task has `strip_prefix`.
        tokens: The new token ids, the end-of-sequence token included where it was produced.
        finish_reason: `stop` when the model or a stop string ended the reply, `length` when `max_new_tokens` did.
        audio_tokens: Number of audio placeholder tokens in the prompt.
        prompt_tokens: Length of the whole prompt, `audio_tokens` included.
    """

    text: str
    tokens: tuple[int, ...]
    finish_reason: str
    audio_tokens: int
    prompt_tokens: int

    @property
    def new_tokens(self) -> int:
        """Number of generated tokens."""
        return len(self.tokens)


class TimedText(NamedTuple):
    """A piece of a transcript, with its time range in the recording, in seconds."""

    start_s: float
    end_s: float
    text: str


class Answer(NamedTuple):
    """A parsed reply: a row of `captions/`, `transcripts/` or `answers/`.

    Attributes:
        segment_index: Index of the segment; 0 for an answer merged from all segments.
        start_s: Start of the audio given to the model, in seconds from the start of the object.
        end_s: End of that audio, exclusive.
        duration_s: Duration of the whole object, in seconds; None if unknown.
        peak_dbfs: This and the next three are the `Levels` of the audio given to the model.
        channels: Number of channels of the object, as stored.
        channel: The channel given to the model: `mix`, `left`, `right`, or its index as text.
        stream: Index of the audio stream given to the model; None for the object's main one.
        history: The earlier prompts of the conversation; empty for a first question.
        choice: The choice that the reply selects; None for free text.
        segments: Segments of a transcript with their times; empty for other tasks.
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
        """The four level columns as a `Levels`."""
        return Levels(self.peak_dbfs, self.rms_dbfs, self.clipped_share, self.silent)

    @property
    def content_identity(self) -> str:
        """See `Recording.content_identity`."""
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
    """Returns a key that distinguishes the tasks of one recording."""
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
    """Returns a key over everything that determines an answer: a rerun skips work whose key has an answer.

    sha256 over the content's identity, the segment's bounds, the task, its prompt, the model and the decoding; and
    the channel and stream, where one was chosen.

    Args:
        recording: The recording, with its size, and etag or modification time.
        start_s: Start of the audio given to the model, in seconds.
        end_s: End of that audio.
        task: The task, resolved.
        model_id: The model.
        model_revision: Its revision.
        cut_at: For a segment whose answer will be merged: `Segment.cut_at`, since merged segments must be cut alike.
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
    """Returns the `answer_key` of an answer merged from several, in order; one alone keeps its own key."""
    return answer_keys[0] if len(answer_keys) == 1 else hashlib.sha256("".join(answer_keys).encode()).hexdigest()


def work_key(
    recording: Recording, tasks: Iterable[Task], model_id: str, model_revision: str, policy: Sequence[object]
) -> str:
    """Returns a key over all requests of a recording: with an equal key, the same run would have the same outcome.

    Unlike `answer_key` it is known before the recording is opened.

    Args:
        recording: The recording, with its size, and etag or modification time.
        tasks: All tasks of the recording, resolved.
        model_id: The model, as in its answers.
        model_revision: Its revision.
        policy: What else determines the outcome: the policies for long and silent recordings, and which manifest rows
            of the recording were rejected.
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
    """Returns the fields of a task that determine its reply and how it is parsed."""
    turns = [list(turn) for turn in task.turns] if task.history or task.audios is not None else []
    # A prompt of one's own need not contain the choices with which its reply is compared.
    choices = [["choices", *task.choices]] if task.choices else []
    return [task.name, task.question_id, task.prompt, task.parser, task.decoding.to_json(), *choices, *turns]


def _digest(parts: Sequence[object]) -> str:
    return hashlib.sha256(json.dumps(list(parts)).encode()).hexdigest()
