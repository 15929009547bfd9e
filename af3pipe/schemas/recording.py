"""What flows before the model: a recording, what its header says, and its segments of PCM."""

import hashlib
import json
import math
from collections.abc import Mapping
from enum import Enum
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa


class TerminalState(str, Enum):
    """How a recording ended. Every recording that was matched ends in exactly one of these."""

    OK = "ok"
    OK_PARTIAL = "ok_partial"
    SKIPPED_DONE = "skipped_done"
    DEAD_LETTER = "dead_letter"


ROUNDING_S = 0.02005
"""A remainder too short for one audio token (20 ms) is not asked about; less than this is no gap."""

MIX = "mix"
"""The mean over all channels: how a recording is heard unless one channel is asked for."""


def channel_text(value: Any) -> str:
    """A channel as users write it, in one spelling: `mix`, `left`, `right`, or an index from 0 (`"1"`, `1`, `1.0`).

    Raises:
        ValueError: It is none of these.
    """
    text = str(value).strip().lower()
    if text in (MIX, "left", "right"):
        return text
    index = _index(value)
    if index is None:
        raise ValueError(
            f"channel is {value!r}; it must be mix, left, right, or a number from 0 (a manifest's column of this "
            "name says which channel is heard: rename one that means something else)"
        )
    return str(index)


def stream_index(value: Any) -> int | None:
    """An audio stream as users write it: a number from 0, or None for the file's main one.

    Raises:
        ValueError: It is neither.
    """
    index = _index(value)
    if index is None and value is not None:
        raise ValueError(
            f"stream is {value!r}; it must be a number from 0, which counts the audio streams (a manifest's column "
            "of this name says which one is heard: rename one that means something else)"
        )
    return index


def _index(value: Any) -> int | None:
    """Manifests have numbers as text, and pandas makes 1.0 of a 1 beside a gap."""
    digits = str(value).strip().removesuffix(".0")
    is_index = not isinstance(value, bool) and digits.isascii() and digits.isdecimal() and len(digits) < 10
    return int(digits) if is_index else None


def content_identity(etag: str | None, size_bytes: int | None, mtime: str | None) -> str:
    """Changes when the bytes change: the store's etag, or size and modification time where it has none."""
    return etag or f"{size_bytes}:{mtime}"


class Question(NamedTuple):
    """A question about one recording, as a manifest row states it; without an id it is named by its text.

    Attributes:
        question_id: Names the question across runs.
        text: In words.
        choices: What the answer must name one of; empty for free text.
        prompt: Given to the model as it stands, instead of what is made of text and choices.
        after: Id of the question that this one follows up: one of the same recording, before it.
    """

    question_id: str | None
    text: str
    choices: tuple[str, ...] = ()
    prompt: str | None = None
    after: str | None = None


class Levels(NamedTuple):
    """How loud a piece of audio is as the model hears it: mixed to mono, at its sampling rate, never normalised.

    dBFS are decibels relative to a sample of 1.0: a square wave of full scale has an RMS of 0, a sine one of -3.

    Attributes:
        peak_dbfs: Of the largest sample; -120 at least, so for digital silence; above 0 for float files that go
            beyond full scale, which are passed on as they are.
        rms_dbfs: Over all samples; -120 at least.
        clipped_share: Share of the samples, 0 to 1, at or beyond full scale (32767/32768, the most that 16-bit PCM
            holds). Mixing and resampling move samples off that mark, so it is lower than in the file.
        silent: Whether the peak is at or below the job's threshold, -60 dBFS unless it says otherwise.
    """

    peak_dbfs: float
    rms_dbfs: float
    clipped_share: float
    silent: bool


class Covered(NamedTuple):
    """What an answer covers of its recording: all that reconciling and resuming need of it.

    Attributes:
        answer_key: Of the row.
        task: See `task_key`.
        pieces: (start_s, end_s) of each part answered for.
        duration_s: Of the whole object, as far as was known with this answer.
        levels: Of the parts together.
        content_identity: Of the recording that was heard, as of `Recording`; empty where nobody has to know.
    """

    answer_key: str
    task: str
    pieces: tuple[tuple[float, float], ...]
    duration_s: float | None
    levels: Levels
    content_identity: str = ""


class Existing(NamedTuple):
    """Rows that earlier runs wrote about a recording's audio: they are neither requested nor written again.

    Attributes:
        answers: Of any model and prompt; each counts only where its `answer_key` is that of a request of this run.
        dead_letters: (dead_letter_key, run_id) of each of this recording.
    """

    answers: tuple[Covered, ...] = ()
    dead_letters: tuple[tuple[str, str], ...] = ()


