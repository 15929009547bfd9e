"""Defines dead letters: stages, reasons, their row, and `Rejected`, raised for inputs that cannot be processed."""

import hashlib
from enum import Enum
from typing import NamedTuple

import pyarrow as pa


class Stage(str, Enum):
    """The stage at which the processing of a recording failed."""

    LIST = "list"
    READ = "read"
    PROBE = "probe"
    DECODE = "decode"
    WINDOW = "window"
    GENERATE = "generate"
    PARSE = "parse"
    WRITE = "write"


class Reason(str, Enum):
    """Why a recording could not be processed. docs/dead-letters.md says what to do for each reason."""

    NOT_FOUND = "not_found"
    PERMISSION_DENIED = "permission_denied"
    NOT_ALLOWED = "not_allowed"
    ARCHIVED = "archived"
    CHANGED = "changed"
    UNREADABLE = "unreadable"
    EMPTY_FILE = "empty_file"
    UNSUPPORTED_FORMAT = "unsupported_format"
    NO_AUDIO_STREAM = "no_audio_stream"
    DECODE_ERROR = "decode_error"
    DECODE_SHORT = "decode_short"
    DECODE_TIMEOUT = "decode_timeout"
    DECODER_CRASHED = "decoder_crashed"
    TOO_SHORT = "too_short"
    TOO_LONG = "too_long"
    SILENT = "silent"
    OUT_OF_MEMORY = "out_of_memory"
    ENGINE_ERROR = "engine_error"
    GENERATE_TIMEOUT = "generate_timeout"
    OUTPUT_INVALID = "output_invalid"

    @property
    def retryable(self) -> bool:
        """Whether every later run retries: true for failures of the environment, not of the input itself."""
        return self in _RETRYABLE


_RETRYABLE = frozenset(
    {
        # Failures of the environment: access may be granted, the object restored or uploaded, or the network recover.
        Reason.NOT_FOUND,
        Reason.PERMISSION_DENIED,
        Reason.ARCHIVED,
        Reason.CHANGED,
        Reason.UNREADABLE,
        # What this machine did.
        Reason.DECODE_TIMEOUT,
        Reason.DECODER_CRASHED,
        Reason.OUT_OF_MEMORY,
        Reason.ENGINE_ERROR,
        Reason.GENERATE_TIMEOUT,
    }
)


class Rejected(Exception):
    """An input that cannot be processed, and why. It becomes a dead letter and never ends the job.

    Raised by storage, audio and models; caught in `transforms/outcome.py` only.

    Attributes:
        stage: The stage that failed.
        reason: The class of failure, from a fixed list.
        detail: One sentence for the reader of the dead letter: what was wrong, with its numbers.
        decoder: The decoder, if one was in use.
        position_s: Position of the failure in the recording, in seconds, if known.
    """

    def __init__(
        self,
        stage: Stage,
        reason: Reason,
        detail: str,
        *,
        decoder: str | None = None,
        position_s: float | None = None,
    ) -> None:
        super().__init__(f"{stage.value}: {reason.value}: {detail}")
        self.stage = stage
        self.reason = reason
        self.detail = detail
        self.decoder = decoder
        self.position_s = position_s

    def __reduce__(self) -> tuple[object, ...]:
        # Exception pickles its args, which here are one formatted string; the fields cross processes instead.
        return _rebuild, (self.stage, self.reason, self.detail, self.decoder, self.position_s)


def _rebuild(stage: Stage, reason: Reason, detail: str, decoder: str | None, position_s: float | None) -> Rejected:
    return Rejected(stage, reason, detail, decoder=decoder, position_s=position_s)


class DeadLetter(NamedTuple):
    """A row of `dead_letters/`: a recording, or one of its requests, that could not be processed.

    Attributes:
        detail: One sentence: what was wrong.
        retryable: Whether every later run retries; see `Reason.retryable`.
        position_s: Position of the failure in the recording, in seconds.
        attempts: Number of attempts in this run.
        traceback: Traceback of an unexpected exception; None for rejected input.
        input: JSON with everything that a redrive needs: the recording, and the segment and tasks if known.
        dead_letter_key: See `dead_letter_key`.
        run_id: Id of the run that wrote it; empty before it is written.
        created_at: Microseconds since 1970-01-01 UTC.
        metadata: Of the recording, as JSON text.
    """

    recording_id: str
    uri: str
    stage: Stage
    reason: Reason
    detail: str
    retryable: bool
    size_bytes: int | None
    decoder: str | None
    position_s: float | None
    attempts: int
    traceback: str | None
    input: str
    dead_letter_key: str
    run_id: str
    created_at: int
    metadata: str = "{}"


def dead_letter_key(recording_id: str, stage: Stage, reason: Reason, input_json: str) -> str:
    """Returns a dead letter's key: equal for the same failure of the same input, however often it occurs."""
    text = "\x00".join((recording_id, stage.value, reason.value, input_json))
    return hashlib.sha256(text.encode()).hexdigest()


DEAD_LETTER_SCHEMA = pa.schema(
    [
        pa.field("recording_id", pa.string(), nullable=False),
        pa.field("uri", pa.string(), nullable=False),
        pa.field("stage", pa.string(), nullable=False),
        pa.field("reason", pa.string(), nullable=False),
        pa.field("detail", pa.string(), nullable=False),
        pa.field("retryable", pa.bool_(), nullable=False),
        ("size_bytes", pa.int64()),
        ("decoder", pa.string()),
        ("position_s", pa.float64()),
        pa.field("attempts", pa.int32(), nullable=False),
        ("traceback", pa.string()),
        pa.field("input", pa.string(), nullable=False),
        pa.field("dead_letter_key", pa.string(), nullable=False),
        pa.field("run_id", pa.string(), nullable=False),
        pa.field("created_at", pa.timestamp("us", tz="UTC"), nullable=False),
        ("metadata", pa.string()),
    ]
)
