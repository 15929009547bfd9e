"""Every row type, once: what flows between the stages, and the Arrow schema of what lands."""

from af3pipe.schemas.answer import (
    ANSWER_SCHEMA,
    Answer,
    Decoding,
    Reply,
    Request,
    Task,
    TimedText,
    answer_key,
)
from af3pipe.schemas.dead_letter import DEAD_LETTER_SCHEMA, DeadLetter, Reason, Rejected, Stage, dead_letter_key
from af3pipe.schemas.recording import (
    MIX,
    RECORDING_SCHEMA,
    AudioInfo,
    Question,
    Recording,
    RecordingResult,
    Segment,
    TerminalState,
    channel_text,
    make_recording_id,
    stream_index,
)

__all__ = [
    "ANSWER_SCHEMA",
    "DEAD_LETTER_SCHEMA",
    "MIX",
    "RECORDING_SCHEMA",
    "Answer",
    "AudioInfo",
    "DeadLetter",
    "Decoding",
    "Question",
    "Reason",
    "Recording",
    "RecordingResult",
    "Rejected",
    "Reply",
    "Request",
    "Segment",
    "Stage",
    "Task",
    "TerminalState",
    "TimedText",
    "answer_key",
    "channel_text",
    "dead_letter_key",
    "make_recording_id",
    "stream_index",
]