NO_METADATA = "{}"


def to_metadata(columns: Mapping[str, Any]) -> str:
    """Columns as the `metadata` column holds them: a JSON object, keys sorted, numbers as numbers, dates as text."""
    return json.dumps(_jsonable(columns), sort_keys=True, ensure_ascii=False, default=str) if columns else NO_METADATA


def _jsonable(value: Any) -> Any:
    """JSON has no NaN and no infinity, and its keys are text."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(key): _jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_jsonable(item) for item in value]
    return value


class Recording(NamedTuple):
    """One input: an audio object, or a time range of it, with what is known before it is opened.

    Attributes:
        recording_id: Stable name of the recording; one terminal state each. A manifest's own id, else its
            `source_key`.
        uri: Any URL that fsspec opens, or a local path.
        size_bytes: Size of the object, None when the listing did not state it.
        etag: The store's content tag, None when it has none (local files).
        mtime: Modification time of the object, ISO 8601 UTC, None when the listing did not state it.
        offset_s: Where to begin, in seconds from the start of the object.
        duration_s: How much to take, in seconds; None takes all that follows.
        channel: `mix`, the mean over all; `left`, `right`, or an index from 0 as text. See `channel_text`.
        stream: Index among the audio streams of the object; None takes its main one.
        questions: Asked of this recording beside the job's own tasks.
        metadata: Further manifest columns, passed through to the output: a JSON object as text, see `to_metadata`.
        work_key: Names all that is requested of it, see `af3pipe.schemas.work_key`; None where resuming is off.
        existing: Rows of earlier runs about the same audio, where the run resumes them.
    """

    recording_id: str
    uri: str
    size_bytes: int | None = None
    etag: str | None = None
    mtime: str | None = None
    offset_s: float = 0.0
    duration_s: float | None = None
    questions: tuple[Question, ...] = ()
    metadata: str = NO_METADATA
    channel: str = MIX
    stream: int | None = None
    work_key: str | None = None
    existing: Existing = Existing()

    @property
    def source_key(self) -> str:
        """Names the audio itself, whatever the recording is called. See `source_key`."""
        return source_key(self.uri, self.offset_s, self.duration_s, channel=self.channel, stream=self.stream)

    def wanted_until_s(self, duration_s: float | None) -> float:
        """Where what is wanted of it ends, in an object of this length; where it begins for one of unknown length."""
        available_s = max(self.offset_s, duration_s or 0.0)
        return available_s if self.duration_s is None else min(available_s, self.offset_s + self.duration_s)

    @property
    def content_identity(self) -> str:
        """Changes when the bytes change: the store's etag, or size and modification time where it has none."""
        return content_identity(self.etag, self.size_bytes, self.mtime)


def source_key(
    uri: str,
    offset_s: float = 0.0,
    duration_s: float | None = None,
    *,
    channel: str = MIX,
    stream: int | None = None,
) -> str:
    """Names a piece of audio: 20 hex digits over the canonical URI and the span, channel and stream of it.

    Manifest rows without an id of their own get it as their `recording_id`.
    """
    parts = [uri, repr(float(offset_s)), repr(None if duration_s is None else float(duration_s))]
    parts += taken_from(channel, stream)
    return hashlib.sha256("\x00".join(parts).encode(errors="surrogateescape")).hexdigest()[:20]


def taken_from(channel: str, stream: int | None) -> list[str]:
    """What ids and keys say of a channel or stream: nothing where none is chosen, so that they stay as they were."""
    return [] if (channel, stream) == (MIX, None) else [f"channel={channel}", f"stream={stream}"]


class AudioInfo(NamedTuple):
    """What a container states about its audio stream.

    Attributes:
        duration_s: Length in seconds; None where only decoding tells.
        sample_rate: In Hz, as stored.
        channels: As stored.
        codec: For example `flac`, `pcm_16`, `mp3`, `aac`.
        decoder: The library that reads it: `soundfile` or `pyav`.
    """

    duration_s: float | None
    sample_rate: int
    channels: int
    codec: str
    decoder: str


