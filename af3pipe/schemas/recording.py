"""Defines recordings, what audio headers state, and segments of PCM."""

import functools
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
    """How a recording ended. Every matched recording ends in exactly one of these states."""

    OK = "ok"
    OK_PARTIAL = "ok_partial"
    SKIPPED_DONE = "skipped_done"
    DEAD_LETTER = "dead_letter"


ROUNDING_S = 0.02005
"""A remainder too short for one audio token (20 ms) is not processed; a gap shorter than this does not count."""

MIX = "mix"
"""The mean over all channels: the default unless one channel is requested."""


def channel_text(value: Any) -> str:
    """Normalises a channel: `mix`, `left`, `right`, or an index from 0 as text (from `"1"`, `1`, `1.0`).

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
            "name selects the channel: rename one that means something else)"
        )
    return str(index)


def stream_index(value: Any) -> int | None:
    """Normalises an audio stream: an index from 0, or None for the file's main one.

    Raises:
        ValueError: It is neither.
    """
    index = _index(value)
    if index is None and value is not None:
        raise ValueError(
            f"stream is {value!r}; it must be a number from 0, which counts the audio streams (a manifest's column "
            "of this name selects the stream: rename one that means something else)"
        )
    return index


def _index(value: Any) -> int | None:
    """Reads an index, also from text, as in manifests, or as 1.0, which pandas makes of a 1 in a column with gaps."""
    digits = str(value).strip().removesuffix(".0")
    is_index = not isinstance(value, bool) and digits.isascii() and digits.isdecimal() and len(digits) < 10
    return int(digits) if is_index else None


def content_identity(etag: str | None, size_bytes: int | None, mtime: str | None) -> str:
    """Returns text that changes with the content: the store's etag, else size and modification time."""
    return etag or f"{size_bytes}:{mtime}"


class Question(NamedTuple):
    """A question about one recording, as a manifest row states it. Without an id, its text identifies it.

    Attributes:
        question_id: Identifies the question across runs.
        text: The question in words.
        choices: Allowed answers; empty for free text.
        prompt: Given to the model verbatim, instead of a prompt built from text and choices.
        after: Id of the earlier question of the same recording that this one follows up.
    """

    question_id: str | None
    text: str
    choices: tuple[str, ...] = ()
    prompt: str | None = None
    after: str | None = None


class Levels(NamedTuple):
    """Loudness of a piece of audio as the model receives it: mixed to mono, at its sampling rate, never normalised.

    dBFS are decibels relative to a sample of 1.0: a square wave of full scale has an RMS of 0, a sine one of -3.

    Attributes:
        peak_dbfs: Level of the largest sample; at least -120, as for digital silence; above 0 for float files beyond
            full scale, which are passed on unchanged.
        rms_dbfs: RMS level of all samples; at least -120.
        clipped_share: Share of the samples, 0 to 1, at or beyond full scale (32767/32768, the most that 16-bit PCM
            holds). Mixing and resampling move samples off that mark, so it is lower than in the file.
        silent: Whether the peak is at or below the job's threshold, by default -60 dBFS.
    """

    peak_dbfs: float
    rms_dbfs: float
    clipped_share: float
    silent: bool


class Covered(NamedTuple):
    """The part of a recording that an answer covers: what reconciling and resuming need of the answer.

    Attributes:
        answer_key: Key of the answer's row.
        task: See `task_key`.
        pieces: (start_s, end_s) of each part that it covers.
        duration_s: Duration of the whole object, if known with this answer.
        levels: Levels of the parts together.
        content_identity: `Recording.content_identity` of the recording; empty if not needed.
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
        dead_letters: (dead_letter_key, run_id) of each dead letter of this recording.
    """

    answers: tuple[Covered, ...] = ()
    dead_letters: tuple[tuple[str, str], ...] = ()


NO_METADATA = "{}"


def to_metadata(columns: Mapping[str, Any]) -> str:
    """Encodes columns for the `metadata` column: a JSON object, keys sorted, numbers as numbers, dates as text."""
    return json.dumps(_jsonable(columns), sort_keys=True, ensure_ascii=False, default=str) if columns else NO_METADATA