class Segment(NamedTuple):
    """A contiguous part of a recording, given to the model as one sample.

    Attributes:
        recording: Where it comes from.
        info: The container's statement; `duration_s` is what decoding found once the end has been reached.
        segment_index: 0, 1, 2, ... along the recording.
        start_s: First sample's time in seconds from the start of the object.
        end_s: End of the last sample, exclusive.
        is_last: Whether the recording ends with this segment.
        sample_rate: Of `samples`, in Hz: the model's.
        samples: float32 mono PCM, shape (n,); full scale is 1.0, which float files may exceed.
        levels: Of `samples`, as `audio.levels.measure` gives them.
        cut_at: Where its recording is cut if it is long: `cap`, or `silence:15.0` with the tolerance in seconds.
    """

    recording: Recording
    info: AudioInfo
    segment_index: int
    start_s: float
    end_s: float
    is_last: bool
    sample_rate: int
    samples: npt.NDArray[np.float32]
    levels: Levels
    cut_at: str = "cap"

    @property
    def audio_s(self) -> float:
        """Length of `samples` in seconds."""
        return len(self.samples) / self.sample_rate

    def __repr__(self) -> str:
        where = f"{self.start_s:.2f}-{self.end_s:.2f} s"
        return f"Segment({self.recording.uri!r}, {self.segment_index}, {where}, samples={self.samples.shape})"


class RecordingRow(NamedTuple):
    """One row of `recordings/`: how a recording ended in a run, and how much of it was covered.

    Attributes:
        source_key: Of the audio, as `source_key` gives it.
        duration_s: Of the object, in seconds; None when it was never learnt.
        covered_s: Seconds for which every task has an answer.
        answers: Rows that this run wrote; `kept_answers` more are of earlier runs.
        answer_keys: Of all its answers, whichever run wrote them: with this row, they are the latest results.
        dead_letters: Rows that this run wrote; `kept_dead_letters` more are of earlier runs.
        dead_letter_keys: Of all its dead letters, as `answer_keys`.
        reasons: Of the recording's dead letters, sorted, without repeats.
        work_key: As of `Recording`.
        peak_dbfs: This and the next three as `Levels`, over the audio with answers; None where there are none.
        mtime: Of the object, ISO 8601 in UTC; a timestamp in Parquet.
        metadata: JSON text, as of `Recording`.
        created_at: Microseconds since 1970-01-01 UTC, as Arrow's timestamp stores it.
    """

    recording_id: str
    uri: str
    source_key: str
    terminal_state: TerminalState
    duration_s: float | None
    covered_s: float
    answers: int
    kept_answers: int
    answer_keys: tuple[str, ...]
    dead_letters: int
    kept_dead_letters: int
    dead_letter_keys: tuple[str, ...]
    reasons: tuple[str, ...]
    work_key: str | None
    peak_dbfs: float | None
    rms_dbfs: float | None
    clipped_share: float | None
    silent: bool | None
    size_bytes: int | None
    etag: str | None
    mtime: str | None
    offset_s: float
    channel: str
    stream: int | None
    metadata: str
    run_id: str
    created_at: int

    @property
    def content_identity(self) -> str:
        """As of `Recording`."""
        return content_identity(self.etag, self.size_bytes, self.mtime)


RECORDING_SCHEMA = pa.schema(
    [
        pa.field("recording_id", pa.string(), nullable=False),
        pa.field("uri", pa.string(), nullable=False),
        ("source_key", pa.string()),
        pa.field("terminal_state", pa.string(), nullable=False),
        ("duration_s", pa.float64()),
        pa.field("covered_s", pa.float64(), nullable=False),
        pa.field("answers", pa.int32(), nullable=False),
        pa.field("kept_answers", pa.int32(), nullable=False),
        ("answer_keys", pa.list_(pa.string())),
        pa.field("dead_letters", pa.int32(), nullable=False),
        pa.field("kept_dead_letters", pa.int32(), nullable=False),
        ("dead_letter_keys", pa.list_(pa.string())),
        ("reasons", pa.list_(pa.string())),
        ("work_key", pa.string()),
        ("peak_dbfs", pa.float64()),
        ("rms_dbfs", pa.float64()),
        ("clipped_share", pa.float64()),
        ("silent", pa.bool_()),
        ("size_bytes", pa.int64()),
        ("etag", pa.string()),
        ("mtime", pa.timestamp("us", tz="UTC")),
        pa.field("offset_s", pa.float64(), nullable=False),
        pa.field("channel", pa.string(), nullable=False),
        ("stream", pa.int32()),
        ("metadata", pa.string()),
        pa.field("run_id", pa.string(), nullable=False),
        pa.field("created_at", pa.timestamp("us", tz="UTC"), nullable=False),
    ]
)