def _jsonable(value: Any) -> Any:
    """Converts a value for JSON, which has no NaN and no infinity, and whose keys are text."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(key): _jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_jsonable(item) for item in value]
    return value


class Recording(NamedTuple):
    """An input: an audio object, or a time range of it, with everything known before it is opened.

    Attributes:
        recording_id: Stable id of the recording, with one terminal state: the manifest's id, else its `source_key`.
        uri: Any URL that fsspec opens, or a local path.
        size_bytes: Size of the object; None if the listing does not state it.
        etag: The store's content tag; None if it has none (local files).
        mtime: Modification time of the object, ISO 8601 UTC; None if the listing does not state it.
        offset_s: Start of the range, in seconds from the start of the object.
        duration_s: Length of the range, in seconds; None for all that follows.
        channel: `mix`, the mean over all; `left`, `right`, or an index from 0 as text. See `channel_text`.
        stream: Index among the audio streams of the object; None for its main one.
        questions: Questions about this recording, in addition to the job's tasks.
        metadata: Further manifest columns, passed through to the output: a JSON object as text, see `to_metadata`.
        work_key: Key over all requests of it, see `af3pipe.schemas.work_key`; None if the run does not resume.
        existing: Rows of earlier runs about the same audio, if the run resumes.
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
        """Identifies the audio itself, whatever the recording's id. See `source_key`."""
        return source_key(self.uri, self.offset_s, self.duration_s, channel=self.channel, stream=self.stream)

    def wanted_until_s(self, duration_s: float | None) -> float:
        """Returns the end of the requested range, in seconds; its start if the object's duration is unknown."""
        available_s = max(self.offset_s, duration_s or 0.0)
        return available_s if self.duration_s is None else min(available_s, self.offset_s + self.duration_s)

    @property
    def content_identity(self) -> str:
        """Text that changes with the content: the store's etag, else size and modification time."""
        return content_identity(self.etag, self.size_bytes, self.mtime)


@functools.lru_cache(maxsize=4096)  # a recording's is needed in several steps
def source_key(
    uri: str,
    offset_s: float = 0.0,
    duration_s: float | None = None,
    *,
    channel: str = MIX,
    stream: int | None = None,
) -> str:
    """Returns an id of a piece of audio: 20 hex digits over its canonical URI, time range, channel and stream.

    It is the `recording_id` of manifest rows without an id.
    """
    parts = [uri, repr(float(offset_s) + 0.0), repr(None if duration_s is None else float(duration_s))]
    parts += taken_from(channel, stream)
    return hashlib.sha256("\x00".join(parts).encode(errors="surrogateescape")).hexdigest()[:20]


def taken_from(channel: str, stream: int | None) -> list[str]:
    """Returns channel and stream as part of ids and keys: empty if none is chosen, so that old keys stay valid."""
    return [] if (channel, stream) == (MIX, None) else [f"channel={channel}", f"stream={stream}"]


class AudioInfo(NamedTuple):
    """What a container's header states about its audio stream.

    Attributes:
        duration_s: Duration in seconds; None if only decoding can find it.
        sample_rate: Sampling rate in Hz, as stored.
        channels: Number of channels, as stored.
        codec: For example `flac`, `pcm_16`, `mp3`, `aac`.
        decoder: The library that reads it: `soundfile` or `pyav`.
    """

    duration_s: float | None
    sample_rate: int
    channels: int
    codec: str
    decoder: str


class Segment(NamedTuple):
    """A contiguous part of a recording, given to the model as one audio.

    Attributes:
        recording: The recording that it is part of.
        info: What the header states; once decoding has reached the end, `duration_s` is the duration it found.
        segment_index: 0, 1, 2, ... along the recording.
        start_s: Time of the first sample, in seconds from the start of the object.
        end_s: End of the last sample, exclusive.
        is_last: Whether the recording ends with this segment.
        sample_rate: Sampling rate of `samples`, in Hz: the model's.
        samples: float32 mono PCM, shape (n,); full scale is 1.0, which float files may exceed.
        levels: Levels of `samples`, from `audio.levels.measure`.
        cut_at: Where long recordings are cut: `cap`, or `silence:15.0` with the tolerance in seconds.
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
        """Duration of `samples`, in seconds."""
        return len(self.samples) / self.sample_rate

    def __repr__(self) -> str:
        where = f"{self.start_s:.2f}-{self.end_s:.2f} s"
        return f"Segment({self.recording.uri!r}, {self.segment_index}, {where}, samples={self.samples.shape})"


class RecordingRow(NamedTuple):
    """A row of `recordings/`: how a recording ended in a run, and how much of it the answers cover.

    Attributes:
        source_key: Id of the audio, see `source_key`.
        duration_s: Duration of the object, in seconds; None if unknown.
        covered_s: Seconds for which every task has an answer.
        answers: Number of answers that this run wrote; `kept_answers` more are from earlier runs.
        answer_keys: Keys of all its answers, whichever run wrote them: with this row, they are the latest results.
        dead_letters: Number of dead letters that this run wrote; `kept_dead_letters` more are from earlier runs.
        dead_letter_keys: Keys of all its dead letters, like `answer_keys`.
        reasons: Reasons of the recording's dead letters, sorted, without repeats.
        work_key: See `Recording`.
        peak_dbfs: This and the next three are the `Levels` of the audio with answers; None if there is none.
        mtime: Modification time of the object, ISO 8601 in UTC; a timestamp in Parquet.
        metadata: JSON text, see `Recording`.
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
        """See `Recording.content_identity`."""
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
